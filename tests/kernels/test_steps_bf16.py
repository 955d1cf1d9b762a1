"""Steps of bf16 tokens and states in C++: against fp64, and against plain torch's states."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import TOLERANCE, needs_compiler, relative_error

from lowline.kernels.memory import row_memory_attention, row_memory_step
from lowline.kernels.slots import SlotState, slot_window_attention, slot_window_step
from lowline.kernels.window import (
    WindowState,
    window_linear_advance,
    window_linear_attention,
    window_linear_step,
    window_linear_verify,
)

B, T, H, G, D, V, M, BEFORE = 2, 40, 4, 2, 32, 16, 16, 17
BF16 = TOLERANCE[torch.bfloat16]
pytestmark = needs_compiler


def tokens(linear):
    g = torch.Generator().manual_seed(0)
    sizes = [(H, D), (G, D), (G, V), *([(H, D), (G, D)] if linear else [])]
    made = [torch.randn(B, T, *size, generator=g) for size in sizes]
    return [x if i < 3 else x.exp() / 20 for i, x in enumerate(y.bfloat16() for y in made)]


def at(given, t):
    return [x[:, t] for x in given]


@pytest.mark.parametrize("linear", [False, True])
def test_window(linear):
    """A prompt in bf16, then tokens one by one, then a block; torch's states come out the same."""
    given, how = tokens(linear), dict(window=5, sinks=2)
    want, end = window_linear_attention(*(x.double() for x in given), **how, backend="reference")
    o, state = window_linear_attention(*at(given, slice(0, BEFORE)), **how)
    assert state.k.dtype == torch.bfloat16 and state.S.dtype == torch.float32
    plain, outputs = WindowState(*(x.clone() for x in state)), [o]
    for t in range(BEFORE, T - 4):
        outputs.append(window_linear_step(*at(given, t), state=state, backend="cpu")[:, None])
        window_linear_step(*at(given, t), state=plain, backend="torch")
    block = at(given, slice(T - 4, T))
    o, pending = window_linear_verify(*block, state=state, backend="cpu")
    window_linear_advance(state, pending, torch.tensor([4, 4]), backend="cpu")
    window_linear_advance(plain, pending, torch.tensor([4, 4]), backend="torch")
    assert o.dtype == torch.bfloat16
    assert relative_error(torch.cat([*outputs, o], 1), want) < BF16
    for ours, theirs in zip(state[:5], plain[:5], strict=True):
        assert torch.equal(ours, theirs)
    assert relative_error(state.S, end.S) < 1e-5 if linear else state.S.numel() == 0
    assert state.length.tolist() == [T, T]


def test_slots():
    given = tokens(False)
    g = torch.Generator().manual_seed(1)
    slot, bias = torch.randint(M, (B, T, G), generator=g), torch.randn(H, M, generator=g).bfloat16()
    how = dict(window=5, sinks=2)
    exact = [x.double() for x in given]
    want, end = slot_window_attention(*exact, slot, bias.double(), **how, backend="reference")
    part = [*at(given, slice(0, BEFORE)), slot[:, :BEFORE], bias]
    o, state = slot_window_attention(*part, **how)
    plain, outputs = SlotState(*(x.clone() for x in state)), [o]
    for t in range(BEFORE, T):
        token = (*at(given, t), slot[:, t], bias)
        outputs.append(slot_window_step(*token, state=state, backend="cpu")[:, None])
        slot_window_step(*token, state=plain, backend="torch")
    assert outputs[-1].dtype == torch.bfloat16
    assert relative_error(torch.cat(outputs, 1), want) < BF16
    for name, ours, theirs in zip(SlotState._fields, state, plain, strict=True):
        if name in ("keys", "values"):
            assert relative_error(ours, getattr(end, name)) < 1e-6
        else:
            assert torch.equal(ours, theirs), name


def test_row_memory():
    given, rule = tokens(False), dict(exact=3, block=2, horizon=8)
    how = rule | dict(window=6, sinks=2, merged=2)
    want, end = row_memory_attention(*(x.double() for x in given), **how, backend="reference")
    o, state = row_memory_attention(*at(given, slice(0, BEFORE)), **how)
    before = {name: x.data_ptr() for name, x in state._asdict().items()}
    outputs = [o]
    for t in range(BEFORE, T):
        outputs.append(row_memory_step(*at(given, t), state=state, **rule, backend="cpu")[:, None])
    assert outputs[-1].dtype == state.row_k.dtype == torch.bfloat16
    assert relative_error(torch.cat(outputs, 1), want) < BF16
    assert torch.equal(state.row_tokens, end.row_tokens.float())  # the same tokens are merged
    assert relative_error(state.row_k, end.row_k) < BF16
    assert relative_error(state.row_received, end.row_received) < BF16
    assert before == {name: x.data_ptr() for name, x in state._asdict().items()}
