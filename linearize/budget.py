"""How many tokens each key and value head needs, measured on a text without training.

For every head and every size, a window alone or a window and rows (`lowline.kernels.memory`),

    cost = ½ Σ_t (g_t · Δo_t)²

where Δo_t is the change of its attention output on the model's own q, k and v, and g_t the gradient
with respect to it of the loss of tokens that are drawn from the model's own predictions. That is
the second order of the KL divergence from the model (the empirical Fisher information), with the
errors of other positions and heads as independent. On strings that come a second time the loss is
that of the second copy, which few heads serve and running text does not show.

`allocate` gives every head a size so that the sum of costs is least at a total of bytes. That few
heads look far back is known from DuoAttention (arXiv 2410.10819) and Ada-KV (2407.11550); received
attention here is of the complete softmax, where the state's is of what it kept.

Shapes: T tokens, P of them scored, G key and value heads with h query heads each, D features,
S sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowline.errors import LowlineError
from lowline.kernels.memory.op import kept_of
from lowline.linearize.body.attention import LinearizedAttention
from lowline.linearize.body.hf import SOFTMAX
from lowline.linearize.convert import linearized_config
from lowline.linearize.mixers.base import HeadShape, Mixer, apply_rope
from lowline.linearize.mixers.options import MemoryOptions

QUERIES = 256  # whose scores are held at once
Size = tuple[int, int]
"""Window and rows."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokens, and which of their losses count.

    Args:
        ids: T of them.
        scored: positions t of which the next token's loss counts, in order.
        drawn: whether next tokens are drawn from the model instead of the text's.
        stride: errors are looked at every so many of the scored positions.
    """

    ids: torch.Tensor = field(repr=False)
    scored: torch.Tensor = field(repr=False)
    drawn: bool = True
    stride: int = 1


def sizes_up_to(tokens: int, window: int) -> list[Size]:
    """Return windows, and rows beside `window`, below all tokens: 2 and 3 times powers of 2."""
    numbers = [k * 2**n for n in range(3, 30) for k in (2, 3)]
    windows = [(w, 0) for w in numbers[2:] if w < tokens]
    return windows + [(window, e) for e in numbers if window + e < tokens]


def head_costs(model: Any, text: Text, sizes: list[Size], options: MemoryOptions) -> torch.Tensor:
    """Return the costs (L, G, S) of a model on a text; sinks, block and horizon as in `options`.

    Raises:
        LowlineError: a model whose attention has a window of its own.
    """
    with _recording(model) as recorders:
        _backward(model, text)
        at = text.scored[:: text.stride]
        costs = []
        for recorder in recorders:
            q, k, v, o = recorder.kept
            assert o.grad is not None
            costs.append(_layer_costs(q[0], k[0], v[0], o[0], o.grad[0], at, sizes, options))
            recorder.kept = ()
    return torch.stack(costs) * text.stride


def allocate(costs_NS: torch.Tensor, bytes_S: torch.Tensor, total: int) -> list[int]:
    """Return a size for each head, with the least sum of costs found at no more bytes in all.

    Raises:
        LowlineError: the smallest sizes are too large.
    """
    costs, size = costs_NS.double(), bytes_S.double()
    if len(costs) * int(size.min()) > total:
        raise LowlineError("so few bytes do not hold the smallest size of every head; give more")
    low, high = 0.0, (costs.max() + 1).item()  # prices of a byte
    best = size.argmin().expand(len(costs)).clone()
    for _ in range(60):
        price = (low + high) / 2
        chosen = (costs + price * size).argmin(-1)
        if size[chosen].sum() <= total:
            best, high = chosen, price
        else:
            low = price
    while True:  # what is left goes where a byte gains most
        more = size - size[best][:, None]
        gain = (costs.gather(1, best[:, None]) - costs) / more
        gain[(more <= 0) | (more > total - size[best].sum())] = 0
        if gain.max() <= 0:
            return best.tolist()
        head, chosen_size = divmod(int(gain.argmax()), len(size))
        best[head] = chosen_size


def budget_text(chosen: list[int], sizes: list[Size], n_kv_heads: int) -> str:
    """Return the option `budget` of the mixer `memory`."""
    heads = [str(w) if not e else f"{w}+{e}" for w, e in (sizes[n] for n in chosen)]
    layers = [heads[n : n + n_kv_heads] for n in range(0, len(heads), n_kv_heads)]
    return "; ".join(", ".join(layer) for layer in layers)


# ------------------------------------------------------------------------------- the model's pass


class _Recorder(Mixer):
    """Softmax attention over everything; keeps q, k, v and its output."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.kept: tuple[torch.Tensor, ...] = ()

    def forward(
        self, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, **how: Any
    ) -> tuple[torch.Tensor, None]:
        q, k = (apply_rope(x, how["rope"]).transpose(1, 2) for x in (q_BTHD, k_BTGD))
        v = v_BTGD.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        o.retain_grad()
        self.kept = (q.detach(), k.detach(), v.detach(), o)
        return o.transpose(1, 2), None


@contextmanager
def _recording(model: Any) -> Iterator[list[_Recorder]]:
    """Put recorders into every layer, and leave no parameter a gradient, for a while."""
    config = linearized_config(model.config, mixer=SOFTMAX, layers="none")
    layers = model.base_model.layers
    if any(config.softmax_window(n) for n in range(len(layers))):
        raise LowlineError("the model's attention has a window of its own; its budget is known")
    before = [layer.self_attn for layer in layers]
    trains = [p for p in model.parameters() if p.requires_grad]
    recorders = [_Recorder(config.head_shape(n)) for n in range(len(layers))]
    try:
        for parameter in trains:
            parameter.requires_grad_(False)
        for layer, attention, recorder in zip(layers, before, recorders, strict=True):
            layer.self_attn = LinearizedAttention(attention, recorder)
        yield recorders
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
        for layer, attention in zip(layers, before, strict=True):
            layer.self_attn = attention


def _backward(model: Any, text: Text) -> None:
    """Run the text, and its loss's gradient back to every layer's attention output."""
    ids_1T, head = text.ids[None].to(model.device), model.get_output_embeddings()
    embedded = model.get_input_embeddings()(ids_1T).requires_grad_()
    hidden_TE = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    grad_TE = torch.zeros_like(hidden_TE)
    generator = torch.Generator().manual_seed(0)
    for at in text.scored.split(QUERIES):
        hidden = hidden_TE.detach()[at].requires_grad_()
        log_p = head(hidden).float().log_softmax(-1)
        following = ids_1T[0, at + 1]
        if text.drawn:
            p = log_p.detach().exp().cpu()
            following = torch.multinomial(p, 1, generator=generator)[:, 0].to(hidden.device)
        nn.functional.nll_loss(log_p, following, reduction="sum").backward()
        assert hidden.grad is not None
        grad_TE[at] = hidden.grad
    hidden_TE.backward(grad_TE)


# -------------------------------------------------------------------------------- costs of a layer


@torch.no_grad()
def _layer_costs(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTD: torch.Tensor,
    o_HTD: torch.Tensor,
    grad_HTD: torch.Tensor,
    at_P: torch.Tensor,
    sizes: list[Size],
    options: MemoryOptions,
) -> torch.Tensor:
    """Return ½ Σ (g · Δo)² over the positions `at`, (G, S).

    With `options.merged` all that rows dropped is in one mean.
    """
    (G, T, _), device = k_GTD.shape, q_HTD.device
    at_P = at_P.to(device)
    q = (q_HTD * q_HTD.shape[-1] ** -0.5).unflatten(0, (G, -1))
    received, p_GhPT, log_z_GhP = _weights(q, k_GTD, at_P, options)
    o, grad, q = (x.unflatten(0, (G, -1))[:, :, at_P] for x in (o_HTD, grad_HTD, q.flatten(0, 1)))
    column = torch.arange(T, device=device)
    causal = column <= at_P[:, None]
    costs = torch.zeros(G, len(sizes), device=device)
    kept = _kept(received, at_P, sizes, options)
    for n, (window, rows) in enumerate(sizes):
        last = at_P[:, None]
        if rows:  # the tokens of a block leave together
            last = last // options.block * options.block + options.block - 1
        seen_GPT = (((column > last - window) | (column < options.sinks)) & causal)[None]
        if rows:
            seen_GPT = seen_GPT | kept[n] & causal
        p = p_GhPT * seen_GPT[:, None]
        y, total = p @ v_GTD[:, None], p.sum(-1, keepdim=True)
        if rows and options.merged:
            gone = (causal & ~seen_GPT).to(p.dtype)
            n_GP1 = gone.sum(-1, keepdim=True)
            mean_k, mean_v = (gone @ x / n_GP1.clamp(min=1) for x in (k_GTD, v_GTD))
            bias = n_GP1.log() + options.bias * (n_GP1 > 1)
            score = (q * mean_k[:, None]).sum(-1, keepdim=True) + bias[:, None]
            share = (score - log_z_GhP[..., None]).exp()
            y, total = y + share * mean_v[:, None], total + share
        change = y / total - o
        costs[:, n] = (grad * change).sum((1, 3)).square().sum(-1) / 2
    return costs


def _weights(
    q_GhTD: torch.Tensor, k_GTD: torch.Tensor, at_P: torch.Tensor, options: MemoryOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the attention received in each block of queries, (G, blocks, T), faded to the block's
    end, and of the queries `at` the weights, (G, h, P, T), and the logarithms of their sums before
    they were normalized, (G, h, P).
    """
    T, block = q_GhTD.shape[2], options.block
    fade = kept_of(options.horizon)
    fades = fade ** torch.arange(block - 1, -1, -1.0, device=q_GhTD.device)
    received, chosen, log_z = [], [], []
    step = QUERIES // block * block or block
    for start in range(0, T, step):
        stop = min(start + step, T)
        scores = q_GhTD[:, :, start:stop] @ k_GTD[:, None, :stop].mT
        t = torch.arange(start, stop, device=q_GhTD.device)[:, None]
        later = torch.arange(stop, device=q_GhTD.device) > t
        scores = scores.masked_fill(later, -torch.inf)
        here = at_P[(at_P >= start) & (at_P < stop)] - start
        log_z.append(scores[:, :, here].logsumexp(-1))
        p = F.pad(scores.softmax(-1), (0, T - stop))
        chosen.append(p[:, :, here])
        got = F.pad(p.sum(1), (0, 0, 0, -(stop - start) % block)).unflatten(1, (-1, block))
        received.append((got * fades[:, None]).sum(2))
    return torch.cat(received, 1), torch.cat(chosen, 2), torch.cat(log_z, 2)


def _kept(
    received_GbT: torch.Tensor, at_P: torch.Tensor, sizes: list[Size], options: MemoryOptions
) -> dict[int, torch.Tensor]:
    """Return by size with rows which tokens its rows hold at the positions `at`: (G, P, T)."""
    G, blocks, T = received_GbT.shape
    fade = kept_of(options.horizon) ** options.block
    with_rows = {n: size for n, size in enumerate(sizes) if size[1]}
    held = {n: received_GbT.new_zeros(G, T, dtype=torch.bool) for n in with_rows}
    found = {n: held[n].new_zeros(G, len(at_P), T) for n in with_rows}
    total_GT = received_GbT.new_zeros(G, T)
    for block in range(blocks):
        start = block * options.block
        here = at_P // options.block == block
        for n, (window, rows) in with_rows.items():
            end = max(start + options.block - window, 0)
            held[n][:, max(end - options.block, options.sinks) : end] = True
            if end - options.sinks > rows:
                rank = total_GT.masked_fill(~held[n], -1)
                top = rank.topk(rows - options.merged, -1).indices
                held[n] = torch.zeros_like(held[n]).scatter_(1, top, True) & held[n]
            found[n][:, here] = held[n][:, None]
        total_GT = fade * total_GT + received_GbT[:, block]
    return found
