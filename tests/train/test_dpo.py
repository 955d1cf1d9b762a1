"""Preference optimization: pairs as rows, the loss by its formula in fp64, runs, refusals."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import training
from helpers.objectives import body_of, tiny_run
from helpers.pairs import CHATML, KEYS, pair, write

from lowline.errors import LowlineError
from lowline.train.config.run import EvaluationConfig
from lowline.train.data import LaneDataLoader, SourceConfig, evaluation_rows, open_source
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.metrics import read_metrics
from lowline.train.objectives.dpo import DpoObjective, DpoSection, Reference
from lowline.train.objectives.next_token import Batch

ROW = 192


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer("embedded")
    found.hf.chat_template = CHATML
    return found


def source(path: Path, **keys):
    return open_source(SourceConfig(dataset="files", path=str(path), **(keys or KEYS)))


# ---------------------------------------------------------------------------------------- the data


def decoded(rows, tokenizer) -> list[tuple[str, str]]:
    """Return the text of each document up to its answer, and the answer."""
    found = []
    for ids, labels, positions in zip(rows.input, rows.labels, rows.positions, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            if len(begin := np.flatnonzero(labels[start:end] != -100)):
                answer = start + begin.item() + 1
                assert labels[answer - 1] == ids[answer]
                texts = ids[start:answer], ids[answer:end]
                found.append(tuple(tokenizer.decode(t.tolist()) for t in texts))
    return found


def test_a_pair_is_two_documents_of_one_row(tmp_path, tokenizer):
    rows = [pair(n) for n in range(1, 8)]
    made = evaluation_rows(source(write(tmp_path / "p.jsonl", rows)), tokenizer, ROW)
    texts = decoded(made, tokenizer)
    wanted = [
        (f"<|user|>{row['prompt']}<|endoftext|>\n<|assistant|>", f"{row[side]}<|endoftext|>\n")
        for row in rows
        for side in ("chosen", "rejected")
    ]
    assert texts == wanted
    assert 1 < len(made) < 7  # several in a row, and not all in one
    assert not (made.labels != -100).sum(1).remainder(2).any()

    def turns(row, side):
        say = [{"role": "user", "content": row["prompt"]}]
        return [*say, {"role": "assistant", "content": row[side]}]

    lists = [{s: turns(row, s) for s in ("chosen", "rejected")} for row in rows]
    parts = [
        {"prompt": turns(r, "chosen")[:1]} | {s: r[s] for s in ("chosen", "rejected")} for r in rows
    ]
    for other in (lists, parts):
        keys = {k: v for k, v in KEYS.items() if v in other[0]}
        again = evaluation_rows(source(write(tmp_path / "q.jsonl", other), **keys), tokenizer, ROW)
        assert torch.equal(again.input, made.input) and torch.equal(again.labels, made.labels)


def test_the_data_resume_at_a_pair_that_did_not_fit(tmp_path, tokenizer):
    config = SourceConfig(
        dataset="files", path=str(write(tmp_path / "p.jsonl", [*map(pair, range(9))])), **KEYS
    )
    how = dict(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=ROW, local_batch_size=1)

    def loader():
        return LaneDataLoader.Config(source=config, global_batch_size=2).build(**how)

    steady = [batch[0]["input"] for batch in islice(loader(), 16)]
    for step in range(1, 7):
        before, after = loader(), loader()
        list(islice(before, 2 * step))
        after.load_state_dict(before.state_dict())
        assert torch.equal(next(iter(after))[0]["input"], steady[2 * step])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2 has no column 'rejected'"),
        (pair(1) | {"rejected": None}, "line 2: message"),
        (pair(1) | {"chosen": 3}, "line 2: message"),
        (pair(1) | {"chosen": [{"role": "user", "content": "b"}]}, "line 2: pair .* assistant"),
        (pair(1) | {"chosen": [{"content": "b"}]}, 'line 2: message .* no "role"'),
        (
            pair(1) | {"chosen": "long " * 300},
            "line 2: has .*seq_len = 192, which a pair must fit",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "p.jsonl", [pair(1), row, pair(2)])
    with pytest.raises(LowlineError, match=message):
        evaluation_rows(source(path), tokenizer, ROW)
    left = evaluation_rows(source(path, **KEYS, on_bad_row="skip"), tokenizer, ROW)
    assert int((left.labels != -100).sum()) == 4


# ---------------------------------------------------------------------------------------- the loss


def test_loss_gradient_and_numbers_are_the_formula(tmp_path, monkeypatch):
    """Against log-probabilities of each document alone, in fp64, padding and packing left out."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    section = DpoSection(beta=0.7, label_smoothing=0.1)
    data = SourceConfig(dataset="files", path="p", **KEYS)
    run = tiny_run(objective=section, data=data, evaluation=EvaluationConfig(enable=False))
    model, frozen = body_of(run), body_of(run, seed=3)
    lengths = [[(6, 3), (5, 2)], [(4, 2), (9, 4), (5, 1), (3, 2)]]  # of documents, of prompts
    random = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(97, (2, 24), generator=random), torch.full((2, 24), -100)
    positions, sums = torch.zeros(2, 24, dtype=torch.long), {model: [], frozen: []}
    for row, documents in enumerate(lengths):
        start = 0
        for length, prompt in documents:
            span = slice(start, start + length)
            positions[row, span] = torch.arange(length)
            labels[row, start + prompt - 1] = ids[row, start + prompt]
            for body, found in sums.items():
                log_p = body(ids[row : row + 1, span]).double().log_softmax(-1)[0, :-1]
                found.append(log_p.gather(1, ids[row, span][1:, None])[prompt - 1 :].sum())
            start += length
    ours, theirs = torch.stack(sums[model]), torch.stack(sums[frozen]).detach()
    chosen, rejected = (0.7 * (ours - theirs)).view(-1, 2).unbind(1)
    h = chosen - rejected
    wanted = (-0.9 * F.logsigmoid(h) - 0.1 * F.logsigmoid(-h)).mean()
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss_fn = section.loss_config(run, 2).build()
    loss_fn.num_chunks = 4
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = frozen._skip_lm_head = True
    objective = DpoObjective(loss_fn, section, Reference(tmp_path / "r", source=None, rank=0))
    objective._teacher = frozen
    with torch.no_grad():
        objective.held_out(model, Batch(ids, labels, {"positions": positions}))
        objective._teacher = None
        held_out = objective.held_out(model, Batch(ids, labels, {"positions": positions}))
    objective.begin_step(1)
    for row in range(2):  # of two microbatches
        part = slice(row, row + 1)
        extra = {"positions": positions[part]}
        found = objective.loss(model, Batch(ids[part], labels[part], extra), torch.tensor(6))
        found.backward()
        held_out["loss"] -= 6 * found.detach()
    assert float(held_out["loss"]) == pytest.approx(0, abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    numbers = {name: float(number) for name, number in objective.numbers().items()}
    means = dict(
        margin=h, accuracy=(h > 0).double(), chosen_reward=chosen, rejected_reward=rejected
    )
    assert numbers == pytest.approx(
        {f"dpo/{name}": float(of.detach().mean()) for name, of in means.items()}, rel=1e-4
    )
    assert {k: float(v) / 6 for k, v in held_out.items() if k != "loss"} == pytest.approx(
        {name.removeprefix("dpo/"): number for name, number in numbers.items()}, rel=1e-4
    )
    again = Reference(tmp_path / "r", source=None, rank=1)  # in another process
    assert again._known == objective.reference._known and len(again._known) == 6


def test_a_reference_that_a_kill_cut_short(tmp_path):
    first = Reference(tmp_path, source=None, rank=0)
    first.add(["a" * 32, "b" * 32], torch.tensor([-1.5, -2.0]))
    path = tmp_path / "rank-0.txt"
    path.write_text(path.read_text()[:-3])
    second = Reference(tmp_path, source=None, rank=0)
    assert second.has(["a" * 32]) and not second.has(["b" * 32])
    second.add(["b" * 32], torch.tensor([-3.0]))
    assert Reference(tmp_path, source=None, rank=0).get(["a" * 32, "b" * 32]) == [-1.5, -3.0]
    write(tmp_path / "weights.bin", [1])
    with pytest.raises(LowlineError, match="of another reference"):
        Reference(tmp_path, source=str(tmp_path / "weights.bin"), rank=0)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tokenizer) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    teacher = training.save_teacher(folder / "teacher")
    tokenizer.hf.save_pretrained(folder / "tokenizer")
    parts = {"data": range(24), "evaluation.data": range(24, 30)}
    files = {name: write(folder / f"{name}.jsonl", [*map(pair, of)]) for name, of in parts.items()}
    data = [f'--{name}.{key}="{value}"' for name in files for key, value in KEYS.items()]
    return (
        *(f'--{name}.path="{path}"' for name, path in files.items()),
        *(f'--{name}.dataset="files"' for name in files),
        *data,
        *(f"--tokenizer={folder / 'tokenizer'}", f"--checkpoint.initial_weights={teacher}"),
        *("--cola.rank=0", '--objective.kind="dpo"', "--optimizer.lr=1e-3"),
        *("--training.seq_len=256", "--training.global_batch_size=4", "--evaluation.every=6"),
        "--checkpoint.keep=9",
    )


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dpo") / "run"
    assert training.train_here(output, *arguments) == 0
    return output


def test_a_run_raises_the_margin(trained):
    records = read_metrics(trained)
    steps = [r for r in records if "dpo/margin" in r]
    assert len(steps) == 12
    assert steps[0]["dpo/margin"] == 0  # the reference is the model it begins with
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses[-1] < 0.5 * losses[0] and steps[-1]["dpo/accuracy"] == 1
    for r in steps:
        margin = r["dpo/chosen_reward"] - r["dpo/rejected_reward"]
        assert r["dpo/margin"] == pytest.approx(margin, abs=1e-5)
    held_out = [r for r in records if "eval_margin" in r]
    assert held_out[-1]["eval_margin"] > held_out[0]["eval_margin"] > 0
    assert held_out[-1]["eval_accuracy"] == 1 and held_out[-1]["eval_tokens"] == 12


def test_a_killed_run_goes_on_bit_for_bit(arguments, trained, tmp_path):
    training.cut(trained, tmp_path / "run", 4)
    assert training.train_here(tmp_path / "run", *arguments) == 0
    assert training.curve(tmp_path / "run") == training.curve(trained)


@pytest.mark.slow
def test_two_ranks_are_one(arguments, trained, tmp_path):
    done = training.launch(tmp_path / "run", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert training.losses(tmp_path / "run") == pytest.approx(training.losses(trained), rel=1e-4)


def test_what_does_not_fit_is_refused(arguments, trained, tmp_path, capsys):
    def refused(*more: str) -> str:
        assert training.train_here(tmp_path / "run", *arguments, *more) == 2
        return capsys.readouterr().err

    assert '"dpo" learns from pairs of answers' in refused('--objective.kind="next-token"')
    training.cut(trained, tmp_path / "cut", 8)
    (tmp_path / "cut" / "reference" / "rank-0.txt").write_text("")
    assert training.train_here(tmp_path / "cut", *arguments) == 1
    assert "lacks log-probabilities of the reference" in capsys.readouterr().err
