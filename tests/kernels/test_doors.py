"""The public names of lowline.kernels: what they are, and each method against its paper's loop."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.kernels import relative_error

import lowline.kernels
from lowline import kernels
from lowline.kernels.memory import row_memory_attention, row_memory_step
from lowline.kernels.slots import slot_window_attention, slot_window_step
from lowline.kernels.window import (
    window_linear_advance,
    window_linear_attention,
    window_linear_step,
    window_linear_verify,
)

B, T, H, K, V = 2, 67, 2, 8, 6
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


Q, KEYS, VALUES = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V)
G_H, G_K = -normal(B, T, H).abs(), -normal(B, T, H, K, seed=2).abs()
BETA = normal(B, T, H, seed=3).sigmoid()
UNIT = torch.nn.functional.normalize(KEYS, dim=-1)


def loop(decay, write):
    """o_t = q_tᵀ S_t, S_t = write(t, decay_t ⊙ S): a token at a time, a state (B, H, K, V)."""
    S, outputs = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        S = write(t, decay(t) * S)
        outputs.append(torch.einsum("bhk,bhkv->bhv", Q[:, t], S))
    return torch.stack(outputs, 1), S


def add(keys=KEYS, values=VALUES):
    return lambda t, S: S + keys[:, t, :, :, None] * values[:, t, :, None, :]


def delta(t, S):
    read = torch.einsum("bhk,bhkv->bhv", UNIT[:, t], S)
    return S + (BETA[:, t, :, None] * UNIT[:, t])[..., None] * (VALUES[:, t] - read)[:, :, None, :]


def same(found, exact) -> None:
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) < 1e-10


@BACKENDS
def test_gla(backend):
    exact = loop(lambda t: G_K[:, t].exp()[..., None], add())
    same(kernels.gla(Q, KEYS, VALUES, G_K, backend=backend), exact)
    o, _ = kernels.gla(Q, KEYS, VALUES, G_K, scale=0.25, backend=backend)
    assert relative_error(o, 0.25 * exact[0]) < 1e-10


@BACKENDS
def test_retention(backend):
    gamma = torch.tensor([0.9, 0.6], dtype=torch.float64)
    exact = loop(lambda t: gamma[:, None, None], add())
    same(kernels.retention(Q, KEYS, VALUES, gamma.log(), backend=backend), exact)


@BACKENDS
def test_gated_delta_rule(backend):
    exact = loop(lambda t: G_H[:, t].exp()[..., None, None], delta)
    same(kernels.gated_delta_rule(Q, UNIT, VALUES, G_H, BETA, backend=backend), exact)
    exact = loop(lambda t: 1.0, delta)
    same(kernels.gated_delta_rule(Q, UNIT, VALUES, None, BETA, backend=backend), exact)


@BACKENDS
def test_kda(backend):
    exact = loop(lambda t: G_K[:, t].exp()[..., None], delta)
    same(kernels.kda(Q, UNIT, VALUES, G_K, BETA, backend=backend), exact)


@BACKENDS
def test_ssd(backend):
    """One group of B and C for both heads, and D x beside the state."""
    A, D, dt = torch.tensor([-0.5, -2.0]).double(), torch.tensor([1.5, -1.0]).double(), -G_H
    B_one, C_one = KEYS[:, :, :1], Q[:, :, :1]
    S, outputs = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        step = dt[:, t, :, None, None]
        S = (A[:, None, None] * step).exp() * S + step * B_one[:, t, :, :, None] * (
            VALUES[:, t, :, None, :]
        )
        outputs.append((C_one[:, t, :, None, :] @ S)[:, :, 0] + D[:, None] * VALUES[:, t])
    found = kernels.ssd(VALUES, dt, A, B_one, C_one, D, backend=backend)
    same(found, (torch.stack(outputs, 1), S))


@BACKENDS
def test_linear_attention(backend):
    """As the masked product of softmax attention, with and without the division."""
    q, k, v = (x.transpose(1, 2) for x in (Q.abs(), KEYS.abs(), VALUES))
    weights = (q @ k.mT).tril()
    exact = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2)
    o, state = kernels.linear_attention(Q.abs(), KEYS.abs(), VALUES, backend=backend)
    assert relative_error(o, exact) < 1e-10
    assert relative_error(state[..., -1], k.sum(2)) < 1e-12
    o, state = kernels.linear_attention(
        Q.abs(), KEYS.abs(), VALUES, normalize=False, backend=backend
    )
    same((o, state), ((weights @ v).transpose(1, 2), k.mT @ v))


def test_every_name_is_there_and_no_other():
    assert set(kernels.__all__) == set(kernels._NAMES)
    for name in kernels.__all__:
        assert callable(getattr(kernels, name)) and getattr(kernels, name).__doc__
        assert name in dir(kernels)
    assert kernels.window_attention is window_linear_attention
    assert kernels.window_step is window_linear_step
    assert kernels.window_verify is window_linear_verify
    assert kernels.window_advance is window_linear_advance
    assert kernels.memory_attention is slot_window_attention
    assert kernels.memory_step is slot_window_step
    assert kernels.row_memory_attention is row_memory_attention
    assert kernels.row_memory_step is row_memory_step
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        lowline.kernels.flash  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, lowline.kernels; assert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
