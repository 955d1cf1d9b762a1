"""The weight of a linear part beside a window, a number of each head: m = sigmoid(a)."""

from __future__ import annotations

import math

import torch
import torch.nn as nn


class LearnedShare(nn.Module):
    """m of (H, 1), which multiplies (B, T, H, D); it begins with `init`, between 0 and 1."""

    def __init__(self, heads: int, init: float) -> None:
        super().__init__()
        self.logit_H = nn.Parameter(torch.full((heads,), math.log(init / (1 - init))))

    def forward(self) -> torch.Tensor:
        return self.logit_H.sigmoid()[:, None]
