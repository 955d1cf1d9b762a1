"""Sequences packed one after another in a batch of one."""

from __future__ import annotations

import torch


def check_pack(op: str, batch: int, time: int, cu_seqlens: torch.Tensor | None) -> int:
    """The number of sequences; ValueError where `cu_seqlens` does not fit the batch."""
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(
            f"{op}: cu_seqlens packs sequences into a batch of one, this batch is {batch}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"{op}: cu_seqlens is a vector of at least two integers")
    if cu_seqlens.device.type == "cpu":  # elsewhere the look would wait for the device
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
            raise ValueError(f"{op}: cu_seqlens = {bounds}; it rises from 0 to T = {time}")
    return cu_seqlens.numel() - 1
