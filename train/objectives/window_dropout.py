"""Window dropout: mixers learn what their window would hide from them."""

from __future__ import annotations

import torch
import torch.nn as nn

from lowline.linearize.mixers.base import Mixer
from lowline.train.config.objective import ObjectiveSection


class WindowDropout:
    """Mixers go without their window at random, less and less often (arXiv 2510.05901).

    Step s of S leaves out a mixer's window with probability p · max(0, 1 - (s - 1) / (u · S)). What
    is drawn depends on the seed and the step alone, on every rank alike, and in a block's run as in
    the complete model's.

    Args:
        before: mixers of the complete model that come before those of this one.
    """

    def __init__(
        self, model: nn.Module, c: ObjectiveSection, steps: int, seed: int, before: int = 0
    ) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        self.before = before
        self.start, self.last, self.seed = c.window_dropout, c.window_dropout_until * steps, seed

    def probability(self, step: int) -> float:
        """Of a mixer's going without its window in a step, the first of which is 1."""
        return self.start * max(0.0, 1.0 - (step - 1) / self.last)

    def draw(self, step: int) -> None:
        """Set the mixers up for a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        draws = torch.rand(self.before + len(self.mixers), generator=generator).tolist()
        for mixer, draw in zip(self.mixers, draws[self.before :], strict=True):
            mixer.drop_window = draw < self.probability(step)
