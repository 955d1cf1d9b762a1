"""Runs that are killed at random moments and started again, and what is left of them to compare."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from helpers import forked
from helpers.forked import Forked
from helpers.processes import TESTS
from helpers.training import curve
from lowline.train.config.folder import saved_steps
from lowline.train.model import step_folder


def run(
    arguments: list[str], processes: int, log: Path, kill: random.Random, within: float
) -> bool:
    """Start `lowline.train` and kill it at a moment of the next seconds; return whether it was.

    Of two ranks, one alone is killed as often as both.

    Args:
        within: the seconds; 0: it is not killed.
    """
    with log.open("a") as shown:
        line = [str(TESTS / "workers" / "ranks_of_train.py"), str(processes), *arguments]
        process = Forked(line, stdout=shown, stderr=shown, session=True)
    try:
        code, killed = process.wait(kill.uniform(0, within) or 600), False
    except subprocess.TimeoutExpired:
        assert within, f"nothing after 600 s: {log.read_text()[-3000:]}"
        with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if processes > 1 and kill.random() < 0.5 and len(children) == processes:
                os.kill(int(kill.choice(children)), signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        code, killed = process.wait(), True
    assert killed or code == 0, log.read_text()[-3000:]
    return killed and code != 0


def result(output: Path) -> dict[str, Any]:
    """Return every curve, every value of each newest checkpoint, and every safetensors file."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.name == "metrics.jsonl":
            found[name] = curve(path.parent)
        elif path.name == "checkpoint":
            found[name] = _values(path / f"step-{saved_steps(path)[-1]}")
        elif path.suffix == ".safetensors":
            found[name] = sha256(path.read_bytes()).hexdigest()
    return found


def _values(step: Path) -> dict[str, str]:
    """Return a digest of every tensor and value that a step folder holds."""
    values: dict[str, Any] = {}
    for name, kind in step_folder.stored(step).items():
        is_tensor = hasattr(kind, "size")
        values[name] = torch.empty(kind.size, dtype=kind.properties.dtype) if is_tensor else None
    step_folder.load(values, step_folder.StepReader(step), no_dist=True)
    digests = {}
    for name, value in values.items():
        raw = value.reshape(-1).view(torch.uint8).numpy() if torch.is_tensor(value) else value
        digests[name] = repr(raw) if raw is value else sha256(raw).hexdigest()
    return {"step": step.name, **digests}


def campaign(line: Any, folder: Path, *, processes: int, kills: int, seed: int) -> dict[str, int]:
    """Kill runs of a command until there are so many kills; each must end as one that was calm.

    Args:
        line: gives the arguments of a run by its output folder.
    """
    draw, calm = random.Random(seed), folder / "calm"
    forked.run(["-c", ""])  # the imports are no part of the seconds
    began = time.monotonic()
    run(line(calm), processes, folder / "calm.log", draw, 0)
    seconds, wanted = time.monotonic() - began, result(calm)
    assert wanted, "a run leaves something to compare"
    counts = {"kills": 0, "with a checkpoint": 0, "runs": 0, "identical": 0}
    while counts["kills"] < kills:
        output = folder / f"run-{counts['runs']}"
        for life in range(5):  # the last is not killed
            within = seconds if life < 4 and counts["kills"] < kills else 0
            if not run(line(output), processes, folder / f"{output.name}.log", draw, within):
                break
            counts["kills"] += 1
            counts["with a checkpoint"] += any(output.rglob("checkpoint/step-*"))
        counts["runs"] += 1
        found = result(output)
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        counts["identical"] += found == wanted
        assert found == wanted, [name for name in wanted if found[name] != wanted[name]]
    return counts
