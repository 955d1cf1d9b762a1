"""The loader over ranks, workers, accumulation splits, world sizes, kills and checkpoints.

Every test reads documents that spell their own number, so that what came out can be named.
"""

import json
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import forked
from helpers.processes import FOR_HELPERS

from lowline.errors import LowlineError
from lowline.train.data import (
    IGNORE_INDEX,
    LaneDataLoader,
    ListSource,
    SourceConfig,
    check_saved_lanes,
    open_source,
)
from lowline.train.data.loader import _LaneRows
from lowline.train.data.order import Order
from lowline.train.model.step_folder import stored

SEQ_LEN = 8
LANES = 8
STEPS = 6


class Digits:
    """One token a decimal digit; EOS 10."""

    eos_id, bos_id = 10, None

    def encode(self, text, *, add_bos=False, add_eos=False):
        return [int(c) for c in text] + [10] * add_eos


def texts(count, first=0):
    """Document i repeats its number 1 to 7 times, zero-padded; every eleventh is empty."""
    return [
        "" if i % 11 == 10 else f"{i:04d}" * (1 + i * 5 % 7) for i in range(first, first + count)
    ]


@pytest.fixture(params=["indexed", "one shard", "three shards", "twenty shards"])
def source(request, tmp_path):
    """97 documents, in memory or streamed: fewer shards than lanes, and more."""
    if request.param == "indexed":
        return ListSource(texts(97))
    shards = {"one shard": 1, "three shards": 3, "twenty shards": 20}[request.param]
    for shard in range(shards):
        lines = [json.dumps({"text": text}) for text in texts(97)[shard::shards]]
        (tmp_path / f"{shard:02d}.jsonl").write_text("\n".join(lines) + "\n")
    path = str(tmp_path / "*.jsonl")
    return open_source(SourceConfig(dataset="files", path=path, streaming=True))


def build(source, *, world=1, rank=0, local=None, workers=0, lanes=LANES, **config):
    config = LaneDataLoader.Config(global_batch_size=lanes, num_workers=workers, **config)
    return config.build(
        dp_world_size=world,
        dp_rank=rank,
        tokenizer=Digits(),
        seq_len=SEQ_LEN,
        local_batch_size=local or lanes // world,
        snapshot_every_n_steps=None,
        documents=source,
    )


def take(loader, steps, local=None, world=1):
    """`steps` global steps of one rank: [steps, 3, lanes of the rank, T]."""
    splits = LANES // world // (local or LANES // world)
    batches = islice(iter(loader), steps * splits)
    rows = [torch.stack([x["input"], y, x["positions"]]) for x, y in batches]
    return torch.stack(
        [torch.cat(rows[i : i + splits], dim=1) for i in range(0, len(rows), splits)]
    )


def merged(loaders):
    state = {}
    for loader in loaders:
        state.update(loader.state_dict())
    return state


def global_steps(source, steps, *, world, state=None, **options):
    """The global batches of a whole world, and its loaders."""
    loaders = [build(source, world=world, rank=rank, **options) for rank in range(world)]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    local = options.get("local")
    return torch.cat([take(loader, steps, local, world) for loader in loaders], dim=2), loaders


def documents_of(rows):
    """The documents, as text, in [steps, 3, lanes, T] of rows, read lane by lane."""
    found = []
    for lane in range(rows.shape[2]):
        tokens = rows[:, 0, lane].flatten().tolist()
        for text in "".join("." if t == 10 else str(t) for t in tokens).split("."):
            found += [text] if text else []
    return sorted(found)


# --- the same data for every layout --------------------------------------------------------------


def test_the_global_batch_does_not_depend_on_world_or_accumulation(source):
    expected, _ = global_steps(source, STEPS, world=1)
    assert expected.shape == (STEPS, 3, LANES, SEQ_LEN)
    for world, local in [(1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)]:
        rows, _ = global_steps(source, STEPS, world=world, local=local)
        assert torch.equal(rows, expected), (world, local)


@pytest.mark.parametrize("workers", [1, 2, 3])  # 3 do not divide a rank's 4 lanes: it takes 2
def test_workers_change_nothing(source, workers):
    expected, loaders = global_steps(source, STEPS, world=2, local=2)
    rows, with_workers = global_steps(source, STEPS, world=2, local=2, workers=workers)
    assert torch.equal(rows, expected)
    assert_same_state(merged(with_workers), merged(loaders))


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_finite_epochs_give_every_document_exactly_so_often(source, world, workers):
    epochs = 1 + (world == 2)
    loaders = [
        build(source, world=world, rank=rank, workers=workers, epochs=epochs)
        for rank in range(world)
    ]
    shares = []
    for loader in loaders:
        rows = []
        for inputs, labels in loader:
            rows.append(torch.stack([inputs["input"], labels, inputs["positions"]]))
            if loader.exhausted:
                break
        assert (rows[-1][1] == IGNORE_INDEX).all() and (rows[-1][2] == 0).all()
        assert any((row[1] != IGNORE_INDEX).any() for row in rows[-2:-1])
        shares.append(documents_of(torch.stack(rows)))
    expected = sorted([text for text in source.documents() if text] * epochs)
    assert sorted(text for share in shares for text in share) == expected


def test_an_endless_run_has_every_document_once_an_epoch():
    source = ListSource(texts(97))
    rows, _ = global_steps(source, 300, world=2)
    found = documents_of(rows)
    counts = {text: found.count(text) for text in texts(97) if text}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert min(counts.values()) >= 5


def test_shuffling_follows_seed_and_epoch(source):
    def rows(**options):
        return global_steps(source, 3, world=1, **options)[0]

    assert torch.equal(rows(), rows())
    plain = rows(shuffle=False)
    if getattr(source, "num_shards", 9) > 1:  # the order of one shard's documents is the file's
        assert not torch.equal(rows(seed=1), rows(seed=2))
        assert not torch.equal(rows(), plain)
    else:
        assert torch.equal(rows(seed=1), plain)
    first = next(text for text in source.documents() if text)
    assert "".join(map(str, plain[0, 0, 0].tolist())).startswith(first[:4])


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 3, 11])
@pytest.mark.parametrize("worlds", [(1, 1), (1, 4), (4, 2), (2, 8)])
def test_resuming_in_another_world_neither_repeats_nor_skips(source, stop, worlds):
    before, after = worlds
    expected, straight = global_steps(source, stop + STEPS, world=1)
    rows, loaders = global_steps(source, stop, world=before) if stop else (expected[:0], None)
    loaders = loaders or [build(source, world=before, rank=r) for r in range(before)]
    rest, resumed = global_steps(source, STEPS, world=after, state=merged(loaders), local=1)
    assert torch.equal(torch.cat([rows, rest]), expected)
    assert_same_state(merged(resumed), merged(straight))


def test_a_finite_run_resumes_to_its_end(source):
    expected, _ = global_steps(source, 60, world=1, epochs=1)
    for stop in (20, 50):
        _, loaders = global_steps(source, stop, world=2, epochs=1)
        rest, _ = global_steps(source, 60 - stop, world=4, state=merged(loaders), epochs=1)
        assert torch.equal(rest, expected[stop:])


def test_a_step_is_atomic(source):
    loader = build(source, local=2)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    whole = loader.state_dict()
    for _ in range(3):  # three quarters of the second step
        next(batches)
    assert_same_state(loader.state_dict(), whole)
    next(batches)
    assert any(not torch.equal(a, whole[key]) for key, a in loader.state_dict().items())


def test_iterating_again_goes_on(source):
    expected, _ = global_steps(source, 5, world=1)
    loader = build(source)
    assert torch.equal(torch.cat([take(loader, 2), take(loader, 3)]), expected)


def test_rows_fetched_ahead_are_not_lost(source):
    expected, _ = global_steps(source, 8, world=1)
    loader = build(source, workers=2, prefetch=3)
    batches = iter(loader)
    rows = [next(batches)[0]["input"] for _ in range(2)]
    state = loader.state_dict()  # the workers are steps ahead, and go down with their rows
    del batches
    resumed = build(source, workers=1)
    resumed.load_state_dict(state)
    rows += [x["input"] for x, _ in islice(iter(resumed), 6)]
    assert torch.equal(torch.stack(rows), expected[:, 0])


@pytest.mark.parametrize("workers", [0, 1])
def test_opening_the_data_leaves_the_models_random_numbers_alone(workers):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    take(build(ListSource(texts(97)), workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_can_be_started_afresh(source):
    """Where processes are not forked, what a worker needs is pickled."""
    rows = _LaneRows(source, Order(lanes=2), Digits(), SEQ_LEN, {0: (0, 0, 0), 1: (0, 0, 0)})
    copy = pickle.loads(pickle.dumps(rows))
    for (a, a_states, _), (b, b_states, _) in islice(zip(rows, copy, strict=True), 4):
        assert torch.equal(a, b) and torch.equal(a_states, b_states)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_has_one_message_also_from_a_worker(tmp_path, workers):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "1"}\n' * 9 + "{\n")
    config = SourceConfig(dataset="files", path=str(path), streaming=True)
    loader = build(open_source(config), workers=workers)
    with pytest.raises(LowlineError) as info:
        take(loader, 9)
    assert str(info.value).startswith(f"cannot read {path} as json: line 10 is not JSON")


# --- checkpoints ---------------------------------------------------------------------------------


def save_world(directory, loaders):
    state = merged(loaders)
    dcp.save({"dataloader": state}, checkpoint_id=directory, no_dist=True)


def test_a_checkpoint_round_trip_into_another_world(source, tmp_path):
    expected, _ = global_steps(source, 3 + STEPS, world=1)
    _, loaders = global_steps(source, 3, world=4)
    save_world(tmp_path / "ckpt", loaders)
    resumed = [build(source, world=2, rank=rank) for rank in range(2)]
    for loader in resumed:
        dcp.load({"dataloader": loader}, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    rows = torch.cat([take(loader, STEPS, world=2) for loader in resumed], dim=2)
    assert torch.equal(rows, expected[3:])


@pytest.mark.parametrize("lanes", [4, 16])
def test_another_global_batch_is_refused_by_name(tmp_path, lanes):
    source = ListSource(texts(97))
    _, loaders = global_steps(source, 2, world=2)
    save_world(tmp_path / "ckpt", loaders)
    message = f"batch of 8 sequences, this run has {lanes}.*training.global_batch_size = 8"
    with pytest.raises(ValueError, match=message):
        build(source, lanes=lanes).load_state_dict(merged(loaders))
    with pytest.raises(ValueError, match=message):
        check_saved_lanes(stored(tmp_path / "ckpt"), lanes)
    check_saved_lanes(stored(tmp_path / "ckpt"), 8)
    dcp.save({"other": torch.zeros(1)}, checkpoint_id=tmp_path / "none", no_dist=True)
    check_saved_lanes(stored(tmp_path / "none"), 8)


def test_other_data_is_refused(tmp_path):
    state = build(ListSource(texts(97))).state_dict()
    for other in (
        build(ListSource(texts(96))),
        build(ListSource(texts(97)), seed=1),
        build(ListSource(texts(97)), shuffle=False),
    ):
        with pytest.raises(ValueError, match="another order of documents"):
            other.load_state_dict(state)
    build(ListSource(texts(97)), epochs=3).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks \\['lane_00001'\\]"):
        build(ListSource(texts(97))).load_state_dict(
            {key: value for key, value in state.items() if key != "lane_00001"}
        )


def test_a_changed_document_in_progress_is_refused():
    source = ListSource(["0123456789" * 5])
    _, (loader,) = global_steps(source, 1, world=1)
    assert loader.state_dict()["lane_00000"].tolist() == [0, 0, 8]
    shorter = build(ListSource(["01234"]))
    shorter.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"stopped at token 8 of document \(0, 0\)"):
        take(shorter, 1)


def test_an_empty_state_means_the_start():
    loader = build(ListSource(texts(97)))
    loader.load_state_dict({})
    assert all(loader.state_dict()[f"lane_{lane:05d}"].tolist() == [0, 0, 0] for lane in range(8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"world": 3, "local": 1}, "global_batch_size = 8 is not a multiple .* 3 x 1 = 3"),
        ({"world": 2, "local": 3}, "2 x 3 = 6: change one"),
        ({"workers": -1}, "num_workers = -1"),
        ({"prefetch": 0}, "prefetch = 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"dataset": "c4"}, "name the data in `source`"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(ListSource(texts(9)), **options)


# --- real processes ------------------------------------------------------------------------------

TRAIN = """
import json, os, signal, sys
from itertools import islice
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from helpers.ranks import fork_ranks
from lowline.train.data import LaneDataLoader, SourceConfig

class Letters:
    eos_id, bos_id = 0, None

    def encode(self, text, *, add_bos, add_eos):
        return [ord(c) for c in text]

def main(*words):
    root, streaming, steps, die_at = words[0], words[1] == "1", *map(int, words[2:])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    source = SourceConfig(dataset="files", path=f"{root}/data/*.jsonl", streaming=streaming)
    loader = LaneDataLoader.Config(source=source, global_batch_size=4, num_workers=1).build(
        dp_world_size=world, dp_rank=rank, tokenizer=Letters(), seq_len=32,
        local_batch_size=2)
    done = 0
    if os.path.exists(f"{root}/ckpt/.metadata"):
        progress = {"step": torch.tensor(0)}
        dcp.load({"dataloader": loader, "train": progress}, checkpoint_id=f"{root}/ckpt")
        done = int(progress["step"])
    batches = iter(loader)
    for step in range(done, steps):
        rows = []
        for _ in range(4 // world // 2):
            inputs, labels = next(batches)
            rows += torch.stack([inputs["input"], labels, inputs["positions"]], dim=1).tolist()
        everyone = [None] * world
        dist.all_gather_object(everyone, rows)
        if rank == 0:
            with open(f"{root}/log", "a") as log:
                log.write(json.dumps([step, sum(everyone, [])]) + "\\n")
        if step == die_at:
            dist.barrier()  # the log has the step
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 2 == 1:
            progress = {"step": torch.tensor(step + 1)}
            dcp.save({"dataloader": loader, "train": progress}, checkpoint_id=f"{root}/ckpt")
    dist.destroy_process_group()

fork_ranks(main, *sys.argv[2:], processes=int(sys.argv[1]))
"""


def launch(root, world, streaming, steps, die_at=-1):
    script = root / "train.py"
    script.write_text(TRAIN)
    words = map(str, (world, root, int(streaming), steps, die_at))
    return forked.run([str(script), *words], env=FOR_HELPERS)


def logged(root):
    """Step -> rows; a step done twice must have been the same."""
    steps: dict[int, list] = {}
    for line in Path(root, "log").read_text().splitlines():
        step, rows = json.loads(line)
        assert steps.setdefault(step, rows) == rows
    return steps


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_ranks_resume_in_another_world(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    for shard in range(3):
        lines = [
            json.dumps({"text": f"Shard {shard} says {i} times: " + "word " * (i % 23)})
            for i in range(40)
        ]
        (tmp_path / "data" / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    killed = launch(tmp_path, 2, streaming, 8, die_at=4)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert sorted(logged(tmp_path)) == [0, 1, 2, 3, 4]
    resumed = launch(tmp_path, 1, streaming, 8)
    assert resumed.returncode == 0, resumed.stderr
    steps = logged(tmp_path)  # step 4 was done twice, with the same rows

    class Letters(Digits):
        eos_id = 0

        def encode(self, text, *, add_bos=False, add_eos=False):
            return [ord(c) for c in text]

    path = str(tmp_path / "data" / "*.jsonl")
    source = SourceConfig(dataset="files", path=path, streaming=streaming)
    straight = LaneDataLoader.Config(source=source, global_batch_size=4).build(
        dp_world_size=1, dp_rank=0, tokenizer=Letters(), seq_len=32, local_batch_size=4
    )
    for step, (inputs, labels) in enumerate(islice(iter(straight), 8)):
        rows = torch.stack([inputs["input"], labels, inputs["positions"]], dim=1)
        assert rows.tolist() == steps[step]
