"""Texts longer than those that the teacher was trained on, in constant memory.

A rotary embedding is trained on the distances between a query and a key that training had: fewer
than L. A window has short distances only, but sinks and remembered tokens lie as far back as the
text is long, and from about 1.5 L on the output is noise. Positions are therefore bounded where
all that a model keeps of a text are keys and values of single tokens or means of them
(`MixerOptions.keeps_keys`). Up to position L nothing changes. From there on, with a period of
M = L/16:

 1. The token at position p ≥ L + M stands at L + (p - L) mod M instead (`place`).
 2. When a period ends, the keys of the window, and those that the memory has taken in since L, are
    rotated back by M, so that distances remain those of the text. A remembered key is rotated
    L/M - 1 times; then it stays where it is, near position 0.
 3. Sinks, keys that were remembered up to L, and means of several stay where they are.

So every distance is less than L + M, or L + window, and those of the last L tokens are the text's.
How often a row is still to be rotated lies in its count of tokens, which is 1 - c·2^-24 instead of
1: c - 1 times more, or, with c = 0, not known yet, since it came in this period. It changes scores
by less than 1e-5. Other ways to bound positions: StreamingLLM (arXiv 2309.17453) renumbers what its
cache holds for each token, and rotates all keys each time; ReRoPE and Self-Extend (2401.01325)
bound the distance for each pair of tokens, with two scores per pair.

Keys are rotated between calls of the mixer: tokens from L on are mixed in pieces that end where a
period ends. Keys of 8 bits are rounded again each time.

Shapes: those of `lowline.linearize.mixers.base`; w tokens in a window's ring buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from lowline.kernels.memory.int8 import is_packed, pack, unpack
from lowline.kernels.memory.op import MemoryState
from lowline.kernels.packs import bounds_on_host
from lowline.kernels.pool import put_rows, take_rows
from lowline.kernels.window.state import WindowState
from lowline.linearize.mixers.base import Rope, State, apply_rope
from lowline.linearize.mixers.branches import at_least_fp32
from lowline.linearize.mixers.options import OPTIONS
from lowline.linearize.mixers.state import clear_rows

Window = WindowState | MemoryState

PERIODS = 16  # in the positions that the teacher knows
STEP = 2.0**-24  # of c; the spacing of fp32 below 1
CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the text."""


class Reach(NamedTuple):
    """How positions of a model are bounded; see the module."""

    length: int  # L
    inv_freq: torch.Tensor  # (D/2,), in radians per position

    @property
    def period(self) -> int:
        """M, in tokens."""
        return max(self.length // PERIODS, 1)

    def place(self, position: torch.Tensor) -> torch.Tensor:
        """Return where tokens of these positions stand."""
        beyond = position - self.length
        return position.where(beyond < self.period, self.length + beyond % self.period)

    def begins_period(self, start: int) -> bool:
        """Return whether a period begins at a position."""
        beyond = start - self.length
        return beyond >= 0 and beyond % self.period == 0

    def turned(self, k_NTGD: torch.Tensor) -> torch.Tensor:
        """Return keys that are rotated back by a period."""
        angle = self.inv_freq.to(k_NTGD.device, torch.float64) * -self.period
        rope = (torch.cat([x, x]).to(k_NTGD.dtype)[None, None] for x in (angle.cos(), angle.sin()))
        return apply_rope(k_NTGD, tuple(rope))  # type: ignore[arg-type]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Return first and last positions, the latter excluded, of what is mixed at once."""
        while start < stop:
            end = self.length
            if start >= end:
                end = start + self.period - (start - end) % self.period
            yield start, min(end, stop)
            start = end


def known_positions(config: Any) -> int | None:
    """Return L of a converted model; None where positions are not bounded.

    They are not in a model with softmax layers or with mixers that keep other states, nor where
    the rotary embedding changes with the length of the text.
    """
    kept = all(m["name"] != "softmax" and OPTIONS[m["name"]].keeps_keys for m in config.mixers)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return config.max_position_embeddings if kept and kind not in CHANGING_ROPES else None


def placed(
    reach: Reach | None, position_ids: torch.Tensor | None, tokens_BT: Any, seen: int
) -> torch.Tensor | None:
    """Return the positions that tokens are given, of which `seen` came before; None for those of
    the text one after the other.
    """
    if reach is None:
        return position_ids
    if position_ids is None:
        position_ids = torch.arange(seen, seen + tokens_BT.shape[1], device=tokens_BT.device)[None]
    return reach.place(position_ids)


def within(reach: Reach | None, mixer: Any) -> Any:
    """Return what is called as a mixer is, for tokens at any position."""
    return mixer if reach is None else Bounded(reach, mixer)


class Bounded(NamedTuple):
    """A mixer for tokens at any position."""

    reach: Reach
    mixer: Any

    def __call__(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: State | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """See `Mixer.forward`."""
        tokens = (q_BTHD, k_BTGD, v_BTGD, x_BTE, *rope)
        (B, T), packed = q_BTHD.shape[:2], cu_seqlens is not None
        bounds = [] if cu_seqlens is None else bounds_on_host(cu_seqlens)
        N = len(bounds) - 1 if packed else B
        lengths = [0] * N if state is None else _windows(state)[0].length.tolist()
        if not packed and len(set(lengths)) == 1:
            return self._mix(tokens, state, lengths[0])
        outputs, after = [], []
        for n, length in enumerate(lengths):
            row, (a, b) = (0, bounds[n : n + 2]) if packed else (n, (0, T))
            alone = None if state is None else tree_map(lambda x, n=n: x[n : n + 1], state)
            if a < b:
                of_row = tuple(x[row : row + 1, a:b] for x in tokens)
                o, alone = self._mix(of_row, alone, length)
                outputs.append(o)
            after.append(alone or self.mixer.empty_state(1, v_BTGD.dtype, v_BTGD.device))
        return torch.cat(outputs, 1 if packed else 0), _joined(after)

    @torch.no_grad()
    def on_pool(
        self,
        *tokens: torch.Tensor,
        pool: State,
        rows_N: torch.Tensor,
        fresh_N: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **of_tokens: Any,
    ) -> torch.Tensor:
        """See `Mixer.on_pool`."""
        if cu_seqlens is None and fresh_N is None:  # one token each, of which few begin anything
            lengths = _windows(pool)[0].length[rows_N.long()].tolist()
            for n, length in enumerate(lengths):
                if self.reach.begins_period(length):
                    row = rows_N[n : n + 1]
                    put_rows(pool, row, self._begun(take_rows(pool, row), length))
            return self.mixer.on_pool(*tokens, pool=pool, rows_N=rows_N, **of_tokens)  # type: ignore[no-any-return]
        state = take_rows(pool, rows_N)
        if fresh_N is not None:
            clear_rows(state, fresh_N)
        o, state = self(*tokens, state=state, cu_seqlens=cu_seqlens, **of_tokens)
        put_rows(pool, rows_N, state)
        return o

    def _mix(
        self, tokens: Sequence[torch.Tensor], state: State | None, length: int
    ) -> tuple[torch.Tensor, State]:
        """Mix tokens of sequences that have all seen `length` before."""
        outputs = []
        for start, stop in self.reach.pieces(length, length + tokens[0].shape[1]):
            if state is not None and self.reach.begins_period(start):
                state = self._begun(state, start)
            q, k, v, x, *rope = (t[:, start - length : stop - length] for t in tokens)
            o, state = self.mixer(q, k, v, rope=tuple(rope), x_BTE=x, state=state)
            outputs.append(o)
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state

    def _begun(self, state: State, start: int) -> State:
        """Return states as they are for the tokens of the period that begins at `start`."""
        change = _settled if start == self.reach.length else partial(_turned, self.reach)
        return tree_map(change, state, is_leaf=_is_window)


def _settled(held: Window) -> Window:
    """Return a window whose rows stay where they are for ever."""
    if not isinstance(held, MemoryState):
        return held
    n_NGR = held.row_tokens
    return held._replace(row_tokens=n_NGR.where(n_NGR != 1, 1 - STEP))


def _turned(reach: Reach, held: Window) -> Window:
    """Return a window that is rotated back by a period, with the rows that still are to be."""

    def turned(k_NTGD: torch.Tensor) -> torch.Tensor:
        if is_packed(held):
            return pack(reach.turned(unpack(k_NTGD)))
        return reach.turned(at_least_fp32(k_NTGD)).to(k_NTGD.dtype)

    if not isinstance(held, MemoryState):
        return held._replace(k=turned(held.k))
    n_NGR = held.row_tokens
    c_NGR = ((1 - n_NGR) / STEP).round()
    moves = (n_NGR > 0) & (n_NGR <= 1) & (c_NGR != 1)
    row_k = turned(held.row_k.transpose(1, 2)).transpose(1, 2)
    c_NGR = (c_NGR - 1).where(c_NGR > 0, reach.length // reach.period - 1)
    return held._replace(
        k=turned(held.k),
        row_k=row_k.where(moves[..., None], held.row_k),
        row_tokens=n_NGR.where(~moves, 1 - c_NGR * STEP),
    )


def _is_window(state: Any) -> bool:
    return isinstance(state, WindowState | MemoryState)


def _windows(state: State) -> list[Window]:
    return tree_leaves(state, is_leaf=_is_window)


def _joined(states: Sequence[State]) -> State:
    """Return states of single sequences as one of all."""
    return tree_map(lambda *parts: torch.cat(parts), *states)
