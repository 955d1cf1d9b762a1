"""Softmax attention in a sliding window and linear attention before it, with one denominator.

    y_t = [ Σ_exact γ e^{s_tj - c_t} v_j + λ Σ_older (φq_t·φk_j) v_j ] / [ the same without v ]

with s_tj = scale·q_t·k_j and c_t the largest s_tj of the exact set (LoLCATs' hybrid, arXiv
2410.10254, section 3.3). The exact set of query t: the last `window` tokens, itself included, and
the first `sinks` tokens of the sequence, each counted once; every token before t that is not exact
is older. c_t weighs in the result, since the linear part is not divided by e^{c_t}: its gradient
goes to the arg max. As γ > 0 the denominator is at least γ.

Time is O(T·window), memory O(T). Feature maps and positional encodings are the caller's: φ(q) and
φ(k) come in, non-negative. There is no padding mask; packed sequences take its place.

Shapes: B batch, T tokens, H query heads, G key/value heads, P heads of φ(k), D, V, F key, value and
feature dimensions, N sequences, W = V + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowline.kernels.backends import choose, type_reason
from lowline.kernels.packs import check_pack
from lowline.kernels.pool import has_whole_pages
from lowline.kernels.window.state import (
    WindowCall,
    WindowState,
    accumulation_dtype,
    behind_window,
    check_state,
)

OP = "window_linear_attention"


def window_linear_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGV: Tensor,
    phi_q_BTHF: Tensor | None = None,
    phi_k_BTPF: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    window_factor_H: Tensor | None = None,
    linear_factor_H: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: WindowState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Compute window-plus-linear attention over complete sequences; the window alone without φ.

    Query head h reads key/value head h // (H // G). φ(k) has a head per key/value head or per
    query head: P is G or H.

    Args:
        q_BTHD, k_BTGD, v_BTGV: queries, keys, values; any strides.
        phi_q_BTHF, phi_k_BTPF: their features, non-negative; both or neither.
        window: tokens of the exact window, the query's own included.
        sinks: leading tokens of a sequence that stay exact.
        window_factor_H: γ, positive; 1 where None.
        linear_factor_H: λ, not negative; 1 where None.
        scale: of the scores; 1/√D where None.
        cu_seqlens: (N + 1,) boundaries of packed sequences, 0 … T; B is then 1.
        initial_state: what a call on the preceding tokens returned (N sequences; N = B unless
            packed). Gradients flow to every part of it.
        backend: `cpu` covers fp32 and bf16 (computed in fp32) with D, V and F multiples of 16;
            `triton` fp32, bf16 and fp16 with D, V and F up to 128; `torch` and `reference` take
            everything. With packed sequences, `torch` and `reference` read cu_seqlens on the host,
            the former not those of `packs.packed_at`.

    Returns:
        o_BTHV in q's dtype, and the state after the last token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that does not cover
            the call.
    """
    _check(q_BTHD, k_BTGD, v_BTGV, phi_q_BTHF, phi_k_BTPF, window, sinks)
    B, _, H, D = q_BTHD.shape
    G, V = v_BTGV.shape[2:]
    dtype = accumulation_dtype(q_BTHD.dtype)
    if phi_q_BTHF is None or phi_k_BTPF is None:
        phi_q_BTHF, phi_k_BTPF = q_BTHD[..., :0], k_BTGD[..., :0]
    P, F = phi_k_BTPF.shape[2:]
    factors = [
        per_head_factor(OP, name, factor_H, q_BTHD)
        for name, factor_H in (
            ("window_factor_H", window_factor_H),
            ("linear_factor_H", linear_factor_H),
        )
    ]
    N = check_pack(OP, B, q_BTHD.shape[1], cu_seqlens)
    cu = None
    if cu_seqlens is not None:
        cu = cu_seqlens.to(q_BTHD.device, torch.int64).contiguous()

    if initial_state is None:
        length_N = torch.zeros(N, dtype=torch.int64, device=q_BTHD.device)
        S_NPFW = torch.zeros(N, P, F, V + 1, dtype=dtype, device=q_BTHD.device)
    else:
        shapes = state_shapes(N, k_BTGD, v_BTGV, phi_k_BTPF, window, sinks)
        check_state(OP, initial_state, shapes)
        length_N, S_NPFW = initial_state.length.contiguous(), initial_state.S
    tokens = (k_BTGD, v_BTGV, phi_k_BTPF)
    seen = behind_window(tokens, initial_state, length_N, cu, window=window, sinks=sinks)

    sizes = (q_BTHD.dtype, D, V, F)
    which = choose(
        OP, backend, q_BTHD.device, cpu=not_on_cpu(*sizes), triton=not_on_triton(*sizes),
        module="window",
    )  # fmt: skip
    if which == "triton":
        from lowline.kernels.window.triton.launch import attend
    elif which == "cpu":
        from lowline.kernels.window.cpu import attend
    elif which == "torch":
        from lowline.kernels.window.torch_form import attend
    else:
        from lowline.kernels.window.reference import attend
    k, v, phi_k = seen.rows
    scale = D**-0.5 if scale is None else float(scale)
    given: Any = (
        *(q_BTHD, k, v, phi_q_BTHF, phi_k, *seen.sinks, *factors, S_NPFW, length_N, cu),
        *(window, seen.prefix, scale),
    )
    call = WindowCall(*given)
    o_BTHV, S_NPFW = attend(call)
    (ring_k, ring_v, ring_phi), (sink_k, sink_v) = seen.rings, seen.sinks
    return o_BTHV, WindowState(ring_k, ring_v, ring_phi, sink_k, sink_v, S_NPFW, seen.length)


def not_on_cpu(dtype: torch.dtype, D: int, V: int, F: int) -> str | None:
    """Return why the C++ backend does not cover a call; None where it does."""
    if reason := type_reason(dtype, "cpu"):
        return reason
    if D % 16 or V % 16 or F % 16:
        return f"it takes multiples of 16, and D = {D}, V = {V}, F = {F}"
    return None


def not_on_triton(dtype: torch.dtype, D: int, V: int, F: int) -> str | None:
    """Return why the Triton kernels do not cover a call; None where they do."""
    if reason := type_reason(dtype, "triton"):
        return reason
    if max(D, V, F) > 128:
        return f"it takes up to 128 dimensions, and D = {D}, V = {V}, F = {F}"
    return None


def step_not_on_triton(q: Tensor, k: Tensor, v: Tensor, *states: Any) -> str | None:
    """Return why a Triton step does not cover tokens and states that hold them; None if it does."""
    if any(x.dtype != q.dtype for x in (k, v, *(state.k for state in states))):
        return "tokens and what the state holds of them differ in type"
    if not all(has_whole_pages(*state) for state in states):
        return "the state's tensors are not contiguous"
    return not_on_triton(q.dtype, q.shape[-1], v.shape[-1], 0)


def per_head_factor(op: str, name: str, factor_H: Tensor | None, q_BTHD: Tensor) -> Tensor:
    """Return γ or λ in the accumulation dtype; ones where None."""
    H, dtype = q_BTHD.shape[-2], accumulation_dtype(q_BTHD.dtype)
    if factor_H is None:
        return torch.ones(H, dtype=dtype, device=q_BTHD.device)
    if factor_H.shape != (H,):
        raise ValueError(f"{op}: {name} has shape {tuple(factor_H.shape)}; give ({H},)")
    return factor_H.to(dtype)


def state_shapes(
    N: int, k: Tensor, v: Tensor, phi_k: Tensor, window: int, sinks: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a WindowState of N sequences of such tokens."""
    G, D, V, (P, F) = k.shape[-2], k.shape[-1], v.shape[-1], phi_k.shape[-2:]
    return {
        "k": (N, window, G, D),
        "v": (N, window, G, V),
        "phi_k": (N, window, P, F),
        "sink_k": (N, sinks, G, D),
        "sink_v": (N, sinks, G, V),
        "S": (N, P, F, V + 1),
        "length": (N,),
    }


def check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None
) -> None:
    """Raise ValueError where tensors (…, heads, features) do not fit each other."""
    H, G = q.shape[-2], k.shape[-2]
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} differ in more than their heads"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} may differ in the last dimension only"
        )
    if G == 0 or H % G:
        raise ValueError(f"{op}: {H} query heads over {G} key/value heads; H must be a multiple")
    if (phi_q is None) != (phi_k is None):
        raise ValueError(f"{op}: give both phi_q and phi_k, or neither (no linear part)")
    if phi_q is not None and phi_k is not None:
        if phi_q.shape[:-1] != q.shape[:-1] or phi_k.shape[:-2] != k.shape[:-2]:
            raise ValueError(
                f"{op}: phi_q {tuple(phi_q.shape)} and phi_k {tuple(phi_k.shape)} do not fit q "
                f"{tuple(q.shape)} and k {tuple(k.shape)}; only the last dimension is free"
            )
        if phi_k.shape[-2] not in (G, H) or phi_k.shape[-1] != phi_q.shape[-1]:
            raise ValueError(
                f"{op}: phi_k {tuple(phi_k.shape)} needs {G} heads (k's) or {H} (q's) and phi_q's "
                f"{phi_q.shape[-1]} features"
            )
    for name, x in (("k", k), ("v", v), ("phi_q", phi_q), ("phi_k", phi_k)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}; "
                "they must agree"
            )
    if not q.is_floating_point():
        raise ValueError(f"{op}: q is {q.dtype}; give floating-point tensors")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    window: int,
    sinks: int,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"{OP}: q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; give 4 each: (batch, "
            "time, heads, features)"
        )
    check_heads(OP, q, k, v, phi_q, phi_k)
    if window < 1 or sinks < 0:
        raise ValueError(f"{OP}: window = {window}, sinks = {sinks}; need window >= 1, sinks >= 0")
