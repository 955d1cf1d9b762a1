"""What one rank of a run's model holds, counted by building and sharding it without memory.

The model lives on the meta device under a process group that only pretends to have other ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lowline.train.config.run import RunConfig
from lowline.train.engine.titan_compat import prepare


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
    """Return a process group whose other ranks do not exist: collectives return at once.

    Raises:
        RuntimeError: this process already has a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process has a process group already; use a process of its own")
    prepare()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_parts(run: RunConfig, world_size: int) -> list[torch.nn.Module]:
    """Return the sharded model, or its pipeline stages, of this process's rank, on the meta
    device.
    """
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
