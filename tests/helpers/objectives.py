"""Tiny bodies and batches for tests of objectives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from helpers import training
from helpers.runs import build, make_run
from lowline.train.config.run import RunConfig

TRANSFER = (*training.MIXER, '--objective.kind="transfer"', "--optimizer.lr=0.1")


def started(teacher: Path, *arguments: str) -> tuple[str, ...]:
    return (f"--checkpoint.initial_weights={teacher}", *arguments)


def tiny_run(mixer: str | None = "lolcats", **sections) -> RunConfig:
    sections.setdefault("training", dict(steps=10, global_batch_size=2))
    if mixer is not None:
        sections.setdefault("mixer", dict(name=mixer, options={"window": 4}))
    return make_run(model=replace(training.MODEL, vocab_size=97), **sections)


def body_of(run: RunConfig, seed: int = 0) -> torch.nn.Module:
    body = build(run, seed)
    with torch.no_grad():
        for weight in body.parameters():
            if weight.ndim > 1:
                weight += torch.randn_like(weight) * weight.shape[-1] ** -0.5
    return body


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels of which some do not count, positions of packed documents."""
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, :5] = labels[1, 11:] = -100
    positions = torch.tensor([[*range(5), *range(11)], [*range(16)]])
    return ids[:, :-1], labels, positions
