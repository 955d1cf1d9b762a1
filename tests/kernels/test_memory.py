"""Window and rows: every form against the definition, and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.memory import text_book
from torch.utils._pytree import tree_map_only

from lowline.kernels.memory import MemoryState, row_memory_attention, row_memory_step
from lowline.linearize.mixers.options import MemoryOptions

H, G, D, V, T = 4, 2, 8, 6, 39
CASES = {
    "eviction": dict(window=8, sinks=2, exact=4, merged=0, block=2, horizon=0),
    "means": dict(window=8, sinks=2, exact=0, merged=4, block=4, horizon=0),
    "both": dict(window=8, sinks=1, exact=3, merged=3, block=4, horizon=6),
    "a block is the window": dict(window=5, sinks=0, exact=2, merged=3, block=5, horizon=9),
    "more sinks than rows": dict(window=6, sinks=3, exact=2, merged=1, block=1, horizon=1),
    "rows stay empty": dict(window=16, sinks=4, exact=40, merged=30, block=16, horizon=20),
}


def inputs(B=2, dtype=torch.float64, length=T):
    g = torch.Generator().manual_seed(0)
    heads = ((H, D), (G, D), (G, V))
    return [
        torch.randn(B, length, *size, generator=g, dtype=torch.float64).to(dtype) for size in heads
    ]


def part(given, span):
    return [x[:, span] for x in given]


def close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_definition(case):
    q, k, v = given = inputs()
    options = CASES[case] | {"bias": 0.3}
    o, state = row_memory_attention(*given, **options, backend="torch")
    close((o, *state), _flat(row_memory_attention(*given, **options, backend="reference")))
    rule, h = MemoryOptions(**options), H // G
    for b in range(2):
        for g in range(G):
            want = text_book(q[b, :, g * h : (g + 1) * h], k[b, :, g], v[b, :, g], rule)
            torch.testing.assert_close(o[b, :, g * h : (g + 1) * h], want, rtol=1e-10, atol=1e-10)
    left = T - 1 - (T - 1) % rule.block + rule.block - rule.window - rule.sinks
    held = state.row_tokens.sum(-1)
    if rule.merged:  # what left the window is in the rows, every token once
        assert (held == left).all()
    else:
        assert (held == rule.exact).all() and state.row_tokens.max() == 1
    # attention received, by what is still held, is a part of all that was given
    assert (state.row_received[state.row_tokens > 0] > 0).all()


def _flat(result):
    return result[0], *result[1]


@pytest.mark.parametrize("case", CASES)
def test_steps_of_sequences_of_other_lengths(case):
    """A batch whose rows are at other places in their blocks: each as if it were alone."""
    given, options = inputs(), CASES[case] | {"bias": 0.3}
    starts = (7, 18)
    alone = [
        row_memory_attention(*part([x[n : n + 1] for x in given], slice(0, t)), **options)[1]
        for n, t in enumerate(starts)
    ]
    state = MemoryState(*(torch.cat(x).clone() for x in zip(*alone, strict=True)))
    token = {name: options[name] for name in ("exact", "block", "horizon", "bias")}
    rows = torch.arange(2)
    outputs = [
        row_memory_step(*(x[rows, torch.tensor(starts) + i] for x in given), state=state, **token)
        for i in range(14)
    ]
    whole = row_memory_attention(*given, **options)[0]
    for n, t in enumerate(starts):
        torch.testing.assert_close(torch.stack(outputs)[:, n], whole[n, t : t + 14])
        want = row_memory_attention(
            *part([x[n : n + 1] for x in given], slice(0, t + 14)), **options
        )
        close(tree_map_only(torch.Tensor, lambda x: x[n : n + 1], state), want[1])  # noqa: B023


def test_with_a_row_for_every_token_it_is_softmax_attention():
    q, k, v = given = inputs()
    for options in (dict(exact=T), dict(exact=0, merged=T)):
        o, _ = row_memory_attention(*given, window=8, sinks=3, block=4, bias=0.3, **options)
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(o, want.transpose(1, 2))


def test_a_token_that_is_looked_at_stays_and_alike_ones_merge():
    """One key that all queries seek survives eviction; two tokens of each kind share a row."""
    length = 40
    q, k, v = (torch.zeros(1, length, 1, 4, dtype=torch.float64) for _ in range(3))
    q[..., 0] = 4.0
    k[:, 3, :, 0], v[:, 3, :, 1] = 4.0, 1.0
    o, state = row_memory_attention(q, k, v, window=4, exact=2, block=2)
    assert (state.row_k[0, 0, :, 0] == 4.0).sum() == 1
    assert o[0, -1, 0, 1] > 0.99  # it is still read, 36 tokens later
    kind = torch.arange(length) % 5
    k = torch.nn.functional.one_hot(kind, 6).double()[None, :, None]
    q = torch.ones(1, length, 1, 6, dtype=torch.float64)
    _, state = row_memory_attention(q, k, k, window=4, exact=0, merged=5, block=2)
    means = state.row_k[0, 0]
    assert means.max(-1).values.tolist() == [1.0] * 5 and means.sum(0).tolist() == [1.0] * 5 + [0]
    assert sorted(state.row_tokens[0, 0].tolist()) == [7, 7, 7, 7, 8]


def test_gradients_are_those_of_the_definition():
    given, options = [x[:1] for x in inputs()], CASES["both"] | {"bias": 0.3}
    rule, grads = replace(MemoryOptions(**options), bias=0.3), []
    for form in ("torch", "reference", "definition"):
        q, k, v = leaves = [x.clone().requires_grad_() for x in given]
        if form == "definition":
            o = torch.cat(
                [
                    text_book(q[0, :, 2 * g : 2 * g + 2], k[0, :, g], v[0, :, g], rule)
                    for g in range(G)
                ],
                1,
            )[None]
        else:
            o, _ = row_memory_attention(*leaves, **options, backend=form)
        grads.append(torch.autograd.grad(o.square().sum(), leaves))
    close(grads[0], grads[1])
    close(grads[0], grads[2], 1e-9)


def test_what_does_not_fit_is_refused():
    given, options = inputs(), CASES["both"]
    _, state = row_memory_attention(*given, **options)
    for changes, words in (
        (dict(block=9), "1 <= block <= window"),
        (dict(exact=0, merged=0), "give at least one row"),
        (dict(exact=4), "row_k has shape"),
        (dict(backend="cpu"), "no kernel of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            row_memory_attention(*given, **(options | changes), initial_state=state)
    odd = [x[..., :7] for x in given[:2]]
    with pytest.raises(ValueError, match="even number of features"):
        row_memory_attention(*odd, given[2], **options)
