"""How the state of a mixer lies in memory: a row of bytes, a "page", for every sequence.

    layout = mixer.state_layout(torch.bfloat16)
    pages_NB = torch.zeros(n, layout.page_bytes, dtype=torch.uint8)    n empty states
    pool = layout.views(pages_NB)                a state of n sequences, whose tensors are the pages
    state = take_rows(pool, rows_N)              copies, which may change (`lowline.kernels.pool`)
    put_rows(pool, rows_N, state)

The tensors of a state lie one after the other, each at a multiple of 64 bytes. A page of zeros is
the state before the first token, of every mixer. Pages may be larger than `page_bytes`: a server
may have one size for all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class TensorPlace:
    """Where in a page one tensor of a state lies."""

    shape: tuple[int, ...]  # of one sequence
    dtype: torch.dtype
    offset: int  # in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StateLayout:
    """The tensors of a mixer's state, in the order of its nest; None where that has a None."""

    structure: TreeSpec
    tensors: tuple[TensorPlace | None, ...]

    @classmethod
    def of(cls, state: Any) -> StateLayout:
        """Return the layout of states such as this one, whose tensors lead with sequences."""
        leaves, structure = tree_flatten(state)
        places: list[TensorPlace | None] = []
        end = 0
        for leaf in leaves:
            if leaf is None:
                places.append(None)
                continue
            place = TensorPlace(tuple(leaf.shape[1:]), leaf.dtype, end)
            places.append(place)
            end += -(-place.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(structure, tuple(places))

    @property
    def nbytes(self) -> int:
        """Bytes of a sequence's tensors."""
        return sum(place.nbytes for place in self.tensors if place is not None)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: those of the tensors, and what lies between them."""
        last = [p.offset + p.nbytes for p in self.tensors if p is not None]
        return -(-max(last, default=0) // ALIGNMENT) * ALIGNMENT

    def empty(self, n: int, device: torch.device | str = "cpu") -> Any:
        """Return the state of n sequences before their first token."""
        return self._nest(
            None if p is None else torch.zeros(n, *p.shape, dtype=p.dtype, device=device)
            for p in self.tensors
        )

    def views(self, pages_NB: torch.Tensor) -> Any:
        """Return a state of N sequences whose tensors are parts of pages (N, bytes) of uint8."""
        N, size = pages_NB.shape
        assert size >= self.page_bytes and pages_NB.dtype == torch.uint8
        return self._nest(
            None
            if p is None
            else pages_NB[:, p.offset : p.offset + p.nbytes].view(p.dtype).view(N, *p.shape)
            for p in self.tensors
        )

    def _nest(self, leaves: Any) -> Any:
        return tree_unflatten(list(leaves), self.structure)


def clear_rows(state: Any, which_N: torch.Tensor) -> None:
    """Make the states where `which_N` (bool) is True empty, without waiting for the device."""
    for tensor in tree_flatten(state)[0]:
        if tensor is not None:
            tensor.masked_fill_(which_N.view(-1, *[1] * (tensor.dim() - 1)), 0)
