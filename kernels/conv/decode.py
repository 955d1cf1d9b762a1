"""Decoding with the short convolution: token by token, and blocks of guessed tokens.

`verify` and `advance` work as the selective scan's (`lowline.kernels.scan.decode`): the state moves
over a block's accepted tokens when the next block comes. Nothing here is differentiable.

Shapes as in `lowline.kernels.conv.op`; T is the length of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.kernels.backends import Backend
from lowline.kernels.conv.op import Activation, causal_conv, check, pick
from lowline.kernels.pool import check_rows
from lowline.kernels.scan.decode import check_accepted, check_pair


@torch.no_grad()
def causal_conv_step(
    x_BD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    state: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance `causal_conv` by one token: return y of (B, D) and move `state` (B, D, W - 1), a pool
    where `rows` (B,) are given (`lowline.kernels.pool`), in place.

    Raises:
        ValueError: as `causal_conv`.
    """
    check_rows("causal_conv_step", rows, len(x_BD), state)
    held = state if rows is None else state.index_select(0, rows)
    check(x_BD[:, None], weight_DW, bias_D, activation, held, None)
    inputs_BDW = torch.cat([held, x_BD[..., None]], -1)
    if rows is None:
        state.copy_(inputs_BDW[..., 1:])
    else:
        state.index_copy_(0, rows.long(), inputs_BDW[..., 1:].to(state))
    kind = torch.promote_types(x_BD.dtype, torch.float32)
    y = (inputs_BDW.to(kind) * weight_DW.to(kind)).sum(-1)
    if bias_D is not None:
        y += bias_D
    if activation == "silu":
        F.silu(y, inplace=True)
    return y.to(x_BD.dtype)


@torch.no_grad()
def causal_conv_advance(
    state: torch.Tensor, x_BTD: torch.Tensor, *, accepted: torch.Tensor
) -> None:
    """Move row b of `state` (B, D, W - 1) over the first accepted[b] tokens of a block, in place.

    Args:
        accepted: (B,) integers from 0 to T.

    Raises:
        ValueError: `accepted` is no vector of B integers.
    """
    check_accepted("causal_conv_advance", accepted, x_BTD.shape[0])
    inputs_BDT = torch.cat([state, x_BTD.transpose(1, 2)], -1)
    window = torch.arange(state.shape[-1], device=state.device)
    places_BDW = (accepted[:, None] + window)[:, None].expand(state.shape)
    state.copy_(inputs_BDT.gather(-1, places_BDW.long()))


@torch.no_grad()
def causal_conv_verify(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    state: torch.Tensor,
    pending: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of a block of guessed tokens, after the state has moved over the block
    before.

    Args:
        state: (B, D, W - 1); moved in place over the accepted tokens of `pending`, no further.
        pending: what the last call returned; None for a state that is up to date.
        accepted: (B,) how many tokens of `pending` are accepted, each from 0 to its length.

    Returns:
        y of (B, T, D), and this block, pending.

    Raises:
        ValueError: as `causal_conv`, or one of `pending` and `accepted` without the other.
    """
    check_pair("causal_conv_verify", pending, accepted)
    # before the state moves: a refused call leaves it unchanged
    check(x_BTD, weight_DW, bias_D, activation, state, None)
    pick(x_BTD, backend)
    if pending is not None and accepted is not None:
        causal_conv_advance(state, pending, accepted=accepted)
    y, _ = causal_conv(
        *(x_BTD, weight_DW, bias_D), activation=activation, initial_state=state, backend=backend
    )
    return y, x_BTD
