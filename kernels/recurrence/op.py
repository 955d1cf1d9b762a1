"""The gated linear recurrence: the op under linear attention, GLA, HGRN2, GSA, SSD and DeltaNet.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t            (S is K x V per
    head)

With `beta`, the delta rule (Gated DeltaNet, arXiv 2412.06464; per-key decay as in KDA): v_t becomes
β_t (v_t - S̃ᵀ k_t), S̃ the decayed state. With `normalize`, o_t is divided by q_t·z_t, where z is
the state of a value that is always one (linear attention, arXiv 2006.16236, equation 9); z is the
last column of the state.

Chunkwise forms (Mamba2, arXiv 2405.21060, section 6; GLA, arXiv 2312.06635, section 4) take O(T)
time and memory. What a method passes in is in docs/concepts/kernels.md.

Shapes: B batch, T time, Q query heads, H state heads (Q = H · queries per state), K key features, V
value features, N sequences (B, or those of `cu_seqlens`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from lowline.kernels.backends import Backend, choose, type_reason
from lowline.kernels.packs import check_pack

EPSILON = 1e-12  # added to the normaliser
NAME = "gated_linear_recurrence"
Gate = Literal["key", "value"]


class Call(NamedTuple):
    """The arguments of every backend, those with a gradient first."""

    q: torch.Tensor  # (B, T, Q, K)
    k: torch.Tensor  # (B, T, H, K)
    v: torch.Tensor  # (B, T, H, V), and with a normaliser a last column of ones
    g: torch.Tensor | None
    beta: torch.Tensor | None  # (B, T, H)
    initial: torch.Tensor | None  # (N, H, K, V)
    cu: torch.Tensor | None
    gate: str
    scale: float
    keep: bool = False  # "cpu": the states that the backward pass starts from


def gated_linear_recurrence(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None = None,
    beta_BTH: torch.Tensor | None = None,
    *,
    gate: Gate = "key",
    normalize: bool = False,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of a complete sequence and the state after it; differentiable in every
    tensor.

    Args:
        q_BTQK: queries; Q a multiple of H: query head i reads the state of head i // (Q / H).
        k_BTHK: keys.
        v_BTHV: values. Keys or values may have fewer heads than the other, each then shared by
            neighbouring state heads.
        g: logarithm of the decay, ≤ 0: None, (B, T, H), or (B, T, H, K) with gate="key", or
            (B, T, H, V) with gate="value".
        beta_BTH: step size of the delta rule; None for plain addition.
        gate: which side of the state a four-dimensional g decays.
        normalize: divide by q·z; for features that are not negative.
        scale: factor of the output.
        initial_state: (N, H, K, V), or (N, H, K, V + 1) with `normalize`; zero when None.
        cu_seqlens: (N + 1,) bounds of sequences packed in a batch of one, from 0 to T.
        backend: see `lowline.kernels.backends`. "cpu" takes fp32 and bf16, K and V multiples of 16;
            "triton" fp32, bf16 and fp16, K and V up to 256, K up to 128 with the delta rule.

    Returns:
        o of (B, T, Q, V) in q's type; the state of (N, H, K, V [+ 1]) in fp32 (fp64 of fp64).

    Raises:
        ValueError: shapes that do not fit, a combination that has no meaning (a value gate with a
            normaliser or with the delta rule, the delta rule with a normaliser), or a backend that
            does not cover the call.
    """
    keys = share_heads(k_BTHK, v_BTHV)
    call = Call(q_BTQK, *keys, g, beta_BTH, initial_state, cu_seqlens, gate, scale)
    return run(call, normalize, backend)


def run(call: Call, normalize: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs and the state after them, of a call that is checked here."""
    check(call, normalize)
    implementation = _implementation(pick(call, backend))
    if not normalize:
        return implementation(call)
    ones = call.v.new_ones(*call.v.shape[:-1], 1)
    o, state = implementation(call._replace(v=torch.cat([call.v, ones], -1)))
    # scale would cancel in the quotient: it multiplies the numerator alone
    return o[..., :-1] / (o[..., -1:] / call.scale + EPSILON), state


def share_heads(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with the same number of heads (dimension -2)."""
    few, many = sorted((k.shape[-2], v.shape[-2]))
    if few == 0 or many % few:
        raise ValueError(
            f"{NAME}: {k.shape[-2]} key heads and {v.shape[-2]} value heads; "
            "one number must be a multiple of the other"
        )
    if k.shape[-2] < many:
        k = k.repeat_interleave(many // few, -2)
    if v.shape[-2] < many:
        v = v.repeat_interleave(many // few, -2)
    return k, v


def check(call: Call, normalize: bool) -> None:
    """Raise ValueError where the arguments of `gated_linear_recurrence` do not fit."""
    q, k, v, g, beta, initial_state, cu_seqlens, gate, *_ = call

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{NAME}: {message}")

    need(q.dim() == k.dim() == v.dim() == 4, "q, k and v are (batch, time, heads, features)")
    B, T, H, K = k.shape
    V = v.shape[-1]
    need(v.shape[:3] == (B, T, H), f"k is {tuple(k.shape)}, v is {tuple(v.shape)}: unlike")
    need(
        q.shape[:2] == (B, T) and q.shape[3] == K,
        f"q is {tuple(q.shape)}, k is {tuple(k.shape)}: unlike batch, time or features",
    )
    need(
        q.shape[2] % H == 0, f"{q.shape[2]} query heads are no multiple of the {H} heads of k and v"
    )
    need(
        q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point,
        f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; use one floating type",
    )
    need(gate in ("key", "value"), f"gate = {gate!r}; choose from 'key', 'value'")
    if g is not None:
        features = K if gate == "key" else V
        allowed = ((B, T, H), (B, T, H, features))
        need(
            tuple(g.shape) in allowed,
            f"g is {tuple(g.shape)}; with gate={gate!r} it is {' or '.join(map(str, allowed))}",
        )
    by_value = g is not None and g.dim() == 4 and gate == "value"
    need(not (by_value and normalize), "a value gate has no normaliser; use gate='key'")
    if beta is not None:
        need(tuple(beta.shape) == (B, T, H), f"beta is {tuple(beta.shape)}, not {(B, T, H)}")
        need(not by_value, "the delta rule takes gates per head or per key, not per value")
        need(not normalize, "the delta rule has no normaliser; pass normalize=False")
    N = check_pack(NAME, B, T, cu_seqlens)
    if initial_state is not None:
        shape = (N, H, K, V + normalize)
        need(
            tuple(initial_state.shape) == shape,
            f"initial_state is {tuple(initial_state.shape)}, not {shape}",
        )


def pick(call: Call, backend: str, *, one_token: bool = False) -> str:
    """Return the backend that runs a call; ValueError where the one asked for does not cover it."""
    q, K, V = call.q, call.q.shape[-1], call.v.shape[-1]
    cpu, triton = type_reason(q.dtype, "cpu"), type_reason(q.dtype, "triton")
    if K % 16 or V % 16:
        cpu = f"K = {K}, V = {V}; it takes multiples of 16"
    if call.beta is not None and K > 128 and not one_token:
        # a program holds all K rows of a state; its backward pass spills
        triton = f"K = {K}; with the delta rule it takes up to 128"
    elif max(K, V) > 256:
        triton = f"K = {K}, V = {V}; it takes up to 256"
    return choose(NAME, backend, q.device, cpu=cpu, triton=triton, module="recurrence")


def _implementation(which: str) -> Callable[[Call], tuple[torch.Tensor, torch.Tensor]]:
    """Return the backend's function.

    Imports are written out: torch.compile cannot trace one by name.
    """
    if which == "triton":
        from lowline.kernels.recurrence.triton.backend import recurrence
    elif which == "cpu":
        from lowline.kernels.recurrence.cpu import recurrence
    elif which == "torch":
        from lowline.kernels.recurrence.torch_form import recurrence
    else:
        from lowline.kernels.recurrence.reference import recurrence
    return recurrence
