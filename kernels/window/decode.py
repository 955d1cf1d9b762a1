"""Window-plus-linear attention from a state: token by token, or a speculative block at once.

    window_linear_step      one token: its output, and the state advanced in place
    window_linear_verify    K + 1 proposed tokens: their outputs, from an unchanged state
    window_linear_advance   the state advanced in place by the tokens that were accepted

A verify keeps the keys, values and features of its block as `pending`; the next verify first
advances by those of them that were accepted (lazy advance: Mamba-in-the-Llama, arXiv 2408.15237,
Algorithm 2), so that no state is saved and restored. Memory and time are constant in the number of
tokens seen. Nothing here is differentiable.

Shapes: those of `op`; X = s + w + T columns: the sinks, the ring buffer, the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lowline.kernels.backends import choose
from lowline.kernels.pool import check_rows, has_whole_pages, on_rows
from lowline.kernels.window.op import (
    check_heads,
    not_on_cpu,
    not_on_triton,
    per_head_factor,
    state_shapes,
    window_linear_attention,
)
from lowline.kernels.window.state import WindowState, check_state, ring_positions

_compiled_step: Callable[..., Tensor | None] | None = None  # once a call has taken it


class WindowPending(NamedTuple):
    """A verified block that the state does not include yet."""

    k: Tensor  # (B, T, G, D)
    v: Tensor  # (B, T, G, V)
    phi_k: Tensor  # (B, T, P, F)


def window_linear_step(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGV: Tensor,
    phi_q_BHF: Tensor | None = None,
    phi_k_BPF: Tensor | None = None,
    *,
    state: WindowState,
    rows: Tensor | None = None,
    window_factor_H: Tensor | None = None,
    linear_factor_H: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute one token of each sequence; advance the state in place.

    Arguments are `window_linear_attention`'s without the time dimension; window and sinks are the
    state's, which is a pool where `rows` (B,) are given (`lowline.kernels.pool`). `triton` covers
    fp32, bf16 and fp16 with D and V up to 128 and any F. Inside torch.compile "auto" takes the
    torch form on a GPU, which the compiler fuses.

    Returns:
        o_BHV in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit the state.
    """
    token = (q_BHD, k_BGD, v_BGV, phi_q_BHF, phi_k_BPF)
    if _compiled_step is not None and backend in ("auto", "cpu") and not is_compiling():
        o_BHV = _compiled_step(*token, state, window_factor_H, linear_factor_H, scale, rows)
        if o_BHV is not None:
            return o_BHV
        # a call that it does not cover, or a wrong one: checked below
    return _step(token, state, rows, window_factor_H, linear_factor_H, scale, backend)


@torch.no_grad()
def window_linear_verify(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGV: Tensor,
    phi_q_BTHF: Tensor | None = None,
    phi_k_BTPF: Tensor | None = None,
    *,
    state: WindowState,
    pending: WindowPending | None = None,
    accepted: Tensor | None = None,
    window_factor_H: Tensor | None = None,
    linear_factor_H: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WindowPending]:
    """Return the outputs of a block of proposed tokens.

    The state is first advanced in place by `accepted` (B,) tokens of `pending`, the block of the
    verify before; the new block leaves it unchanged.

    Returns:
        o_BTHV in q's dtype, and the new block for the next verify or `window_linear_advance`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit the state, or one of pending and
            accepted without the other.
    """
    if (pending is None) != (accepted is None):
        raise ValueError("window_linear_verify: give both pending and accepted, or neither")
    op = "window_linear_verify"
    block = [q_BTHD, k_BTGD, v_BTGV, phi_q_BTHF, phi_k_BTPF]
    # before the state moves: a refused call leaves it unchanged
    call = _checked(op, block, state, window_factor_H, linear_factor_H, scale)
    which = _backend(op, backend, call.k, call.v, call.phi_k, state)
    if pending is not None and accepted is not None:
        window_linear_advance(state, pending, accepted, backend=backend)
    return _outputs(call, which), WindowPending(call.k, call.v, call.phi_k)


@torch.no_grad()
def window_linear_advance(
    state: WindowState, pending: WindowPending, accepted_B: Tensor, *, backend: str = "auto"
) -> None:
    """Advance row b of the state in place by the first accepted_B[b] tokens of `pending`.

    Raises:
        ValueError: accepted_B is not (B,) integers (for CPU tensors also: of 0 … T), or pending
            does not fit the state.
    """
    op = "window_linear_advance"
    B, T = pending.k.shape[:2]
    check_state(op, state, state_shapes(B, *pending, *_window_and_sinks(state)))
    if accepted_B.shape != (B,) or accepted_B.is_floating_point():
        raise ValueError(
            f"{op}: accepted_B is {accepted_B.dtype} of shape {tuple(accepted_B.shape)}; give "
            f"integers of shape ({B},)"
        )
    on_host = accepted_B.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not all(0 <= a <= T for a in accepted_B.tolist()):
        raise ValueError(f"{op}: accepted_B = {accepted_B.tolist()}; each must be of 0 … {T}")
    if _backend(op, backend, *pending, state) == "cpu":
        from lowline.kernels.window.cpu import advance

        advance(state, *pending, accepted_B)
    else:
        _push(state, pending, accepted_B.to(state.length))


@torch.no_grad()
def _step(
    token: tuple[Tensor | None, ...],
    state: WindowState,
    rows: Tensor | None,
    window_factor_H: Tensor | None,
    linear_factor_H: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Run `window_linear_step` on any backend, with the checks."""
    global _compiled_step
    op = "window_linear_step"
    block = [None if x is None else x[:, None] for x in token]
    call = _checked(op, block, state, window_factor_H, linear_factor_H, scale, rows)
    if backend == "auto" and is_compiling() and call.k.device.type != "cpu":
        backend = "torch"
    which = _backend(op, backend, call.k, call.v, call.phi_k, state, steps=True)
    if which == "triton":
        from lowline.kernels.window.triton.step import step as run

        return run(*call, rows)[:, 0]
    if which == "cpu":
        from lowline.kernels.window import cpu

        if not is_compiling():
            _compiled_step = cpu.step
        return cpu.decode(*call, rows, take_in=True)[:, 0]

    def step(taken: WindowState) -> Tensor:
        o_BTHV = _outputs(call._replace(state=taken), which)
        _push(taken, WindowPending(call.k, call.v, call.phi_k), torch.ones_like(taken.length))
        return o_BTHV[:, 0]

    return on_rows(step, state, rows)


class _Call(NamedTuple):
    """The checked arguments of a step or a verify; without φ, features of size 0."""

    q: Tensor  # (B, T, H, D)
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    state: WindowState
    window_factor: Tensor  # (H,)
    linear_factor: Tensor  # (H,)
    scale: float


def _checked(
    op: str,
    block: list[Tensor | None],
    state: WindowState,
    window_factor_H: Tensor | None,
    linear_factor_H: Tensor | None,
    scale: float | None,
    rows: Tensor | None = None,
) -> _Call:
    q, k, v, phi_q, phi_k = block
    assert q is not None and k is not None and v is not None
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{op}: q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions")
    check_heads(op, q, k, v, phi_q, phi_k)
    if phi_q is None or phi_k is None:
        phi_q, phi_k = q[..., :0], k[..., :0]
    N = check_rows(op, rows, q.shape[0], state.length)
    shapes = state_shapes(N, k, v, phi_k, *_window_and_sinks(state))
    check_state(op, state, shapes)
    gamma = per_head_factor(op, "window_factor_H", window_factor_H, q)
    lam = per_head_factor(op, "linear_factor_H", linear_factor_H, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Call(q, k, v, phi_q, phi_k, state, gamma, lam, scale)


def _window_and_sinks(state: WindowState) -> tuple[int, int]:
    return state.k.shape[1], state.sink_k.shape[1]


def _backend(
    op: str,
    backend: str,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    state: WindowState,
    *,
    steps: bool = False,
) -> str:
    sizes = (k.dtype, k.shape[-1], v.shape[-1])
    cpu = not_on_cpu(*sizes, phi_k.shape[-1])
    triton = not_on_triton(*sizes, 0) if steps else "it has no kernel of blocks that are verified"
    if any(x.dtype != k.dtype for x in (v, *state[:5])):
        cpu = triton = "tokens and what the state holds of them differ in type"
    elif state.S.dtype != torch.float32:
        cpu = triton = "it sums in fp32 only"
    elif not has_whole_pages(*state):
        cpu = triton = "the state's tensors are not contiguous"
    return choose(op, backend, k.device, cpu=cpu, triton=triton, module="window")


def _outputs(call: _Call, which: str) -> Tensor:
    if which == "cpu":
        from lowline.kernels.window.cpu import decode

        return decode(*call, None, take_in=False)
    if which == "torch":
        return _read(*call)
    window, sinks = _window_and_sinks(call.state)
    return window_linear_attention(
        *call[:5],
        window=window,
        sinks=sinks,
        window_factor_H=call.window_factor,
        linear_factor_H=call.linear_factor,
        scale=call.scale,
        initial_state=call.state,
        backend=which,
    )[0]


def _read(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGV: Tensor,
    phi_q_BTHF: Tensor,
    phi_k_BTPF: Tensor,
    state: WindowState,
    window_factor_H: Tensor,
    linear_factor_H: Tensor,
    scale: float,
) -> Tensor:
    """Return the block's outputs in plain torch; every query against every column, masked by
    age.
    """
    T, H = q_BTHD.shape[1:3]
    G, P, dtype = k_BTGD.shape[2], phi_k_BTPF.shape[2], state.S.dtype
    w, s = _window_and_sinks(state)
    B, length_B1, device = len(state.length), state.length[:, None], q_BTHD.device
    t_BT = length_B1 + torch.arange(T, device=device)
    sink_Bs = torch.arange(s, device=device).expand(B, s)
    ring_Bw = ring_positions(state.length, w)
    held_BX = torch.cat([sink_Bs < length_B1 - w, ring_Bw >= 0, t_BT >= 0], dim=1)
    position_BX = torch.cat([sink_Bs, ring_Bw, t_BT], dim=1)
    age_BTX = t_BT[:, :, None] - position_BX[:, None]
    seen_BTX = held_BX[:, None] & (age_BTX >= 0)
    exact_BTX = seen_BTX & ((age_BTX < w) | (position_BX < s)[:, None])
    older_BTX = seen_BTX & ~exact_BTX

    def columns(*parts: Tensor) -> Tensor:
        return torch.cat([x.to(dtype) for x in parts], dim=1)

    k_BXGD = columns(state.sink_k, state.k, k_BTGD)
    v_BXGV = columns(state.sink_v, state.v, v_BTGV)
    v1_BXGW = torch.cat([v_BXGV, torch.ones_like(v_BXGV[..., :1])], dim=-1)
    q, phi_q = q_BTHD.to(dtype).unflatten(2, (G, -1)), phi_q_BTHF.to(dtype)
    phi_q = (phi_q * linear_factor_H[:, None]).unflatten(2, (P, H // P))

    scores = scale * torch.einsum("btgrd,bxgd->bgrtx", q, k_BXGD)
    scores = scores.masked_fill_(~exact_BTX[:, None, None], -torch.inf)
    E = (scores - scores.amax(-1, keepdim=True)).exp_()
    W = E * window_factor_H.view(G, -1, 1, 1)
    older = torch.einsum("btprf,bxpf->bprtx", phi_q, columns(state.phi_k, phi_k_BTPF))
    W[..., s:] += older.reshape(B, G, H // G, T, w + T) * older_BTX[:, None, None, :, s:]
    y = torch.einsum("bgrtx,bxgw->btgrw", W, v1_BXGW).reshape(B, T, H, -1)
    y = y + torch.einsum("btprf,bpfw->btprw", phi_q, state.S).reshape(B, T, H, -1)
    return (y[..., :-1] / y[..., -1:]).to(q_BTHD.dtype)


def _push(state: WindowState, pending: WindowPending, accepted_B: Tensor) -> None:
    """Move row b of the state over the first accepted_B[b] tokens, one after another."""
    (w, s), P = _window_and_sinks(state), pending.phi_k.shape[2]
    b_B = torch.arange(len(accepted_B), device=accepted_B.device)
    for i in range(pending.k.shape[1]):
        taken_B = accepted_B > i
        slot_B = state.length % w
        joins_B = taken_B & (state.length - w >= s)
        v = state.v[b_B, slot_B].to(state.S.dtype)
        v1 = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) * joins_B[:, None, None]
        v1 = v1.repeat_interleave(P // v1.shape[1], dim=1)
        state.S.add_(state.phi_k[b_B, slot_B].to(v.dtype)[..., None] * v1[:, :, None])
        for ring, new in zip(state[:3], pending, strict=True):
            kept = torch.where(taken_B[:, None, None], new[:, i].to(ring), ring[b_B, slot_B])
            ring[b_B, slot_B] = kept
        if s:
            here = taken_B[:, None] & (torch.arange(s, device=b_B.device) == state.length[:, None])
            for sink, new in ((state.sink_k, pending.k), (state.sink_v, pending.v)):
                sink.copy_(torch.where(here[..., None, None], new[:, i : i + 1].to(sink), sink))
        state.length.add_(taken_B)
