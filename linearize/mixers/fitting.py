"""A start that is measured: parameters of gated mixers fitted to softmax attention's outputs.

    error_h = Σ_t |o_th - o*_th|²,    o* of softmax attention, of the same q, k and v

Heads do not depend on each other: a candidate is tried in all of them at once, and each takes the
best of its own. Scales are least squares: of a share m beside the window

    m = <l - w, o* - w> / <l - w, l - w>,    l and w the outputs of the recurrence and the window

(as Taylor-Calibrate, gates are set from the teacher's statistics before any training).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from lowline.linearize.mixers.base import Mixer

LEAST, MOST = 1e-3, 0.9  # of a share
TINY = 1e-12
DECAYS = (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 1024, 1 / 8192)  # log decay of a token


class Sample(NamedTuple):
    """Some tokens of a layer, and what softmax attention makes of them."""

    q: torch.Tensor  # (1, T, H, D)
    k: torch.Tensor  # (1, T, G, D)
    v: torch.Tensor
    x: torch.Tensor  # (1, T, E)
    cos: torch.Tensor  # (1, T, D)
    sin: torch.Tensor
    wanted: torch.Tensor  # (1, T, H, D), o*
    cu_seqlens: torch.Tensor | None = None

    def mixed(self, mixer: Mixer) -> torch.Tensor:
        """Return the mixer's output, (T, H, D)."""
        rope, how = (self.cos, self.sin), {"x_BTE": self.x, "cu_seqlens": self.cu_seqlens}
        return mixer(self.q, self.k, self.v, rope=rope, **how)[0].flatten(0, 1)


def best_of(
    candidates: Iterable[Any], tried: Callable[[Any], torch.Tensor], per: int = 1
) -> list[Any]:
    """Return each head's best candidate.

    Args:
        tried: sets a candidate in all heads and returns their errors, (H,).
        per: neighbouring heads that share a choice.
    """
    candidates = list(candidates)
    errors = torch.stack(
        [tried(candidate).unflatten(0, (-1, per)).sum(1) for candidate in candidates]
    )
    return [candidates[i] for i in errors.argmin(0).tolist()]


def parts_beside(mixer: Mixer, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the window's and the recurrence's outputs of a mixer whose shares are all ½."""
    both = sample.mixed(mixer)
    mixer.linear_enabled = False
    window = 2 * sample.mixed(mixer)
    mixer.linear_enabled = True
    return window, 2 * both - window


def best_share(
    window: torch.Tensor, linear: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each head's m and its error, (H,); all inputs (T, H, D)."""
    way, gap = linear - window, wanted - window
    share_H = ((way * gap).sum((0, 2)) / (way.square().sum((0, 2)) + TINY)).clamp(LEAST, MOST)
    return share_H, (gap - share_H[:, None] * way).square().sum((0, 2))


def best_scale(output: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a factor of each head's features, (H, D), and each head's error with it."""
    scale_HD = (output * wanted).sum(0) / (output.square().sum(0) + TINY)
    return scale_HD, (output * scale_HD - wanted).square().sum((0, 2))


def constant_of(x_TE: torch.Tensor, value: float) -> torch.Tensor:
    """Return w of (E,) with x·w near `value` for every token."""
    x = x_TE.double()
    gram = x.T @ x
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    return (value * torch.linalg.solve(gram, x.sum(0))).to(x_TE.dtype)
