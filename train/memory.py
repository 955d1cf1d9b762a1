"""Memory of one device of a run, predicted from its configuration.

A device holds its shards of weights, gradients and optimizer state (fp32), the parameters that FSDP
has gathered in the compute type, what the forward pass saved, and the buffers of the loss. These do
not all peak together, so the peak is that of the three moments which can be the highest:

    loss         everything saved, and three fp32 tensors as large as the logits
    last block   everything saved, one block's gathered parameters and gradients on their way out
    first block  all gradients, one block's saved activations, the same buffers

With gradient accumulation FSDP keeps whole fp32 gradients between microbatches and shards them
after the last one.

Left out: memory of the libraries, of communication and of the allocator's gaps, and what
`torch.compile` spares (the figures are those of eager execution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowline.cola.accounting import (
    Device,
    Policy,
    Saved,
    Shape,
    recomputed_at_once,
    saved_by_block,
    saved_by_head,
)
from lowline.train.config import RunConfig

FP32 = 4
_SHARDED_BY_ROWS = ("q", "k", "v", "gate", "up")  # by tensor parallelism; o and down by columns


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. The parts need not sum to `peak`: they are not alive all at once."""

    weights: int
    gradients: int
    optimizer: int
    tables: int  # of the rotary embedding
    gathered: int  # what FSDP unshards at once: parameters, and gradients on their way out
    activations: int  # saved for the backward pass, and what a block recomputes
    loss: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A parameter, and the dimension that tensor parallelism shards."""

    shape: tuple[int, ...]
    tp_dim: int | None = None

    def unsharded(self, tp: int) -> int:
        """Elements of a tensor-parallel rank's part (the first rank's, which is the largest)."""
        sizes = list(self.shape)
        if self.tp_dim is not None:
            sizes[self.tp_dim] = math.ceil(sizes[self.tp_dim] / tp)
        return math.prod(sizes)

    def sharded(self, tp: int, shard: int) -> int:
        """Elements of that part which FSDP leaves on a rank; it splits rows and pads the last."""
        rows, *columns = self.shape
        if self.tp_dim == 0:
            rows = math.ceil(rows / tp)
        elif self.tp_dim == 1:
            columns[0] = math.ceil(columns[0] / tp)
        return math.ceil(rows / shard) * math.prod(columns)


def shape_of(run: RunConfig) -> Shape:
    """The sizes of a run's model."""
    m, c = run.model, run.cola
    return Shape(
        dim=m.dim,
        n_layers=m.n_layers,
        n_heads=m.n_heads,
        n_kv_heads=m.kv_heads,
        head_dim=m.per_head,
        ffn_dim=m.ffn_dim,
        vocab_size=m.vocab_size,
        ranks=run.ranks(),
        activation=c.activation,
        mlp_activation=m.mlp_activation,
        bias=c.bias,
        grouped=c.grouped,
        qk_norm=m.qk_norm,
        tie_embeddings=m.tie_embeddings,
    )


def policy_of(run: RunConfig) -> Policy:
    """What a run's blocks keep for the backward pass."""
    if run.cola.memory == "cola-m":
        return "cola-m"
    return "all" if run.activation_checkpoint == "none" else run.activation_checkpoint


def predict_memory(run: RunConfig, world_size: int, device: Device) -> Memory:
    """Memory of the fullest device of a run on `world_size` processes.

    Raises:
        ValueError: a layout that does not fit the world size, the batch or the model.
    """
    run.local_batch_size(world_size)  # raises
    ranks = range(run.parallelism.pipeline_parallel)
    memories = [stage_memory(run, world_size, device, rank) for rank in ranks]
    return max(memories, key=lambda memory: memory.peak)


def stage_memory(run: RunConfig, world_size: int, device: Device, pp_rank: int) -> Memory:
    """Memory of the devices that hold one rank's share of the pipeline (the whole without one)."""
    shape, policy, p = shape_of(run), policy_of(run), run.parallelism
    tp, itemsize = p.tensor_parallel, itemsize_of(run)
    shard = p.data_parallel(world_size) // p.data_parallel_replicate
    names = _names_on(run, pp_rank)
    tensors = _tensors(shape)
    units = {name: sum(t.unsharded(tp) for t in tensors[name]) for name in names}
    local = {name: sum(t.sharded(tp, shard) for t in tensors[name]) for name in names}
    block = max((units[name] for name in names if name.startswith("layers.")), default=0)
    head = units.get("norm", 0) + units.get("lm_head", 0)
    microbatches, in_flight, rows = microbatches_of(run, world_size, pp_rank)
    accumulates = microbatches > 1

    weights = FP32 * sum(local.values())
    gradients = FP32 * sum((units if accumulates else local).values())
    head_gradients = FP32 * (local.get("norm", 0) + local.get("lm_head", 0))
    optimizer = FP32 * sum(
        _optimizer_elements(run, tensors[name], tp, shard, name) for name in names
    )
    layers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
    seq_len = run.training.seq_len
    tables = len(layers) * seq_len * 2 * shape.head_dim * FP32

    tokens = rows * seq_len
    blocks = sum((_saved(shape, policy, layer, device, tp) for layer in layers), Saved())
    one_block = _saved(shape, policy, max(layers), device, tp) if layers else Saved()
    last = saved_by_head(shape, device=device, tp=tp) if "lm_head" in names else Saved()
    working = recomputed_at_once(shape, policy, device=device, tp=tp)
    working += Saved(elements=2 * shape.ffn_dim / tp)  # gradients inside the MLP
    held = math.ceil(tokens * in_flight * (blocks + last).bytes(itemsize))
    mask = tokens * in_flight * seq_len * itemsize if _masked(run, device) else 0
    work = math.ceil(tokens * working.bytes(itemsize))
    logits = 3 * FP32 * tokens * math.ceil(shape.vocab_size / tp) if "lm_head" in names else 0

    reduced = p.data_parallel(world_size) > 1 or itemsize != FP32
    in_block = work + (itemsize * block if reduced else 0)  # its gradients, not yet reduced
    in_block = max(in_block, (itemsize + FP32) * block if reduced else 0)
    if p.pipeline_parallel > 1:  # FSDP keeps a stage gathered between microbatches
        gathered_at_loss = gathered_in_backward = itemsize * sum(units.values())
    else:
        gathered_at_loss, gathered_in_backward = itemsize * head, itemsize * 2 * block
    if world_size == 1 and itemsize == FP32:  # without FSDP
        gathered_at_loss = gathered_in_backward = 0
    before = gradients if accumulates else 0
    moments = {
        "loss": before + held + mask + gathered_at_loss + logits,
        "last block": max(before, head_gradients) + held + mask + in_block + gathered_in_backward,
        "first block": gradients
        + math.ceil(tokens * (one_block.bytes(itemsize)))
        + mask
        + in_block
        + gathered_in_backward,
    }
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        tables=tables,
        gathered=max(gathered_at_loss, gathered_in_backward),
        activations=held + mask + work,
        loss=logits,
        peak=weights + optimizer + tables + max(moments.values()),
    )


def _tensors(shape: Shape) -> dict[str, list[_Tensor]]:
    """Every parameter, by the module at the model's top that holds it."""
    block = [_Tensor(shape=(shape.dim,)) for _ in range(2)]
    if shape.qk_norm:
        block += [_Tensor(shape=(shape.head_dim,)) for _ in range(2)]
    for name, (fan_in, fan_out) in shape.projections.items():
        by_rows, rank = name in _SHARDED_BY_ROWS, shape.ranks[name]
        if not rank:
            block.append(_Tensor(shape=(fan_out, fan_in), tp_dim=0 if by_rows else 1))
            continue
        block.append(_Tensor(shape=(rank, fan_in), tp_dim=None if by_rows else 1))
        block.append(_Tensor(shape=(fan_out, rank), tp_dim=0 if by_rows else None))
        if shape.bias:
            block.append(_Tensor(shape=(rank,)))
            block.append(_Tensor(shape=(fan_out,), tp_dim=0 if by_rows else None))
    embedding = _Tensor(shape=(shape.vocab_size, shape.dim), tp_dim=0)
    return {
        "tok_embeddings": [] if shape.tie_embeddings else [embedding],
        **{f"layers.{layer}": block for layer in range(shape.n_layers)},
        "norm": [_Tensor(shape=(shape.dim,))],
        "lm_head": [embedding],
    }


def _names_on(run: RunConfig, pp_rank: int) -> list[str]:
    """The model's top modules that a rank of the pipeline holds, as torchtitan deals them."""
    degree, layers = run.parallelism.pipeline_parallel, run.model.n_layers
    if degree == 1:
        return list(_tensors(shape_of(run)))
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
    from torchtitan.distributed.pipeline_parallel import (
        _generate_llm_fqn_per_model_part,
        _get_pp_rank_to_stage_indices_mapping,
    )

    schedule = run.parallelism.pipeline_schedule
    stages = (
        degree if issubclass(get_schedule_class(schedule), PipelineScheduleSingle) else 2 * degree
    )
    parts = _generate_llm_fqn_per_model_part(stages, layers)
    mine = _get_pp_rank_to_stage_indices_mapping(pp_rank, degree, schedule, stages)
    return [name for stage in mine for name in parts[stage]]


def microbatches_of(run: RunConfig, world_size: int, pp_rank: int = 0) -> tuple[int, int, int]:
    """(microbatches a step, how many of them are saved at once, sequences of each)."""
    p, local = run.parallelism, run.local_batch_size(world_size)
    share = run.training.global_batch_size // p.data_parallel(world_size)
    if p.pipeline_parallel == 1:
        return share // local, 1, local
    rows = p.pipeline_microbatch_size
    count = local // rows
    # 1F1B starts a backward pass for every forward pass once the pipeline is full.
    at_once = min(count, p.pipeline_parallel - pp_rank) if p.pipeline_schedule == "1F1B" else count
    return share // rows, at_once, rows


def _optimizer_elements(
    run: RunConfig, tensors: list[_Tensor], tp: int, shard: int, name: str
) -> int:
    """AdamW keeps two moments; Muon one momentum of the blocks' matrices."""
    muon = run.optimizer.name == "muon" and name.startswith("layers.")
    return sum((1 if muon and len(t.shape) == 2 else 2) * t.sharded(tp, shard) for t in tensors)


def _saved(shape: Shape, policy: Policy, layer: int, device: Device, tp: int) -> Saved:
    return saved_by_block(shape, policy, layer=layer, device=device, tp=tp)


def itemsize_of(run: RunConfig) -> int:
    return 2 if run.training.precision == "bfloat16" else 4


def _masked(run: RunConfig, device: Device) -> bool:
    """Whether attention runs through a mask of (L, L) a sequence, which all blocks share."""
    attention = run.model.attention
    return attention == "sdpa" or attention == "auto" and device == "cpu"
