"""What blockwise attention transfer costs before it starts: disk, time, devices.

A model of L layers is cut into blocks of k. The inputs of every block, for T tokens of width d, are
written to disk by one forward pass of the teacher, in bf16: 2·T·d bytes per block, so

    disk = 2·T·d·(L/k)

as LoLCATs counts (arXiv 2410.10254: Llama-3.1-405B and 50M tokens take 200 TB with k = 1 and 22 TB
with k = 9). The first block's inputs are embeddings, which are counted all the same. Then every
block trains by itself, on a device of its own: one forward pass of its frozen layers a token, and
the mixers' part, which is small beside it.

Time is FLOPs over `utilization` of a device's peak; both are assumptions, not measurements. Left
out: attention's scores (linear in the length, small for sequences of a few thousand tokens), the
mixers' own products, reading the shards, and the stage that trains the stitched model.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowline.cola.accounting import Shape, parameters
from lowline.errors import LowlineError

BF16 = 2  # bytes
PEAKS = {  # bf16 FLOP/s without sparsity and bytes of memory, from the makers' data sheets
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 192e9),
}


@dataclass(frozen=True, kw_only=True)
class BlockwisePlan:
    """Costs of one choice of k; bytes, FLOPs and seconds."""

    block_size: int  # k
    blocks: int
    disk: int
    teacher_flops: float  # the forward pass that writes the inputs
    block_flops: float  # training one block
    block_weights: int  # bytes of a block's frozen weights in bf16
    teacher_weights: int  # bytes of the complete model's in bf16
    teacher_devices: int  # that hold the teacher while inputs are written
    block_devices: int  # that hold one block
    teacher_seconds: float
    block_seconds: float

    @property
    def devices(self) -> int:
        """To train all blocks at once."""
        return self.blocks * self.block_devices


def plan_blockwise(
    shape: Shape,
    *,
    tokens: float,
    block_size: int,
    epochs: int = 1,
    device: str = "h100",
    utilization: float = 0.4,
) -> BlockwisePlan:
    """Plan blockwise transfer.

    Args:
        shape: of the teacher.
        tokens: T, whose hidden states are stored.
        block_size: k, layers a block; the last block holds what is left over.
        epochs: passes of each block over them.
        device: a key of `PEAKS`.
        utilization: part of a device's peak that is reached.

    Raises:
        ValueError: a number out of its range, an unknown device.
    """
    if device not in PEAKS:
        raise LowlineError(f"device = {device!r}; choose from {', '.join(PEAKS)}")
    if not 1 <= block_size <= shape.n_layers:
        raise LowlineError(f"block_size = {block_size}; the model has {shape.n_layers} layers")
    if tokens < 1 or epochs < 1:
        raise LowlineError(f"tokens = {tokens}, epochs = {epochs}; both are at least 1")
    if not 0 < utilization <= 1:
        raise LowlineError(f"utilization = {utilization}; it lies in (0, 1]")
    peak, memory = PEAKS[device]
    count = parameters(shape)
    in_layers = count.low_rank + count.dense
    block = in_layers * block_size / shape.n_layers
    teacher_devices = _devices(count.total * BF16, memory)
    block_devices = _devices(block * BF16, memory)
    teacher_flops = 2.0 * in_layers * tokens
    block_flops = 2.0 * block * tokens * epochs
    speed = peak * utilization
    return BlockwisePlan(
        block_size=block_size,
        blocks=-(-shape.n_layers // block_size),
        disk=stored_bytes(
            tokens=int(tokens), dim=shape.dim, n_layers=shape.n_layers, block_size=block_size
        ),
        teacher_flops=teacher_flops,
        block_flops=block_flops,
        block_weights=round(block * BF16),
        teacher_weights=count.total * BF16,
        teacher_devices=teacher_devices,
        block_devices=block_devices,
        teacher_seconds=teacher_flops / (speed * teacher_devices),
        block_seconds=block_flops / (speed * block_devices),
    )


def stored_bytes(
    *, tokens: int, dim: int, n_layers: int, block_size: int, itemsize: int = BF16
) -> int:
    """Return bytes of every block's inputs, in bf16 2·T·d·⌈L/k⌉."""
    return itemsize * tokens * dim * -(-n_layers // block_size)


def _devices(weights: float, memory: float) -> int:
    """Devices that hold so many bytes, with a tenth of their memory left for the rest."""
    return max(1, -(-int(weights) // int(0.9 * memory)))
