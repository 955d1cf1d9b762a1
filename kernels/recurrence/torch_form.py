"""The gated linear recurrence in chunks, in plain torch: any device, O(T) time and memory.

Inside a chunk the recurrence is a product of matrices, between chunks it is the state (`chunks`;
without gates and delta rule `ungated`). Chunks are processed in segments of about `ROWS` rows,
which autograd differentiates. All but a call's last segment are recomputed in the backward pass:
what is kept is the inputs, one state per segment, and of the last segment, unless it has more than
`ROWS` rows, what autograd keeps (11 times the size of its q with a gate per head, 21 with one per
feature; twice that with the delta rule). A sequence no longer than a chunk is one chunk: the
parallel form.

fp64 inputs are computed in fp64, fp32 in fp32; bf16 has bf16 GEMMs, fp32 states and gates, and with
the delta rule fp32 throughout. torch.compile unrolls the loops over chunks, so that compiling takes
time in proportion to the length; it stops at `cu_seqlens`, whose values it cannot know.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from lowline.kernels.packs import bounds_on_host
from lowline.kernels.recurrence import chunks, ungated
from lowline.kernels.recurrence.op import Call

CHUNK = 64  # rows, a power of two
# Rows of all heads in one segment: few enough for a CPU's cache, and enough that the calls of torch
# cost little beside them. More on other devices, which few rows leave idle.
ROWS = 8192
TIMES_ON_A_GPU = 16


class Segment(NamedTuple):
    """Consecutive chunks of one sequence; a short last chunk is a segment of its own, padded."""

    tokens: int
    rows: int  # per chunk


def recurrence(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents."""
    q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state_NHKV, cu_seqlens, _, scale, _ = call
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    wide = torch.promote_types(q_BTQK.dtype, torch.float32)
    bounds = [0, T] if cu_seqlens is None else bounds_on_host(cu_seqlens)
    lengths = [end - start for start, end in pairwise(bounds)]
    # packed sequences are a batch of one: a sequence's states are B of the N · H
    if initial_state_NHKV is None:
        initial = q_BTQK.new_zeros(len(lengths), B * H, K, V, dtype=wide)
    else:
        initial = initial_state_NHKV.to(wide).reshape(len(lengths), B * H, K, V)
    plain = g is None and beta_BTH is None
    if plain:
        segments = [[Segment(length, CHUNK)] for length in lengths]
    else:
        segments = [_segments(length, B * H, k_BTHK.device) for length in lengths]
    sizes = [segment.tokens for sequence in segments for segment in sequence]
    columns = [_split(x, sizes) for x in (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH)]
    inputs = list(zip(*columns, strict=True))
    outputs: list[torch.Tensor] = []
    final = []
    for sequence, S in zip(segments, initial.unbind(), strict=True):
        for segment in sequence:
            q, k, v, *rest = inputs[len(outputs)]
            part = q, k, v, *rest, S, call.gate, scale, segment.rows
            kept = len(outputs) == len(inputs) - 1 and segment.tokens * B * H <= ROWS
            if plain:
                o, S = ungated.Ungated.apply(q, k, v, S, CHUNK, scale)
            elif kept or not torch.is_grad_enabled():
                o, S = _run(*part)
            else:
                o, S = checkpoint(_run, *part, use_reentrant=False, preserve_rng_state=False)
            outputs.append(o)
        final.append(S)
    if not outputs:
        outputs.append(v_BTHV.new_empty(B, T, q_BTQK.shape[2], V))
    o_BTQV = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o_BTQV, torch.stack(final).view(-1, H, K, V)


def _segments(tokens: int, heads: int, device: torch.device) -> list[Segment]:
    """Return segments of as many chunks as suit the device; then the rest, padded to 2ⁿ rows.

    An empty batch has none.
    """
    if heads == 0:
        return []
    rows = ROWS if device.type == "cpu" else TIMES_ON_A_GPU * ROWS
    most, rest = max(1, rows // (heads * CHUNK)) * CHUNK, tokens % CHUNK
    sizes = [min(most, tokens - rest - start) for start in range(0, tokens - rest, most)]
    found = [Segment(size, CHUNK) for size in sizes]
    return found + ([Segment(rest, 1 << (rest - 1).bit_length())] if rest else [])


def _split(x: torch.Tensor | None, sizes: list[int]) -> list[Any]:
    """Return the segments' tokens; the gradient of a split is one concatenation."""
    if x is None or len(sizes) < 2:
        return [x] * len(sizes)
    return list(x.split(sizes, 1))


def _run(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BTH: torch.Tensor | None,
    S_NKV: torch.Tensor,
    gate: str,
    scale: float,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a segment's outputs, (B, T, Q, V), and the state after it."""
    B, T, H, _ = k_BTHK.shape
    type_ = q_BTQK.dtype if beta_BTH is None else S_NKV.dtype
    q_RGCK = _rows(q_BTQK, H, rows).to(type_)
    k_RCK, v_RCV = (_rows(x, H, rows).squeeze(1).to(type_) for x in (k_BTHK, v_BTHV))
    g_RCF = beta_RC1 = None
    if g is not None:
        gates = g if g.dim() == 4 else g[..., None]
        g_RCF = _rows(gates, H, rows).squeeze(1).to(S_NKV.dtype)
    if beta_BTH is not None:
        beta_RC1 = _rows(beta_BTH[..., None], H, rows).squeeze(1).to(S_NKV.dtype)
    q_RGCK = q_RGCK if scale == 1 else q_RGCK * scale
    if g is not None and g_RCF is not None and g.dim() == 4 and gate == "value":
        o_RGCV, S_NKV = chunks.by_value(q_RGCK, k_RCK, v_RCV, g_RCF, S_NKV)
    else:
        per_head = g is not None and g.dim() == 3
        o_RGCV, S_NKV = chunks.by_key(q_RGCK, k_RCK, v_RCV, beta_RC1, g_RCF, per_head, S_NKV)
    o = o_RGCV.view(B, H, -1, *o_RGCV.shape[1:]).permute(0, 2, 4, 1, 3, 5)
    o_BTQV = o.reshape(B, -1, q_BTQK.shape[2], v_BTHV.shape[-1])
    return o_BTQV[:, :T].to(q_BTQK.dtype), S_NKV


def _rows(x_BTQF: torch.Tensor, heads: int, rows: int) -> torch.Tensor:
    """Return (B, T, Q, F) as (R, G, C, F), zero-padded; contiguous: strided GEMMs are slow."""
    B, T, Q, F = x_BTQF.shape
    if T % rows:
        x_BTQF = torch.nn.functional.pad(x_BTQF, (0, 0, 0, 0, 0, -T % rows))
    chunked = x_BTQF.reshape(B, -1, rows, heads, Q // heads, F)
    return chunked.permute(0, 3, 1, 4, 2, 5).reshape(-1, Q // heads, rows, F)
