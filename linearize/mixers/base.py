"""What stands in for softmax attention: a mixer, between the q, k, v projections and o's.

    o, state = mixer(q, k, v, rope=(cos, sin), x=x)            a complete sequence, or a first part
    o, state = mixer(q, k, v, rope=..., x=x, state=state)      what follows it, at any split

Both bodies (transformers' and torchtitan's) project, normalise q and k where the architecture does,
and call a mixer with q and k *before* the rotary embedding, since some branches take them so. With
`cu_seqlens` the tokens are those of several sequences, packed in a batch of one; padded batches are
packed before they come here, so that no mixer knows of padding.

Shapes: B batch, T time, H query heads, G key and value heads, D features a head, E features of the
model, N sequences (B, or those of `cu_seqlens`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from lowline.kernels.dense import is_one_token, rotate_token
from lowline.kernels.pool import put_rows, take_rows
from lowline.linearize.mixers.fitting import Sample
from lowline.linearize.mixers.options import MixerOptions
from lowline.linearize.mixers.state import StateLayout, clear_rows

Rope = tuple[torch.Tensor, torch.Tensor]
State = Any
"""A tensor, or a (named) tuple or dict of states; every tensor leads with N. Nothing grows with
the tokens seen, except in softmax attention."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a mixer needs to know of the attention it replaces."""

    hidden_size: int  # E
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # D
    layer: int = 0  # index of the layer

    @property
    def queries_per_kv_head(self) -> int:
        return self.n_heads // self.n_kv_heads


class Mixer(nn.Module):
    """Base of all mixers. A subclass takes `(shape, options)`, a frozen dataclass of its own.

    Attributes:
        options: what it is built from; `has_window`, `has_linear` are theirs.
        fixed: names of the parameters that get no gradient.
        whole: names of the parameters that belong to no head; all others have a part for each head
            (a query head, or a key and value head) along their first dimension.
        part: where heads lie on several ranks (`MixerOptions.splits`): the number of this rank
            among those, and how many there are; `forward` gets the heads of its rank only.
        linear_enabled: where there are both: set it to False to leave the linear part's terms out
            of the output, all else unchanged; states go on as they would.
        drop_window: where there are both: set it to True to have the linear part alone stand in for
            attention, over all tokens and at weight 1, so that it learns what the window would
            hide from it (arXiv 2510.05901). Like dropout, in training mode only.
    """

    options: Any = MixerOptions()
    fixed: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    part = (0, 1)
    linear_enabled = True
    drop_window = False

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def has_window(self) -> bool:
        return self.options.has_window

    @property
    def has_linear(self) -> bool:
        return self.options.has_linear

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: State | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Mix tokens.

        Args:
            q_BTHD, k_BTGD, v_BTGD: projections, before the rotary embedding.
            rope: cos and sin of (B, T, D), or (1, T, D).
            x_BTE: the layer's normalised input, for gates that are learned from it.
            state: what a call before returned; None at the start of every sequence. Without
                gradients it may be changed in place.
            cu_seqlens: (N + 1,) bounds of packed sequences, B = 1.
            rows: (B,) where the state is a pool (`lowline.kernels.pool`), of which these pages
                change; for one token of each sequence.

        Returns:
            o of (B, T, H, D), before the output projection, and the state after the last token of
            every sequence.
        """
        raise NotImplementedError

    @torch.no_grad()
    def on_pool(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        pool: State,
        rows_N: torch.Tensor,
        fresh_N: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return o of tokens of sequences whose states are pages of a pool, which change in place.

        One token of each sequence takes the kernels' steps on rows, if `forward` has the argument
        `rows`; other calls copy the states out and back. Nothing waits for the device that
        `forward` does not wait for.

        Args:
            pool: a state whose tensors lead with pages, of any stride (`StateLayout.views`).
            rows_N: int32 or int64, the page of each sequence; each page at most once.
            fresh_N: bool, which sequences begin here, whatever their pages hold.

        The other arguments are those of `forward`.
        """
        of_tokens: dict[str, Any] = {"rope": rope, "x_BTE": x_BTE}
        steps = fresh_N is None and cu_seqlens is None and q_BTHD.shape[1] == 1
        if steps and "rows" in _arguments(type(self).forward):
            return self(q_BTHD, k_BTGD, v_BTGD, **of_tokens, state=pool, rows=rows_N)[0]
        state = take_rows(pool, rows_N)
        if fresh_N is not None:
            clear_rows(state, fresh_N)
        of_tokens |= {"state": state, "cu_seqlens": cu_seqlens}
        o_BTHD, state = self(q_BTHD, k_BTGD, v_BTGD, **of_tokens)
        put_rows(pool, rows_N, state)
        return o_BTHD

    def state_layout(self, dtype: torch.dtype = torch.float32) -> StateLayout:
        """Return structure, shapes and types of its states, where it computes in `dtype`.

        They are those after one token. A mixer whose options have no `backend` runs as it is, and
        so does one that does not keep its options.
        """
        shape, options = self.shape, self.options
        if hasattr(options, "backend"):
            options = replace(options, backend="reference")
        kind: Any = type(self)
        with torch.device("meta"):  # costs no random numbers
            kept = type(options) is not MixerOptions
            mixer = kind(shape, options) if kept else copy.deepcopy(self)
        mixer.to(dtype).to_empty(device="cpu")
        with torch.no_grad(), torch.device("cpu"):
            for weight in mixer.state_dict().values():
                weight.zero_()
            heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
            q, k, v = (torch.zeros(1, 1, n, shape.head_dim, dtype=dtype) for n in heads)
            x = torch.zeros(1, 1, shape.hidden_size, dtype=dtype)
            rope = (torch.ones_like(q[:, :, 0]), torch.zeros_like(q[:, :, 0]))
            return StateLayout.of(mixer(q, k, v, rope=rope, x_BTE=x)[1])

    def empty_state(
        self, n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> State:
        """Return the state of n sequences before their first token, all zeros.

        A call with it, and one with `state=None`, give the same.
        """
        return self.state_layout(dtype).empty(n, device)

    def calibrate(self, k_TGD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return parameters, by name, to begin with, from the teacher's attention on some text.

        Args:
            k_TGD: keys of its tokens, before the rotary embedding, sinks left out.

        Raises:
            ValueError: too few tokens.
        """
        return {}

    def fit(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return parameters, by name, with which the output is nearest to softmax attention's.

        It may change the mixer's own.

        Args:
            sample: tokens and softmax attention's output; see `lowline.linearize.mixers.fitting`.
        """
        return {}


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's arguments."""
    return frozenset(inspect.signature(forward).parameters)


def apply_rope(x_BTHD: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotary embedding of the half-split layout that Hugging Face checkpoints have."""
    if is_one_token(x_BTHD, *rope):
        return rotate_token(x_BTHD, *rope)
    cos_BT1D, sin_BT1D = (t.unsqueeze(-2).to(x_BTHD.dtype) for t in rope)
    first, second = x_BTHD.chunk(2, -1)
    return torch.addcmul(x_BTHD * cos_BT1D, torch.cat([-second, first], -1), sin_BT1D)
