"""Which layers stay softmax: measured by what the conversion of each one alone costs.

    costs = measure_layers(teacher, mixer="memory", copies=..., rows_NT=...)
    softmax = costliest(costs, 4)

One layer of the teacher gets the mixer, the others stay; then it is put back. Two costs:

    recall   nats per token by which the second copy of a random string becomes less likely, mean
             over distances (`lowline.linearize.evaluation.second_copy`)
    kl       KL(teacher || converted) of the next token on text, in nats per token, in the second
             halves of rows

Nothing is trained. A mixer is measured as window + sinks of its own sizes (`stand_in`): what the
start of one that learns is worth says little about what training makes of it, and a window shows
what the layer loses if nothing is learned. Layers below the converted one see what they always saw,
so that their outputs are computed once: n layers cost about n/2 forward passes, not n.

Layers are measured one by one. Those that stand in for one another are not seen: where two layers
copy, the conversion of either alone costs little. HALO (arXiv 2601.22156) chooses so, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowline.linearize.body.attention import LinearizedAttention
from lowline.linearize.convert import linearized_config
from lowline.linearize.evaluation.measure import Advance, losses_of
from lowline.linearize.evaluation.second_copy import SecondCopy
from lowline.linearize.layers import LayerCost
from lowline.linearize.layers import costliest as costliest
from lowline.linearize.mixers.options import mixer_options

WINDOW, SINKS = 64, 4  # of the stand-in for a mixer that has none
STRING = 32  # tokens, the shortest distance
POSITIONS = 128  # of a row, whose distributions are compared


def stand_in(mixer: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the mixer and options that layers are measured with: no parameter is to be learned.

    A memory is measured as its window alone, too: at these distances it keeps nearly everything,
    while the layers that copy over a few hundred tokens are those that find a fact among thousands.
    """
    chosen = mixer_options(mixer, options)
    window = getattr(chosen, "window", 0)
    sinks = getattr(chosen, "sinks", 0) if window else SINKS
    return "sink_window", {"window": window or WINDOW, "sinks": sinks}


def distances(window: int) -> tuple[int, int]:
    """Return how far a string is from its copy: beyond the window, and well beyond it."""
    return max(STRING, 2 * (window or WINDOW)), max(2 * STRING, 8 * (window or WINDOW))


@torch.no_grad()
def measure_layers(
    teacher: PreTrainedModel,
    *,
    mixer: str,
    options: Mapping[str, Any],
    copies: SecondCopy,
    rows_NT: torch.Tensor,
    advance: Advance,
) -> list[LayerCost]:
    """Return what the conversion of each layer costs.

    Args:
        teacher: with softmax attention in every layer; it is as it was afterwards.
        mixer, options: what a layer is converted to, see `stand_in`.
        copies: the strings and distances of recall.
        rows_NT: ids of text.
        advance: is told of tokens times layers, `work` of them.
    """
    body: Any = teacher.base_model
    layers = list(body.layers)
    config = linearized_config(teacher.config, mixer=mixer, options=options)
    batches: list[_Copies | _Text] = [_Copies(copies, d) for d in copies.distances]
    batches.append(_Text(rows_NT))
    tokens = sum(batch.ids_NT.numel() for batch in batches)
    hidden = [body.get_input_embeddings()(b.ids_NT.to(teacher.device)) for b in batches]
    costs: list[LayerCost] = []
    try:
        for batch, x_NTE in zip(batches, hidden, strict=True):
            batch.remember(teacher, _through(body, layers, range(len(layers)), x_NTE))
        advance(tokens * len(layers))
        for number, layer in enumerate(layers):
            softmax = layer.self_attn
            layer.self_attn = LinearizedAttention(
                softmax, config.build_mixer(number).to(teacher.device, teacher.dtype).eval()
            )
            try:
                *recall, kl = [
                    batch.cost(teacher, _through(body, layers, range(number, len(layers)), x_NTE))
                    for batch, x_NTE in zip(batches, hidden, strict=True)
                ]
            finally:
                layer.self_attn = softmax
            costs.append({"layer": number, "recall": sum(recall) / len(recall), "kl": kl})
            hidden = [_through(body, layers, range(number, number + 1), x) for x in hidden]
            advance(tokens * (len(layers) - number + 1))
    finally:
        body.layers = nn.ModuleList(layers)
    return costs


def work(tokens: int, n_layers: int) -> int:
    """Return the tokens times layers that `measure_layers` runs."""
    return tokens * (n_layers + n_layers * (n_layers + 3) // 2)


class _Skip(nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what came."""
        return hidden_states


def _through(
    body: Any, layers: Sequence[nn.Module], these: range, hidden_NTE: torch.Tensor
) -> torch.Tensor:
    """Return hidden states after some layers, before the norm at the end.

    The body itself runs them, with the masks and positions of its architecture.
    """
    found: list[torch.Tensor] = []
    body.layers = nn.ModuleList(
        layer if number in these else _Skip() for number, layer in enumerate(layers)
    )
    hook = layers[these[-1]].register_forward_hook(lambda module, given, out: found.append(out))
    try:
        body(inputs_embeds=hidden_NTE, use_cache=False)
    finally:
        hook.remove()
    return found[0]


class _Copies:
    """Strings that come twice."""

    def __init__(self, copies: SecondCopy, distance: int) -> None:
        self.ids_NT, self.n = copies.sequences(distance), copies.length - 1

    def _loss(self, teacher: Any, hidden_NTE: torch.Tensor) -> float:
        x = teacher.base_model.norm(hidden_NTE[:, -self.n - 1 : -1])
        losses = losses_of(teacher, x, self.ids_NT[:, -self.n :].to(x.device))
        return losses.double().mean().item()

    def remember(self, teacher: Any, hidden_NTE: torch.Tensor) -> None:
        self.before = self._loss(teacher, hidden_NTE)

    def cost(self, teacher: Any, hidden_NTE: torch.Tensor) -> float:
        return self._loss(teacher, hidden_NTE) - self.before


class _Text:
    """Rows of text, in whose second halves distributions are compared at some positions."""

    def __init__(self, rows_NT: torch.Tensor) -> None:
        self.ids_NT, length = rows_NT, rows_NT.shape[1]
        self.at = torch.arange(length // 2, length, max(1, length // 2 // POSITIONS))

    def _log_p(self, teacher: Any, hidden_NTE: torch.Tensor) -> torch.Tensor:
        x = teacher.base_model.norm(hidden_NTE[:, self.at.to(hidden_NTE.device)])
        return teacher.get_output_embeddings()(x).float().log_softmax(-1)

    def remember(self, teacher: Any, hidden_NTE: torch.Tensor) -> None:
        self.before = self._log_p(teacher, hidden_NTE)

    def cost(self, teacher: Any, hidden_NTE: torch.Tensor) -> float:
        after = self._log_p(teacher, hidden_NTE)
        kl = (self.before.exp() * (self.before - after)).sum(-1)
        return kl.double().mean().item()
