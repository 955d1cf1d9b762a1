"""Decoding with the selective scan: token by token, and blocks of guessed tokens.

Speculative decoding with lazy advance (Mamba in the Llama, arXiv 2408.15237, algorithm 2): `verify`
computes the outputs of K + 1 guessed tokens from a state that it leaves unchanged. How many of them
are accepted is known afterwards, so the next `verify` first advances the state over those. No
state is copied or rolled back, whatever is accepted. Nothing here is differentiable.

Shapes as in `lowline.kernels.scan.op`; T is the length of a block, K + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.backends import Backend
from lowline.kernels.pool import check_rows, on_rows
from lowline.kernels.scan.op import Call, check, pick, run
from lowline.kernels.scan.reference import step_size


class ScanBlock(NamedTuple):
    """What `selective_scan_verify` keeps of a block to advance over it later."""

    x: torch.Tensor  # (B, T, D)
    dt: torch.Tensor  # (B, T, D)
    B: torch.Tensor  # (B, T, N), or (B, T, G, N)


@torch.no_grad()
def selective_scan_step(
    x_BD: torch.Tensor,
    dt_BD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BN: torch.Tensor,
    C_BN: torch.Tensor,
    D_D: torch.Tensor | None = None,
    *,
    z_BD: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state: torch.Tensor,
    rows: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Advance `selective_scan` by one token: return y of (B, D) and move `state` (B, D, N), a pool
    where `rows` (B,) are given (`lowline.kernels.pool`), in place.

    Raises:
        ValueError: as `selective_scan`.
    """
    x, dt, B, C = (tensor[:, None] for tensor in (x_BD, dt_BD, B_BN, C_BN))
    z = None if z_BD is None else z_BD[:, None]
    check_rows("selective_scan_step", rows, len(x_BD), state)

    def step(taken: torch.Tensor) -> torch.Tensor:
        call = Call(x, dt, A_DN, B, C, D_D, z, dt_bias_D, taken, None, dt_softplus)
        y, after = run(call, backend)
        taken.copy_(after)
        return y[:, 0]

    return on_rows(step, state, rows)


@torch.no_grad()
def selective_scan_advance(
    state: torch.Tensor,
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BTN: torch.Tensor,
    *,
    accepted: torch.Tensor,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    backend: Backend = "auto",
) -> None:
    """Move row b of `state` (B, D, N) over the first accepted[b] tokens of a block, in place.

    Args:
        accepted: (B,) integers from 0 to T.

    Raises:
        ValueError: as `selective_scan`, or `accepted` is no vector of B integers.
    """
    check_accepted("selective_scan_advance", accepted, x_BTD.shape[0])
    dt = step_size(dt_BTD, dt_bias_D, dt_softplus)
    time = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    dt = dt.masked_fill((time >= accepted[:, None])[..., None], 0)  # δ = 0 changes nothing
    x, B = x_BTD.to(dt.dtype), B_BTN.to(dt.dtype)
    _, after = run(Call(x, dt, A_DN, B, B, None, None, None, state, None, False), backend)
    state.copy_(after)


@torch.no_grad()
def selective_scan_verify(
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BTN: torch.Tensor,
    C_BTN: torch.Tensor,
    D_D: torch.Tensor | None = None,
    *,
    z_BTD: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state: torch.Tensor,
    pending: ScanBlock | None = None,
    accepted: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, ScanBlock]:
    """Return the outputs of a block of guessed tokens, after the state has moved over the block
    before.

    Args:
        state: (B, D, N); moved in place over the accepted tokens of `pending`, and no further.
        pending: what the last call returned; None for a state that is up to date.
        accepted: (B,) how many tokens of `pending` are accepted, each from 0 to its length.

    Returns:
        y of (B, T, D), and this block, pending.

    Raises:
        ValueError: as `selective_scan`, or one of `pending` and `accepted` without the other.
    """
    check_pair("selective_scan_verify", pending, accepted)
    tensors = (x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, dt_bias_D, state)
    call = Call(*tensors, None, dt_softplus)
    check(call)  # before the state moves: a refused call leaves it unchanged
    pick(call, backend)
    if pending is not None and accepted is not None:
        selective_scan_advance(
            *(state, pending.x, pending.dt, A_DN, pending.B),
            accepted=accepted,
            dt_bias_D=dt_bias_D,
            dt_softplus=dt_softplus,
            backend=backend,
        )
    y, _ = run(call, backend)
    return y, ScanBlock(x_BTD, dt_BTD, B_BTN)


def check_accepted(op: str, accepted: torch.Tensor, batch: int) -> None:
    if tuple(accepted.shape) != (batch,) or accepted.is_floating_point():
        raise ValueError(
            f"{op}: accepted is {tuple(accepted.shape)} of {accepted.dtype}; it is ({batch},) "
            "integers, a count for each row"
        )


def check_pair(op: str, pending: object | None, accepted: torch.Tensor | None) -> None:
    if (pending is None) != (accepted is None):
        given = "pending" if accepted is None else "accepted"
        raise ValueError(f"{op}: {given} without the other; pass both, or neither")
