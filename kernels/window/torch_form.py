"""Window-plus-linear attention in plain torch, one group of blocks at a time.

A block is C = max(window, 64) queries. It needs the keys of its own block and of the one before,
where an element (i, j) is exact if i - j < window and linear if not, and the sum S of everything
before those two:

    W_ij = γ e^{s_ij - c_i} (exact)  or  λφq_i·φk_j (older)
    [numerator, denominator] = W [v, 1] + λφq S

so a column of ones carries the denominator through every product. Blocks are processed in groups of
about a million scores (more on a GPU): temporaries do not grow with T, and what is kept for the
backward pass is the inputs and one S per group; all else is recomputed.

Backward, with u_i = [do_i, -do_i·o_i] / denominator_i:

    dW = u [v, 1]ᵀ;  dγ = Σ e^{s-c} dW;  ds = W dW, less its row sum at the arg max (through c)
    d(λφq) = dW_older φk + u Sᵀ;  dφk = dW_olderᵀ λφq + [v, 1] dSᵀ;  d[v, 1] = Wᵀ u + φk dS
    dS of a block's keys = Σ over later blocks of (λφq)ᵀ u

Differentiable once. bf16 is computed in fp32.

Shapes: those of `op`; g blocks in a group; in blocks the heads precede the rows. The query
heads of one key/value head are concatenated: R = C·H/G rows over G heads, Q = C·H/P over P.
X = s + 2C columns: the sinks, the block before, the block itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowline.kernels.packs import bounds_on_host
from lowline.kernels.window.state import WindowCall

SCORES_A_GROUP = 2**20  # fits a CPU's cache
TIMES_ON_A_GPU = 16  # there a group costs dozens of launches, and few scores leave it idle


def attend(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return (o_BTHV, S_NPFW) (see `reference.attend`)."""
    *tensors, cu, window, prefix, scale, _ = call
    shape = _Shape(window, prefix, scale)
    if cu is None:
        return _attend_batch(*tensors, shape)
    q, k, v, phi_q, phi_k, sink_k, sink_v, *factors, S, length = tensors
    outputs, states = [], []
    bounds = bounds_on_host(cu)
    for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        queries, keys = slice(a, b), slice(a + n * prefix, b + (n + 1) * prefix)
        one = slice(n, n + 1)
        o, S_n = _attend_batch(
            *(q[:, queries], k[:, keys], v[:, keys], phi_q[:, queries], phi_k[:, keys]),
            *(sink_k[one], sink_v[one], *factors, S[one], length[one], shape),
        )
        outputs.append(o)
        states.append(S_n)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _attend_batch(*args: Any) -> tuple[Tensor, Tensor]:
    q, v, S = args[0], args[2], args[9]
    if q.shape[1] == 0:
        return q.new_empty(*q.shape[:3], v.shape[-1]), S
    return _Attend.apply(*args)


class _Shape(NamedTuple):
    window: int
    prefix: int  # rows of k before the first query's
    scale: float

    @property
    def C(self) -> int:
        return max(self.window, 64)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, shape = args
        o, S, kept = _forward(tensors, shape)
        ctx.save_for_backward(*tensors, *kept)
        ctx.shape = shape
        return o, S

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, do: Tensor, dS: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
        gradients = _backward(tensors, kept, do, dS, ctx.shape)
        return (*(g.to(x.dtype) for g, x in zip(gradients, tensors[:10], strict=True)), None, None)


def _forward(tensors: Sequence[Tensor], shape: _Shape) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return o, the sum after the last token, and the sum before each group."""
    q, v, S = tensors[0], tensors[2], tensors[9]
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    kept = []
    for first, count in _groups(tensors, shape):
        kept.append(S)
        x = _load(tensors, shape, first, count)
        S_blocks, S = _running_sums(x, shape, S)
        _store(o, _normalised(_weigh(x, S_blocks)), first * shape.C)
    # What is older than the last token: all before its two blocks, and the first rows of the two.
    n = _rows_of_the_end(q.shape[1], shape)
    end = x.phi_k[:, -1, :, :n].mT @ _spread(x.v1, x.phi_k)[:, -1, :, x.sinks : x.sinks + n]
    return o, S_blocks[:, -1] + end, kept


def _backward(
    tensors: Sequence[Tensor], kept: Sequence[Tensor], do: Tensor, dS_end: Tensor, shape: _Shape
) -> list[Tensor]:
    """Return the gradients of the first ten tensors."""
    gradients = [torch.zeros_like(x, dtype=dS_end.dtype) for x in tensors[:9]]
    dq, dk, dv, dphi_q, dphi_k, dsink_k, dsink_v, dgamma, dlam = gradients
    C, T, n = shape.C, do.shape[1], _rows_of_the_end(do.shape[1], shape)
    dS = torch.zeros_like(dS_end)  # of the sum before the blocks after this group
    for (first, count), S in reversed(list(zip(_groups(tensors, shape), kept, strict=True))):
        x = _load(tensors, shape, first, count)
        S_blocks, _ = _running_sums(x, shape, S)
        y = _weigh(x, S_blocks)
        do_rows = _blocks(do, first * C, count, C).to(y.dtype).reshape(*y.shape[:-1], -1)
        delta = (do_rows * y[..., :-1]).sum(-1, keepdim=True) / y[..., -1:]
        u = torch.cat([do_rows, -delta], dim=-1) / y[..., -1:]
        u_P = u.view(*x.phi_q.shape[:-1], u.shape[-1])
        ends = (first + count) * C >= T

        dW = u @ x.v1.mT
        ds = dW * x.E
        dgamma += ds.sum(-1).view(*x.raw_phi_q.shape[:-1]).sum((0, 1, 3))
        ds *= x.gamma
        ds.scatter_add_(-1, x.argmax, -ds.sum(-1, keepdim=True))
        ds *= shape.scale
        dolder = (dW[..., x.sinks :] * x.older).view(*x.phi_q.shape[:-1], 2 * C)

        # The sum before block b holds the keys of the blocks before it.
        dS_blocks = x.phi_q.mT @ u_P
        if ends:
            dS_blocks[:, -1] += dS_end
        dsums = dS[:, None] + dS_blocks.flip(1).cumsum(1).flip(1) - dS_blocks
        dS = dS + dS_blocks.sum(1)

        dphi = (dolder @ x.phi_k + u_P @ S_blocks.mT).view_as(x.raw_phi_q)  # of λφ(q)
        dlam += (dphi * x.raw_phi_q).sum((0, 1, 3, 4))
        _store(dphi_q, dphi * x.lam, first * C)
        _store(dq, ds @ x.k, first * C)

        dk_X, dv_X = ds.mT @ x.q, (x.W.mT @ u)[..., :-1]
        dphi_2C = dolder.mT @ x.phi_q
        v1_P = _spread(x.v1, x.phi_k)[..., x.sinks :, :]
        dphi_2C[..., :C, :] += v1_P[..., :C, :] @ dsums.mT
        dv_P = x.phi_k[..., :C, :] @ dsums
        dv_X[..., x.sinks : x.sinks + C, :] += _gather_heads(dv_P, dv_X)[..., :-1]
        if ends:
            dphi_2C[:, -1, :, :n] += v1_P[:, -1, :, :n] @ dS_end.mT
            dv_P = (x.phi_k[:, -1, :, :n] @ dS_end)[:, None]
            dv_X[:, -1:, :, x.sinks : x.sinks + n] += _gather_heads(dv_P, dv_X)[..., :-1]

        start = (first - 1) * C + shape.prefix
        _add_pairs(dk, dk_X[..., x.sinks :, :], start)
        _add_pairs(dv, dv_X[..., x.sinks :, :], start)
        _add_pairs(dphi_k, dphi_2C if x.summed is None else dphi_2C * x.summed, start)
        dsink_k += dk_X[..., : x.sinks, :].sum(1).transpose(1, 2)
        dsink_v += dv_X[..., : x.sinks, :].sum(1).transpose(1, 2)
    return [*gradients, dS]


class _Group(NamedTuple):
    """A group of query blocks, the keys around them, and the weights between the two."""

    q: Tensor  # (N, g, G, R, D)
    raw_phi_q: Tensor  # φ(q): (N, g, H, C, F)
    phi_q: Tensor  # λφ(q): (N, g, P, Q, F)
    k: Tensor  # (N, g, G, X, D)
    v1: Tensor  # [v, 1]: (N, g, G, X, W)
    phi_k: Tensor  # (N, g, P, 2C, F), zero for sinks
    summed: Tensor | None  # (N, g, 1, 2C, 1): no sink; None where there is none
    gamma: Tensor  # (G, R, 1)
    lam: Tensor  # (H, 1, 1)
    E: Tensor  # e^{s - c}, zero where not exact: (N, g, G, R, X)
    argmax: Tensor  # of the scores: (N, g, G, R, 1)
    W: Tensor  # (N, g, G, R, X)
    older: Tensor  # which of the last 2C columns are linear: (R, 2C)

    @property
    def sinks(self) -> int:
        return self.k.shape[-2] - self.phi_k.shape[-2]


def _load(tensors: Sequence[Tensor], shape: _Shape, first: int, count: int) -> _Group:
    q, k, v, phi_q, phi_k, sink_k, sink_v, gamma_H, lam_H, S, length_N = tensors
    C, w, dtype, device = shape.C, shape.window, S.dtype, q.device
    N, s, G, H, P = len(length_N), sink_k.shape[1], k.shape[2], q.shape[2], phi_k.shape[2]
    start = (first - 1) * C + shape.prefix

    def pairs(x: Tensor) -> Tensor:
        blocks = _blocks(x, start, count + 1, C).to(dtype)
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=3)

    def behind_sinks(sink: Tensor, rows: Tensor) -> Tensor:
        sink = sink.transpose(1, 2)[:, None].expand(-1, count, -1, -1, -1)
        return torch.cat([sink.to(dtype), rows], dim=3) if s else rows

    q_rows = _blocks(q, first * C, count, C).to(dtype).reshape(N, count, G, H // G * C, q.shape[-1])
    raw_phi_q = _blocks(phi_q, first * C, count, C).to(dtype).contiguous()
    lam = lam_H[:, None, None]
    k_X = behind_sinks(sink_k, pairs(k))
    v_X = behind_sinks(sink_v, pairs(v))
    phi_k_2C = pairs(phi_k)
    phi_q_rows = (raw_phi_q * lam).view(N, count, P, H // P * C, phi_q.shape[-1])

    # Positions are counted from the group's first query; `begin` is the sequence's first token.
    i = torch.arange(C, device=device).repeat(H // G)[:, None]
    j = torch.arange(2 * C, device=device) - C
    begin = -length_N[:, None] - first * C
    exact, older = (j <= i) & (j > i - w), j <= i - w
    scores = shape.scale * (q_rows @ k_X.mT)
    scores[..., s:].masked_fill_(~exact, -torch.inf)
    if first == 0:
        missing = j < begin
        scores[:, 0, ..., s:].masked_fill_(missing[:, None, None], -torch.inf)
    summed = None
    if s:
        block = C * torch.arange(count, device=device)[:, None]
        n1g = begin[:, :, None, None]
        inside = n1g + torch.arange(s, device=device) > block[..., None] + i - w
        scores[..., :s].masked_fill_(inside[:, :, None], -torch.inf)
        if first * C < s + C:
            summed = (j + block >= begin[:, None] + s)[:, :, None, :, None]
            phi_k_2C = phi_k_2C * summed
    top = scores.max(dim=-1, keepdim=True)
    E = scores.sub_(top.values).exp_()
    gamma = gamma_H[:, None, None].expand(H, C, 1).reshape(G, -1, 1)
    W = E * gamma
    W[..., s:] += (phi_q_rows @ phi_k_2C.mT).view(*W.shape[:-1], -1) * older
    v1_X = torch.cat([v_X, torch.ones_like(v_X[..., :1])], dim=-1)
    return _Group(
        *(q_rows, raw_phi_q, phi_q_rows, k_X, v1_X, phi_k_2C, summed),
        *(gamma, lam, E, top.indices, W, older),
    )


def _running_sums(x: _Group, shape: _Shape, S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums before each block's two blocks of keys, (N, g, P, F, W), and at the end."""
    rows = slice(x.sinks, x.sinks + shape.C)
    sums = x.phi_k[..., : shape.C, :].mT @ _spread(x.v1[..., rows, :], x.phi_k)
    ends = S[:, None] + sums.cumsum(1)
    return torch.cat([S[:, None], ends[:, :-1]], dim=1), ends[:, -1]


def _weigh(x: _Group, S_blocks: Tensor) -> Tensor:
    """Return [numerator, denominator]: (N, g, G, R, W)."""
    y = x.W @ x.v1
    return y.add_((x.phi_q @ S_blocks).view_as(y))


def _normalised(y: Tensor) -> Tensor:
    return y[..., :-1] / y[..., -1:]


def _rows_of_the_end(T: int, shape: _Shape) -> int:
    """Return how many of the last block's 2C keys are older than the last token."""
    before_last = (-(-T // shape.C) - 2) * shape.C
    return T - shape.window - before_last


def _groups(tensors: Sequence[Tensor], shape: _Shape) -> list[tuple[int, int]]:
    """Return (first block, blocks) of each group."""
    N, T, H, _ = tensors[0].shape
    blocks = -(-T // shape.C)
    scores = N * H * shape.C * (2 * shape.C + tensors[5].shape[1])
    allowed = SCORES_A_GROUP * (1 if tensors[0].device.type == "cpu" else TIMES_ON_A_GPU)
    size = max(1, allowed // max(scores, 1))
    return [(b, min(size, blocks - b)) for b in range(0, blocks, size)]


def _blocks(x_BTHD: Tensor, start: int, count: int, C: int) -> Tensor:
    """Return blocks of C rows from row `start` on, zeros outside x: (B, count, H, C, D)."""
    stop, T = start + count * C, x_BTHD.shape[1]
    lo, hi = min(max(start, 0), T), max(min(stop, T), 0)
    part = x_BTHD[:, lo:hi]
    if hi - lo < stop - start:
        part = F.pad(part, (0, 0, 0, 0, lo - start, stop - hi))
    return part.unflatten(1, (count, C)).transpose(2, 3)


def _store(out_BTHD: Tensor, blocks: Tensor, start: int) -> None:
    """Write blocks of rows (or of each head's rows, one head after another) from `start` on."""
    H, D = out_BTHD.shape[2:]
    N, g, heads, C = blocks.shape[:4]
    rows = blocks.reshape(N, g, H, heads * C // H, D).transpose(2, 3).flatten(1, 2)
    stop = min(start + rows.shape[1], out_BTHD.shape[1])
    out_BTHD[:, start:stop] = rows[:, : stop - start]


def _add_pairs(out_BUHD: Tensor, pairs: Tensor, start: int) -> None:
    """Add the gradients of pairs of blocks, each overlapping the last; the first is at `start`."""
    C = pairs.shape[3] // 2
    for half, offset in ((pairs[:, :, :, :C], start), (pairs[:, :, :, C:], start + C)):
        rows = half.transpose(2, 3).flatten(1, 2)
        lo, hi = max(offset, 0), min(offset + rows.shape[1], out_BUHD.shape[1])
        if lo < hi:
            out_BUHD[:, lo:hi] += rows[:, lo - offset : hi - offset]


def _spread(x_NgGCD: Tensor, like_NgPCF: Tensor) -> Tensor:
    """Repeat key/value heads for the heads of φ(k)."""
    repeats = like_NgPCF.shape[2] // x_NgGCD.shape[2]
    return x_NgGCD if repeats == 1 else x_NgGCD.repeat_interleave(repeats, dim=2)


def _gather_heads(x_NgPCD: Tensor, like_NgGCD: Tensor) -> Tensor:
    """Return the gradient of `_spread`."""
    G = like_NgGCD.shape[2]
    return x_NgPCD if x_NgPCD.shape[2] == G else x_NgPCD.unflatten(2, (G, -1)).sum(3)
