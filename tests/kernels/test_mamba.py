"""Mamba's and Mamba2's layers as transformers computes them, made of the ops here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.kernels import relative_error
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lowline.kernels.conv import causal_conv
from lowline.kernels.recurrence import gated_linear_recurrence
from lowline.kernels.scan import selective_scan

T = 70
Layer = Callable[[torch.Tensor], torch.Tensor]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def scrambled(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return layer.eval()


def compare(layer: torch.nn.Module, ours: Layer, width: int) -> None:
    """Outputs, and gradients of the input and of every parameter."""
    x_BTE = torch.randn(2, T, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x_BTE, *layer.parameters()]
    found = []
    for f in (ours, layer):
        o = f(x_BTE)
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for name, a, b in zip(["o", "x", *dict(layer.named_parameters())], *found, strict=True):
        assert relative_error(a, b) < 2e-5, name


@BACKENDS
def test_mamba(backend):
    config = MambaConfig(hidden_size=24, state_size=16, num_hidden_layers=1, time_step_rank=3)
    m = scrambled(MambaMixer(config, layer_idx=0))

    def ours(x_BTE):
        x, z = m.in_proj(x_BTE).chunk(2, -1)
        taps = m.conv1d.weight[:, 0]
        x, _ = causal_conv(x, taps, m.conv1d.bias, activation="silu", backend=backend)
        dt, B, C = m.x_proj(x).split([3, 16, 16], -1)
        dt = F.linear(dt, m.dt_proj.weight)
        y, _ = selective_scan(
            *(x, dt, -m.A_log.exp(), B, C, m.D),
            z_BTD=z,
            dt_bias_D=m.dt_proj.bias,
            dt_softplus=True,
            backend=backend,
        )
        return m.out_proj(y)

    compare(m, ours, 24)


@BACKENDS
def test_mamba2(backend):
    """Two groups of B and C, each of two heads."""
    config = Mamba2Config(
        hidden_size=32, state_size=16, head_dim=16, num_heads=4, n_groups=2, num_hidden_layers=1,
        chunk_size=32,
    )  # fmt: skip
    m = scrambled(Mamba2Mixer(config, layer_idx=0))

    def ours(x_BTE):
        gate, xBC, dt = m.in_proj(x_BTE).split([64, 128, 4], -1)
        taps = m.conv1d.weight[:, 0]
        xBC, _ = causal_conv(xBC, taps, m.conv1d.bias, activation="silu", backend=backend)
        x, B, C = xBC.split([64, 32, 32], -1)
        x = x.unflatten(-1, (4, 16))
        B, C = (t.unflatten(-1, (2, 16)).repeat_interleave(2, 2) for t in (B, C))
        dt = F.softplus(dt + m.dt_bias)
        y, _ = gated_linear_recurrence(
            C, B, dt[..., None] * x, -m.A_log.exp() * dt, backend=backend
        )
        y = y + m.D[:, None] * x
        return m.out_proj(m.norm(y.flatten(2), gate))

    compare(m, ours, 32)
