"""Tiny training runs for the tests: as the real command, or by its `main` in this process."""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from unittest import mock

import torch

from helpers.forked import Forked
from helpers.processes import ENVIRONMENT, train_line
from lowline.train.config.run import ColaConfig, ModelConfig

TINY = (
    "--config",
    str(files("lowline.configs") / "demo_cola.toml"),
    *("--model.n_layers=2", "--model.dim=64", "--model.n_heads=2", "--model.ffn_dim=172"),
    *("--cola.rank=16", "--training.seq_len=64", "--training.steps=12", "--metrics.log_every=1"),
    "--training.global_batch_size=8",
    *("--schedule.warmup_steps=2", "--checkpoint.every=4", "--evaluation.every=6"),
    *("--evaluation.max_tokens=1536", "--metrics.tensorboard=false"),
)
MODEL = ModelConfig(dim=64, n_layers=2, n_heads=2, ffn_dim=172, vocab_size=4096)
MIXER = ('--mixer.name="lolcats"', "--mixer.options={window = 8}", "--cola.rank=0")


def command(output: Path, *arguments: str, processes: int = 1) -> list[str]:
    """Return the command line of a tiny run."""
    return train_line(*TINY, f"--output={output}", *arguments, processes=processes)


def launch(output: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end."""
    line = command(output, *arguments, processes=processes)
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def start(
    output: Path, *arguments: str, processes: int = 1, session: bool = False
) -> subprocess.Popen[str] | Forked:
    """Start the command, of several processes under torchrun; its output goes to `output`.log."""
    line = command(output, *arguments, processes=processes)
    with Path(f"{output}.log").open("w") as log:
        if processes == 1:
            return Forked(line[2:], stdout=log, stderr=log, session=session)
        return subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log, text=True)


def kill_with_children(process: subprocess.Popen | Forked) -> None:
    """Kill a process and those it started, such as torchrun's, and wait until they are gone."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        subprocess.run(["kill", "-9", str(pid)], check=False)
    process.wait()
    for pid in children:  # not ours to wait for: gone when /proc forgets it or it is a zombie
        stat = Path(f"/proc/{pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


def train_here(output: Path, *arguments: str) -> int:
    """`main` of the command in this process; leaves the process as it was."""
    from lowline.train.__main__ import main

    with one_process():
        return main([*TINY, f"--output={output}", *arguments])


def save_teacher(folder: Path) -> Path:
    """Return a dense `MODEL` as it begins, but for sharper predictions; its attention is near
    uniform.
    """
    from transformers import AutoModelForCausalLM

    from lowline.train.hf.config import config_to_hf

    torch.manual_seed(0)
    body = AutoModelForCausalLM.from_config(config_to_hf(MODEL, ColaConfig(), max_seq_len=64))
    with torch.no_grad():
        body.lm_head.weight.mul_(20)
    body.save_pretrained(folder)
    return folder


def distilled(teacher: Path, *arguments: str) -> tuple[str, ...]:
    """Arguments of a run that begins as a teacher with other mixers, and learns its logits."""
    return (
        *(f"--checkpoint.initial_weights={teacher}", *MIXER, '--objective.kind="distill"'),
        *(f"--objective.teacher={teacher}", "--optimizer.lr=1e-3", *arguments),
    )


@cache
def _imported() -> None:
    """Import what runs import, and keep it from the collection with which every run ends."""
    import lowline.train.engine.trainer  # noqa: F401

    gc.collect()
    gc.freeze()


@contextmanager
def one_process() -> Iterator[None]:
    """Undo what a training process does to itself, and skip torchtitan's last two seconds."""
    _imported()
    root, threads, environment = logging.getLogger(), torch.get_num_threads(), dict(os.environ)
    handlers, level = root.handlers[:], root.level
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), mock.patch("torchtitan.trainer.time.sleep"):
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)
        gc.enable()


def curve(output: Path) -> list[tuple]:
    """Return what must be equal of equal runs: step, loss, gradient norm, learning rate,
    held-out loss.
    """
    from lowline.train.engine.metrics import read_metrics

    keys = ("step", "loss", "grad_norm", "lr/AdamW", "tokens", "eval_loss")
    return [
        tuple(r.get(key) for key in keys)
        for r in read_metrics(output)
        if "loss" in r or "eval_loss" in r
    ]


def losses(output: Path) -> list[float]:
    """Return the loss of every step, then the held-out losses."""
    rows = curve(output)
    return [r[1] for r in rows if r[1] is not None] + [r[5] for r in rows if r[5] is not None]


def cut(source: Path, output: Path, step: int) -> None:
    """Copy a run as it was when it was killed some steps after the checkpoint of `step`."""
    shutil.copytree(source, output)
    for folder in (output / "checkpoint").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    assert (output / "checkpoint" / f"step-{step}").is_dir()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
