"""Window and slots: every form against dense softmax attention and against each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from lowline.kernels.slots import SlotState, slot_window_attention, slot_window_step

H, G, D, V, M = 4, 2, 8, 6, 3
CASES = [(5, 2), (64, 4), (1, 0), (70, 0)]


def inputs(T, B=2, dtype=torch.float64, slots=M, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    r = draw(B, T, G, slots).softmax(-1)
    return [draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, V), r, draw(H, slots)]


def part(given, span):
    return [x[:, span] for x in given[:4]] + given[4:]


def dense(given, window, sinks):
    """T x T weights: tokens that are exact by themselves, older ones by their slots."""
    q, k, v, r, bias = given
    B, T = q.shape[:2]
    t, j = torch.arange(T)[:, None], torch.arange(T)
    exact = (j <= t) & ((j > t - window) | (j < sinks))
    older = ((j <= t) & ~exact).to(q.dtype)
    out = torch.empty(B, T, H, V, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            s = q[b, :, h] @ k[b, :, g].T / D**0.5
            n = older @ r[b, :, g]
            mean = torch.einsum("tj,jm,jd->tmd", older, r[b, :, g], k[b, :, g]) / n[..., None]
            a = torch.einsum("td,tmd->tm", q[b, :, h], mean) / D**0.5 + bias[h]
            slot = torch.einsum("tm,jm->tj", torch.where(n > 0, a.exp(), 0), r[b, :, g])
            weights = torch.where(exact, s.exp(), slot * older)
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
    single = [x.float() for x in given]
    o, _ = slot_window_attention(*single, window=window, sinks=sinks)
    assert o.dtype == torch.float32
    assert (o - expected).abs().max() <= 1e-5 * expected.abs().max()
    half = [x.bfloat16() for x in given]
    o, _ = slot_window_attention(*half, window=window, sinks=sinks)
    exact = dense([x.double() for x in half], window, sinks)
    assert o.dtype == torch.bfloat16
    assert (o - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_a_slot_for_every_token_is_softmax_attention():
    T = 40
    q, k, v, _, _ = inputs(T)
    r = torch.eye(T, dtype=q.dtype)[None, :, None].expand(2, T, G, T)
    bias = torch.zeros(H, T, dtype=q.dtype)
    o, _ = slot_window_attention(q, k, v, r, bias, window=3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    close(o, expected.transpose(1, 2), 1e-12)
    off, _ = slot_window_attention(q, k, v, r, bias - torch.inf, window=T)
    close(off, o, 1e-12)
    window, _ = slot_window_attention(q, k, v, r, bias - torch.inf, window=3)
    close(window, dense([q, k, v, r * 0, bias], 3, 0), 1e-12)


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
    r = (8 * draw(B, T, G, M)).softmax(-1)
    r[..., 3:5] = 0
    starts = [slot_window_attention(*(x[[n], :t] for x in (q, k, v, r)), bias, window=window,
                                    sinks=sinks)[1] for n, t in enumerate((1, 3, 71))]  # fmt: skip
    leaves = zip(*(tree_leaves(state) for state in starts), strict=True)
    joined = [torch.cat(tensors) for tensors in leaves]
    states = {
        name: SlotState(type(starts[0].window)(*(x.clone() for x in joined[:7])), joined[7].clone())
        for name in ("cpu", "torch")
    }
    for t in range(75, T):
        token = [x[:, t] for x in (q, k, v, r)]
        outs = {
            name: slot_window_step(*token, bias, state=state, backend=name)
            for name, state in states.items()
        }
        torch.testing.assert_close(outs["cpu"], outs["torch"], rtol=1e-5, atol=1e-5)
    close(states["cpu"], states["torch"], 1e-5)
    assert states["cpu"].window.length.tolist() == [1 + 15, 3 + 15, 71 + 15]
    with pytest.raises(ValueError, match="fp32 only"):
        slot_window_step(*(x.double() for x in token), bias.double(),
                         state=SlotState(*tree_map_only(torch.Tensor, lambda x: x.double() if
                         x.is_floating_point() else x, states["cpu"])), backend="cpu")  # fmt: skip


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
        leaves = [x.clone().requires_grad_() for x in (*second, *state.window[:-1], state.keys)]
        held = state._replace(
            window=type(state.window)(*leaves[5:11], state.window.length), keys=leaves[11]
        )
        o, after = slot_window_attention(
            *leaves[:5], window=window, sinks=sinks, initial_state=held, backend=backend
        )
        way = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
        loss = (o * way).sum() + after.keys.square().sum() + after.window.S.square().sum()
        found.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert all(x.abs().max() > 1e-3 for x in found[0][:5])
    close(found[1], found[0], 1e-9)


def test_slots_that_are_nearly_empty():
    """Shares too small for their inverse are no slot; the gradients stay finite."""
    given = inputs(130, dtype=torch.float32)
    given[3] = torch.zeros_like(given[3])
    given[3][..., 0], given[3][..., 1] = 1, 1e-40
    leaves = [x.requires_grad_() for x in given]
    o, state = slot_window_attention(*leaves, window=5, sinks=2)
    o.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    one = [x.detach()[..., :1] for x in given[3:]]
    alone, _ = slot_window_attention(*given[:3], *one, window=5, sinks=2)
    close(o, alone, 1e-6)
    token = [x[:, -1].detach() for x in given[:4]] + [given[4].detach()]
    with torch.no_grad():
        assert (
            slot_window_step(*token, state=tree_map_only(torch.Tensor, torch.clone, state))
            .isfinite()
            .all()
        )


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
    with pytest.raises(ValueError, match="do not fit"):
        slot_window_attention(*inputs(9)[:4], torch.zeros(H, M + 1), window=3)
