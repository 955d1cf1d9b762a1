"""Mixers against their text-book formulas, and one function of the tokens at any split."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from lowline.linearize.mixers import MIXERS, HeadShape, Mixer, build_mixer, recorded_shares
from lowline.linearize.mixers.base import apply_rope

WINDOW, SINKS = 5, 2
LIGER = ("liger_gla", "liger_hgrn2", "liger_gsa")
DELTA = ("gated_deltanet", "kda")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sink_window": ("sink_window", dict(window=WINDOW, sinks=SINKS)),
    "window only": ("sink_window", dict(window=WINDOW, sinks=0)),
    "lolcats": ("lolcats", dict(window=WINDOW)),
    "lolcats, both, few features": (
        "lolcats",
        dict(window=WINDOW, mixing="both", features=16, state_heads="kv"),
    ),
    "lolcats, linear, sinks": (
        "lolcats",
        dict(window=WINDOW, sinks=SINKS, mixing="linear", mixing_init=0.3),
    ),
    "hedgehog": ("hedgehog", {}),
    "hedgehog, shared": ("hedgehog", dict(state_heads="kv", features=16)),
    "t2r": ("t2r", {}),
    "t2r, shared": ("t2r", dict(state_heads="kv", features=32)),
    **{name: (name, dict(window=WINDOW)) for name in LIGER},
    "liger_gla, sinks": ("liger_gla", dict(window=WINDOW, sinks=SINKS)),
    "slots": ("slots", dict(window=WINDOW, sinks=SINKS, slots=4)),
    "liger_gsa, no window": ("liger_gsa", dict(window=0)),
    "retention": ("retention", dict(window=WINDOW, sinks=SINKS, share_init=0.3)),
    "retention, no window, shared": ("retention", dict(window=0, sinks=0, state_heads="kv")),
    **{name: (name, dict(window=WINDOW, sinks=SINKS, share_init=0.3)) for name in DELTA},
    "kda, conv, shared": (
        "kda",
        dict(window=WINDOW, conv=4, state_heads="kv", rotary=False, share_init=0.3),
    ),
    "gated_deltanet, conv, no window": ("gated_deltanet", dict(window=0, sinks=0, conv=3)),
}
SHAPES = {
    "shared, 24": HeadShape(hidden_size=40, n_heads=4, n_kv_heads=2, head_dim=24),
    "one each, 16": HeadShape(hidden_size=32, n_heads=2, n_kv_heads=2, head_dim=16),
    "shared by three, 64": HeadShape(hidden_size=48, n_heads=3, n_kv_heads=1, head_dim=64),
}
SHARED = SHAPES["shared, 24"]
OTHERS = [name for name in SHAPES if SHAPES[name] is not SHARED]


def made(case: str, shape: HeadShape = SHARED, dtype=torch.float32, backend="reference") -> Mixer:
    """Return a mixer whose parameters are away from where they begin."""
    name, options = CASES[case]
    torch.manual_seed(0)
    mixer = build_mixer(name, options | {"backend": backend}, shape).to(dtype).eval()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight += 0.2 * torch.randn(weight.shape).to(dtype)
    return mixer


def inputs(shape: HeadShape, T: int, B: int = 2, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    made = {
        name: torch.randn(B, T, n, shape.head_dim, generator=generator, dtype=torch.float64)
        for name, n in heads.items()
    }
    made["x"] = torch.randn(B, T, shape.hidden_size, generator=generator, dtype=torch.float64)
    rate = 10.0 ** -torch.linspace(0, 2, shape.head_dim // 2, dtype=torch.float64)
    angle = (torch.arange(T, dtype=torch.float64)[:, None] * rate).repeat(1, 2)[None]
    made |= {"cos": angle.cos(), "sin": angle.sin()}
    return {name: t.to(dtype) for name, t in made.items()}


def run(mixer: Mixer, given: dict[str, torch.Tensor], span=slice(None), **how):
    q, k, v, x, cos, sin = (t[:, span] for t in given.values())
    return mixer(q, k, v, rope=(cos, sin), x_BTE=x, **how)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 1e-2
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


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
    if CASES[case][1].get("state_heads") == "kv" and shape.n_kv_heads == 1:
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
        tolerance = 1e-6 if CASES[case][0] == "retention" else 1e-9
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


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter_and_input(case):
    mixer, given = (
        made(case, dtype=torch.float64, backend="torch"),
        inputs(SHARED, 19, dtype=torch.float64),
    )
    used = {"q", "k", "v"} | ({"x"} if CASES[case][0] in DELTA else set())
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


# ------------------------------------------------------------------------- beginning and switches


def count(name: str, **options: Any) -> int:
    mixer = build_mixer(name, options, SHARED)
    return sum(weight.numel() for weight in mixer.parameters())


def test_parameter_counts():
    E, H, G, D = 40, 4, 2, 24
    assert [count(name) for name in (*LIGER, "sink_window")] == [0] * 4
    assert count("hedgehog") == 2 * H * D * D
    assert count("hedgehog", state_heads="kv", features=12) == (H + G) * D * 12
    assert count("lolcats") == 2 * H * D * D + H
    assert count("t2r", features=32) == 2 * H * (D + 1) * 32
    assert count("retention") == H * D + H and count("retention", window=0, sinks=0) == H * D
    assert count("gated_deltanet") == (E + 1) * H + H + E * H + H
    assert count("kda", state_heads="kv") == E * D + (D + 1) * G * D + G + E * G + H
    assert count("slots", slots=5) == (G * D + H) * 5
    assert count("kda", conv=4) - count("kda") == 4 * (H + 2 * G) * D


def plain(name: str, **options: Any) -> Mixer:
    return build_mixer(name, {"window": WINDOW, "backend": "torch"} | options, SHARED)


@torch.no_grad()
def test_where_conversion_begins():
    """Delta rules and retention near the window and its sinks; LoLCATs' variant, too."""
    given = inputs(SHARED, 40)
    window, _ = run(plain("sink_window", sinks=4), given)
    cases = [(name, {}) for name in (*DELTA, "retention")]
    cases += [("lolcats", {"mixing": "linear", "mixing_init": 0.01}), ("kda", {"conv": 4})]
    for name, options in cases:
        o, _ = run(plain(name, sinks=4, **options), given)
        assert 1e-5 < error(o, window) < 0.1, (name, error(o, window))
    bare, _ = run(plain("kda"), given)
    with_conv, _ = run(plain("kda", conv=4), given)
    torch.testing.assert_close(with_conv, bare)  # the identity
    decay = plain("gated_deltanet").decay(given["x"]).exp()[0, 0]
    assert decay.tolist() == pytest.approx(
        (1 - decay.new_tensor([1 / 16, 1 / 64, 1 / 256, 1 / 1024])).tolist(), abs=3e-3
    )


@pytest.mark.parametrize("features", [None, 12, 16, 30])
def test_hedgehog_begins_by_passing_all_dimensions(features):
    W = build_mixer("hedgehog", {"features": features}, SHARED).map_q[0].detach()
    assert W.shape == (24, features or 24) and (W.norm(dim=1) > 0).all()
    if features in (None, 12):
        torch.testing.assert_close(W.T @ W, torch.eye(features or 24))


TWO = [case for case in CASES if (m := made(case)).has_window and m.has_linear]


@pytest.mark.parametrize("case", TWO)
def test_linear_part_switched_off(case):
    """Only the window is left, at its weight, and states go on as if nothing had happened."""
    name, mixer, given = CASES[case][0], made(case), inputs(SHARED, 19)
    window = plain("sink_window", sinks=mixer.options.sinks, backend="reference")
    with torch.no_grad():
        whole, state = run(mixer, given)
        expected, _ = run(window, given)
        if name not in ("lolcats", "slots"):
            share = 0.5 if name in LIGER else mixer.share()
            expected = (1 - share) * expected
        mixer.linear_enabled = False
        off, off_state = run(mixer, given)
        assert error(off, expected) <= 1e-6 and error(off, whole) > 1e-3
        for ours, theirs in zip(tree_leaves(off_state), tree_leaves(state), strict=True):
            assert ours is None or torch.equal(ours, theirs)
        head, state = run(mixer, given, slice(0, 12))
        tail = [run(mixer, given, slice(t, t + 1), state=state)[0] for t in range(12, 19)]
        assert error(torch.cat([head, *tail], 1), off) <= 1e-5


@pytest.mark.parametrize("case", TWO)
def test_window_dropped(case):
    """In training the linear part stands in for all tokens; elsewhere nothing changes."""
    name, options = CASES[case]
    mixer, given = made(case), inputs(SHARED, 19)
    with torch.no_grad():
        whole, state = run(mixer, given)
        mixer.drop_window = True
        assert torch.equal(run(mixer, given)[0], whole)
        mixer.train()
        dropped, _ = run(mixer, given)
        with pytest.raises(ValueError, match="whole sequences"):
            run(mixer, given, slice(0, 1), state=state)
    shared = {n: options[n] for n in ("features", "state_heads", "conv", "rotary") if n in options}
    if name == "lolcats":
        other = build_mixer("hedgehog", shared | {"backend": "reference"}, SHARED)
    elif name == "slots":
        other = build_mixer(name, dict(window=1, sinks=0, slots=4, backend="reference"), SHARED)
    else:
        other = build_mixer(name, shared | dict(window=0, sinks=0, backend="reference"), SHARED)
    other.load_state_dict({n: w for n, w in mixer.state_dict().items() if n in other.state_dict()})
    assert error(dropped, run(other, given)[0].detach()) <= 1e-5 < error(dropped, whole)
    far = {n: t.clone() for n, t in given.items()}
    far["v"][:, 0] += 1
    assert not torch.equal(run(mixer, far)[0][:, -1], dropped[:, -1])


def test_slots_are_calibrated_on_keys():
    """Centres that lie apart are found, and keys of a kind then share a slot."""
    mixer = build_mixer("slots", {"slots": 3}, SHARED)
    truth = torch.eye(3, SHARED.head_dim) * 20
    kind = torch.arange(300) % 3
    k_TGD = (truth[kind] + torch.randn(300, SHARED.head_dim))[:, None].repeat(1, 2, 1)
    found = mixer.calibrate(k_TGD)["centroids"]
    assert found.shape == mixer.centroids.shape
    for centres in found:
        nearest = torch.cdist(centres, truth).argmin(-1)
        assert sorted(nearest.tolist()) == [0, 1, 2]
        mean = torch.stack([k_TGD[kind == m, 0].mean(0) for m in nearest])
        torch.testing.assert_close(centres, mean, rtol=1e-4, atol=1e-4)
    mixer.load_state_dict({"centroids": found, "bias": mixer.bias})
    slots_TG = mixer.assign(k_TGD[None])[0]
    for head, centres in enumerate(found):
        nearest = torch.cdist(centres, truth).argmin(-1)
        assert torch.equal(nearest[slots_TG[:, head]], kind)
    with pytest.raises(ValueError, match="2 keys for 3 slots"):
        mixer.calibrate(k_TGD[:2])


def test_recorded_shares():
    given = inputs(SHARED, 19)
    mixers = torch.nn.ModuleList()
    for layer, case in enumerate(["sink_window", "hedgehog", "liger_gla", "lolcats"]):
        mixer = made(case)
        mixer.shape = HeadShape(**{**vars(SHARED), "layer": layer})
        mixers.append(mixer)
    with recorded_shares(mixers) as shares, torch.no_grad():
        for mixer in mixers:
            run(mixer, given)
        run(mixers[2], given)
        with pytest.raises(ValueError, match="whole sequences"):
            run(mixers[0], given, state=run(mixers[0], given)[1])
    assert shares[1] == [1.0] and shares[0] == [0.0] * 2
    with torch.no_grad():
        window = run(plain("sink_window", sinks=0), given)[0] / 2
        linear = run(mixers[2], given)[0] - window
    expected = linear.norm(dim=-1).sum() / (linear.norm(dim=-1).sum() + window.norm(dim=-1).sum())
    assert shares[2] == pytest.approx([expected.item()] * 2, rel=1e-4)
    assert 0 < shares[3][0] < 1 and mixers[3].linear_enabled
    run(mixers[3], given)
    assert len(shares[3]) == 1  # the hooks are gone


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case):
    shape = SHAPES["one each, 16"]
    exact, half = made(case, shape), made(case, shape, torch.bfloat16, "auto")
    half.load_state_dict(exact.state_dict())
    with torch.no_grad():
        ours, _ = run(half, inputs(shape, 19, dtype=torch.bfloat16))
        theirs, _ = run(exact, inputs(shape, 19))
        assert ours.dtype == torch.bfloat16
        # T2R's denominator may come near 0
        assert error(ours.float(), theirs) <= (0.2 if CASES[case][0] == "t2r" else 0.05)
        head, state = run(half, inputs(shape, 19, dtype=torch.bfloat16), slice(0, 18))
        tail, _ = run(half, inputs(shape, 19, dtype=torch.bfloat16), slice(18, 19), state=state)
        assert error(tail.float(), ours[:, 18:].float()) <= 0.03


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_is_documented_and_builds_on_meta(name):
    options, mixer = MIXERS[name]
    for field in fields(options):
        assert f"        {field.name}" in (options.__doc__ or ""), field.name
    with torch.device("meta"):
        built = build_mixer(name, {}, SHARED)
    assert type(built) is mixer and all(weight.is_meta for weight in built.parameters())


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_type_that_is_set(case):
    name, options = CASES[case]
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = build_mixer(name, options, SHARED)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(weight.dtype == torch.bfloat16 for weight in built.parameters())
    for name, weight in built.named_parameters():
        assert weight.requires_grad == (name not in built.fixed) and weight.is_leaf


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("lolcat", {}, "'lolcat' is not known; choose from .*did you mean 'lolcats'"),
        ("softmax", {"window": 3}, "'softmax' is not known"),
        ("lolcats", {"windw": 3}, "no option 'windw'; .*did you mean 'window'"),
        ("hedgehog", {"window": 3}, "no option 'window'; choose from features"),
        ("sink_window", {"window": 0}, "window = 0; give an integer of at least 1"),
        ("liger_gla", {"window": -1}, "at least 0"),
        ("liger_gla", {"window": 2.0}, "window = 2.0"),
        ("kda", {"window": 0}, "sinks = 4 without a window"),
        ("lolcats", {"sinks": True}, "sinks = True"),
        ("lolcats", {"mixing": "all"}, "mixing = 'all'; choose from 'window', 'both', 'linear'"),
        ("lolcats", {"mixing_init": 1.0}, "between 0 and 1"),
        ("lolcats", {"mixing_init": "0.5"}, "between 0 and 1"),
        ("retention", {"share_init": 0}, "share_init = 0"),
        ("hedgehog", {"features": 0}, "features = 0"),
        ("t2r", {"state_heads": "key"}, "'query', 'kv'"),
        ("kda", {"rotary": 1}, "True or False"),
        ("kda", {"conv": -1}, "conv = -1"),
        ("slots", {"slots": 0}, "slots = 0"),
        ("slots", {"backend": "cpu"}, "backend = 'cpu'; choose from 'auto', 'reference', 'torch'"),
        ("liger_gsa", {"backend": "gpu"}, "'auto', 'reference'"),
    ],
)
def test_impossible_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_mixer(name, options, SHARED)
