"""Window and slots in plain torch, blocks of C = max(window, 64) queries at a time.

A block needs the keys of its own block and of the one before, where an element (i, j) is exact if
i - j < window and older if not, and the slots' sums over everything before those two. With s the
scores of those 2C keys, r_jm = 1 where token j has slot m and masks for what is older,

    n = n_before + older·r,      a = (q·Kᵀ_before + (s older)·r) / n + b
    y = [e^{s - c} exact + (e^{a - c}·rᵀ) older] [v, 1] + e^{a - c}·[V, n]_before

for every c; the largest exponent of a row is used. All are products of matrices; autograd keeps the
2C + M weights of each query. Scores are in bits (`lowline.kernels.exponent`).

Shapes: those of `op`; n blocks; X = 2C + s columns: the block before, the block itself, the sinks;
P of them can be older. Blocks have h = H/G query heads, one after another: R = h·C rows. Time
counts from the first query; position from the sequence's first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.kernels.exponent import LOG2_E


def attend(
    q_NTHD: torch.Tensor,
    k_NUGD: torch.Tensor,
    v_NUGV: torch.Tensor,
    slot_NUG: torch.Tensor,
    bias_HM: torch.Tensor,
    sink_k_NsGD: torch.Tensor,
    sink_v_NsGV: torch.Tensor,
    keys_NGMD: torch.Tensor,
    values_NGMV: torch.Tensor,
    count_NGM: torch.Tensor,
    length_N: torch.Tensor,
    *,
    window: int,
    prefix: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return o_NTHV, and the slots' sums of keys, values and tokens; see `reference.attend`."""
    N, T, H, D = q_NTHD.shape
    G, sinks, dtype, device = k_NUGD.shape[2], sink_k_NsGD.shape[1], keys_NGMD.dtype, q_NTHD.device
    V, M = v_NUGV.shape[-1], bias_HM.shape[-1]
    C, h = max(window, 64), H // G
    n, R = -(-T // C), h * C

    # Rows of keys, from time -C to nC; r is 0 for what is no token, or a sink.
    def padded(x_NUG_: torch.Tensor) -> torch.Tensor:
        return F.pad(x_NUG_, (0, 0, 0, 0, C - prefix, n * C - T)).transpose(1, 2)

    k, v1 = padded(k_NUGD.to(dtype)), padded(F.pad(v_NUGV.to(dtype), (0, 1), value=1.0))
    time = torch.arange(-C, n * C, device=device)
    position = time + length_N[:, None]
    joins = (position >= sinks) & (time >= -prefix)
    slots = torch.arange(M, device=device)
    r = ((padded(slot_NUG[..., None]) == slots) & joins[:, None, :, None]).to(dtype)
    sums = torch.cat([values_NGMV, count_NGM[..., None]], -1)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (n + 1, C))

    def pairs(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([blocks(x)[:, :, :-1], blocks(x)[:, :, 1:]], 3)

    def before(first: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the slots' sums of x before each block's pair."""
        of_block = blocks(r)[:, :, :-2].mT @ blocks(x)[:, :, :-2]
        return torch.cat([first[:, :, None], of_block], 2).cumsum(2)

    def zero_where(mask: torch.Tensor) -> torch.Tensor:
        """Return 0 where mask, else -inf; adding it takes a sixth of masked_fill's CPU time."""
        return torch.zeros((), dtype=dtype, device=device).where(mask, -torch.inf)

    q = F.pad(q_NTHD.to(dtype) * (scale * LOG2_E), (0, 0, 0, 0, 0, n * C - T)).unflatten(1, (n, C))
    q = q.unflatten(3, (G, h)).permute(0, 3, 1, 4, 2, 5).reshape(N, G, n, R, D)
    i = torch.arange(C, device=device).repeat(h)[:, None]
    j = torch.arange(-C, C, device=device)
    is_token = pairs((position >= 0)[:, None, :, None])[..., 0]  # (N, 1, n, 2C)
    exact = ((j <= i) & (j > i - window)) & is_token[..., None, :]
    k_X, v_X = pairs(k), pairs(v1)
    if sinks:  # columns after those of the pair, where they are not within the window
        start = position[:, C::C][:, None, :, None, None]  # of each block
        outside = torch.arange(sinks, device=device) <= start + i - window
        exact = torch.cat([exact, outside], -1)
        sink_v = F.pad(sink_v_NsGV.to(dtype), (0, 1), value=1.0)
        k_X, v_X = (
            torch.cat([x, sink.to(dtype).transpose(1, 2)[:, :, None].expand(-1, -1, n, -1, -1)], 3)
            for x, sink in ((k_X, sink_k_NsGD), (v_X, sink_v))
        )
    scores = q @ k_X.mT
    e = scores + zero_where(exact)

    P = C if window >= C else 2 * C  # only the first P columns can be older
    older = (j[:P] <= i - window).to(dtype)
    r_P = blocks(r)[:, :, :-1] if window >= C else pairs(r)
    sums_before = before(sums, v1)
    count = (older[:C] @ r_P + sums_before[..., None, :, -1])[:, :, :, None]  # (N, G, n, 1, C, M)
    a = q @ before(keys_NGMD, k).mT + (scores[..., :P] * older) @ r_P
    b = bias_HM.to(dtype).view(G, 1, h, 1, M) * LOG2_E
    a = torch.addcmul(b, a.unflatten(3, (h, C)), 1 / count.clamp(min=1))
    a = (a + zero_where(count > 0)).flatten(3, 4)
    c = torch.maximum(e.detach().amax(-1, keepdim=True), a.detach().amax(-1, keepdim=True))
    weight = (a - c).exp2()
    y = (e - c).exp2() @ v_X + weight @ sums_before
    y = y + ((weight @ r_P.mT) * older) @ v_X[..., :P, :]
    o = (y[..., :-1] / y[..., -1:]).view(N, G, n, h, C, V)
    o_NTHV = o.permute(0, 2, 4, 1, 3, 5).reshape(N, n * C, H, V)[:, :T].to(q_NTHD.dtype)

    end = max(C + T - window, 0)  # rows that are older than the last token
    r_end = r[:, :, :end].mT
    sums = sums + r_end @ v1[:, :, :end]
    return o_NTHV, keys_NGMD + r_end @ k[:, :, :end], sums[..., :-1], sums[..., -1]
