"""Keys and values of 8 bits in a state: of each token and head 127 steps to its largest feature.

A vector x of D features becomes D + 4 bytes: integers r in -127 … 127, and the scale s in fp32,

    x ≈ s · r,      s = max |x| / 127, rounded down to 17 bits,      r = round(x / s)

so that s · r is exact in fp32, and packing it again gives the same bytes. A memory that computes
with rounded keys and values therefore loses nothing when its state is packed between calls. D is a
multiple of 4. Zeros are packed as zeros. One scale per token and head is that of int8 caches such
as llama.cpp's Q8_0, which has one for 32 features.
"""

from __future__ import annotations

from typing import Any

import torch

from lowline.kernels.memory.op import MemoryState
from lowline.kernels.window.state import WindowState

SCALE_BYTES = 4
LEVELS = 127
LOST_BITS = 7  # of the scale's 24; LEVELS has 7
PACKED = ("k", "v", "sink_k", "sink_v", "row_k", "row_v")

State = MemoryState | WindowState


def round_int8(x: torch.Tensor) -> torch.Tensor:
    """Return x as it is after packing, in its dtype, fp32 or fp64; the gradient is that of x."""
    return _Round.apply(x)  # type: ignore[no-any-return]


def pack(x: torch.Tensor) -> torch.Tensor:
    """Return (…, D) as int8 (…, D + 4). A vector with a number that is not finite becomes NaN."""
    scale, levels = _levels(x.detach())
    return torch.cat([levels.to(torch.int8), scale.contiguous().view(torch.int8)], -1)


def unpack(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the (…, D) that int8 (…, D + 4) stands for."""
    levels, scale = packed.split([packed.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
    return levels.to(dtype) * scale.contiguous().view(torch.float32).to(dtype)


def pack_state(state: State) -> State:
    """Return a state with packed keys and values."""
    return each_kept(state, pack)


def unpack_state(state: State, dtype: torch.dtype = torch.float32) -> State:
    """Return a state with keys and values of `dtype`."""
    return each_kept(state, lambda x: unpack(x, dtype))


def is_packed(state: State) -> bool:
    return state.k.dtype == torch.int8


def each_kept(state: State, change: Any) -> State:
    """Return a state with its keys and values changed."""
    names = [name for name in PACKED if name in state._fields]
    return state._replace(**{name: change(getattr(state, name)) for name in names})


def _levels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s, (…, 1) in fp32, and r in x's dtype."""
    of_bits = (x.abs().amax(-1, keepdim=True).to(torch.float32) / LEVELS).view(torch.int32)
    scale = (of_bits >> LOST_BITS << LOST_BITS).view(torch.float32)
    levels = (x / scale.to(x.dtype)).round().nan_to_num(0, 0, 0).clamp(-LEVELS, LEVELS)
    return torch.where(scale.isinf(), torch.nan, scale), levels


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scale, levels = _levels(x)
        return levels * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return dy
