"""Starts that are measured: what is fitted, and that it is nearer to softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.mixers import SHARED, inputs

from lowline.linearize.mixers import build_mixer
from lowline.linearize.mixers.base import apply_rope
from lowline.linearize.mixers.fitting import (
    LEAST,
    MOST,
    Sample,
    best_of,
    best_scale,
    best_share,
    constant_of,
)
from lowline.linearize.mixers.mamba1 import inverse_silu

T = 60
NO_WINDOW = dict(window=0, sinks=0)
CASES = [
    ("mamba2", {}),
    ("mamba1", {}),
    ("gated_deltanet", {"window": 8}),
    ("gated_deltanet", NO_WINDOW),
    ("kda", {"window": 8, "state_heads": "kv"}),
    ("retention", {"window": 8}),
    ("retention", NO_WINDOW),
]


def sample() -> Sample:
    """Random tokens, two documents, and what softmax attention makes of each."""
    given, cut = inputs(SHARED, T, B=1), 25
    rope = (given["cos"], given["sin"])
    q, k = (apply_rope(given[name], rope).transpose(1, 2) for name in "qk")
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[:, :, part] for t in (q, k, given["v"].transpose(1, 2))),
            is_causal=True, enable_gqa=True,
        )
        for part in (slice(0, cut), slice(cut, T))
    ]  # fmt: skip
    wanted = torch.cat(parts, 2).transpose(1, 2)
    return Sample(*given.values(), wanted, torch.tensor([0, cut, T]))


def built(name: str, options: dict[str, Any]):
    torch.manual_seed(0)
    return build_mixer(name, {"backend": "torch"} | options, SHARED)


@pytest.mark.parametrize(("name", "options"), CASES)
@torch.no_grad()
def test_a_fitted_start_is_nearer_to_attention(name, options):
    tokens = sample()

    def errors(mixer) -> torch.Tensor:
        return (tokens.mixed(mixer) - tokens.wanted[0]).square().sum((0, 2))

    before, after = built(name, options), built(name, options)
    values = built(name, options).fit(tokens)
    assert values.keys() <= dict(after.named_parameters()).keys()
    after.load_state_dict(values, strict=False)
    assert (errors(after) <= 1.001 * errors(before)).all()
    scales = name == "mamba2" or name == "retention" and not options["window"]
    most = 0.7 if scales else 0.85 if name == "mamba1" else 0.98
    assert errors(after).sum() < most * errors(before).sum()
    if name == "mamba1":  # and nearer than nothing at all
        assert errors(after).sum() < 0.95 * tokens.wanted.square().sum()


def test_gates_that_give_a_scale():
    y = torch.tensor([0, 1e-6, 0.01, 0.3, 1, 20], dtype=torch.float64)
    assert torch.nn.functional.silu(inverse_silu(y)).tolist() == pytest.approx(y.tolist())
    assert inverse_silu(torch.tensor([0.0, 1e-4, 0.5])).tolist() == pytest.approx(
        [0, 2e-4, 0.7388], rel=1e-3
    )


def test_shares_and_scales_are_the_best():
    window, linear, wanted = torch.randn(3, T, 4, 6, generator=torch.Generator().manual_seed(1))
    wanted = wanted / 2 + 0.6 * window + 0.4 * linear
    share_H, errors_H = best_share(window, linear, wanted)
    assert ((share_H > LEAST) & (share_H < MOST)).all()
    for step in (-0.02, 0, 0.02):
        m = (share_H + step)[:, None]
        moved = ((1 - m) * window + m * linear - wanted).square().sum((0, 2))
        assert (moved > errors_H).all() if step else torch.allclose(moved, errors_H, rtol=1e-4)
    scale_HD, errors_H = best_scale(linear, wanted)
    assert torch.allclose((linear * scale_HD - wanted).square().sum((0, 2)), errors_H)
    assert ((1.02 * linear * scale_HD - wanted).square().sum((0, 2)) > errors_H).all()
    assert best_share(window, window, wanted)[0].tolist() == pytest.approx([LEAST] * 4)


def test_heads_choose_alone_or_together():
    table = {1: torch.tensor([3.0, 0, 1, 9]), 2: torch.tensor([1.0, 5, 2, 0])}
    assert best_of([1, 2], table.__getitem__) == [2, 1, 1, 2]
    assert best_of([1, 2], table.__getitem__, 2) == [1, 2]


def test_a_constant_of_inputs_that_have_a_mean():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    x[:, 3] += 4
    assert (x @ constant_of(x, 1.5)).mean().item() == pytest.approx(1.5, rel=0.1)
    assert (x @ constant_of(x, 1.5)).std() < 0.4
