"""Mixers against their text-book formulas, and one function of the tokens at any split."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.memory import text_book
from helpers.mixers import CASES, DELTA, LIGER, MAMBA, SHAPES, SHARED, error, inputs, made, run
from torch.utils._pytree import tree_leaves, tree_map_only

from lowline.linearize.mixers import Mixer
from lowline.linearize.mixers.base import apply_rope

OTHERS = [name for name in SHAPES if SHAPES[name] is not SHARED]


# ----------------------------------------------------------------------------- the text-book forms
# One sequence and head at a time, T x T weights, fp64: q, k, v are (T, D), after repeating heads.


def masks(T: int, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are exact, and which of the past are not."""
    t, j = torch.arange(T)[:, None], torch.arange(T)
    exact = (j <= t) & ((j > t - window) | (j < sinks))
    return exact, (j <= t) & ~exact


def softmax_window(q, k, v, window, sinks):
    exact, _ = masks(len(q), window, sinks)
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~exact, -torch.inf)
    return scores.softmax(-1) @ v


def of_8_bits(x):
    """Return each row in steps of its largest number's 127th part, which has 17 bits."""
    bits, exponent = torch.frexp(x.abs().amax(-1, keepdim=True).float() / 127)
    step = torch.ldexp((bits * 2**17).floor() / 2**17, exponent).to(x.dtype)
    return (x / step).round() * step


def hedgehog_map(x, W):
    return torch.cat([(x @ W).softmax(-1), (-x @ W).softmax(-1)], -1)


def normalized(phi_q, phi_k, v):
    weights = (phi_q @ phi_k.T).tril()
    return weights @ v / weights.sum(-1, keepdim=True)


def decayed(q, k, v, g):
    """Σ_j (Σ_d q_td k_jd Π_{j<i≤t} g_id) v_j."""
    log = g.log().cumsum(0)
    factor = (log[:, None] - log[None]).masked_fill(
        ~torch.ones(len(q), len(q)).tril().bool()[..., None], -torch.inf
    )
    return torch.einsum("td,jd,tjd,jv->tv", q, k, factor.exp(), v)


def slots(q, k, v, g):
    out, K, V = [], 0, 0
    for q_t, k_t, v_t, g_t in zip(q, k, v, g, strict=True):
        K = K * g_t[None, :] + torch.outer(k_t, 1 - g_t)
        V = g_t[:, None] * V + torch.outer(1 - g_t, v_t)
        out.append((q_t @ K).softmax(-1) @ V)
    return torch.stack(out)


def delta(q, k, v, alpha, beta):
    S, out, one = 0, [], torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        S = alpha[t][:, None] * S if t else torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)
        S = (one - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        out.append(S.T @ q[t])
    return torch.stack(out)


def convolved(x, taps):
    padded = torch.cat([x.new_zeros(taps.shape[1] - 1, x.shape[1]), x])
    rows = [padded[t : t + taps.shape[1]].T * taps for t in range(len(x))]
    return torch.stack(rows).sum(-1)


def mamba2(mixer, u, q, k, v, h, g):
    D = q.shape[1]

    def taken(x, conv, head):
        part = slice(head * D, head * D + D)
        return F.silu(convolved(x, conv.weight[part]) + conv.bias[part])

    x, B, C = taken(v, mixer.conv_v, g), taken(k, mixer.conv_k, g), taken(q, mixer.conv_q, h)
    delta = (1 + (u @ mixer.step.weight[h] + mixer.step_bias[h]).exp()).log()
    decay = (-delta * mixer.log_rate_H[h].exp()).exp()
    S, out = torch.zeros(D, D, dtype=q.dtype), []
    for t in range(len(q)):
        S = decay[t] * S + delta[t] * torch.outer(B[t], x[t])
        out.append(S.T @ C[t] + mixer.skip_H[h] * x[t])
    y = torch.stack(out) * F.silu(u @ mixer.gate.weight[h * D : h * D + D].T)
    return mixer.norm_HD[h] * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def mamba1(mixer, u, q, k, v, h, g):
    D = q.shape[1]
    here = slice(h * D, h * D + D)
    x = F.silu(convolved(v, mixer.conv.weight[here]) + mixer.conv.bias[here])
    raw = u @ mixer.step_down.weight.T @ mixer.step.weight[here].T + mixer.step_bias[here]
    delta, rates = (1 + raw.exp()).log(), mixer.log_rate_CN[here].exp()
    N, columns = rates.shape[1], []
    for c in range(D):
        B, C = (t[:, c // N * N : c // N * N + N] for t in (k, q))
        state, column = torch.zeros(N, dtype=q.dtype), []
        for t in range(len(q)):
            state = (-delta[t, c] * rates[c]).exp() * state + delta[t, c] * B[t] * x[t, c]
            column.append(state @ C[t] + mixer.skip_C[here][c] * x[t, c])
        columns.append(torch.stack(column))
    return torch.stack(columns, 1) * F.silu(u @ mixer.gate.weight[here].T)


MAMBAS = {"mamba1": mamba1, "mamba2": mamba2}


@torch.no_grad()
def naive(mixer: Mixer, name: str, given: dict[str, torch.Tensor], b: int, h: int) -> torch.Tensor:
    """Return the output of query head h in row b."""
    o, shape = mixer.options, mixer.shape
    g = h // shape.queries_per_kv_head
    s = h if getattr(o, "state_heads", "kv") == "query" else g  # the state's head
    rope = (given["cos"], given["sin"])
    q, k, v = given["q"][b, :, h], given["k"][b, :, g], given["v"][b, :, g]
    rq, rk = (apply_rope(given[n], rope)[b, :, i] for n, i in (("q", h), ("k", g)))
    if name == "sink_window":
        return softmax_window(rq, rk, v, o.window, o.sinks)
    if name == "memory" and o.cache_dtype == "int8":
        rk, v = of_8_bits(rk), of_8_bits(v)
    if name == "memory" and o.budget:
        window, rows = o.heads()[shape.layer][g]
        if not rows:
            return softmax_window(rq, rk, v, window, o.sinks)
        o = replace(o, window=window, exact=rows - o.merged, budget="")
    if name == "memory":
        group = slice(g * shape.queries_per_kv_head, (g + 1) * shape.queries_per_kv_head)
        rotated = apply_rope(given["q"], rope)[b, :, group]
        return text_book(rotated, rk, v, o)[:, h - group.start]
    if name in ("hedgehog", "lolcats"):
        phi_q, phi_k = hedgehog_map(rq, mixer.map_q[h]), hedgehog_map(rk, mixer.map_k[s])
        if name == "hedgehog":
            return normalized(phi_q, phi_k, v)
        a = mixer.mixing_H[h]
        gamma, lam = {
            "window": (a.sigmoid(), 1.0),
            "both": (a.sigmoid(), 1 - a.sigmoid()),
            "linear": (1.0, a.exp()),
        }[o.mixing]
        exact, older = masks(len(q), o.window, o.sinks)
        scores = (rq @ rk.T / shape.head_dim**0.5).masked_fill(~exact, -torch.inf)
        near = gamma * (scores - scores.amax(-1, keepdim=True)).exp()
        weights = near + lam * (phi_q @ phi_k.T) * older
        return weights @ v / weights.sum(-1, keepdim=True)
    if name == "slots":
        c = mixer.centroids[g]
        r = F.one_hot(torch.cdist(k, c).argmin(-1), len(c)).to(q.dtype)
        exact, older = masks(len(q), o.window, o.sinks)
        older = older.to(q.dtype)
        n, sums = older @ r, torch.einsum("tj,jm,jd->tmd", older, r, rk)
        mean = sums / n.clamp(min=1)[..., None]
        slot = (torch.einsum("td,tmd->tm", rq, mean) / shape.head_dim**0.5 + mixer.bias[h]).exp()
        near = (rq @ rk.T / shape.head_dim**0.5).exp()
        weights = torch.where(exact, near, slot @ r.T * older)
        return weights @ v / weights.sum(-1, keepdim=True)
    if name == "t2r":
        phi_q = (rq @ mixer.map_q.weight[h] + mixer.map_q.bias[h]).relu()
        phi_k = (rk @ mixer.map_k.weight[s] + mixer.map_k.bias[s]).relu()
        return normalized(phi_q, phi_k, v)
    if name in MAMBA:
        return MAMBAS[name](mixer, given["x"][b], q, k, v, h, g)
    if name in LIGER:
        share, fq, fk = 0.5, q.softmax(-1), k.softmax(-1)
        linear = {
            "liger_gla": lambda: decayed(fq, fk, v, k.sigmoid() ** (1 / 16)),
            "liger_hgrn2": lambda: decayed(fq, 1 - k.sigmoid(), v, k.sigmoid()),
            "liger_gsa": lambda: slots(fq, fk, v, k.sigmoid() ** (1 / 16)),
        }[name]()
    else:
        share = mixer.share.logit_H[h].sigmoid() if o.window else 1.0
        states = shape.n_heads if o.state_heads == "query" else shape.n_kv_heads
        if name == "retention":
            loss = 2 ** -(5 + 4 * s / (states - 1))
            rate = torch.full_like(q, 1 - loss)
            raw = decayed(rq, rk, v, rate) / shape.head_dim**0.5
            linear = mixer.norm_HD[h] * raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        else:
            x, decay = given["x"][b], mixer.decay
            if o.conv:
                joined = torch.cat([given[n][b].flatten(1) for n in "qkv"], 1)
                parts = convolved(joined, mixer.taps).unflatten(1, (-1, shape.head_dim))
                q, k, v = (parts[:, i] for i in (h, shape.n_heads + g, -shape.n_kv_heads + g))
                rq, rk = (apply_rope(t[None, :, None], rope)[0, :, 0] for t in (q, k))
            inner = x if decay.down is None else x @ decay.down.weight.T
            raw = (inner @ decay.up.weight.T + decay.up.bias).unflatten(-1, (states, -1))[:, s]
            alpha = (-decay.log_rate[s].exp() * F.softplus(raw)).exp().expand_as(q)
            beta = (x @ mixer.beta.weight[s]).sigmoid()
            q, k = (rq, rk) if o.rotary else (q, k)
            q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
            linear = delta(q, k, v, alpha, beta)
    if not o.window:
        return linear
    v = given["v"][b, :, g]
    rq, rk = (apply_rope(given[n], rope)[b, :, i] for n, i in (("q", h), ("k", g)))
    return (1 - share) * softmax_window(rq, rk, v, o.window, o.sinks) + share * linear


SLOW = pytest.mark.slow
BACKENDS = [pytest.param("reference", marks=SLOW), "torch", "auto"]


@pytest.mark.parametrize("shape", ["shared, 24", *(pytest.param(s, marks=SLOW) for s in OTHERS)])
@pytest.mark.parametrize("case", CASES)
def test_formula(case, shape):
    T, shape = 19, SHAPES[shape]
    options = CASES[case][1]
    if (options.get("state_heads") == "kv" or "budget" in options) and shape.n_kv_heads == 1:
        shape = SHAPES["shared, 24"]
    given = inputs(shape, T, dtype=torch.float64)
    for backend in ("reference", "torch"):
        mixer = made(case, shape, torch.float64, backend)
        ours, _ = run(mixer, given)
        rows = [
            torch.stack(
                [naive(mixer, CASES[case][0], given, b, h) for h in range(shape.n_heads)], 1
            )
            for b in range(2)
        ]
        # γ of retention, and its state's head, are computed in fp32
        tolerance = {"retention": 1e-6, "mamba1": 1e-12, "mamba2": 1e-12}.get(CASES[case][0], 1e-9)
        assert error(ours, torch.stack(rows)) <= tolerance, backend


# ---------------------------------------------------------------------------------- any split


BOUNDS = ([1], [4, 5, 11], list(range(7, 19)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_pieces_and_tokens_are_the_whole(case, backend):
    shape = SHAPES["one each, 16"] if backend == "auto" else SHARED  # 16: the fast kernels run
    mixer, given, T = made(case, shape, backend=backend), inputs(shape, 19), 19
    with torch.no_grad():
        whole, last = run(mixer, given)
        for bounds in BOUNDS:
            state, parts, sizes = None, [], set()
            for start, end in pairwise([0, *bounds, T]):
                o, state = run(mixer, given, slice(start, end), state=state)
                parts.append(o)
                sizes.add(tuple(t.shape for t in tree_leaves(state) if t is not None))
            assert error(torch.cat(parts, 1), whole) <= 1e-5, bounds
            assert len(sizes) == 1  # nothing grows
            for ours, theirs in zip(tree_leaves(state), tree_leaves(last), strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_packed_sequences_are_those_alone(case, backend):
    shape = SHAPES["one each, 16"] if backend == "auto" else SHARED
    mixer, given = made(case, shape, backend=backend), inputs(shape, 19, B=1)
    bounds = [0, 7, 7, 8, 19]  # an empty one, and one of a token
    cu_seqlens = torch.tensor(bounds)
    with torch.no_grad():
        packed, state = run(mixer, given, cu_seqlens=cu_seqlens)
        alone = [run(mixer, given, slice(a, b)) for a, b in pairwise(bounds) if b > a]
        assert error(packed, torch.cat([o for o, _ in alone], 1)) <= 1e-5
        assert all(t.shape[0] == 4 for t in tree_leaves(state) if t is not None)
        kept = tree_map_only(torch.Tensor, lambda t: t[[0, 2, 3]], state)
        for n, (_, theirs) in enumerate(alone):
            for ours, other in zip(tree_leaves(kept), tree_leaves(theirs), strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours[n], other[0], rtol=1e-4, atol=1e-5)
        # and on from there, from a state, with an empty sequence in another place
        more, cu_seqlens = inputs(shape, 9, B=1), torch.tensor([0, 0, 4, 5, 9])
        packed, _ = run(mixer, more, state=state, cu_seqlens=cu_seqlens)
        parts = []
        for n in (1, 2, 3):
            a, b = cu_seqlens[n : n + 2].tolist()
            row = tree_map_only(torch.Tensor, lambda t: t[[n]], state)  # noqa: B023
            parts.append(run(mixer, more, slice(a, b), state=row)[0])
        assert error(packed, torch.cat(parts, 1)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_state_changes_in_place_only_without_gradients(case):
    mixer, given = made(case), inputs(SHARED, 8)
    with torch.no_grad():
        _, state = run(mixer, given, slice(0, 7))
    before = tree_map_only(torch.Tensor, torch.clone, state)

    def unchanged() -> bool:
        pairs = zip(tree_leaves(before), tree_leaves(state), strict=True)
        return all(torch.equal(a, b) for a, b in pairs if a is not None)

    run(mixer, given, slice(7, 8), state=state)
    assert unchanged()
    with torch.no_grad():
        _, after = run(mixer, given, slice(7, 8), state=state)
    assert not unchanged()
    for ours, theirs in zip(tree_leaves(after), tree_leaves(state), strict=True):
        assert ours is theirs


@pytest.mark.parametrize("case", CASES)
def test_a_state_that_was_made_with_gradients_can_be_decoded_from(case):
    mixer, given = made(case), inputs(SHARED, 8)
    q = given["q"].clone()
    given |= {n: given[n].requires_grad_() for n in "qkv"}
    whole, _ = run(mixer, given)
    _, state = run(mixer, given, slice(0, 7))
    with torch.no_grad():
        o, _ = run(mixer, given, slice(7, 8), state=state)
    assert error(o, whole[:, 7:].detach()) <= 1e-5
    assert torch.equal(q, given["q"])


@pytest.mark.parametrize("case", [case for case in CASES if "int8" not in case])
def test_gradients_reach_every_parameter_and_input(case):
    mixer, given = (
        made(case, dtype=torch.float64, backend="torch"),
        inputs(SHARED, 19, dtype=torch.float64),
    )
    used = {"q", "k", "v"} | ({"x"} if CASES[case][0] in (*DELTA, *MAMBA) else set())
    for name in used:
        given[name].requires_grad_()
    o, _ = run(mixer, given)
    target = torch.randn(o.shape, dtype=o.dtype)
    (o * target).sum().backward()
    assert {n for n, p in mixer.named_parameters() if not p.requires_grad} == set(mixer.fixed)
    learnt = {n: p for n, p in mixer.named_parameters() if p.requires_grad}
    learnt |= {name: given[name] for name in sorted(used)}
    for name, weight in learnt.items():
        assert weight.grad is not None and weight.grad.abs().max() > 1e-6, name
    # one direction of each, against a finite difference
    step = 1e-6
    for name, weight in learnt.items():
        way = torch.randn(weight.shape, dtype=weight.dtype)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight += sign * step * way
                values.append((run(mixer, given)[0] * target).sum())
                weight -= sign * step * way
        measured = (values[0] - values[1]).item() / (2 * step)
        assert (weight.grad * way).sum().item() == pytest.approx(measured, rel=2e-3, abs=1e-4), name
