"""The training command: what it learns, records and keeps, and what must not change its losses."""

from __future__ import annotations

import json
import os
import pty
import re
from pathlib import Path

import pytest
import torch
from helpers import forked, training
from helpers.forked import Forked
from helpers.processes import TESTS

from lowline.train.config.folder import saved_steps
from lowline.train.config.load import load_config
from lowline.train.engine.metrics import read_metrics, tag_of

RANKS = (str(TESTS / "workers" / "ranks_of_train.py"), "2")


@pytest.fixture(scope="module")
def cola(tmp_path_factory):
    """A whole run, with effective ranks measured on the way."""
    output = tmp_path_factory.mktemp("cola") / "run"
    options = ("--metrics.rank_every=6", "--metrics.tensorboard=true", "--checkpoint.keep=2")
    assert training.train_here(output, *options) == 0
    return output


def test_it_learns_and_records_everything(cola):
    steps = [r for r in read_metrics(cola) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [r["tokens"] for r in steps] == [512 * step for step in range(1, 13)]
    for record in steps:
        assert record["perplexity"] == pytest.approx(torch.tensor(record["loss"]).exp().item())
        assert record["tokens_per_second"] == pytest.approx(512 / record["seconds_per_step"])
        # The peak that it is a part of is measured beside whatever else runs: 1.53 was seen.
        assert 0 < record["mfu"] < 3 and record["memory_gib"] > 0.1
    evaluated = {r["step"]: r for r in read_metrics(cola) if "eval_loss" in r}
    assert list(evaluated) == [6, 12] and evaluated[12]["eval_loss"] < evaluated[6]["eval_loss"]
    assert evaluated[12]["eval_tokens"] <= 1536


def test_tensorboard_holds_the_same(cola):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(cola / "tb")).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(cola):
        for name, value in record.items():
            if name != "step":
                expected.setdefault(tag_of(name), []).append((record["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected)
    names = {"train/loss", "train/perplexity", "train/tokens", "eval/loss", "eval/perplexity"}
    names |= {"optim/lr/AdamW", "optim/grad_norm", "speed/tokens_per_second", "speed/mfu"}
    assert names | {"speed/memory_gib", "speed/seconds_per_step"} < set(expected)
    assert {name for name in expected if "/" not in name} == set()
    for name, points in expected.items():
        written = [(e.step, e.value) for e in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    (shown,) = events.Tensors("config/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    assert text == "".join(f"    {x}\n" for x in (cola / "config.toml").read_text().splitlines())


def test_effective_ranks_are_recorded_on_their_schedule(cola):
    measured = {r["step"]: r for r in read_metrics(cola) if any("effective" in k for k in r)}
    assert list(measured) == [6, 12]
    ranks = {k: v for k, v in measured[12].items() if k.startswith("effective_rank/")}
    assert len(ranks) == 2 * 7 and all(1 <= rank <= 16 for rank in ranks.values())
    assert "effective_rank/layers.1.feed_forward.w2" in ranks


def test_only_whole_and_only_the_last_checkpoints_are_there(cola):
    folder = cola / "checkpoint"
    assert sorted(p.name for p in folder.iterdir()) == ["step-12", "step-8"]
    for step in saved_steps(folder):
        assert (folder / f"step-{step}" / ".metadata").is_file()
        assert load_config(folder / f"step-{step}" / "config.toml").output == str(cola)


def test_colam_and_a_run_without_measurement_have_the_same_losses(cola, tmp_path):
    assert training.train_here(tmp_path / "m", "--cola.memory=cola-m") == 0
    assert training.curve(tmp_path / "m") == training.curve(cola)


def test_the_saved_config_reproduces_the_run(cola, tmp_path):
    from lowline.train.__main__ import main

    saved = cola / "checkpoint" / "step-8" / "config.toml"
    with training.one_process():
        assert main(["--config", str(saved), f"--output={tmp_path / 'again'}"]) == 0
    assert training.curve(tmp_path / "again") == training.curve(cola)


def test_microbatches_do_not_change_the_losses(cola, tmp_path):
    assert training.train_here(tmp_path / "run", "--training.local_batch_size=2") == 0
    assert training.losses(tmp_path / "run") == pytest.approx(training.losses(cola), rel=1e-6)


def test_evaluation_does_not_depend_on_its_batch_size():
    from lowline.train.engine.group import single_process_defaults
    from lowline.train.engine.titan_compat import prepare

    with training.one_process():
        single_process_defaults()
        prepare()
        from lowline.train.engine.trainer import trainer_config

        run = load_config(training.TINY[1], ["--evaluation.max_tokens=3000", *training.TINY[2:]])
        trainer = trainer_config(run, 1).build()
        results = []
        try:
            for size in (1, 3, 8):
                trainer.validator.batch_size, trainer.validator.batches = size, None
                results.append(trainer.validator.loss(trainer.model_parts))
        finally:
            torch.distributed.destroy_process_group()
    assert len({tokens for _, tokens in results}) == 1
    assert [loss for loss, _ in results] == pytest.approx([results[0][0]] * 3, rel=1e-6)


def _documents(path: Path, count: int) -> list[str]:
    texts = [
        f"Document {i} of {count}: " + "words and more words, " * (i % 7) for i in range(count)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [
        *("--data.dataset=files", f"--data.path={path}", "--data.epochs=1"),
        *("--evaluation.data.split=validation", "--training.steps=1000"),
    ]


def _steps_of_an_epoch(output: Path) -> int:
    """Counted from the loader itself."""
    from lowline.train.data import LaneDataLoader
    from lowline.train.data.tokenizer import load_tokenizer

    run = load_config(output / "config.toml")
    loader = LaneDataLoader.Config(
        source=run.data, global_batch_size=8, seed=run.training.seed, epochs=1
    ).build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=load_tokenizer("embedded"),
        seq_len=64,
        local_batch_size=8,
    )
    for count, _ in enumerate(loader):
        if loader.exhausted:
            return count
    raise AssertionError("the loader ended")


def test_finite_data_ends_the_run(tmp_path):
    output = tmp_path / "run"
    options = [*_documents(tmp_path / "text.jsonl", 60), "--checkpoint.every=1000"]
    assert training.train_here(output, *options, "--evaluation.every=0") == 0
    last = _steps_of_an_epoch(output)
    assert 1 < last < 20
    assert [row[0] for row in training.curve(output)] == [*range(1, last + 1), last]
    assert saved_steps(output / "checkpoint") == [last]
    before = training.curve(output)
    assert training.train_here(output, *options, "--evaluation.every=0") == 0  # nothing is left
    assert training.curve(output) == before


def test_a_bar_on_a_terminal(tmp_path):
    """The command with its standard error on a terminal shows a bar below its lines."""
    ours, theirs = pty.openpty()
    line = training.command(tmp_path / "run", "--training.steps=3", "--evaluation.max_tokens=512")
    environment = {**training.ENVIRONMENT, "TERM": "xterm"}
    with open(os.devnull, "w") as nowhere:
        process = Forked(line[2:], env=environment, stdout=nowhere, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "━" in text and "3/3" in text and "tokens/s" in text
    assert "watch" not in text and "model    0.5" in text and "held-out loss" in text


@pytest.fixture(scope="module", params=["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def two_ranks(tmp_path_factory, request):
    """A run of two ranks: forks with what torchrun gives them, or the real thing."""
    output = tmp_path_factory.mktemp("two") / "run"
    if request.param == "forks":
        result = forked.run([*RANKS, *training.command(output)[4:]])
    else:
        result = training.launch(output, processes=2)
    assert result.returncode == 0, result.stderr
    return output, result.stderr


def test_two_ranks_have_the_losses_of_one(cola, two_ranks):
    assert training.losses(two_ranks[0]) == pytest.approx(training.losses(cola), rel=1e-6)


def test_the_command_says_what_matters_and_nothing_else(two_ranks):
    output, said = two_ranks
    ours = re.compile(
        r"\d\d:\d\d:\d\d  (model|step|devices|output|starting|step \d+/12"
        r"|step \d+  held-out|done|export) "
    )
    lines = [line for line in said.splitlines() if line.strip() and "OMP_NUM_THREADS" not in line]
    assert [line for line in lines if not ours.match(line)] == []
    assert "devices  2 x cpu: FSDP 2" in said and f"output   {output}" in said
    assert "step     512 tokens: 8 sequences of 64" in said


@pytest.mark.slow
def test_two_ranks_end_finite_data_together(tmp_path):
    options = [*_documents(tmp_path / "text.jsonl", 61), "--checkpoint.every=1000"]
    result = training.launch(tmp_path / "run", *options, processes=2)
    assert result.returncode == 0, result.stderr
    assert saved_steps(tmp_path / "run" / "checkpoint") == [_steps_of_an_epoch(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["pipeline_parallel", "tensor_parallel"])
def test_other_layouts_go_on_with_the_same_losses(cola, tmp_path, degree):
    """A pipeline's stages draw other first weights, so both layouts start from a checkpoint."""
    training.cut(cola, tmp_path / "run", 8)
    result = training.launch(tmp_path / "run", f"--parallelism.{degree}=2", processes=2)
    assert result.returncode == 0, result.stderr
    assert training.losses(tmp_path / "run") == pytest.approx(training.losses(cola), rel=2e-6)
