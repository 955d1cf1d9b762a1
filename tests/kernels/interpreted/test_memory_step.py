"""The Triton step of window and rows, on pages of a pool, against the step in torch."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import TOLERANCE, poisoned, pool_of, relative_error

from lowline.kernels.memory import MemoryState, row_memory_attention, row_memory_step

B, PAGES = 2, 4


@pytest.mark.parametrize(
    "dtype, D, V, heads, window, sinks, exact, merged, kind",
    [
        (torch.float32, 24, 16, (4, 2), 6, 2, 3, 2, torch.int64),
        (torch.bfloat16, 16, 16, (3, 1), 5, 0, 4, 0, torch.int32),
        pytest.param(torch.float32, 16, 40, (2, 2), 70, 3, 80, 10, None, marks=pytest.mark.slow),
        pytest.param(torch.float16, 80, 64, (4, 1), 6, 2, 70, 0, None, marks=pytest.mark.slow),
    ],
)
def test_step(dtype, D, V, heads, window, sinks, exact, merged, kind, device) -> None:
    """Sequences of two lengths, until several blocks have left the window."""
    (H, G), starts, rule = heads, (1, window + 3), dict(exact=exact, block=3, horizon=7, bias=0.3)
    T = max(starts) + 10
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(B, T, *size, generator=g).to(dtype) for size in ((H, D), (G, D), (G, V))]
    whole = [x.double() for x in tokens]
    of_all = rule | dict(window=window, sinks=sinks, merged=merged, backend="torch")
    alone = [
        row_memory_attention(*(x[n : n + 1, :t] for x in tokens), **of_all)[1]
        for n, t in enumerate(starts)
    ]
    state = MemoryState(*(torch.cat(x) for x in zip(*alone, strict=True)))
    pages = [3, 1] if kind else [0, 1]
    rows = torch.tensor(pages, dtype=kind, device=device) if kind else None
    held = pool_of(state, pages, PAGES if kind else B, device)
    outputs = []
    for i in range(10):
        one = [x[torch.arange(B), torch.tensor(starts) + i].to(device) for x in tokens]
        one[0] = one[0].mT.contiguous().mT  # of any strides
        with poisoned():
            o = row_memory_step(*one, state=held, rows=rows, backend="triton", **rule)
        outputs.append(o.cpu())
    for n, t in enumerate(starts):
        want, end = row_memory_attention(*(x[n : n + 1, : t + 10] for x in whole), **of_all)
        assert relative_error(torch.stack(outputs, 1)[n], want[0, t:]) < TOLERANCE[dtype]
        for name, ours, theirs in zip(MemoryState._fields, held, end, strict=True):
            ours = ours[pages[n]].cpu()
            if name in ("k", "v", "sink_k", "sink_v", "length"):  # as they came
                assert torch.equal(ours.to(theirs.dtype), theirs[0]), name
            elif theirs.count_nonzero():
                assert relative_error(ours, theirs[0]) < TOLERANCE[dtype], name
    if kind:
        for x in held:
            others = x[[p for p in range(PAGES) if p not in pages]].cpu()
            assert others.isnan().all() if x.is_floating_point() else (others == -1).all()
