"""What a run will cost before it starts: sizes, FLOPs, and the memory of its fullest device.

    torchrun --nproc_per_node=1 -m lowline.train --config configs/cola_7b.toml --dry-run

`dry_run` predicts from the configuration alone. `check_by_building` builds and shards the run's
model under a process group that only pretends to have other ranks, and counts what one rank holds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

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
from lowline.train.objectives.logit_cache import cache_bytes


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
    if run.objective.kind == "transfer":  # in which no block has a backward pass
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
        logit_cache=cache_bytes(run) if run.objective.logit_cache is not None else 0,
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
    return [
        ("parameters", f"{p.total:,}"),
        ("  low-rank", f"{p.low_rank:,}"),
        ("  embedding and output", f"{p.embedding + p.lm_head:,}"),
        *([("mixers", f"{report.mixers:,}")] if report.mixers else []),
        *([("adapters", f"{report.adapters:,}")] if report.adapters else []),
        *([("parameters that train", f"{report.trained:,}")] if frozen else []),
        ("FLOPs a token, forward + backward", f"{report.flops:.4g}"),
        ("  recomputed beside them", f"{report.recomputed_flops:.4g}"),
        ("tokens a step", f"{report.tokens_per_step:,}"),
        ("processes", f"{report.world_size} ({report.device})"),
        ("microbatches a step and data-parallel rank", f"{report.microbatches}"),
        ("saved for the backward pass, bytes a token", f"{report.saved_bytes:,.0f}"),
        ("memory of the fullest device", ""),
        ("  weights (fp32)", human_bytes(m.weights)),
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


@dataclass(frozen=True, kw_only=True)
class Built:
    """Bytes that one rank of a really sharded model holds; the optimizer is AdamW."""

    weights: int
    gradients: int
    optimizer: int


def check_by_building(run: RunConfig, world_size: int, rank: int = 0) -> Built:
    """Build and shard the run's model as rank `rank` of `world_size`, and count what it holds.

    The model lives on the meta device and the process group is torch's fake one, so any world size
    fits in one process and no memory is used.

    Raises:
        RuntimeError: this process already has a process group.
        ValueError: a layout that does not fit.
    """
    run.local_batch_size(world_size)  # raises
    with fake_process_group(world_size, rank):
        held = [p for part in build_parts(run, world_size) for p in part.parameters()]
        trained = [p for p in held if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(trained, foreach=False)
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        return Built(
            weights=_local_bytes(held),
            gradients=_local_bytes([p.grad for p in held if p.grad is not None]),
            optimizer=_local_bytes(states),
        )


@contextlib.contextmanager
def fake_process_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """A process group whose other ranks do not exist: collectives return at once.

    Raises:
        RuntimeError: this process already has a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lowline.train.engine.device import prepare

    if dist.is_initialized():
        raise RuntimeError("this process has a process group already; use a process of its own")
    prepare()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_parts(run: RunConfig, world_size: int) -> list[torch.nn.Module]:
    """The sharded model, or its pipeline stages, of this process's rank, on the meta device."""
    import torchtitan.distributed.utils as titan_utils
    from torchtitan.config.configs import CompileConfig
    from torchtitan.distributed import ParallelDims

    from lowline.train.engine.trainer import trainer_config

    config = trainer_config(run, world_size)
    dims = ParallelDims.from_config(config.parallelism, world_size)
    dims.build_mesh()
    titan_utils.set_spmd_backend(config.parallelism.spmd_backend)
    spec = config.model_spec
    assert spec is not None
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    layout = dict(
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=CompileConfig(enable=False),
        ac_config=config.activation_checkpoint,
        dump_folder=config.dump_folder,
    )
    if run.parallelism.pipeline_parallel == 1:
        return [spec.parallelize_fn(model, **layout)]
    assert spec.pipelining_fn is not None
    _, parts, _, _ = spec.pipelining_fn(
        model,
        device=torch.device("meta"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=config.loss.build(compile_config=config.compile),
        **layout,
    )
    return parts


def _local_bytes(tensors: Sequence[torch.Tensor]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
