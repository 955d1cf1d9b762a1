"""The Triton step of window and slots, on pages of a pool, against whole sequences in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import TOLERANCE, poisoned, pool_of, relative_error

from lowline.kernels.slots import SlotState, slot_window_attention, slot_window_step

B, PAGES = 2, 4


@pytest.mark.parametrize(
    "dtype, D, V, heads, window, sinks, slots, kind",
    [
        (torch.float32, 24, 16, (4, 2), 6, 2, 5, torch.int64),
        (torch.bfloat16, 16, 16, (3, 1), 5, 0, 20, torch.int32),
        pytest.param(torch.float32, 16, 40, (2, 2), 70, 3, 90, None, marks=pytest.mark.slow),
        pytest.param(torch.float16, 80, 64, (4, 1), 6, 2, 70, None, marks=pytest.mark.slow),
    ],
)
def test_step(dtype, D, V, heads, window, sinks, slots, kind, device) -> None:
    """Sequences of two lengths, until tokens have joined slots that others are in."""
    (H, G), starts = heads, (1, window + sinks)
    T = max(starts) + 10
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(B, T, *size, generator=g).to(dtype) for size in ((H, D), (G, D), (G, V))]
    tokens.append(torch.randint(slots, (B, T, G), generator=g))
    bias = torch.randn(H, slots, generator=g)
    how = dict(window=window, sinks=sinks, backend="torch")
    alone = [
        slot_window_attention(*(x[n : n + 1, :t] for x in tokens), bias, **how)[1]
        for n, t in enumerate(starts)
    ]
    state = SlotState(*(torch.cat(x) for x in zip(*alone, strict=True)))
    pages = [3, 1] if kind else [0, 1]
    rows = torch.tensor(pages, dtype=kind, device=device) if kind else None
    held = pool_of(state, pages, PAGES if kind else B, device)
    outputs = []
    for i in range(10):
        one = [x[torch.arange(B), torch.tensor(starts) + i].to(device) for x in tokens]
        one[0] = one[0].mT.contiguous().mT  # of any strides
        with poisoned():
            o = slot_window_step(*one, bias.to(device), state=held, rows=rows, backend="triton")
        outputs.append(o.cpu())
    whole = [x.double() if x.is_floating_point() else x for x in tokens]
    for n, t in enumerate(starts):
        of_one = (x[n : n + 1, : t + 10] for x in whole)
        want, end = slot_window_attention(*of_one, bias.double(), **how)
        assert relative_error(torch.stack(outputs, 1)[n], want[0, t:]) < TOLERANCE[dtype]
        for name, ours, theirs in zip(SlotState._fields, held, end, strict=True):
            ours = ours[pages[n]].cpu()
            if name in ("keys", "values"):
                assert relative_error(ours, theirs[0]) < TOLERANCE[dtype], name
            else:  # as they came
                assert torch.equal(ours.to(theirs.dtype), theirs[0]), name
    if kind:
        for x in held:
            others = x[[p for p in range(PAGES) if p not in pages]].cpu()
            assert others.isnan().all() if x.is_floating_point() else (others == -1).all()
