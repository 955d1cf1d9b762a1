"""A run whose numbers are inf or nan is never saved: it fails and names the last good step."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import training

from lowline.train.config.folder import saved_steps
from lowline.train.engine.finite import all_finite

DIVERGING = ("--optimizer.lr=1e30", "--schedule.warmup_steps=0")
UNLOGGED = ("--metrics.log_every=1000", "--evaluation.enable=false", "--checkpoint.every=1000")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    output = tmp_path_factory.mktemp("good") / "run"
    options = ("--training.steps=2", "--evaluation.enable=false")
    assert training.train_here(output, *options) == 0
    return output


def _message(said: str, reason: str) -> re.Match:
    assert "Traceback" not in said
    found = re.search(rf"diverged: {reason}.*checkpoint: (\S+)\. Lower optimizer.lr", said)
    assert found is not None, said
    return found


def test_a_logged_step(tmp_path, capsys):
    output = tmp_path / "run"
    assert training.train_here(output, *DIVERGING, "--checkpoint.every=2") == 1
    found = _message(capsys.readouterr().err, r".* step (\d+)")
    steps = saved_steps(output / "checkpoint")
    assert all(step < int(found[1]) for step in steps)
    assert found[2] == (f"{output}/checkpoint/step-{steps[-1]}" if steps else "none")


def test_a_signal_between_two_logs(good, tmp_path, capsys, monkeypatch):
    """No step is logged after the first: only the save can find out."""
    from lowline.train.engine.metrics import Metrics

    output, end_step = tmp_path / "run", Metrics.end_step

    def stop_at_6(self, step):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        end_step(self, step)

    monkeypatch.setattr(Metrics, "end_step", stop_at_6)
    training.cut(good, output, 2)
    assert training.train_here(output, *DIVERGING, *UNLOGGED) == 1
    found = _message(capsys.readouterr().err, r"weights or moments .* after step (\d+)")
    assert found[1] == "7" and found[2] == f"{output}/checkpoint/step-2"
    assert saved_steps(output / "checkpoint") == [2]
    monkeypatch.undo()
    assert training.train_here(output, "--training.steps=3") == 0  # from the good step


@pytest.mark.parametrize("checkpoints", ["true", "false"])
def test_the_end_of_the_data(tmp_path, capsys, checkpoints):
    file = tmp_path / "text.jsonl"
    rows = (f"document {n}: " + "water runs down the hill. " * (n % 7 + 3) for n in range(60))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = ("--data.dataset=files", f"--data.path={file}", "--data.epochs=1")
    options += (
        "--training.steps=1000",
        *DIVERGING,
        *UNLOGGED,
        f"--checkpoint.enable={checkpoints}",
    )
    assert training.train_here(tmp_path / "run", *options) == 1
    said = capsys.readouterr().err
    assert _message(said, r"weights or moments .* after step (\d+)")[2] == "none"
    assert "the data ended after step" in said
    assert saved_steps(tmp_path / "run" / "checkpoint") == []


def test_weights_and_moments_are_looked_at(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        assert all_finite([model], [optimizer], device)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        model.weight.data[1, 2] = torch.finfo(torch.float32).max
        assert all_finite([model], [optimizer], device)
        for tensor in (model.weight.data, optimizer.state[model.bias]["exp_avg_sq"]):
            for bad in (float("inf"), float("-inf"), float("nan")):
                kept = tensor.clone()
                tensor.flatten()[1] = bad
                assert not all_finite([model], [optimizer], device)
                tensor.copy_(kept)
        model.weight.data[1, 2] = 3e38  # bfloat16 holds it
        assert all_finite([model.to(torch.bfloat16)], [optimizer], device)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_one_rank_alone_is_enough(tmp_path):
    """Rank 1 has a nan; both say no."""
    code = f"""
import sys, torch, torch.distributed as dist
from lowline.train.engine.finite import all_finite
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
model = torch.nn.Linear(3, 2)
print(all_finite([model], [], torch.device("cpu")))
if rank == 1:
    model.bias.data[0] = float("nan")
print(all_finite([model], [], torch.device("cpu")))
"""
    line = [sys.executable, "-P", "-c", code]
    ranks = [
        subprocess.Popen([*line, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["True", "False"]] * 2
