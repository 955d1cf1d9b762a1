"""A mixer's state in pages of bytes, and zeros as the state before the first token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.mixers import CASES, SHARED, error, inputs, made, run
from torch.utils._pytree import tree_leaves

from lowline.errors import LowlineError
from lowline.kernels.pool import put_rows, take_rows
from lowline.linearize.mixers import HeadShape, Mixer
from lowline.linearize.mixers.state import ALIGNMENT, clear_rows


def described(state):
    return [(tuple(t.shape), t.dtype) for t in tree_leaves(state) if t is not None]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_zeros_are_empty(case: str, backend: str) -> None:
    """Of one token, few, many and a packed batch, and so is what follows."""
    mixer = made(case, dtype=torch.float64 if backend == "reference" else torch.float32)
    mixer.options = replace(mixer.options, backend=backend)
    dtype = torch.float64 if backend == "reference" else torch.float32
    limit = 1e-12 if backend == "reference" else 2e-5
    given = inputs(SHARED, 24, dtype=dtype)
    with torch.no_grad():
        for length in (1, 3, 18):
            expected, after = run(mixer, given, slice(0, length))
            ours, state = run(mixer, given, slice(0, length), state=mixer.empty_state(2, dtype))
            assert error(ours, expected) < limit
            assert described(state) == described(after)
            rest = slice(length, 24)
            expected, ours = (run(mixer, given, rest, state=s)[0] for s in (after, state))
            assert error(ours, expected) < limit
        packed = {name: t[:1] for name, t in given.items()}
        bounds = torch.tensor([0, 1, 10, 24])
        expected, _ = run(mixer, packed, cu_seqlens=bounds)
        ours, _ = run(mixer, packed, cu_seqlens=bounds, state=mixer.empty_state(3, dtype))
        assert error(ours, expected) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_layout_is_that_of_the_states(case: str, dtype: torch.dtype) -> None:
    mixer = made(case, dtype=dtype)
    before = torch.get_rng_state()
    layout = mixer.state_layout(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        _, state = run(mixer, inputs(SHARED, 9, dtype=dtype))
    assert described(layout.empty(2)) == described(state)
    assert layout.nbytes == sum(t.nbytes for t in tree_leaves(state) if t is not None) // 2
    assert layout.page_bytes % ALIGNMENT == 0 and layout.page_bytes >= layout.nbytes


@pytest.mark.parametrize("case", ["slots", "memory, budget", "liger_gsa", "kda, conv, shared"])
def test_states_in_pages(case: str) -> None:
    """Sequences continue from rows of a pool whose pages are larger, as they do apart from it."""
    mixer = made(case)
    given = inputs(SHARED, 12)
    layout = mixer.state_layout()
    pages = torch.full((5, layout.page_bytes + 4 * ALIGNMENT), 255, dtype=torch.uint8)
    pool = layout.views(pages)
    rows = torch.tensor([3, 1])
    with torch.no_grad():
        state = take_rows(pool, rows)
        clear_rows(state, torch.tensor([True, True]))
        _, state = run(mixer, given, slice(0, 11), state=state)
        put_rows(pool, rows, state)
        state = take_rows(pool, rows)
        clear_rows(state, torch.tensor([False, False]))
        ours, _ = run(mixer, given, slice(11, 12), state=state)
        expected, _ = run(mixer, given)
    assert error(ours, expected[:, 11:]) < 1e-5
    assert (pages[[0, 2, 4]] == 255).all()  # other sequences' pages
    assert (pages[:, layout.page_bytes :] == 255).all()


ALONE = HeadShape(hidden_size=32, n_heads=4, n_kv_heads=2, head_dim=16)


def on_pool(mixer, given, span, pool, rows, **how):
    q, k, v, x, cos, sin = (t[:, span] for t in given.values())
    return mixer.on_pool(
        q, k, v, rope=(cos, sin), x_BTE=x, pool=pool, rows_N=torch.tensor(rows), **how
    )


@pytest.mark.parametrize("case", CASES)
def test_a_pool_serves_sequences_that_come_and_end(case: str) -> None:
    """Prompts in pieces, packed, on pages that others left; then tokens, one of each sequence."""
    mixer, given = made(case, shape=ALONE, backend="auto"), inputs(ALONE, 12, B=3)
    layout = mixer.state_layout()
    pages = torch.full((5, layout.page_bytes + ALIGNMENT), 255, dtype=torch.uint8)  # NaN
    pool, rows = layout.views(pages), [3, 0, 4]
    with torch.no_grad():
        expected, _ = run(mixer, given)

        def packed(numbers, begin, end, fresh):
            part = {
                name: torch.cat([t[n % len(t), begin:end] for n in numbers])[None]
                for name, t in given.items()
            }
            bounds = torch.arange(len(numbers) + 1) * (end - begin)
            where = [rows[n] for n in numbers]
            fresh = torch.tensor(fresh)
            o = on_pool(mixer, part, slice(None), pool, where, fresh_N=fresh, cu_seqlens=bounds)
            want = torch.cat([expected[n, begin:end] for n in numbers])[None]
            assert error(o, want) < 2e-5

        packed([0, 1], 0, 4, [True, True])
        packed([1, 0], 4, 7, [False, False])
        packed([2], 0, 7, [True])
        for t in range(7, 12):
            o = on_pool(mixer, given, slice(t, t + 1), pool, rows)
            assert error(o, expected[:, t : t + 1]) < 2e-5
        packed([0, 1], 0, 2, [True, True])  # new sequences on used pages
    assert (pages[[1, 2]] == 255).all() and (pages[:, layout.page_bytes :] == 255).all()


def test_rows_are_for_one_token_without_gradients() -> None:
    mixer, given = made("slots", shape=ALONE, backend="auto"), inputs(ALONE, 3)
    pool = mixer.empty_state(4)
    for span in (slice(0, 1), slice(0, 3)):
        with pytest.raises(LowlineError, match="for one token of each sequence"):
            run(mixer, given, span, state=pool, rows=torch.tensor([2, 1]),
                cu_seqlens=None if span.stop == 1 else torch.tensor([0, 3]))  # fmt: skip


def test_a_mixer_without_rows_has_its_states_copied() -> None:
    class Sum(Mixer):
        def forward(self, q_BTHD, k_BTGD, v_BTGD, *, rope, x_BTE, state=None, cu_seqlens=None):
            after = v_BTGD[:, 0] + (0 if state is None else state)
            return after[:, None], after

    pool, v = torch.zeros(3, 2, 16), torch.ones(2, 1, 2, 16)
    for _ in range(2):
        o = Sum(ALONE).on_pool(
            v, v, v, rope=(v, v), x_BTE=v, pool=pool, rows_N=torch.tensor([2, 0])
        )
    assert o.unique().tolist() == [2.0]
    assert pool[:, 0, 0].tolist() == [2.0, 0.0, 2.0]
