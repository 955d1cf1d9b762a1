"""An attention layer of `transformers` with a mixer where softmax attention stood.

    o = W_o · mixer(W_q x, W_k x, W_v x)

Projections, and norms of q and k where the architecture has them, are the layer's own, under their
own names; what the mixer gets is described in `lowline.linearize.mixers.base`. Padding and packed
documents are dealt with here (`lowline.linearize.body.packing`), and so is the state between calls.

Left out: dropout of attention weights, and attention weights as an output: there are none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Cache

from lowline.cola.one_token import softmax
from lowline.linearize.body.cache import LinearizedCache, MixerLayer, Tokens
from lowline.linearize.body.packing import Packing
from lowline.linearize.body.reach import Reach, within
from lowline.linearize.mixers.base import Mixer


class LinearizedAttention(nn.Module):
    """An attention layer with a mixer in the place of softmax(q·k)·v.

    Args:
        attention: the layer it stands in for, of which it takes the projections and norms.
        mixer: see `lowline.linearize.mixers.base`.
    """

    def __init__(self, attention: Any, mixer: Mixer) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.mixer = mixer

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: LinearizedCache | None = None,
        packing: Packing | None = None,
        reach: Reach | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, T, E) to (B, T, E). A mask that comes along is for the softmax layers."""
        x_BTE, rope = hidden_states, position_embeddings
        if packing is not None:
            x_BTE, rope = packing.pack(x_BTE), (packing.pack(rope[0]), packing.pack(rope[1]))
        q_BTHD, k_BTGD, v_BTGD = self.project(x_BTE)
        precision: AbstractContextManager[Any] = nullcontext()
        device = x_BTE.device.type
        if torch.is_autocast_enabled(device):
            # Kernels multiply in autocast's type, on tensor cores. Gates are computed from x in the
            # mixer's own type, and sums inside the kernels are fp32: autocast must not lower those.
            dtype = torch.get_autocast_dtype(device)
            q_BTHD, k_BTGD, v_BTGD = (x.to(dtype) for x in (q_BTHD, k_BTGD, v_BTGD))
            x_BTE = x_BTE.to(next((p.dtype for p in self.mixer.parameters()), x_BTE.dtype))
            precision = torch.autocast(device, enabled=False)
        held = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        assert held is None or isinstance(held, MixerLayer)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        cos, sin = (t.expand(x_BTE.shape[0], -1, -1) for t in rope)
        with precision:
            tokens = Tokens(q_BTHD, k_BTGD, v_BTGD, x_BTE, cos, sin)
            mixer = within(reach, self.mixer)
            if held is None:
                o_BTHD, _ = tokens.mixed(mixer, None, cu_seqlens)
            else:
                o_BTHD = held.mix(mixer, tokens, cu_seqlens)
                held.update(hidden_states.shape[1])
        o_BTE = self.o_proj(o_BTHD.flatten(2))
        return (o_BTE if packing is None else packing.unpack(o_BTE)), None

    def project(self, x_BTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q of (B, T, H, D), k and v of (B, T, G, D): normalised, before the rotary embedding."""
        q, k, v = (
            projection(x_BTE).unflatten(-1, (-1, self.mixer.shape.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return *self._normalised(q, k), v

    def _normalised(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        *rest: torch.Tensor,
        cache: Cache,
        reach: Reach | None = None,
    ) -> torch.Tensor:
        """Return the mixer's output for one token from its projections, v, x, cos and sin."""
        held = cache.layers[self.layer_idx]
        assert isinstance(held, MixerLayer)
        tokens = Tokens(*self._normalised(q, k), *rest)
        o_BTHD = held.mix(within(reach, self.mixer), tokens, None)
        held.update(1)
        return o_BTHD


def attend_token(
    attention: Any,
    q: Any,
    k: Any,
    v: Any,
    x: Any,
    rope: Any,
    cache: Any,
    reach: Reach | None = None,
) -> torch.Tensor:
    """Return the output of a layer's mixer or attention (`lowline.cola.one_token`)."""
    if isinstance(attention, LinearizedAttention):
        return attention.step(q, k, v, x, *rope, cache=cache, reach=reach).contiguous()
    return softmax(attention, q, k, v, x, rope, cache)
