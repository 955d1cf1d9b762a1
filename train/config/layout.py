"""[parallelism]: how a run lies on its processes, and what can be divided among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lowline.errors import LowlineError
from lowline.train.config.fields import NOTHING, Positive, Strict

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """[parallelism]: degrees; their product is the number of processes."""

    __pydantic_config__ = Strict
    decides = NOTHING
    data_parallel_shard: Annotated[int, Field(ge=-1)] = -1
    """Processes over which FSDP shards the model; -1 takes all that the other degrees leave."""
    data_parallel_replicate: Positive = 1
    """Copies of the sharded model (HSDP)."""
    tensor_parallel: Positive = 1
    """Processes over which matrices are split."""
    pipeline_parallel: Positive = 1
    """Pipeline stages over which layers are split."""
    pipeline_schedule: Literal["1F1B", "GPipe", "Interleaved1F1B"] = "1F1B"
    """The order in which pipeline stages work."""
    pipeline_microbatch_size: Positive = 1
    """Sequences of a pipeline microbatch."""

    def __post_init__(self) -> None:
        if self.data_parallel_shard == 0:
            raise LowlineError("data_parallel_shard = 0; give a degree, or -1 for what is left")

    def data_parallel(self, world_size: int) -> int:
        """Return the number of data-parallel ranks among `world_size` processes.

        Raises:
            ValueError: the degrees do not multiply to the world size.
        """
        fixed = self.data_parallel_replicate * self.tensor_parallel * self.pipeline_parallel
        shard = self.data_parallel_shard
        if world_size % fixed or shard > 0 and shard * fixed != world_size:
            raise LowlineError(
                f"parallelism: data_parallel_shard {shard} x data_parallel_replicate "
                f"{self.data_parallel_replicate} x tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel} does not make {world_size} "
                "process(es); change a degree or torchrun's --nproc_per_node / --nnodes"
            )
        return world_size // (self.tensor_parallel * self.pipeline_parallel)


def check_layout(run: RunConfig, world_size: int) -> int:
    """Return the number of sequences per forward pass of one rank.

    Raises:
        ValueError: the batch, a sequence or the layers cannot be divided as asked.
    """
    p, t = run.parallelism, run.training
    ranks = p.data_parallel(world_size)
    total, local = t.global_batch_size, t.local_batch_size
    if total % ranks or local is not None and total // ranks % local:
        hint = ""
        if local is not None and total % ranks == 0:
            fits = max(n for n in range(1, local) if total // ranks % n == 0)
            hint = f"; --training.local_batch_size={fits} would work"
        raise LowlineError(
            f"training.global_batch_size = {total} sequences cannot be divided among {ranks} "
            f"data-parallel rank(s)"
            + (f" with local_batch_size = {local}" if local else "")
            + f"; it must be a multiple of {ranks * (local or 1)}{hint}"
        )
    local = local or total // ranks
    shared = {
        "model.n_heads": run.model.n_heads,
        "model.n_kv_heads": run.model.kv_heads,
        "training.seq_len": t.seq_len,
    }
    for name, size in shared.items():
        if size % p.tensor_parallel:
            raise LowlineError(
                f"parallelism.tensor_parallel = {p.tensor_parallel} does not divide {name} = {size}"
            )
    if p.pipeline_parallel == 1:
        return local
    if local % p.pipeline_microbatch_size:
        raise LowlineError(
            f"parallelism.pipeline_microbatch_size = {p.pipeline_microbatch_size} does not divide "
            f"the {local} sequences of a forward pass"
        )
    stages = p.pipeline_parallel * (2 if p.pipeline_schedule == "Interleaved1F1B" else 1)
    if stages > run.model.n_layers:
        raise LowlineError(
            f"parallelism.pipeline_parallel = {p.pipeline_parallel} with {p.pipeline_schedule} "
            f"makes {stages} stages of {run.model.n_layers} layers; choose a smaller degree"
        )
    return local
