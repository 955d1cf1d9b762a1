"""What a run will cost before it starts: sizes, FLOPs, and the memory of its fullest device.

    torchrun --nproc_per_node=1 -m lowline.train --config configs/cola_7b.toml --dry-run

It predicts from the configuration alone, in closed form; docs/dev/cost_model.md says why no step is
traced with fake tensors instead.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TextIO

import torch

from lowline.cola.accounting import (
    Device,
    Parameters,
    Saved,
    recomputed_flops_per_token,
    saved_by_model,
)
from lowline.train.config.run import RunConfig
from lowline.train.cost.memory import (
    Memory,
    itemsize_of,
    microbatches_of,
    policy_of,
    predict_memory,
)
from lowline.train.cost.parameters import count, model_parameters, shape_of, training_flops_of


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run's cost on `world_size` processes; FLOPs and saved bytes are a token's."""

    world_size: int
    device: Device
    parameters: Parameters  # of the model, without the following two
    mixers: int
    adapters: int
    trained: int  # parameters that train
    flops: int  # of the objective, forward + backward
    recomputed_flops: int
    saved_bytes: float  # by blocks, last norm and output projection, on one device
    tokens_per_step: int
    microbatches: int  # a step, on one data-parallel rank
    memory: Memory  # of the fullest device
    logit_cache: int  # bytes on disk


def dry_run(run: RunConfig, world_size: int, device: Device | None = None) -> Report:
    """Predict sizes, FLOPs and memory of a run on `world_size` processes.

    Args:
        device: what it will run on; default: what is here.

    Raises:
        ValueError: a layout that does not fit the world size, the batch or the model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    memory = predict_memory(run, world_size, device)
    shape, policy, seq_len = shape_of(run), policy_of(run), run.training.seq_len
    saved = saved_by_model(shape, policy, device=device, tp=run.parallelism.tensor_parallel)
    recomputed = recomputed_flops_per_token(shape, seq_len, policy, device)
    if run.objective.mixers_only:  # no block has a backward pass
        saved, recomputed = Saved(), 0
    return Report(
        world_size=world_size,
        device=device,
        parameters=model_parameters(run),
        mixers=count(run, "mixer"),
        adapters=count(run, "lora"),
        trained=count(run, trained=True),
        flops=training_flops_of(run),
        recomputed_flops=recomputed,
        saved_bytes=saved.bytes(itemsize_of(run)),
        tokens_per_step=run.training.global_batch_size * seq_len,
        microbatches=microbatches_of(run, world_size)[0],
        memory=memory,
        logit_cache=run.objective.disk_bytes(run),
    )


def print_dry_run(
    run: RunConfig, world_size: int, device: Device | None = None, out: TextIO | None = None
) -> None:
    """Print `dry_run`'s report: a table on a terminal, `name: value` lines elsewhere.

    Raises:
        ValueError: as `dry_run`.
    """
    out = out or sys.stdout
    rows = _rows(dry_run(run, world_size, device))
    if not out.isatty():
        for name, value in rows:
            print(f"{name}: {value}" if value else f"{name}:", file=out)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=run.output, show_header=False)
    for name, value in rows:
        table.add_row(name, value, style=None if value else "bold")
    Console(file=out).print(table)


def _rows(report: Report) -> list[tuple[str, str]]:
    p, m = report.parameters, report.memory
    frozen = report.trained < p.total + report.mixers + report.adapters
    weights = "fp32; the frozen in the precision of the run" if frozen else "fp32"
    return [
        ("parameters", f"{p.total:,}"),
        ("  low-rank", f"{p.low_rank:,}"),
        ("  embedding and output", f"{p.embedding + p.lm_head:,}"),
        *([("mixers", f"{report.mixers:,}")] if report.mixers else []),
        *([("adapters", f"{report.adapters:,}")] if report.adapters else []),
        *([("parameters that train", f"{report.trained:,}")] if frozen else []),
        ("FLOPs per token, forward + backward", f"{report.flops:.4g}"),
        ("  recomputed in the backward pass", f"{report.recomputed_flops:.4g}"),
        ("tokens per step", f"{report.tokens_per_step:,}"),
        ("processes", f"{report.world_size} ({report.device})"),
        ("microbatches per step and data-parallel rank", f"{report.microbatches}"),
        ("saved for the backward pass, bytes per token", f"{report.saved_bytes:,.0f}"),
        ("memory of the fullest device", ""),
        (f"  weights ({weights})", human_bytes(m.weights)),
        ("  gradients (fp32)", human_bytes(m.gradients)),
        ("  optimizer state", human_bytes(m.optimizer)),
        ("  gathered parameters", human_bytes(m.gathered)),
        ("  activations", human_bytes(m.activations)),
        ("  loss", human_bytes(m.loss)),
        ("  rotary tables", human_bytes(m.tables)),
        *([("  teacher", human_bytes(m.teacher))] if m.teacher else []),
        ("  peak (they are not all alive at once)", human_bytes(m.peak)),
        *(
            [("teacher's logits on disk", human_bytes(report.logit_cache))]
            if report.logit_cache
            else []
        ),
    ]


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
