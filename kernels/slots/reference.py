"""Window and slots by the book: one sequence, one token at a time.

The arguments are `op.slot_window_attention`'s after its checks: k, v and r begin with `prefix` rows
of the window before each sequence.
"""

from __future__ import annotations

import torch

from lowline.kernels.slots.op import EMPTY


def attend(
    q_NTHD: torch.Tensor,
    k_NUGD: torch.Tensor,
    v_NUGV: torch.Tensor,
    r_NUGM: torch.Tensor,
    bias_HM: torch.Tensor,
    sink_k_NsGD: torch.Tensor,
    sink_v_NsGV: torch.Tensor,
    keys_NGMD: torch.Tensor,
    sums_NGMW: torch.Tensor,
    length_N: torch.Tensor,
    *,
    window: int,
    prefix: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o_NTHV, and the slots' sums of keys and of [v, 1] after the last token."""
    dtype, (T, H) = sums_NGMW.dtype, q_NTHD.shape[1:3]
    repeats, sinks = H // k_NUGD.shape[2], sink_k_NsGD.shape[1]
    rows = []
    for n, length in enumerate(length_N.tolist()):
        tensors = (q_NTHD[n], k_NUGD[n], v_NUGV[n], r_NUGM[n], sink_k_NsGD[n], sink_v_NsGV[n])
        q, k, v, r, sink_k, sink_v = (x.to(dtype) for x in tensors)
        keys, sums, outputs = keys_NGMD[n], sums_NGMW[n], []
        for t in range(T):
            position, row = length + t, prefix + t
            if position - window >= sinks:  # it leaves the window, and is no sink
                left = row - window
                one = torch.ones_like(v[left, :, :1])
                keys = keys + r[left, :, :, None] * k[left, :, None]
                sums = sums + r[left, :, :, None] * torch.cat([v[left], one], -1)[:, None]
            outside = min(max(position - window + 1, 0), sinks)
            first = row - min(window - 1, position)
            exact_k = torch.cat([sink_k[:outside], k[first : row + 1]])
            exact_v = torch.cat([sink_v[:outside], v[first : row + 1]])
            of_head = []
            for h in range(H):
                g, q_D = h // repeats, scale * q[t, h]
                held = sums[g, :, -1] > EMPTY
                count = sums[g, held, -1]
                slots = (keys[g, held] / count[:, None]) @ q_D + bias_HM[h, held].to(dtype)
                scores = torch.cat([exact_k[:, g] @ q_D, slots + count.log()])
                mean_v = sums[g, held, :-1] / count[:, None]
                of_head.append(scores.softmax(0) @ torch.cat([exact_v[:, g], mean_v]))
            outputs.append(torch.stack(of_head))
        o = torch.stack(outputs) if outputs else v.new_zeros(0, H, v.shape[-1])
        rows.append((o.to(q_NTHD.dtype), keys, sums))
    o_NTHV, keys_NGMD, sums_NGMW = (torch.stack(x) for x in zip(*rows, strict=True))
    return o_NTHV, keys_NGMD, sums_NGMW
