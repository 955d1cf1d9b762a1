"""The Triton step of window-plus-linear attention, on rows of a pool, against fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import TOLERANCE, poisoned, pool_of, relative_error

from lowline.kernels.window import (
    WindowState,
    empty_window_state,
    window_linear_attention,
    window_linear_step,
)

B, PAGES = 2, 4


@pytest.mark.parametrize(
    "dtype, D, V, F, heads, window, sinks, kind",
    [
        (torch.float32, 16, 24, 16, (4, 2, 2), 3, 2, torch.int32),
        (torch.float32, 20, 16, 40, (3, 1, 3), 4, 0, torch.int64),
        (torch.bfloat16, 16, 16, 0, (2, 1, 1), 3, 2, torch.int64),
        pytest.param(
            torch.bfloat16, 80, 48, 24, (4, 2, 4), 70, 3, torch.int32, marks=pytest.mark.slow
        ),
        pytest.param(torch.float16, 16, 16, 16, (2, 2, 2), 1, 0, None, marks=pytest.mark.slow),
    ],
)
def test_step(dtype, D, V, F, heads, window, sinks, kind, device: torch.device) -> None:
    """From an empty state until tokens have left the window and the sinks."""
    (H, G, P), T = heads, window + sinks + 4
    g = torch.Generator().manual_seed(0)
    sizes = [(H, D), (G, D), (G, V), *([(H, F), (P, F)] if F else [])]
    tokens = [torch.randn(B, T, *size, generator=g) for size in sizes]
    tokens = [(x if i < 3 else x.softmax(-1)).to(dtype) for i, x in enumerate(tokens)]
    factors = {name: torch.randn(H, generator=g).exp() for name in ("window_factor_H",)}
    if F:
        factors["linear_factor_H"] = torch.randn(H, generator=g).exp()
    want, end = window_linear_attention(
        *(x.double() for x in tokens), **{n: x.double() for n, x in factors.items()},
        window=window, sinks=sinks, backend="reference",
    )  # fmt: skip
    alone = empty_window_state(
        B, window=window, sinks=sinks, kv_heads=G, key_dim=D, value_dim=V, feature_heads=P,
        feature_dim=F, dtype=dtype,
    )  # fmt: skip
    rows, how = [3, 1] if kind else [0, 1], {n: x.to(device) for n, x in factors.items()}
    state = (
        pool_of(alone, rows, PAGES, device) if kind else WindowState(*(x.to(device) for x in alone))
    )
    how["rows"] = torch.tensor(rows, dtype=kind, device=device) if kind else None
    outputs = []
    for t in range(T):
        one = [x[:, t].to(device) for x in tokens]
        one[0] = one[0].mT.contiguous().mT  # of any strides
        with poisoned():
            outputs.append(window_linear_step(*one, state=state, backend="triton", **how))
    assert relative_error(torch.stack(outputs, 1).cpu(), want) < TOLERANCE[dtype]
    for name, ours, theirs in zip(WindowState._fields, state, end, strict=True):
        ours = ours.cpu()
        if name == "S" and F:
            assert relative_error(ours[rows], theirs) < 1e-6
        elif name != "S":  # the last tokens as they came
            assert torch.equal(ours[rows].to(theirs.dtype), theirs), name
        if kind:
            others = ours[[n for n in range(PAGES) if n not in rows]]
            assert others.isnan().all() if ours.is_floating_point() else (others == -1).all()
