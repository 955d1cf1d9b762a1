"""One token through a decoder of transformers on a CPU, in two C++ calls per block.

    q, k, v = P_qkv RMSNorm(x)        project
    o = attend(q, k, v)               torch, or a mixer
    x += P_o o;  x += MLP(RMSNorm(x)) finish

The same numbers as transformers' modules give, to fp32 rounding, without some twenty operators of
torch per block. Blocks are those of Llama, Mistral, Qwen2, Qwen3 and CoLA, with weights in fp32 or
int8 (`lowline.cola.int8`), low-rank ones with or without pivots. What it does not cover takes
transformers' way: gradients, several rows or tokens, padding, other dtypes, caches and activations,
hooks, adapters, variants that cross layers, attention weights or hidden states as outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from lowline.cola.int8 import Int8Linear
from lowline.cola.low_rank import LowRankLinear
from lowline.cola.pivoted import PivotedLinear
from lowline.kernels.backends import choose
from lowline.kernels.dense import rotate_token

Attend = Callable[..., torch.Tensor]
Projection = tuple[Any, ...]  # as dense.cpp takes it
CODES = {"identity": 0, "linear": 0, "silu": 1, "gelu": 2, "relu": 3}  # of activations
OUTPUTS = ("output_attentions", "output_hidden_states")


class Unsupported(Exception):  # noqa: N818
    """A module that the C++ calls do not cover."""


class Plan:
    """What the C++ calls take of each block; current while the modules are those it was made of."""

    def __init__(self, body: Any) -> None:
        self.modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self.weights: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self.act = CODES.get(body.config.hidden_act, -1)
        if (
            self.act < 0
            or choose("one token", "auto", torch.device("cpu"), module="dense") != "cpu"
        ):
            raise Unsupported
        self.blocks = [self._block(block) for block in body.layers]
        self.norm = self._norm(body.norm)
        for _, module in body.named_modules():
            self.modules += [
                (module._modules, n, m) for n, m in module._modules.items() if m is not None
            ]

    def _block(self, block: Any) -> tuple[Any, ...]:
        attention, mlp = block.self_attn, block.mlp
        first, second = (
            self._norm(block.input_layernorm),
            self._norm(block.post_attention_layernorm),
        )
        entries = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv, widths = tuple(map(self._projection, entries)), [m.out_features for m in entries]
        last = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        rest = (self._projection(attention.o_proj), *second, *map(self._projection, last), self.act)
        return attention, (*first, qkv), widths, rest

    def _norm(self, norm: Any) -> tuple[torch.Tensor, float]:
        return self._held(norm, "weight"), float(norm.variance_epsilon)

    def _projection(self, module: nn.Module) -> Projection:
        if type(module) is nn.Linear:
            bias = None if module.bias is None else self._held(module, "bias")
            return self._held(module, "weight"), None, bias
        if type(module) is Int8Linear:
            return module.q, module.scale, module.bias
        if type(module) is LowRankLinear and module.gate is None and not module.variant.crosses:
            return self._low_rank(module)
        if type(module) is PivotedLinear:
            return (*self._low_rank(module), self._held(module, "is_pivot"))
        raise Unsupported

    def _low_rank(self, layer: LowRankLinear) -> Projection:
        both = self._projection(layer.A) + self._projection(layer.B)
        return (*both, CODES[layer.activation])

    def _held(self, module: nn.Module, name: str) -> torch.Tensor:
        weight: Any = getattr(module, name)
        held: Any = module._buffers if name in module._buffers else module._parameters
        self.weights.append((held, name, weight))
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            raise Unsupported
        return weight

    def is_current(self) -> bool:
        """Return whether modules and weights are those of the plan, and nothing hooks into them."""
        return all(held.get(name) is weight for held, name, weight in self.weights) and all(
            held.get(name) is m and not (m._forward_hooks or m._forward_pre_hooks)
            for held, name, m in self.modules
        )


PLANS: WeakKeyDictionary[nn.Module, Plan | None] = WeakKeyDictionary()  # None: not covered


def one_token(
    body: Any,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    attend: Attend,
    layers: tuple[type, ...],
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return a body's last hidden state (1, 1, E) for one more token; None where it is not covered.

    Args:
        attend: called as `softmax` is.
        layers: the classes of cache layers that `attend` knows.
        kwargs: whatever else the body was called with.
    """
    cache = past_key_values
    if input_ids is None or input_ids.shape != (1, 1) or cache is None:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if body.training or input_ids.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    others = any(v is not None and v is not False for k, v in kwargs.items() if k != "use_cache")
    if others or any(getattr(body.config, name, False) for name in OUTPUTS):
        return None
    seen = cache.get_seq_length()
    if not seen or not all(type(layer) in layers for layer in cache.layers):
        return None
    if attention_mask is not None and not (
        isinstance(attention_mask, torch.Tensor) and attention_mask.shape == (1, seen + 1)
        and attention_mask.all()
    ):  # fmt: skip
        return None
    if body not in PLANS:
        try:
            PLANS[body] = Plan(body)
        except (Unsupported, AttributeError):  # another library's module in a block
            PLANS[body] = None
    plan, embedding = PLANS[body], body.embed_tokens.weight
    if plan is None or embedding.dtype != torch.float32 or embedding.device.type != "cpu":
        return None
    if not plan.is_current():
        del PLANS[body]
        return None
    from lowline.kernels.cpu import load

    call = load("dense")
    x = F.embedding(input_ids, embedding).flatten()
    positions = torch.tensor([[seen]]) if position_ids is None else position_ids
    rope = body.rotary_emb(x, positions)
    head_dim = rope[0].shape[-1]
    for attention, (norm, eps, qkv), widths, rest in plan.blocks:
        q, k, v = (x.new_empty(1, 1, width) for width in widths)
        h = x.new_empty(1, 1, len(x))
        call.project(x, norm, eps, qkv, (q, k, v), h)
        heads = (y.unflatten(-1, (-1, head_dim)) for y in (q, k, v))
        o = attend(attention, *heads, h, rope, cache)
        call.finish(o, x, *rest)
    call.project(x, *plan.norm, (), (), x)
    return x.view(1, 1, -1)


def softmax(
    attention: Any,
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGD: torch.Tensor,
    x_BTE: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
) -> torch.Tensor:
    """Return softmax attention to all tokens of the cache, and to this one, of (B, H, T, D)."""
    if getattr(attention, "q_norm", None) is not None:
        q_BTHD, k_BTGD = attention.q_norm(q_BTHD), attention.k_norm(k_BTGD)
    q, k = (rotate_token(x, *rope).transpose(1, 2) for x in (q_BTHD, k_BTGD))
    k, v = cache.update(k, v_BTGD.transpose(1, 2), attention.layer_idx)
    o: torch.Tensor = F.scaled_dot_product_attention(
        q, k, v, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.contiguous()
