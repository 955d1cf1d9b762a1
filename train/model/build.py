"""torchtitan's own Llama from a [model] table, changed by converters as the other tables ask.

`lowline.cola` makes its projections low-rank, `lowline.linearize` puts mixers where attention stood
and torchtitan adds LoRA, in this order. Rotary embedding is in Hugging Face's half-split convention
throughout, so that weights go in and out by renaming. Dense projections, the embedding and the
output start at N(0, 0.02).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from torchtitan.distributed import ParallelDims
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import GQAttention, QKVLinear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

from lowline.cola.accounting import training_flops
from lowline.cola.block import ColaConverter
from lowline.cola.projections import ATTENTION, PROJECTIONS, ProjectionName
from lowline.cola.sharded import init_unsharded
from lowline.linearize.mixers.base import Mixer
from lowline.linearize.titan import (
    MixerAttention,
    MixerConverter,
    MixerInputs,
    Transfer,
    document_bounds,
)
from lowline.train.config.run import ModelConfig, RopeScaling, RunConfig
from lowline.train.model.attention import Bounds, DocumentSDPA, document_mask, inner_attention
from lowline.train.model.lora import add_lora, init_factors_unsharded
from lowline.train.model.tensor_parallel import set_sharding

INIT_STD = 0.02
Trainable = Literal["all", "mixers", "attention"]


class RoPE(CosSinRoPE):
    """torchtitan's half-split rotary embedding with Llama 3.1's frequency scaling added."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    def _precompute_cache(self) -> torch.Tensor:
        c = self.config
        if c.scaling != "llama":
            return super()._precompute_cache()
        frequency = c.theta ** -(torch.arange(0, c.dim, 2).float() / c.dim)
        # Llama 3.1: divide the low frequencies by the factor, keep the high ones, blend between.
        turns = c.original_max_position_embeddings * frequency / (2 * torch.pi)
        blend = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequency = frequency * (blend + (1 - blend) / c.scaling_factor)
        angle = torch.outer(torch.arange(c.max_seq_len).float(), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Llama(Llama3Model):
    """torchtitan's Llama; tells each layer what it must know of documents that share a row."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        trainable: Trainable = "all"
        frozen: tuple[ProjectionName, ...] = ()
        kept: tuple[int, int] | None = None  # first and last layer that there are, alone

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Fit the model to the run: longest sequence, and the layout of tensor parallelism."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            if config.parallelism.tensor_parallel_degree > 1:
                set_sharding(self)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Return the parameters, and the FLOPs per token of forward + backward
            (`lowline.cola.accounting`).
            """
            attention = self.layers[0].attention
            looked_up = model.tok_embeddings is not None and not self.enable_weight_tying
            lookup = self.vocab_size * self.dim if looked_up else 0
            flops = training_flops(
                matrix_parameters=sum(p.numel() for p in model.parameters() if p.ndim == 2)
                - lookup,
                n_layers=len(self.layers),
                query_width=attention.n_heads
                * (attention.head_dim or self.dim // attention.n_heads),
                seq_len=seq_len,
            )
            return sum(p.numel() for p in model.parameters()), flops

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.kept is not None:
            self._keep(*config.kept)
        freeze(self, config.trainable, config.frozen)
        init_factors_unsharded(self)

    def _keep(self, first: int, last: int) -> None:
        for name in list(self.layers):
            if not first <= int(name) <= last:
                del self.layers[name]
        self.tok_embeddings = self.norm = self.lm_head = None

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Split the model over tensor-parallel ranks, unless that was done."""
        if not self._parallelized:
            super().parallelize(parallel_dims)

    def verify_module_protocol(self) -> None:
        """Do nothing: mixers are plain modules, which `MixerAttention` initializes."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Any = None,
        transfer: Transfer | None = None,
    ) -> torch.Tensor:
        """Map token ids (B, L) to logits (B, L, V); of some layers alone, their input to their
        output.

        Args:
            positions: (B, L), 0 where a document starts.
            attention_masks: of Flex and Varlen attention; SDPA's are made here.
            transfer: let mixers learn from softmax attention, whose output is passed on.
        """
        mixed = [isinstance(c.attention, MixerAttention.Config) for c in self.config.layers]
        bounds = None
        if positions is not None and any(mixed):
            bounds = document_bounds(positions)
        sdpa = isinstance(self.config.first_attention.inner_attention, DocumentSDPA.Config)
        if sdpa and attention_masks is None and positions is not None:
            if transfer is not None:
                attention_masks = None if bounds is None else Bounds.of(bounds)
            elif not all(mixed):
                attention_masks = document_mask(positions, next(self.parameters()).dtype)
        inputs = MixerInputs(bounds, attention_masks, transfer)
        h = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        carried: list[Any] = []  # what a variant's layers hand on beside h
        for name, layer in self.layers.items():  # a pipeline stage or a block has some of them
            h = layer(h, inputs if mixed[int(name)] else attention_masks, positions, *carried)
            h, *carried = h if isinstance(h, tuple) else (h,)
        h = h if self.norm is None else self.norm(h)
        return h if self._skip_lm_head or self.lm_head is None else self.lm_head(h)


def freeze(model: nn.Module, trainable: Trainable, frozen: tuple[ProjectionName, ...] = ()) -> None:
    """Let only the named part of the model train, without the projections `frozen`, and LoRA's
    factors where there are any.
    """
    path = {name: f".{projection.titan}." for name, projection in PROJECTIONS.items()}
    attention = [path[name] for name in ATTENTION]
    parts = {"all": [""], "mixers": [".mixer."], "attention": [".mixer.", *attention]}
    for name, parameter in model.named_parameters():
        held = any(path[projection] in name for projection in frozen)
        if ".lora_" not in name and (held or not any(p in name for p in parts[trainable])):
            parameter.requires_grad_(False)
    for module in model.modules():
        for name in module.fixed if isinstance(module, Mixer) else ():
            module.get_parameter(name).requires_grad_(False)


def _normal() -> dict[str, Any]:
    return {
        "weight": init_unsharded(partial(nn.init.normal_, std=INIT_STD)),
        "bias": nn.init.zeros_,
    }


def _rope(model: ModelConfig, max_seq_len: int) -> RoPE.Config:
    rope = RoPE.Config(dim=model.per_head, max_seq_len=max_seq_len, theta=model.rope_theta)
    scaling = model.rope_scaling
    if scaling is None:
        return rope
    assert isinstance(scaling, RopeScaling)
    if scaling.kind == "llama3":
        rope.scaling = "llama"
        rope.scaling_factor = scaling.factor
        rope.low_freq_factor = scaling.low_freq_factor
        rope.high_freq_factor = scaling.high_freq_factor
        rope.original_max_position_embeddings = scaling.original_max_seq_len
    else:
        rope.scaling = "yarn"
        rope.rope_factor = scaling.factor
        rope.beta_fast, rope.beta_slow = scaling.beta_fast, scaling.beta_slow
        rope.original_seq_len = scaling.original_max_seq_len
    return rope


def build_model_config(run: RunConfig) -> Llama.Config:
    """torchtitan's configuration of the model that a run trains."""
    m = run.model
    attention = inner_attention(m.attention, gpu=torch.cuda.is_available())

    def linear(in_features: int, out_features: int, bias: bool = False) -> Linear.Config:
        return Linear.Config(
            in_features=in_features, out_features=out_features, bias=bias, param_init=_normal()
        )

    def norm(width: int = m.dim) -> RMSNorm.Config:
        return RMSNorm.Config(
            normalized_shape=width, eps=m.norm_eps, param_init={"weight": nn.init.ones_}
        )

    query, key_value = m.n_heads * m.per_head, m.kv_heads * m.per_head
    max_seq_len = m.max_seq_len or run.training.seq_len

    def block() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=GQAttention.Config(
                dim=m.dim,
                n_heads=m.n_heads,
                n_kv_heads=m.kv_heads,
                head_dim=m.per_head,
                qkv_linear=QKVLinear.Config(
                    head_dim=m.per_head,
                    wq=linear(m.dim, query, m.qkv_bias),
                    wkv=linear(m.dim, key_value, m.qkv_bias),
                ),
                wo=linear(query, m.dim),
                qk_norm=norm(m.per_head) if m.qk_norm else None,
                inner_attention=copy.copy(attention),
                rope=_rope(m, max_seq_len),
            ),
            feed_forward=FeedForward.Config(
                w1=linear(m.dim, m.ffn_dim),
                w3=linear(m.dim, m.ffn_dim),
                w2=linear(m.ffn_dim, m.dim),
            ),
        )

    config = Llama.Config(
        dim=m.dim,
        vocab_size=m.vocab_size,
        enable_weight_tying=m.tie_embeddings,
        tok_embeddings=Embedding.Config(
            num_embeddings=m.vocab_size,
            embedding_dim=m.dim,
            param_init={"weight": lambda weight: None} if m.tie_embeddings else _normal(),
        ),
        norm=norm(),
        lm_head=linear(m.dim, m.vocab_size),
        layers=[block() for _ in range(m.n_layers)],
        trainable=run.trainable(),
        frozen=tuple(run.objective.frozen),
    )
    ranks = run.ranks()
    if any(ranks.values()) or m.mlp_activation != "silu":
        ColaConverter.Config(
            ranks=ranks,
            activation=run.cola.sigma,
            bias=run.cola.bias,
            init=run.cola.init,
            variant=run.cola.variant,
            mlp_activation=m.mlp_activation,
            memory=run.cola.memory,
            grouped=run.cola.grouped,
        ).build().convert(config)
    if run.mixer is not None:
        MixerConverter.Config(
            mixer=run.mixer.name, options=run.mixer.options, layers=sorted(run.mixer_layers())
        ).build().convert(config)
    if run.lora is not None:
        converted = add_lora(config, run.lora)
        assert isinstance(converted, Llama.Config)
        return converted
    if run.block is not None:
        keep_layers(config, run.layers())
    return config


def keep_layers(config: Llama.Config, layers: range) -> None:
    """Let a model have these layers alone, under their names, without embeddings and output."""
    config.kept, config.enable_weight_tying = (layers[0], layers[-1]), False
