"""Runs of every kind, killed at random moments: each resumes to the numbers of a calm one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import kills, training
from helpers.blockwise import DISTILL, STAGES, save_teacher

pytestmark = pytest.mark.slow


def pretraining(folder: Path):
    return lambda output: [*training.TINY, f"--output={output}", "--checkpoint.every=1"]


def conversion(folder: Path, *more: str):
    teacher = save_teacher(folder / "teacher", layers=3)
    (file := folder / "stages.toml").write_text(STAGES + DISTILL)
    line = ["--config", str(file), f"--source={teacher}", "--checkpoint.every=1", *more]
    return lambda output: [*line, f"--output={output}"]


def layer_groups(folder: Path):
    return conversion(folder, "--block-size=2", "--inputs-dtype=float32")


@pytest.mark.parametrize(
    ("kind", "processes", "count"),
    [
        *((pretraining, 1, 14), (pretraining, 2, 12), (conversion, 1, 12), (conversion, 2, 8)),
        *((layer_groups, 1, 12), (layer_groups, 2, 8)),
    ],
)
def test_killed_runs_are_calm_ones(tmp_path, capsys, kind, processes, count):
    line, seed = kind(tmp_path), 100 * processes + count
    counts = kills.campaign(line, tmp_path, processes=processes, kills=count, seed=seed)
    with capsys.disabled():
        print(f"\n{kind.__name__}, {processes} processes: {counts}")
    assert counts["identical"] == counts["runs"] and counts["with a checkpoint"] > count // 4
