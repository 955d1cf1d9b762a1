"""Window and rows: every form against the definition, and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.kernels import needs_compiler, poisoned, relative_error
from helpers.memory import text_book
from torch.utils._pytree import tree_map_only

from lowline.kernels.memory import (
    MemoryState,
    row_memory_attention,
    row_memory_step,
    row_memory_steps,
)
from lowline.kernels.window import window_linear_attention
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


def wide(length, dtype=torch.float32):
    """q, k, v of dimensions that the C++ kernel takes."""
    g = torch.Generator().manual_seed(1)
    sizes = ((6, 32), (2, 32), (2, 16))
    return [torch.randn(2, length, *size, generator=g).to(dtype) for size in sizes]


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_compiled_form_is_the_plain_one(case):
    """Pieces of any length, a token at a time among them; and the states that other forms made."""
    given, options = wide(90), CASES[case] | {"bias": 0.3}
    exact = [x.double() for x in given]
    want = row_memory_attention(*exact, **options, backend="torch")
    bounds = (0, 13, 14, 15, 50, 90)
    for backends in (["cpu"] * 5, ["torch", "cpu", "torch", "cpu", "torch"]):
        state, outputs = None, []
        for a, b, backend in zip(bounds, bounds[1:], backends, strict=False):
            tokens = part(given, slice(a, b))
            kept = None if state is None else [x.clone() for x in state]
            o, after = row_memory_attention(*tokens, **options, initial_state=state,
                                            backend=backend)  # fmt: skip
            if state is not None:
                assert all(map(torch.equal, kept, state))  # which the call leaves as it was
            outputs.append(o)
            state = after
        for got, there in zip((torch.cat(outputs, 1), *state), _flat(want), strict=True):
            assert relative_error(got, there) < 1e-5
        assert torch.equal(state.row_tokens.double(), want[1].row_tokens)
    packed = [torch.cat([x[0, :33], x[1, :50]])[None] for x in given]
    cu = torch.tensor([0, 33, 33, 83])
    got = row_memory_attention(*packed, **options, cu_seqlens=cu, backend="cpu")
    with_torch = row_memory_attention(*packed, **options, cu_seqlens=cu, backend="torch")
    for ours, theirs in zip(_flat(got), _flat(with_torch), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_compiled_form_are_the_plain_ones(case):
    """Of the outputs, and of the keys and values that the state holds; packed sequences too."""
    given, options = wide(53), CASES[case] | {"bias": 0.3}
    packed = [torch.cat([x[0, :33], x[1, :20]])[None] for x in given]
    cu = torch.tensor([0, 33, 33, 53])
    for tensors, how in ((given, {}), (packed, {"cu_seqlens": cu})):
        grads = []
        for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in tensors]
            with poisoned():
                o, s = row_memory_attention(*leaves, **options, **how, backend=backend)
                held = (o, s.k, s.v, s.sink_k, s.sink_v, s.row_k, s.row_v)
                loss = sum((x * x.detach().cos()).sum() for x in held)
                grads.append(torch.autograd.grad(loss, leaves))
            assert s.row_received.grad_fn is None
        for ours, theirs in zip(*grads, strict=True):
            assert relative_error(ours, theirs) < 1e-5
    state = row_memory_attention(*given, **options)[1]
    leaves = [x.clone().requires_grad_() for x in given]
    with pytest.raises(ValueError, match="no gradients of what follows a state"):
        row_memory_attention(*leaves, **options, initial_state=state, backend="cpu")


@needs_compiler
def test_among_equals_the_older_row_stays_and_older_pairs_merge():
    """Uniform attention: the same rows in every form, where all candidates are equal."""
    q, k, v = (torch.zeros(1, 40, 1, 16) for _ in range(3))
    v[0, :, 0, 0] = torch.arange(40.0)  # tells rows apart, and weighs nothing in a choice
    for backend in ("cpu", "torch", "reference"):
        how = dict(window=4, block=2, horizon=1, backend=backend)
        _, state = row_memory_attention(q, k, v, exact=3, **how)
        assert state.row_v[0, 0, :, 0].tolist() == [0, 1, 2]
    q[..., 0], k[0, :, 0, 0], v = 1.0, torch.arange(40) % 2, torch.ones_like(v)  # two kinds
    for backend in ("cpu", "torch", "reference"):
        how = dict(window=4, block=4, backend=backend)
        _, state = row_memory_attention(q, k, v, exact=0, merged=4, **how)
        assert state.row_tokens[0, 0].sum() == 36 and state.row_k[0, 0, :, 0].unique().numel() == 2


@needs_compiler
@pytest.mark.parametrize("length", [1, 7])
def test_heads_of_several_sizes_are_those_alone(length):
    """One call, with sequences at several places in their blocks."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 80, n, 16, generator=g) for n in (8, 4, 4))
    heads, exact, how = ((2,), (0, 3), (1,)), (5, 0, 2), dict(sinks=2)
    rows = dict(block=4, horizon=9, bias=0.2)
    outs = {}
    for backend in ("cpu", "torch"):
        states, outputs = [], []
        for group, n_exact, window in zip(heads, exact, (8, 12, 4), strict=True):
            of_q = [2 * h + i for h in group for i in (0, 1)]
            alone = [
                (window_linear_attention(*tokens, window=window, **how) if not n_exact else
                 row_memory_attention(*tokens, window=window, exact=n_exact, **rows, **how))[1]
                for n, t in enumerate((21, 54))
                for tokens in [(q[n : n + 1, :t, of_q], k[n : n + 1, :t, group],
                                v[n : n + 1, :t, group])]
            ]  # fmt: skip
            states.append(type(alone[0])(*(torch.cat(x) for x in zip(*alone, strict=True))))
        for i in range(0, 21, length):
            n = torch.arange(2)[:, None]
            t = torch.tensor([21, 54])[:, None] + torch.arange(i, i + length)
            tokens = (x[n, t] for x in (q, k, v))
            outputs.append(row_memory_steps(*tokens, states=states, heads=heads, exact=exact,
                                            **rows, backend=backend))  # fmt: skip
        outs[backend] = [torch.cat(outputs, 1), *(x for state in states for x in state)]
    for ours, theirs in zip(*outs.values(), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    whole = row_memory_attention(q[1:, :, 4:6], k[1:, :, 2:3], v[1:, :, 2:3], window=8, exact=5,
                                 **rows, **how)[0]  # fmt: skip
    torch.testing.assert_close(outs["cpu"][0][1, :, 4:6], whole[0, 54:75], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    given, options = inputs(), CASES["both"]
    _, state = row_memory_attention(*given, **options)
    for changes, words in (
        (dict(block=9), "1 <= block <= window"),
        (dict(exact=0, merged=0), "give at least one row"),
        (dict(exact=4), "row_k has shape"),
        (dict(backend="cpu"), "it computes in fp32 only"),
        (dict(backend="triton"), "no kernel of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            row_memory_attention(*given, **(options | changes), initial_state=state)
    odd = [x[..., :7] for x in given[:2]]
    with pytest.raises(ValueError, match="even number of features"):
        row_memory_attention(*odd, given[2], **options)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_compiler)])
def test_a_key_that_is_no_number_ends_nothing_but_its_own_sequence(backend):
    """Such a row has no nearest one to merge with."""
    given = wide(40)
    given[1][0, 20] = torch.nan
    o, _ = row_memory_attention(*given, **CASES["both"], backend=backend)
    assert o[0, :20].isfinite().all() and o[1].isfinite().all()
    alone, _ = row_memory_attention(*(x[1:] for x in given), **CASES["both"], backend=backend)
    torch.testing.assert_close(o[1:], alone)
