"""Tables of packed sequences: what they hold, and when they are kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lowline.kernels import packs
from lowline.kernels.packs import as_bounds, chunk_table, sequence_of_tokens


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
