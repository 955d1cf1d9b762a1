"""Memory of one device of a run, predicted from its configuration.

A device holds its shards of weights, gradients and optimizer state (fp32, but weights that do not
train in the compute type), the parameters that FSDP has gathered in the compute type, what the
forward pass saved, and the buffers of the loss. These do not all peak together, so the peak is that
of the three moments which can be the highest:

    loss         everything saved, and three fp32 tensors as large as the logits
    last block   everything saved, one block's gathered parameters and gradients on their way out
    first block  all gradients, one block's saved activations, the same buffers

With gradient accumulation FSDP keeps unsharded fp32 gradients between microbatches and shards them
after the last one. Gradients and optimizer state are of what trains. A transfer keeps q, k, v and
o of every mixer and one block's forward pass; a distillation's teacher is held in the compute type,
and its logits exist for `logit_chunks` at a time.

Left out: what mixers keep beside q, k, v and o (features, states), memory of the libraries, of
communication and of the allocator's gaps, and what `torch.compile` spares (the figures are those
of eager execution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowline.cola.accounting import (
    Device,
    Policy,
    Saved,
    recomputed_at_once,
    saved_by_block,
    saved_by_head,
)
from lowline.train.config.optimizer import MuonConfig
from lowline.train.config.run import RunConfig
from lowline.train.cost.parameters import (
    Parameter,
    parameters_of,
    shape_of,
    shape_of_model,
    teacher_count,
    teacher_shape,
)

__all__ = ["Memory", "predict_memory", "shape_of", "shape_of_model", "stage_memory"]

FP32 = 4


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
    teacher: int  # its weights
    peak: int


def policy_of(run: RunConfig) -> Policy:
    """Return what a run's blocks keep for the backward pass."""
    if run.cola.memory == "cola-m":
        return "cola-m"
    return "all" if run.activation_checkpoint == "none" else run.activation_checkpoint


def predict_memory(run: RunConfig, world_size: int, device: Device) -> Memory:
    """Return the memory of the fullest device of a run on `world_size` processes.

    Raises:
        ValueError: a layout that does not fit the world size, the batch or the model.
    """
    run.local_batch_size(world_size)  # raises
    ranks = range(run.parallelism.pipeline_parallel)
    memories = [stage_memory(run, world_size, device, rank) for rank in ranks]
    return max(memories, key=lambda memory: memory.peak)


def stage_memory(run: RunConfig, world_size: int, device: Device, pp_rank: int) -> Memory:
    """Return the memory of the devices with one rank's share of the pipeline, if there is one."""
    shape, policy, p = shape_of(run), policy_of(run), run.parallelism
    tp, itemsize = p.tensor_parallel, itemsize_of(run)
    shard = p.data_parallel(world_size) // p.data_parallel_replicate
    names = _names_on(run, pp_rank)
    tensors = parameters_of(run)
    units = {name: sum(t.unsharded(tp) for t in tensors[name]) for name in names}
    local = {name: sum(t.sharded(tp, shard) for t in tensors[name]) for name in names}
    in_layers = [name for name in names if name.startswith("layers.")]
    block = max((units[name] for name in in_layers), default=0)
    head = units.get("norm", 0) + units.get("lm_head", 0)
    microbatches, in_flight, rows = microbatches_of(run, world_size, pp_rank)
    accumulates = microbatches > 1

    trained = {name: [t for t in tensors[name] if t.trains] for name in names}
    trained_units = {name: sum(t.unsharded(tp) for t in trained[name]) for name in names}
    trained_local = {name: sum(t.sharded(tp, shard) for t in trained[name]) for name in names}
    frozen = sum(t.sharded(tp, shard) for name in names for t in tensors[name] if t.is_rounded)
    weights = FP32 * sum(local.values()) - (FP32 - itemsize) * frozen
    gradients = FP32 * sum((trained_units if accumulates else trained_local).values())
    head_gradients = FP32 * (trained_local.get("norm", 0) + trained_local.get("lm_head", 0))
    optimizer = FP32 * sum(
        _optimizer_elements(run, trained[name], tp, shard, name) for name in names
    )
    layers = [int(name.removeprefix("layers.")) for name in in_layers]
    seq_len = run.training.seq_len
    tables = len(layers) * seq_len * 2 * shape.head_dim * FP32

    tokens = rows * seq_len
    blocks = sum(
        (saved_by_block(shape, policy, device=device, tp=tp, layer=n) for n in layers), Saved()
    )
    one_block = saved_by_block(shape, policy, device=device, tp=tp) if layers else Saved()
    last = saved_by_head(shape, device=device, tp=tp) if "lm_head" in names else Saved()
    working = recomputed_at_once(shape, policy, device=device, tp=tp)
    working += Saved(elements=2 * shape.ffn_dim / tp)  # gradients inside the MLP
    held = math.ceil(tokens * in_flight * (blocks + last).bytes(itemsize))
    mask = tokens * in_flight * seq_len * itemsize if _masked(run, device) else 0
    work = math.ceil(tokens * working.bytes(itemsize))
    logits = 0
    if "lm_head" in names:
        width = math.ceil(shape.vocab_size / tp)
        if run.objective.needs_teacher:  # tensor-parallel ranks gather the logits of a chunk
            width = shape.vocab_size
        chunks = run.objective.logit_chunks(run, rows)
        logits = run.objective.logit_tensors * FP32 * tokens * width // chunks
    teacher = 0
    if run.objective.mixers_only:
        held, mask = _held_in_transfer(run, tokens), 0
        work = math.ceil(tokens * one_block.bytes(itemsize))  # no more than with a graph
        one_block = Saved()
    if run.objective.needs_teacher:
        of_teacher = teacher_shape(run)
        teacher = itemsize * math.ceil(teacher_count(run) / (shard * tp))
        tables += of_teacher.n_layers * seq_len * 2 * of_teacher.head_dim * FP32

    reduced = p.data_parallel(world_size) > 1 or itemsize != FP32
    out_of_block = max((trained_units[name] for name in in_layers), default=0)
    in_block = work + (itemsize * out_of_block if reduced else 0)  # gradients, not yet reduced
    in_block = max(in_block, (itemsize + FP32) * out_of_block if reduced else 0)
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
        teacher=teacher,
        peak=weights + optimizer + tables + teacher + max(moments.values()),
    )


def _held_in_transfer(run: RunConfig, tokens: int) -> int:
    """Return bytes of every mixer's q, k, v and o, and of the two outputs that its loss
    compares.
    """
    m, itemsize = run.model, itemsize_of(run)
    tp = run.parallelism.tensor_parallel  # of which a rank has some heads
    heads = 2 * m.n_heads + 2 * m.kv_heads
    elements = m.per_head * (heads * itemsize + 2 * m.n_heads * FP32) // tp
    return len(run.mixer_layers()) * tokens * elements


def _names_on(run: RunConfig, pp_rank: int) -> list[str]:
    """Return the model's top modules that a rank of the pipeline holds, as torchtitan deals
    them.
    """
    degree, layers = run.parallelism.pipeline_parallel, run.model.n_layers
    if degree == 1:
        return list(parameters_of(run))
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
    """Return microbatches per step, how many are saved at once, and the sequences of each."""
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
    run: RunConfig, tensors: list[Parameter], tp: int, shard: int, name: str
) -> int:
    """AdamW keeps two moments; Muon one momentum of the blocks' matrices."""
    muon = isinstance(run.optimizer, MuonConfig) and name.startswith("layers.")
    return sum((1 if muon and len(t.shape) == 2 else 2) * t.sharded(tp, shard) for t in tensors)


def itemsize_of(run: RunConfig) -> int:
    return 2 if run.training.precision == "bfloat16" else 4


def _masked(run: RunConfig, device: Device) -> bool:
    """Return whether attention runs through a mask of (L, L) a sequence, which all blocks share."""
    attention = run.model.attention
    return attention == "sdpa" or attention == "auto" and device == "cpu"
