"""Keys and values of 8 bits in the state of the mixer `memory`."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import relative_error
from helpers.mixers import SHARED, inputs, made, run
from helpers.models import teacher, tokens

from lowline.errors import LowlineError
from lowline.kernels.memory import MemoryState, row_memory_attention, row_memory_steps
from lowline.kernels.memory.int8 import pack, pack_state, round_int8, unpack, unpack_state
from lowline.kernels.window import window_linear_attention
from lowline.linearize.body.cache import LinearizedCache, state_bytes
from lowline.linearize.convert import convert
from lowline.linearize.mixers.options import MemoryOptions


def spread(dtype=torch.float32):
    """Return rows of many sizes, the smallest below and the largest near the ends of fp32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(401, 3, 64, generator=g, dtype=torch.float64)
    return (x * torch.logspace(-36, 36, 401, dtype=torch.float64)[:, None, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_twice_gives_the_same_bytes(dtype):
    x = spread(dtype)
    packed = pack(x)
    assert packed.dtype == torch.int8 and packed.shape == (401, 3, 68)
    rounded = unpack(packed, dtype)
    assert torch.equal(pack(rounded), packed)
    assert torch.equal(round_int8(x), rounded)
    assert torch.equal(unpack(packed).to(dtype), rounded)  # every product is exact in fp32
    step = x.abs().amax(-1) / 127
    assert ((x - rounded).abs().amax(-1) <= 0.5001 * step).all()
    assert packed[..., :64].abs().amax(-1).eq(127).all()


def test_zeros_stay_and_what_is_no_number_shows():
    assert not pack(torch.zeros(2, 8)).any()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(2, 8)
        x[0, 3] = bad
        rounded = unpack(pack(x))
        assert rounded[0].isnan().all()
        torch.testing.assert_close(rounded[1], x[1], rtol=2**-15, atol=0)


def test_the_gradient_is_that_at_the_rounded_keys_and_values():
    given = inputs(SHARED, 19, dtype=torch.float64)
    given["cos"], given["sin"] = torch.ones_like(given["cos"]), torch.zeros_like(given["sin"])
    rounded = dict(given) | {name: round_int8(given[name]) for name in ("k", "v")}
    grads = []
    for case, x in (("memory, int8", given), ("memory, int8", rounded)):
        leaves = [x[name].detach().requires_grad_() for name in ("q", "k", "v")]
        mixer = made(case, dtype=torch.float64, backend="torch")
        if x is rounded:
            mixer.options = MemoryOptions(**vars(mixer.options) | {"cache_dtype": "auto"})
        o, _ = run(mixer, x | dict(zip("qkv", leaves, strict=True)))
        grads.append(torch.autograd.grad(o.sin().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-3
        assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("length", [1, 5])
def test_steps_of_packed_states_are_those_of_rounded_tokens(backend, length):
    """Two sizes of heads, sequences at several places in their blocks; bytes are equal."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 60, n, 16, generator=g) for n in (4, 2, 2))
    k, v = round_int8(k), round_int8(v)
    rows = dict(block=4, horizon=9)
    alone = [
        (row_memory_attention(q[n : n + 1, :t, :2], k[n : n + 1, :t, :1], v[n : n + 1, :t, :1],
                              window=8, exact=5, sinks=2, **rows)[1],
         window_linear_attention(q[n : n + 1, :t, 2:], k[n : n + 1, :t, 1:], v[n : n + 1, :t, 1:],
                                 window=12, sinks=2)[1])
        for n, t in enumerate((21, 33))
    ]  # fmt: skip
    exact = [
        type(x[0])(*(torch.cat(t) for t in zip(*x, strict=True))) for x in zip(*alone, strict=True)
    ]
    packed = [pack_state(type(state)(*(x.clone() for x in state))) for state in exact]
    for i in range(0, 25, length):
        n, t = torch.arange(2)[:, None], torch.tensor([[21], [33]]) + torch.arange(i, i + length)
        new = (q[n, t], k[n, t], v[n, t])
        how = dict(heads=((0,), (1,)), exact=(5, 0), backend=backend, **rows)
        want = row_memory_steps(*new, states=exact, **how)
        # a token that was not rounded is rounded on its way
        ours = row_memory_steps(*new[:2], new[2] * (1 + 1e-5), states=packed, **how)
        assert relative_error(ours, want) < 1e-4
    for ours, theirs in zip(packed, exact, strict=True):
        for name, held in ours._asdict().items():
            of_exact = getattr(theirs, name)
            if held.dtype == torch.int8:
                held, of_exact = unpack(held), unpack(pack(of_exact))
            torch.testing.assert_close(held, of_exact, rtol=1e-4, atol=1e-6)
        assert torch.equal(pack_state(unpack_state(ours))[0], ours[0])
    assert isinstance(packed[0], MemoryState) and packed[0].row_k.dtype == torch.int8


@torch.no_grad()
def test_a_state_holds_a_byte_a_feature():
    options = dict(sinks=1, block=2, budget="; ".join(["4+3, 6"] * 3), horizon=6)
    models = [
        convert(teacher(), mixer="memory", options=options | {"cache_dtype": of}).eval()
        for of in ("auto", "int8")
    ]
    ids, caches = tokens(2, 24), [LinearizedCache(model.config) for model in models]
    logits = [m(ids, past_key_values=c).logits for m, c in zip(models, caches, strict=True)]
    assert 1e-4 < relative_error(logits[1], logits[0]) < 0.05
    # in each of 3 layers: 8 tokens and 7 of 16 features, and what is not of keys and values
    rest = 4 * ((4 + 3) + 3 + (8 + 1)) + 2 * 8
    assert state_bytes(models[0].config) == 3 * (15 * 2 * 16 * 4 + rest)
    assert state_bytes(models[1].config) == state_bytes(caches[1]) == 3 * (15 * 2 * 20 + rest)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cache_dtype": "int4"}, "cache_dtype = 'int4'; choose from 'auto', 'int8'"),
        ({"cache_dtype": "int8", "merged": 2}, "means are not held in 8 bits: give merged = 0"),
    ],
)
def test_what_is_not_offered_is_refused(options, words):
    with pytest.raises(LowlineError, match=words):
        MemoryOptions(**options)
