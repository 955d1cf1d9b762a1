"""Padded batches and packed documents as mixers take them: end to end, with their bounds.

A mixer knows no padding mask. Around it the tokens of a padded batch are gathered into a batch of
one (`Packing.pack`), each row a sequence, and its output is scattered back, 0 at padding. Rows that
hold several documents are cut where a document starts: where positions do not follow each other,
as transformers does it where neither a mask nor a cache is given, or at `cu_seq_lens_q`.

Shapes: B batch, T time, E features, L tokens that are no padding, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import Cache

from lowline.errors import LowlineError


@dataclass(frozen=True)
class Packing:
    """How a batch's tokens lie end to end, sequence after sequence, without padding."""

    cu_seqlens: torch.Tensor  # (N + 1,), from 0 to L
    places: torch.Tensor | None  # (L,) in the flattened batch; None where all are tokens
    shape: tuple[int, int]  # B, T

    @classmethod
    def of_padding(cls, real_BT: torch.Tensor) -> Packing:
        """Return every row a sequence; rows without a token in this stretch are sequences of
        length 0.
        """
        B, T = real_BT.shape
        cu_seqlens = F.pad(real_BT.sum(1).cumsum(0), (1, 0))
        return cls(cu_seqlens, real_BT.flatten().nonzero()[:, 0], (B, T))

    @classmethod
    def of_starts(cls, starts_BT: torch.Tensor) -> Packing:
        """Return a sequence from each start to the next."""
        B, T = starts_BT.shape
        starts = starts_BT.flatten().nonzero()[:, 0]
        return cls(F.pad(starts, (0, 1), value=B * T), None, (B, T))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Packing:
        """On another device, where accelerate moves a layer's arguments to."""
        places = None if self.places is None else self.places.to(device, non_blocking=non_blocking)
        return Packing(self.cu_seqlens.to(device, non_blocking=non_blocking), places, self.shape)

    def pack(self, x_BTE: torch.Tensor) -> torch.Tensor:
        """(B, T, E), or (1, T, E) that all rows share, to (1, L, E)."""
        flat = x_BTE.expand(self.shape[0], -1, -1).flatten(0, 1)
        return (flat if self.places is None else flat[self.places])[None]

    def unpack(self, x_1LE: torch.Tensor) -> torch.Tensor:
        """(1, L, E) to (B, T, E), 0 at padding."""
        if self.places is None:
            return x_1LE.view(*self.shape, -1)
        flat = x_1LE.new_zeros(self.shape[0] * self.shape[1], x_1LE.shape[-1])
        return flat.index_copy(0, self.places, x_1LE[0]).view(*self.shape, -1)


def plan_packing(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cache: Cache | None,
    *,
    all_real: bool = False,
) -> tuple[Packing | None, torch.Tensor | None]:
    """Return the packing that a batch needs (None: every row is one sequence), and its positions.

    Positions are given back as they came, or made where padding or documents ask for others than
    one after the other. Looking at a mask, or at the positions of more than one token, waits for
    the device; a token that is decoded without a mask, or with `all_real`, does not.

    Args:
        shape: (B, T).
        attention_mask: (B, S): 0 at padding, in any place; S = T + the tokens `cache` has seen.
        position_ids: (B, T) or (1, T).
        cu_seqlens: (N + 1,) bounds of documents in a batch of one.
        cache: what came before.
        all_real: whether no token of this batch is padding, which the mask is then not asked for.

    Raises:
        ValueError: a mask of another shape, or packed documents with a mask or a cache.
    """
    B, T = shape
    if attention_mask is not None:
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask.shape != (B, seen + T):
            raise LowlineError(
                f"attention_mask is {tuple(attention_mask.shape)}; linearized models take "
                f"{(B, seen + T)}, the tokens that past_key_values has seen first"
            )
        if cu_seqlens is not None:
            raise LowlineError("give cu_seq_lens_q or an attention_mask, not both")
        real_BS = attention_mask.bool()
        if not all_real and real_BS.all():
            return None, position_ids
        if position_ids is None:
            position_ids = (real_BS.cumsum(1) - 1).clamp(min=0)[:, -T:]
        real_BT = real_BS[:, -T:]
        return (None if all_real or real_BT.all() else Packing.of_padding(real_BT)), position_ids
    if cu_seqlens is not None:
        if B != 1:
            raise LowlineError(
                f"cu_seq_lens_q packs documents into a batch of one, this one is {B}"
            )
        packing = Packing(cu_seqlens, None, shape)
        if position_ids is None:
            time = torch.arange(T, device=cu_seqlens.device)
            document = torch.searchsorted(cu_seqlens, time, right=True) - 1
            position_ids = (time - cu_seqlens[document])[None]
    elif position_ids is not None and T > 1:
        starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).expand(B, T)
        if not starts[:, 1:].any():
            return None, position_ids
        packing = Packing.of_starts(starts)
    else:
        return None, position_ids
    if cache is not None:
        raise LowlineError("packed documents cannot be continued: call without past_key_values")
    return packing, position_ids
