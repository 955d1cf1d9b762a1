"""Window and slots as their formula reads: one sequence, one token at a time.

The arguments are `op.slot_window_attention`'s after its checks: k, v and slot begin with `prefix`
rows of the window before each sequence.
"""

from __future__ import annotations

import torch


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
    """Return o_NTHV, and the slots' sums of keys, values and tokens after the last token."""
    dtype, (T, H), (G, M) = keys_NGMD.dtype, q_NTHD.shape[1:3], keys_NGMD.shape[1:3]
    repeats, sinks = H // G, sink_k_NsGD.shape[1]
    rows = []
    for n, length in enumerate(length_N.tolist()):
        tensors = (q_NTHD[n], k_NUGD[n], v_NUGV[n], sink_k_NsGD[n], sink_v_NsGV[n])
        q, k, v, sink_k, sink_v = (x.to(dtype) for x in tensors)
        keys, values, count, outputs = keys_NGMD[n], values_NGMV[n], count_NGM[n], []
        for t in range(T):
            position, row = length + t, prefix + t
            if position - window >= sinks:  # it leaves the window, and is no sink
                left = row - window
                r_GM = torch.nn.functional.one_hot(slot_NUG[n, left], M).to(dtype)
                keys = keys + r_GM[..., None] * k[left, :, None]
                values = values + r_GM[..., None] * v[left, :, None]
                count = count + r_GM
            outside = min(max(position - window + 1, 0), sinks)
            first = row - min(window - 1, position)
            exact_k = torch.cat([sink_k[:outside], k[first : row + 1]])
            exact_v = torch.cat([sink_v[:outside], v[first : row + 1]])
            of_head = []
            for h in range(H):
                g, q_D = h // repeats, scale * q[t, h]
                held = count[g] > 0
                n_M = count[g, held]
                slots = (keys[g, held] / n_M[:, None]) @ q_D + bias_HM[h, held].to(dtype)
                scores = torch.cat([exact_k[:, g] @ q_D, slots + n_M.log()])
                mean_v = values[g, held] / n_M[:, None]
                of_head.append(scores.softmax(0) @ torch.cat([exact_v[:, g], mean_v]))
            outputs.append(torch.stack(of_head))
        o = torch.stack(outputs) if outputs else v.new_zeros(0, H, v.shape[-1])
        rows.append((o.to(q_NTHD.dtype), keys, values, count))
    o_NTHV, keys_NGMD, values_NGMV, count_NGM = (torch.stack(x) for x in zip(*rows, strict=True))
    return o_NTHV, keys_NGMD, values_NGMV, count_NGM
