"""transformers' body with its states, keys and values in vLLM's pages.

    tokens of a step, end to end: (T,)  ->  hidden states (T, E)

A layer finds its state where it always finds it, in `past_key_values.layers[n]`. Here that is a
`PagedLayer`: pages of vLLM's cache, one for each request, on which the mixer works (`on_pool`).
Layers that stay softmax call vLLM's attention, which a transformers model does by the name of an
attention function. Everything else, projections, norms, low-rank layers and what crosses them, is
as it is everywhere.

vLLM is told that a state is one tensor of bytes of one size in all layers, so that layers with
different mixers share pages, and a page is copied by one call. Where all layers have mixers the
pages of a request lie side by side: they are one block of bytes, in which states of unequal sizes
lie one after the other. Where a layer stays softmax the pages lie as its attention wants them, and
have the size of the largest state.

Shapes: T tokens of a step, N requests, E features of the model, H, G and D as in
`lowline.linearize.mixers.base`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lowline.cola.hf import Crossing
from lowline.cola.variants import variant_of
from lowline.errors import LowlineError
from lowline.linearize.body.cache import MixerLayer, Tokens, state_layouts
from lowline.linearize.body.reach import Reach, placed
from lowline.linearize.mixers.base import Mixer
from lowline.linearize.mixers.state import StateLayout
from lowline.linearize.serving import BACKEND
from lowline.linearize.serving.checks import page_bytes
from lowline.linearize.serving.settings import refuse_settings

ATTENTION = "lowline_vllm"  # the name of vLLM's attention among transformers' functions


class PagedLayer(MixerLayer, MambaBase):
    """The states of one layer's mixer, in pages of vLLM's cache.

    Args:
        name: of the layer, by which vLLM hands out metadata.
        layout: of a state.
        size: bytes of a page.
        start: where the state begins in the block of all pages of a request; None: in its own page.
    """

    _layer_type = None  # type: ignore[assignment]  # transformers' caches still make a `MixerLayer`

    def __init__(self, name: str, layout: StateLayout, size: int, start: int | None) -> None:
        super().__init__()
        self.name, self.layout, self.size, self.start = name, layout, size, start
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        self.pool: Any = None

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """Return what vLLM allocates pages by; without softmax layers as large as they are."""
        spec: Any = super().get_kv_cache_spec(vllm_config)
        return spec if self.start is None else replace(spec, page_size_padded=None)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the pages that vLLM has allocated."""
        super().bind_kv_cache(kv_cache)
        (pages_NB,) = self.kv_cache
        if self.start is not None:
            block = pages_NB.stride(0)  # bytes: the pages of all layers
            assert block >= self.start + self.layout.page_bytes
            first = pages_NB.storage_offset() // block * block + self.start
            shape = (len(pages_NB), self.layout.page_bytes)
            pages_NB = pages_NB.as_strided(shape, (block, 1), first)
        self.pool = self.layout.views(pages_NB)

    def mix(self, mixer: Any, tokens: Tokens, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the mixer's output (1, T, H, D) for a step's tokens, and move their states."""
        by_layer: Any = get_forward_context().attn_metadata
        if by_layer is None:  # vLLM measures the memory that a step takes
            return tokens.mixed(mixer, None)[0]
        step = by_layer[self.name]
        D, P = step.num_decode_tokens, step.num_prefill_tokens
        o_1THD = torch.zeros_like(tokens.q)
        if D:
            rows_N = step.state_indices_tensor_d[:, 0]
            one_each = Tokens(*(t[0, :D, None] for t in tokens))
            o_1THD[0, :D] = self._on_pool(mixer, one_each, rows_N=rows_N)[:, 0]
        if P:
            o_1THD[:, D : D + P] = self._on_pool(
                mixer,
                tokens.span(D, D + P),
                rows_N=step.state_indices_tensor_p,
                fresh_N=~step.has_initial_states_p,  # pages keep what their last owner left
                cu_seqlens=step.query_start_loc_p.long(),
            )
        return o_1THD

    def _on_pool(self, mixer: Mixer, tokens: Tokens, **how: Any) -> torch.Tensor:
        q, k, v, x, *rope = tokens
        return mixer.on_pool(q, k, v, rope=tuple(rope), x_BTE=x, pool=self.pool, **how)  # type: ignore[arg-type]

    def update(self, n_tokens: int) -> None:  # type: ignore[override]
        """Do nothing: vLLM counts positions."""


class PagedCache:
    """What a body is given as `past_key_values`: the layers by their number."""

    def __init__(self, layers: list[PagedLayer | None]) -> None:
        self.layers = layers

    def update(self, key: Any, value: Any, *where: Any, **how: Any) -> tuple[Any, Any]:
        """Return a softmax layer's new keys and values, which vLLM's attention stores."""
        return key, value


def paged_attention(
    module: nn.Module, q_1HTD: Any, k_1GTD: Any, v_1GTD: Any, *mask: Any,
    attentions: nn.ModuleDict, **how: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return vLLM's attention, as an attention function of transformers."""
    T = q_1HTD.shape[2]
    q, k, v = (x[0].transpose(0, 1).reshape(T, -1) for x in (q_1HTD, k_1GTD, v_1GTD))
    layer: Any = attentions[str(module.layer_idx)]
    return layer(q, k, v).view(1, T, *q_1HTD.shape[1::2]), None


class ServedCoLA(nn.Module):
    """A causal language model of lowline's: vLLM's interface around transformers' body."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse_settings(vllm_config)
        config: Any = vllm_config.model_config.hf_config
        dtype = vllm_config.model_config.dtype
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        model.tie_weights()
        model.eval().requires_grad_(False)
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
        config._attn_implementation = ATTENTION
        self.config, self.model, self.lm_head = config, model.model, model.lm_head
        layouts = state_layouts(config, dtype) if hasattr(config, "mixers") else {}
        self.reach: Reach | None = (
            self.model.reach(vllm_config.model_config.max_model_len) if layouts else None
        )
        size = page_bytes(config, layouts)
        self.attentions = nn.ModuleDict()
        layers: list[PagedLayer | None] = []
        start = 0 if len(layouts) == config.num_hidden_layers else None
        for number in range(config.num_hidden_layers):
            name = f"{prefix}.".lstrip(".") + f"model.layers.{number}.self_attn"
            if number in layouts:
                layer = PagedLayer(name, layouts[number], size, start)
                start = None if start is None else start + layouts[number].page_bytes
                vllm_config.compilation_config.static_forward_context[name] = layer
                layers.append(layer)
            else:
                layers.append(None)
                attention = self._softmax(number, f"{name}.attn", vllm_config)
                self.attentions[str(number)] = attention
        self.cache = PagedCache(layers)

    def _softmax(self, number: int, name: str, vllm_config: VllmConfig) -> Attention:
        attention: Any = self.model.layers[number].self_attn
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        window = getattr(self.config, "softmax_window", lambda _: None)(number)
        return Attention(
            heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=window,
            prefix=name,
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (T, E) of tokens."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (T, E) of a step's tokens."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        x_1TE = x[None]
        reach = self.reach
        if reach is not None:
            reach = reach if bool((positions >= reach.length).any()) else None
        position_ids = placed(reach, positions[None], x_1TE, 0)
        how: dict[str, Any] = {
            "position_embeddings": self.model.rotary_emb(x_1TE, position_ids),
            "past_key_values": self.cache,
            "attentions": self.attentions,
            "reach": reach,
        }
        if variant_of(getattr(self.config, "variant", "cola")).crosses:
            how["crossing"] = Crossing()
        for layer in self.model.layers:
            x_1TE = layer(x_1TE, **how)
        return self.model.norm(x_1TE)[0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, which have the names of this model's."""
        ours = dict(self.named_parameters(remove_duplicate=False))
        tied = self.model.embed_tokens.weight is self.lm_head.weight
        missing = set(ours) - ({"lm_head.weight"} if tied else set())
        for name, weight in weights:
            if name not in ours:
                raise LowlineError(f"the checkpoint has a tensor {name!r}, which its model has not")
            if ours[name].shape != weight.shape:
                raise LowlineError(
                    f"{name!r} is {tuple(weight.shape)} in the checkpoint, its model has "
                    f"{tuple(ours[name].shape)}"
                )
            ours[name].copy_(weight)
            missing.discard(name)
        if missing:
            raise LowlineError(f"the checkpoint lacks {len(missing)} tensors, {min(missing)!r} ...")
        return set(ours)


class ServedLinearized(ServedCoLA, HasInnerState, IsHybrid):
    """A converted model. Hybrid for vLLM even without softmax layers: no other kind gets pages of
    states.
    """

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        model = vllm_config.model_config
        assert isinstance(model.dtype, torch.dtype)
        layouts = state_layouts(model.hf_config, model.dtype)
        return ((page_bytes(model.hf_config, layouts),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return (get_temporal_copy_spec,)
