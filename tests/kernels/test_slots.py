"""Window and slots: every form against dense softmax attention and against each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from lowline.kernels.slots import (
    SlotState,
    nearest_slot_step,
    slot_window_attention,
    slot_window_step,
)

H, G, D, V, M = 4, 2, 8, 6, 3
FLOATS = ("k", "v", "sink_k", "sink_v", "keys", "values", "tokens")
CASES = [(5, 2), (64, 4), (1, 0), (70, 0)]


def inputs(T, B=2, dtype=torch.float64, slots=M, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    slot = torch.randint(slots, (B, T, G), generator=g)
    return [draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, V), slot, draw(H, slots)]


def cast(given, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in given]


def part(given, span):
    return [x[:, span] for x in given[:4]] + given[4:]


def dense(given, window, sinks):
    """T x T weights: tokens that are exact by themselves, older ones by their slots."""
    q, k, v, slot, bias = given
    B, T = q.shape[:2]
    r = torch.nn.functional.one_hot(slot, bias.shape[1]).to(q.dtype)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    exact = (j <= t) & ((j > t - window) | (j < sinks))
    older = ((j <= t) & ~exact).to(q.dtype)
    out = torch.empty(B, T, H, V, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            s = q[b, :, h] @ k[b, :, g].T / D**0.5
            n = older @ r[b, :, g]
            sums = torch.einsum("tj,jm,jd->tmd", older, r[b, :, g], k[b, :, g])
            mean = sums / n.clamp(min=1)[..., None]
            a = torch.einsum("td,tmd->tm", q[b, :, h], mean) / D**0.5 + bias[h]
            of_slot = torch.einsum("tm,jm->tj", a.exp(), r[b, :, g])
            weights = torch.where(exact, s.exp(), of_slot * older)
            out[b, :, h] = weights @ v[b, :, g] / weights.sum(-1, keepdim=True)
    return out


def close(ours, theirs, tolerance):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window, sinks", CASES)
@pytest.mark.parametrize("T", [1, 2, 63, 65, 150])
def test_formula(T, window, sinks):
    given = inputs(T)
    expected = dense(given, window, sinks)
    outs = {
        name: slot_window_attention(*given, window=window, sinks=sinks, backend=name)
        for name in ("reference", "torch")
    }
    for o, _ in outs.values():
        close(o, expected, 1e-10)
    close(outs["torch"][1], outs["reference"][1], 1e-10)
    single = cast(given, torch.float32)
    o, _ = slot_window_attention(*single, window=window, sinks=sinks)
    assert o.dtype == torch.float32
    assert (o - expected).abs().max() <= 1e-5 * expected.abs().max()
    half = cast(given, torch.bfloat16)
    o, _ = slot_window_attention(*half, window=window, sinks=sinks)
    exact = dense(cast(half, torch.float64), window, sinks)
    assert o.dtype == torch.bfloat16
    assert (o - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_a_slot_for_every_token_is_softmax_attention():
    T = 40
    q, k, v, _, _ = inputs(T)
    slot = torch.arange(T)[None, :, None].expand(2, T, G)
    bias = torch.zeros(H, T, dtype=q.dtype)
    o, _ = slot_window_attention(q, k, v, slot, bias, window=3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    close(o, expected.transpose(1, 2), 1e-12)
    off, _ = slot_window_attention(q, k, v, slot, bias - torch.inf, window=T)
    close(off, o, 1e-12)
    window, _ = slot_window_attention(q, k, v, slot, bias - torch.inf, window=3)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), (j <= t) & (j > t - 3), enable_gqa=True
    )
    close(window, expected.transpose(1, 2), 1e-12)


@pytest.mark.parametrize("window, sinks", CASES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_pieces_and_tokens_are_the_whole(backend, window, sinks):
    given = inputs(90)
    whole, last = slot_window_attention(*given, window=window, sinks=sinks, backend="torch")
    for bounds in ([0, 1, 90], [0, 4, 64, 90], [0, 80, 90]):
        state, outs = None, []
        for a, b in pairwise(bounds):
            o, state = slot_window_attention(
                *part(given, slice(a, b)),
                window=window,
                sinks=sinks,
                initial_state=state,
                backend=backend,
            )
            outs.append(o)
        close((torch.cat(outs, 1), state), (whole, last), 1e-10)
    o, state = slot_window_attention(*part(given, slice(0, 1)), window=window, sinks=sinks)
    outs = [o]
    for t in range(1, 90):
        token = [x[:, t] for x in given[:4]] + given[4:]
        outs.append(slot_window_step(*token, state=state)[:, None])
    close((torch.cat(outs, 1), state), (whole, last), 1e-10)


@pytest.mark.parametrize("window, sinks", [(5, 2), (64, 4), (1, 0)])
def test_compiled_step_is_the_plain_one(window, sinks):
    """Token by token, from sequences of several lengths; some slots stay empty."""
    g = torch.Generator().manual_seed(0)
    B, T, G, D, V, M = 3, 90, 2, 32, 16, 16

    def draw(*shape):
        return torch.randn(shape, generator=g)

    q, k, v, bias = draw(B, T, 6, D), draw(B, T, G, D), draw(B, T, G, V), draw(6, M)
    slot = torch.randint(M - 2, (B, T, G), generator=g)
    starts = [slot_window_attention(*(x[[n], :t] for x in (q, k, v, slot)), bias, window=window,
                                    sinks=sinks)[1] for n, t in enumerate((1, 3, 71))]  # fmt: skip
    states = {
        name: SlotState(*map(torch.cat, zip(*starts, strict=True))) for name in ("cpu", "torch")
    }
    for t in range(75, T):
        token = [x[:, t] for x in (q, k, v, slot)]
        outs = {
            name: slot_window_step(*token, bias, state=state, backend=name)
            for name, state in states.items()
        }
        torch.testing.assert_close(outs["cpu"], outs["torch"], rtol=1e-5, atol=1e-5)
    close(states["cpu"], states["torch"], 1e-5)
    assert states["cpu"].length.tolist() == [1 + 15, 3 + 15, 71 + 15]
    double = SlotState(*cast(states["cpu"], torch.float64))
    with pytest.raises(ValueError, match="fp32 only"):
        slot_window_step(
            *cast([*token, bias], torch.float64),
            state=double,
            backend="cpu",
        )
    state = states["cpu"]
    oldest = state.slot[2, state.length[2] % window]  # of the token that leaves next
    for wrong in (token[3][1], oldest):
        before, right = tree_map_only(torch.Tensor, torch.clone, state), wrong[0].clone()
        wrong[0] = M
        with pytest.raises(IndexError, match=f"slot {M} of {M}"):
            slot_window_step(*token, bias, state=state, backend="cpu")
        wrong[0] = right
        close(state, before, 0)


def test_step_of_an_integer_scale_and_of_lengths_apart():
    """`auto`: the compiled step for the one, torch for the other."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, h, 16, generator=g) for h in (4, 2, 2))
    slot, bias = torch.randint(16, (2, 9, 2), generator=g), torch.zeros(4, 16)
    whole, _ = slot_window_attention(q, k, v, slot, bias, window=3, scale=1)
    start = [x[:, :5] for x in (q, k, v, slot)]
    _, state = slot_window_attention(*start, bias, window=3, scale=1)
    apart = tree_map_only(torch.Tensor, torch.clone, state)
    apart = apart._replace(length=torch.tensor([5, 0, 5, 0])[::2])
    for t in range(5, 9):
        token = [x[:, t] for x in (q, k, v, slot)]
        for each in (state, apart):
            o = slot_window_step(*token, bias, state=each, scale=1)
            torch.testing.assert_close(o, whole[:, t], rtol=1e-5, atol=1e-5)
    assert apart.length.tolist() == [9, 9]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_are_those_alone(backend):
    given, bounds = inputs(100, B=1), [0, 7, 7, 8, 100]
    how = dict(window=5, sinks=2, backend=backend)
    packed, state = slot_window_attention(*given, **how, cu_seqlens=torch.tensor(bounds))
    alone = [slot_window_attention(*part(given, slice(a, b)), **how) for a, b in pairwise(bounds)]
    close(packed, torch.cat([o for o, _ in alone], 1), 1e-10)
    for n, (_, theirs) in enumerate(alone):
        close(tree_map_only(torch.Tensor, lambda t: t[[n]], state), theirs, 1e-10)  # noqa: B023
    more = inputs(9, B=1, seed=1)
    bounds = [0, 0, 4, 5, 9]
    packed, _ = slot_window_attention(
        *more, **how, cu_seqlens=torch.tensor(bounds), initial_state=state
    )
    parts = []
    for n, (a, b) in enumerate(pairwise(bounds)):
        row = tree_map_only(torch.Tensor, lambda t: t[[n]], state)  # noqa: B023
        o, _ = slot_window_attention(*part(more, slice(a, b)), **how, initial_state=row)
        parts.append(o)
    close(packed, torch.cat(parts, 1), 1e-10)


@pytest.mark.parametrize("window, sinks", CASES)
def test_gradients(window, sinks):
    """Of every input and of the state, against autograd of the reference."""
    found = []
    first, second = inputs(20), inputs(75, seed=1)
    _, state = slot_window_attention(*first, window=window, sinks=sinks)
    for backend in ("reference", "torch"):
        tensors = (*second[:3], second[4], *(getattr(state, name) for name in FLOATS))
        leaves = [x.clone().requires_grad_() for x in tensors]
        held = state._replace(**dict(zip(FLOATS, leaves[4:], strict=True)))
        o, after = slot_window_attention(
            *leaves[:3],
            second[3],
            leaves[3],
            window=window,
            sinks=sinks,
            initial_state=held,
            backend=backend,
        )
        way = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
        loss = (o * way).sum() + after.keys.square().sum() + after.values.square().sum()
        found.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert all(x.abs().max() > 1e-3 for x in found[0][:4])
    close(found[1], found[0], 1e-9)


@pytest.mark.parametrize("window, sinks", CASES)
@pytest.mark.parametrize("before", [0, 1, 90])
def test_pieces_are_computed_again(window, sinks, before, monkeypatch):
    """A long sequence in pieces: the same outputs, state and gradients, and less is kept."""
    found, kept = [], []
    given, state = inputs(300), None
    if before:
        _, state = slot_window_attention(*inputs(before, seed=1), window=window, sinks=sinks)
    for piece in (1 << 20, 70):
        monkeypatch.setattr("lowline.kernels.slots.op.PIECE", piece)
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in given]
        saved = []

        def keep(x, saved=saved):
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            o, after = slot_window_attention(
                *leaves, window=window, sinks=sinks, initial_state=state
            )
        loss = o.square().sum() + after.keys.square().sum() + after.values.square().sum()
        wanted = [x for x in leaves if x.requires_grad]
        found.append((o, after, torch.autograd.grad(loss, wanted)))
        kept.append(sum(saved))
    close(found[1], found[0], 1e-10)
    assert kept[1] < kept[0] / 3


def test_extreme_scores():
    given = inputs(130, dtype=torch.float32)
    given[0] *= 1e3
    given[0].requires_grad_()
    o, state = slot_window_attention(*given, window=5, sinks=2)
    o.sum().backward()
    assert o.isfinite().all() and given[0].grad.isfinite().all()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(window=0), "window = 0"),
        (dict(backend="triton"), "no kernel"),
        (dict(cu_seqlens=torch.tensor([0, 9])), "batch of one"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        slot_window_attention(*inputs(9), **({"window": 3} | change))
    q, k, v, slot, bias = inputs(9)
    with pytest.raises(ValueError, match="do not fit"):
        slot_window_attention(q, k, v, slot, bias[1:], window=3)
    with pytest.raises(ValueError, match=f"slot is torch.int32; give int64, of 0 … {M - 1}"):
        slot_window_attention(q, k, v, slot.int(), bias, window=3)
    _, state = slot_window_attention(q, k, v, slot, bias, window=3)
    with pytest.raises(ValueError, match=r"state's k has shape \(2, 3, 2, 8\), this call needs"):
        slot_window_attention(q, k, v, slot, bias, window=4, initial_state=state)


@torch.no_grad()
def test_one_token_into_the_nearest_slot():
    G, M, D = 2, 32, 16
    x = torch.randn(1, 30, 4, D), *torch.randn(3, 1, 30, G, D)
    centroids, bias = torch.randn(G, M, D), torch.randn(4, M)
    near = (x[3][0, :, :, None].double() - centroids.double()).square().sum(-1).argmin(-1)[None]
    expected, after = slot_window_attention(*x[:3], near, bias, window=6, sinks=2)
    _, state = slot_window_attention(*(t[:, :9] for t in (*x[:3], near)), bias, window=6, sinks=2)
    for t in range(9, 30):
        token = [y[:, t : t + 1].contiguous() for y in x]
        o = nearest_slot_step(*token, centroids, bias, state)
        torch.testing.assert_close(o[0, 0], expected[0, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, after)
    other = SlotState(*(s.double() if s.is_floating_point() else s for s in state))
    assert nearest_slot_step(*token, centroids, bias, other) is None and state.length == 30
    assert nearest_slot_step(*(y.double() for y in token), centroids, bias, state) is None
