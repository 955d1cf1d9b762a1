"""The recurrence against the plain references of flash-linear-attention (`pip install fla-core`).

Those compute in fp32, a token at a time; outputs, final states and every gradient are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.kernels import relative_error

from lowline.kernels.recurrence import gated_linear_recurrence

pytest.importorskip("fla.ops", reason="pip install fla-core")

from fla.ops.delta_rule.naive import delta_rule_recurrence  # noqa: E402
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule  # noqa: E402
from fla.ops.gla.naive import naive_recurrent_gla  # noqa: E402
from fla.ops.gsa.naive import naive_recurrent_gsa  # noqa: E402
from fla.ops.kda.naive import naive_recurrent_kda  # noqa: E402
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn  # noqa: E402
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla  # noqa: E402

B, T, H, K, V, M = 2, 100, 2, 32, 48, 16
SCALE = K**-0.5
Outputs = tuple[torch.Tensor, ...]
Inputs = dict[str, torch.Tensor]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(**more: torch.Tensor) -> Inputs:
    drawn = {"q": normal(B, T, H, K), "k": normal(B, T, H, K, seed=1), "v": normal(B, T, H, V)}
    return drawn | {"state": normal(B, H, K, V)} | more


def compare(ours: Callable[..., Outputs], theirs: Callable[..., Outputs], given: Inputs) -> None:
    found = []
    for f in (ours, theirs):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        outputs = f(**leaves)
        loss = sum((o * normal(*o.shape, seed=7)).sum() for o in outputs)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append([*outputs, *gradients])
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"d {name}" for name in given)]
    for name, a, b in zip(names, *found, strict=True):
        assert relative_error(a, b) < 2e-5, name


@BACKENDS
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention(backend, normalize):
    def ours(q, k, v, state):
        q, k = q.abs(), k.abs()
        if normalize:  # the state's last column is the normaliser's
            state = torch.nn.functional.pad(state, (0, 1))
        scale = 1.0 if normalize else SCALE  # theirs cancels
        o, after = gated_linear_recurrence(
            q, k, v, scale=scale, normalize=normalize, initial_state=state, backend=backend
        )
        return o, after[..., :V], after[..., V:]

    def theirs(q, k, v, state):
        o, after = naive_recurrent_linear_attn(
            *(q.abs(), k.abs(), v),
            initial_state=state,
            output_final_state=True,
            normalize=normalize,
        )
        S, z = after if normalize else (after, None)
        return o, S, z.transpose(1, 3).transpose(1, 2) if normalize else S[..., V:]

    compare(ours, theirs, inputs())


@BACKENDS
@pytest.mark.parametrize("gate", ["head", "key"])
def test_gated_linear_attention(backend, gate):
    g = -normal(B, T, H, *((K,) if gate == "key" else ())).abs()
    reference = naive_recurrent_gla if gate == "key" else naive_recurrent_simple_gla

    def ours(q, k, v, state, g):
        return gated_linear_recurrence(
            q, k, v, g, scale=SCALE, initial_state=state, backend=backend
        )

    def theirs(q, k, v, state, g):
        return reference(q, k, v, g, initial_state=state, output_final_state=True)

    compare(ours, theirs, inputs(g=g))


@BACKENDS
@pytest.mark.parametrize("gate", ["none", "head", "key"])
def test_delta_rule(backend, gate):
    """Gated by head as in Gated DeltaNet, by key feature as in KDA."""
    more = {"beta": normal(B, T, H).sigmoid()}
    if gate != "none":
        more["g"] = -normal(B, T, H, *((K,) if gate == "key" else ()), seed=2).abs()

    def unit(k):
        return torch.nn.functional.normalize(k, dim=-1)

    def ours(q, k, v, state, beta, g=None):
        return gated_linear_recurrence(
            q, unit(k), v, g, beta, scale=SCALE, initial_state=state, backend=backend
        )

    def theirs(q, k, v, state, beta, g=None):
        k, end = unit(k), {"initial_state": state, "output_final_state": True}
        if gate == "head":
            return naive_recurrent_gated_delta_rule(q, k, v, beta, g, **end)
        if gate == "key":
            return naive_recurrent_kda(q, k, v, g, beta, **end)
        o, after = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), **end)
        return o.transpose(1, 2), after

    compare(ours, theirs, inputs(**more))


@BACKENDS
def test_gated_slot_attention(backend):
    """Two recurrences: a gate on the values' features, then on the keys'; shared states."""
    groups = 2
    given = {
        "q": normal(B, T, H * groups, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "s": normal(B, T, H, M).sigmoid(),
        "g": -normal(B, T, H, M).abs(),
    }

    def ours(q, k, v, s, g):
        how = {"backend": backend}
        o, K_state = gated_linear_recurrence(q, k, s, g, gate="value", scale=SCALE, **how)
        o, V_state = gated_linear_recurrence(o.softmax(-1), s, v, g, gate="key", **how)
        return o, K_state, V_state

    def theirs(q, k, v, s, g):
        o, states = naive_recurrent_gsa(q, k, v, s, g, output_final_state=True)
        return o, *states

    compare(ours, theirs, given)
