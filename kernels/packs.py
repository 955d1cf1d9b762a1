"""Sequences packed one after another in a batch of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary


def packed_at(bounds: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Return cu_seqlens on a device, whose boundaries ops that need them on the host know, too.

    They then wait for the device in no packed call. The tensor must not be changed.
    """
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64).to(device, non_blocking=True)
    _on_host[cu_seqlens] = list(bounds)
    return cu_seqlens


def bounds_on_host(cu_seqlens: torch.Tensor) -> list[int]:
    """Return the boundaries as `packed_at` was given them, or else read from the device."""
    known = None if torch.compiler.is_compiling() else _on_host.get(cu_seqlens)
    return cu_seqlens.tolist() if known is None else known  # type: ignore[no-any-return]


def check_pack(op: str, batch: int, time: int, cu_seqlens: torch.Tensor | None) -> int:
    """Return the number of sequences; ValueError where `cu_seqlens` does not fit the batch."""
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(
            f"{op}: cu_seqlens packs sequences into a batch of one, this batch is {batch}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"{op}: cu_seqlens is a vector of at least two integers")
    if cu_seqlens.device.type == "cpu":  # elsewhere the check would wait for the device
        bounds = bounds_on_host(cu_seqlens)
        if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
            raise ValueError(f"{op}: cu_seqlens = {bounds}; it rises from 0 to T = {time}")
    return cu_seqlens.numel() - 1


class ChunkTable(NamedTuple):
    """How packed sequences are cut into chunks of C tokens.

    Sequence n has its chunks from number ⌊(start + n·more) / C⌋ + n on, which is enough for all
    of them and depends on no length: nothing waits for the device. Unused numbers are empty chunks.
    """

    count: int  # type: ignore[assignment]
    rows: torch.Tensor  # (count, 4): sequence (N where empty), chunk in it, first token, tokens
    first: torch.Tensor  # (N,): the number of each sequence's first chunk


def chunk_table(cu_seqlens: torch.Tensor, T: int, C: int, more: int = 0) -> ChunkTable:
    """Return the chunks of packed sequences, each longer by `more` rows than cu_seqlens says."""

    def make() -> ChunkTable:
        cu = as_bounds(cu_seqlens)
        N = cu.numel() - 1
        count = (T + N * more) // C + N
        number = torch.arange(count, device=cu.device)
        first = (cu[:-1] + more * number[:N]) // C + number[:N]
        n = torch.searchsorted(first, number, right=True) - 1
        chunk = number - first[n]
        tokens = (cu[n + 1] + more - cu[n] - chunk * C).clamp(0, C)
        n_or_none = torch.where(tokens > 0, n, N)
        rows = torch.stack([n_or_none, chunk, cu[n] + chunk * C, tokens], 1)
        return ChunkTable(count, rows, first)

    return _cached(cu_seqlens, ("chunks", T, C, more), make)


def sequence_of_tokens(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Return the sequence that each token belongs to, (T,) of int32."""

    def make() -> torch.Tensor:
        cu = as_bounds(cu_seqlens)
        token = torch.arange(T, device=cu.device)
        return torch.searchsorted(cu[1:].contiguous(), token, right=True).int()

    return _cached(cu_seqlens, ("tokens", T), make)


def as_bounds(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return cu_seqlens as a contiguous vector of int64."""
    if cu_seqlens.dtype == torch.int64 and cu_seqlens.is_contiguous():
        return cu_seqlens  # a cached reference would keep itself alive
    return _cached(cu_seqlens, ("bounds",), lambda: cu_seqlens.to(torch.int64).contiguous())


_on_host: Any = WeakIdKeyDictionary()  # cu_seqlens of `packed_at` -> list of its numbers
_tables: Any = WeakIdKeyDictionary()  # cu_seqlens -> key -> what was computed from it


def _cached(cu_seqlens: torch.Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return what `make` computes from cu_seqlens, cached while that tensor lives and is unchanged.

    Every layer of a model needs the same tables. Nothing is cached where a change could go
    unseen: inference tensors count no versions, and a CUDA graph must hold the computation.
    """
    device = cu_seqlens.device
    cuda = device.type == "cuda"
    if cu_seqlens.is_inference() or (cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    stream = torch.cuda.current_stream(device).stream_id if cuda else 0
    key = (*key, cu_seqlens._version, stream)
    tables = _tables.setdefault(cu_seqlens, {})
    if key not in tables:
        if any(old[-2] != cu_seqlens._version for old in tables):
            tables.clear()
        tables[key] = make()
    return tables[key]
