"""The second part of a measured start: each new layer's attention trains alone for some passes.

    Σ_t |W_o · mixer(W_q x_t, W_k x_t, W_v x_t) - y_t|² / mean over batches of Σ_t |y_t|²

x is the layer's input in the model as it is, y the output of softmax attention with the weights
that the layer began with. No layer below or above is computed, so that a pass over kept inputs
costs a small part of one through the model (as MOHAWK's second stage, arXiv 2408.10189, and
Taylor-Calibrate's steps, 2606.16429). AdamW, a warm-up of `WARM_UP` batches, then half a cosine to
a tenth; parameters of mixers move `MIXER_FACTOR` times as fast as the projections'.

Shapes: B batch, T time, E features of the model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from lowline.linearize.mixers.fitting import Sample
from lowline.linearize.titan import MixerAttention

WARM_UP, LEAST, MIXER_FACTOR, LARGEST_NORM = 8, 0.1, 3.0, 1.0


class Text(NamedTuple):
    """A batch at one layer; hidden states in bf16, since all layers' are in memory at once."""

    x: torch.Tensor  # (B, T, E)
    wanted: torch.Tensor  # (B, T, E), y
    rope: tuple[torch.Tensor, torch.Tensor]
    cu_seqlens: torch.Tensor | None

    @classmethod
    def of(cls, layer: MixerAttention, sample: Sample, like: Text | None) -> Text:
        """Keep what a layer sees of a batch, with the rotary tables of the layer below."""
        wanted = layer.wo(sample.wanted.flatten(2))
        rope = (sample.cos, sample.sin) if like is None else like.rope
        return cls(sample.x.bfloat16(), wanted.bfloat16(), rope, sample.cu_seqlens)


class _Alone(nn.Module):
    """A layer's attention on such a batch."""

    def __init__(self, layer: MixerAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, text: Text) -> torch.Tensor:
        """Return the squared error and the target's square, summed."""
        layer, x = self.layer, text.x.float()
        q, k, v = layer.qkv_linear(x)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        o, _ = layer.mixer(q, k, v, rope=text.rope, x_BTE=x, cu_seqlens=text.cu_seqlens)
        return (layer.wo(o.flatten(2)) - text.wanted.float()).square().sum()


def train_alone(
    layer: MixerAttention, texts: list[Text], *, epochs: int, lr: float, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Return full values of a layer's parameters after these passes, and the last one's error.

    The layer itself stays as it is. Its parameters that do not train in the run do not here.
    """
    values = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in layer.named_parameters()
        if p.requires_grad
    }
    for value in values.values():
        value.requires_grad_()
    of_mixer = [value for name, value in values.items() if name.startswith("mixer.")]
    others = [value for name, value in values.items() if not name.startswith("mixer.")]
    groups = [{"params": of_mixer, "lr": MIXER_FACTOR * lr}, {"params": others, "lr": lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    count = epochs * len(texts)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (
            min(1.0, (n + 1) / WARM_UP)
            * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * n / count)) / 2)
        ),
    )
    scale = sum(text.wanted.float().square().sum() for text in texts) / len(texts)
    alone = _Alone(layer)
    parameters = {f"layer.{name}": value for name, value in values.items()}
    generator = torch.Generator().manual_seed(seed)
    error = 0.0
    with torch.enable_grad():
        for _ in range(epochs):
            error = 0.0
            for at in torch.randperm(len(texts), generator=generator).tolist():
                loss = functional_call(alone, parameters, (texts[at],)) / scale
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(list(values.values()), LARGEST_NORM)
                optimizer.step()
                schedule.step()
                error += loss.item() / len(texts)
    return {name: value.detach() for name, value in values.items()}, error
