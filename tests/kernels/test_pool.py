"""Steps on rows of a pool: those of the states alone, other pages untouched, nothing read there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.kernels import CPU

from lowline.kernels.conv import causal_conv_step
from lowline.kernels.memory import row_memory_step
from lowline.kernels.memory.op import Rule, empty_memory_state
from lowline.kernels.memory.op import state_shapes as memory_shapes
from lowline.kernels.pool import on_rows
from lowline.kernels.recurrence import recurrence_step
from lowline.kernels.scan import selective_scan_step
from lowline.kernels.slots import SlotState, nearest_slot_step, slot_window_step
from lowline.kernels.slots.op import state_shapes as slot_shapes
from lowline.kernels.window import empty_window_state, window_linear_step

B, H, G, D, V, F, M, PAGES = 3, 4, 2, 16, 32, 16, 16, 7
ROWS, BETWEEN = (5, 0, 3), 11


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=drawn.generator)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seed():
    drawn.generator = torch.Generator().manual_seed(0)


def heads(dtype=torch.float32):
    return [x.to(dtype) for x in (drawn(B, H, D), drawn(B, G, D), drawn(B, G, V))]


def window(state=None, **how):
    if state is None:
        return empty_window_state(
            B, window=3, kv_heads=G, key_dim=D, value_dim=V, feature_dim=F, sinks=2
        )
    phi = drawn(B, H, F).exp(), drawn(B, G, F).exp()
    return window_linear_step(*heads(), *phi, state=state, **how)


def slots(state=None, **how):
    if state is None:
        q, k, v = heads()
        return SlotState(
            **{
                name: torch.zeros(size, dtype=torch.int64 if name in ("slot", "length") else None)
                for name, size in slot_shapes(B, k, v, drawn(H, M), 3, 2).items()
            }
        )
    slot = torch.randint(M, (B, G), generator=drawn.generator)
    return slot_window_step(*heads(), slot, drawn(H, M), state=state, **how)


def nearest_slots(state=None, backend="cpu", **how):
    if state is None:
        return slots()
    q, k, v = (x[:, None] for x in heads())
    return nearest_slot_step(q, k, v, drawn(B, 1, G, D), drawn(G, M, D), drawn(H, M), state, **how)


def row_memory(state=None, **how):
    if state is None:
        rule = Rule(window=4, sinks=1, exact=2, merged=2, block=2, horizon=0, bias=0.0, scale=1.0)
        _, k, v = heads()
        return empty_memory_state(memory_shapes(B, k, v, rule), k)
    return row_memory_step(*heads(), state=state, exact=2, block=2, **how)


def recurrence(kind, state=None, **how):
    normalize = kind == "normalized"
    if state is None:
        return torch.zeros(B, G, D, V + normalize)
    q, k, v = heads()
    g, beta = -drawn(B, G, D).exp(), drawn(B, G).sigmoid()
    if kind == "value":
        g = -drawn(B, G, V).exp()
    given = {"scalar": (g[..., 0], None), "delta": (g, beta), "normalized": (None, None)}
    q, k = q.exp(), k.exp() / 30
    how |= {"gate": "value" if kind == "value" else "key", "normalize": normalize}
    return recurrence_step(q, k, v, *given.get(kind, (g, None)), state=state, **how)


def conv(state=None, backend=None, **how):
    if state is None:
        return torch.zeros(B, D, 3)
    return causal_conv_step(drawn(B, D), drawn(D, 4), state=state, **how)


def scan(state=None, **how):
    if state is None:
        return torch.zeros(B, D, 16)
    rates = -drawn(D, 16).exp()
    tokens = drawn(B, D), drawn(B, D).exp(), rates, drawn(B, 16), drawn(B, 16)
    return selective_scan_step(*tokens, state=state, **how)


STEPS = {
    "window": window,
    "slots": slots,
    "row memory": row_memory,
    **{k: partial(recurrence, k) for k in ("key", "value", "scalar", "delta", "normalized")},
    "scan": scan,
}
EVERY = [
    *(pytest.param(step, "torch", id=f"{name}-torch") for name, step in STEPS.items()),
    *(pytest.param(step, *CPU.values, marks=CPU.marks, id=f"{name}-cpu")
      for name, step in STEPS.items()),
    pytest.param(partial(recurrence, "delta"), "reference", id="delta-reference"),
    pytest.param(conv, None, id="conv"),
    pytest.param(nearest_slots, *CPU.values, marks=CPU.marks, id="nearest slots-cpu"),
]  # fmt: skip


def leaves(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def pool_of(state, rows=ROWS):
    """Pages of NaN (of indices: of -1) that lie apart, those of `rows` with the states in them."""
    pools = []
    for x in leaves(state):
        size = x[0].numel()
        room = torch.full((PAGES, size + BETWEEN), float("nan")).to(x.dtype)
        if not x.is_floating_point():
            room.fill_(-1)
        pools.append(room[:, :size].unflatten(1, x.shape[1:]) if x.dim() > 1 else room[:, 0])
        pools[-1][list(rows)] = x
    return pools[0] if isinstance(state, torch.Tensor) else type(state)(*pools)


def bits(x):
    return x if not x.is_floating_point() else x.view(torch.int32)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("step, backend", EVERY)
def test_rows_of_a_pool_are_the_states_alone(step, backend, kind):
    alone, rows = step(), torch.tensor(ROWS, dtype=kind)
    pool = pool_of(alone)
    rooms = [x.as_strided((PAGES, x.stride(0)), (x.stride(0), 1)) for x in leaves(pool)]
    before = [x.clone() for x in rooms]
    for t in range(9):
        drawn.generator.manual_seed(t)
        want = step(alone, backend=backend)
        drawn.generator.manual_seed(t)
        got = step(pool, backend=backend, rows=rows)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert want.abs().max() > 0.01
    for room, old, x, one in zip(rooms, before, leaves(pool), leaves(alone), strict=True):
        assert torch.equal(x[list(ROWS)], one)
        x[list(ROWS)] = 0
        old.as_strided(x.shape, x.stride())[list(ROWS)] = 0
        assert torch.equal(bits(room), bits(old))  # other pages, and what lies between pages


@pytest.mark.parametrize("step, backend", EVERY)
def test_rows_that_repeat_or_do_not_exist_are_refused(step, backend):
    pool = pool_of(step())
    before = [x.clone() for x in leaves(pool)]
    for rows, words in (
        (torch.tensor([1, 2, 1]), "give different pages, each of 0 … 6"),
        (torch.tensor([0, 1, PAGES]), "give different pages"),
        (torch.tensor([-1, 1, 2]), "give different pages"),
        (torch.tensor([1, 2]), r"give int32 or int64 of shape \(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "give int32 or int64"),
    ):
        if step is nearest_slots:
            assert step(pool, rows=rows) is None
        else:
            with pytest.raises(ValueError, match=words):
                step(pool, backend=backend, rows=rows)
    for old, x in zip(before, leaves(pool), strict=True):
        assert torch.equal(bits(old), bits(x))


def test_the_plain_form_returns_and_writes_what_the_step_does():
    pool = torch.arange(12.0).view(4, 3)

    def step(taken):
        taken.mul_(10)
        return taken.sum(1)

    out = on_rows(step, pool[:, :2], torch.tensor([2, 0], dtype=torch.int32))
    assert out.tolist() == [130.0, 10.0]
    assert pool.tolist() == [[0, 10, 2], [3, 4, 5], [60, 70, 8], [9, 10, 11]]
