"""Steps on rows of a pool of states, in place.

A pool is a state whose tensors lead with pages in place of sequences. Pages need not follow each
other in memory: they may be views of larger pages that hold the states of several ops. A step with

    rows (B,)    int32 or int64, on the state's device: token b belongs to the state of page rows[b]

changes those pages alone; what the others hold, NaN included, has no influence and stays. Each page
occurs once at most. On a CPU numbers that repeat or do not exist are refused; on other devices such
a check would wait for the device, so that of a page that repeats it is undefined which token it
takes in. C++ and Triton read and write the pages where they lie. Plain torch copies them out and
back (`on_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def check_rows(op: str, rows: Tensor | None, batch: int, pool: Tensor) -> int:
    """Return how many states a step's tensors must hold: `batch`, or with rows the pool's pages.

    Args:
        pool: a tensor of the state.

    Raises:
        ValueError: rows that are no vector of `batch` integers on the pool's device; for CPU
            tensors also numbers that repeat or are no page.
    """
    if rows is None:
        return batch
    pages = len(pool)
    if rows.shape != (batch,) or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: rows is {tuple(rows.shape)} of {rows.dtype}; give int32 or int64 of shape "
            f"({batch},), the page of each token's state"
        )
    if rows.device != pool.device:
        raise ValueError(f"{op}: rows is on {rows.device}, the state on {pool.device}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        numbers = rows.tolist()
        if len(set(numbers)) < batch or not all(0 <= n < pages for n in numbers):
            raise ValueError(
                f"{op}: rows = {numbers}; give different pages, each of 0 … {pages - 1}"
            )
    return pages


def on_rows(step: Callable[[Any], Tensor], state: Any, rows: Tensor | None) -> Tensor:
    """Return what a step returns that changes its state, applied to some pages of `state`."""
    if rows is None:
        return step(state)
    taken = take_rows(state, rows)
    out = step(taken)
    put_rows(state, rows, taken)
    return out


def take_rows(pool: Any, rows: Tensor) -> Any:
    """Return copies of some pages of a nest of tensors."""
    return tree_map_only(Tensor, lambda t: t.index_select(0, rows), pool)


def put_rows(pool: Any, rows: Tensor, new: Any) -> None:
    """Overwrite some pages of a nest of tensors."""
    for ours, theirs in zip(tree_leaves(pool), tree_leaves(new), strict=True):
        if ours is not None:
            ours.index_copy_(0, rows.long(), theirs)


def has_whole_pages(*pools: Tensor) -> bool:
    """Return whether the C++ steps can work in place: each page is contiguous."""
    return all(
        x.is_contiguous()
        or (x[:1].is_contiguous() and (len(x) < 2 or x.stride(0) >= x[:1].numel()))
        for x in pools
    )
