"""Tables of packed sequences: what they hold, and when they are kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lowline.kernels import packs
from lowline.kernels.memory import row_memory_attention
from lowline.kernels.packs import as_bounds, chunk_table, packed_at, sequence_of_tokens
from lowline.kernels.recurrence import gated_linear_recurrence
from lowline.kernels.scan import selective_scan
from lowline.kernels.slots import slot_window_attention
from lowline.kernels.window import window_linear_attention


@pytest.mark.parametrize("more", [0, 3, 8])
@pytest.mark.parametrize("bounds", [[0, 9], [0, 0, 3, 3, 20], [0, 8, 16, 17], [0, 0]])
def test_every_row_of_every_sequence_is_in_one_chunk(bounds: list[int], more: int) -> None:
    C, N = 8, len(bounds) - 1
    table = chunk_table(torch.tensor(bounds), bounds[-1], C, more)
    assert table.rows.shape == (table.count, 4)
    found: dict[int, list[int]] = {n: [] for n in range(N)}
    for number, (n, c, first, rows) in enumerate(table.rows.tolist()):
        if n == N:
            assert rows == 0
            continue
        assert number == table.first[n] + c and first == bounds[n] + c * C and 0 < rows <= C
        found[n] += range(c * C, c * C + rows)
    for n in range(N):
        assert found[n] == list(range(bounds[n + 1] - bounds[n] + more))


def test_sequence_of_tokens() -> None:
    assert sequence_of_tokens(torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 0, 2, 2, 2]


def test_a_table_is_kept_while_its_bounds_are_what_they_were() -> None:
    cu = torch.tensor([0, 5, 16], dtype=torch.int32)
    table = chunk_table(cu, 16, 8)
    assert chunk_table(cu, 16, 8) is table and as_bounds(cu) is as_bounds(cu)
    assert chunk_table(cu.clone(), 16, 8) is not table
    cu[1] = 9
    changed = chunk_table(cu, 16, 8)
    assert changed.rows.tolist() == chunk_table(cu.clone(), 16, 8).rows.tolist()
    assert changed.rows.tolist() != table.rows.tolist()


def test_no_table_of_bounds_whose_changes_go_unseen_is_kept() -> None:
    with torch.inference_mode():
        cu = torch.tensor([0, 5, 16])
        chunk_table(cu, 16, 8)
        cu[1] = 9
        assert chunk_table(cu, 16, 8).rows.tolist() == chunk_table(cu.clone(), 16, 8).rows.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_go_with_their_bounds(dtype: torch.dtype) -> None:
    cu = torch.tensor([0, 5, 16], dtype=dtype)
    chunk_table(cu, 16, 8)
    rows = weakref.ref(chunk_table(cu, 16, 8).rows)
    assert cu in packs._tables and rows() is not None
    del cu
    gc.collect()
    assert rows() is None


def test_bounds_that_the_host_knows_are_not_read_from_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, x = torch.randn(1, 12, 2, 4), torch.randn(1, 12, 4)
    slot, how = torch.randint(3, (1, 12, 2)), dict(window=2, backend="torch")
    calls = {
        "window": lambda cu: window_linear_attention(q, q, q, cu_seqlens=cu, **how),
        "slots": lambda cu: slot_window_attention(q, q, q, slot, q[0, :2, 0], cu_seqlens=cu, **how),
        "rows": lambda cu: row_memory_attention(q, q, q, exact=2, block=1, cu_seqlens=cu, **how),
        "recurrence": lambda cu: gated_linear_recurrence(
            q, q, q, -q.exp(), cu_seqlens=cu, backend="torch"
        ),
        "scan": lambda cu: selective_scan(
            x, x.exp(), -x[0, :4].exp(), x, x, cu_seqlens=cu, backend="torch"
        ),
    }
    bounds = [0, 1, 8, 12]
    want = {name: call(torch.tensor(bounds))[0] for name, call in calls.items()}
    known, unknown = packed_at(bounds, "cpu"), torch.tensor(bounds)
    assert known.tolist() == bounds and known.dtype == torch.int64

    def tolist(self: torch.Tensor) -> None:
        raise AssertionError("read on the host")

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    for name, call in calls.items():
        assert torch.equal(call(known)[0], want[name]), name
        with pytest.raises(AssertionError, match="read on the host"):
            call(unknown)
    with pytest.raises(ValueError, match=r"\[0, 1, 8\]; it rises from 0 to T = 12"):
        calls["slots"](packed_at([0, 1, 8], "cpu"))
