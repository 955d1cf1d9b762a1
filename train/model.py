"""torchtitan's own Llama from a [model] table, made low-rank by the converter of `lowline.cola`.

Rotary embedding is in Hugging Face's half-split convention throughout, so that weights go in and
out by renaming. Dense projections, the embedding and the output start at N(0, 0.02).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config.configs import CompileConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import (
    FlexAttention,
    GQAttention,
    QKVLinear,
    VarlenAttention,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import set_decoder_sharding_config
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.protocols.model_spec import ModelSpec

from lowline.cola.accounting import training_flops
from lowline.cola.titan import ColaBlock, ColaConverter, drawn_whole, set_cola_sharding
from lowline.train.attention import DocumentSDPA, document_mask
from lowline.train.config import ModelConfig, RopeScaling, RunConfig

INIT_STD = 0.02


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
    """torchtitan's Llama; builds the document mask where attention runs through SDPA."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Fit the model to the run: longest sequence, and the layout of tensor parallelism."""
            if not isinstance(self.layers[0], ColaBlock.Config):
                Llama3Model.Config.update_from_config(self, config=config, **kwargs)
                return
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            set_decoder_sharding_config(self, enable_sp=True)
            for layer in self.layers:
                set_cola_sharding(layer)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and FLOPs a token of forward + backward (`lowline.cola.accounting`)."""
            attention = self.layers[0].attention
            lookup = 0 if self.enable_weight_tying else self.vocab_size * self.dim
            flops = training_flops(
                matrix_parameters=sum(p.numel() for p in model.parameters() if p.ndim == 2)
                - lookup,
                n_layers=len(self.layers),
                query_width=attention.n_heads
                * (attention.head_dim or self.dim // attention.n_heads),
                seq_len=seq_len,
            )
            return sum(p.numel() for p in model.parameters()), flops

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Any = None,
    ) -> torch.Tensor:
        if (
            attention_masks is None
            and positions is not None
            and isinstance(self.config.layers[0].attention.inner_attention, DocumentSDPA.Config)
        ):
            attention_masks = document_mask(positions, next(self.parameters()).dtype)
        return super().forward(tokens, positions=positions, attention_masks=attention_masks)


def _normal() -> dict[str, Any]:
    return {"weight": drawn_whole(partial(nn.init.normal_, std=INIT_STD)), "bias": nn.init.zeros_}


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
    inner = {"sdpa": DocumentSDPA, "flex": FlexAttention, "varlen": VarlenAttention}
    backend = m.attention
    if backend == "auto":
        backend = "flex" if torch.cuda.is_available() else "sdpa"
    elif backend != "sdpa" and not torch.cuda.is_available():
        raise ValueError(f'model.attention = "{backend}" needs a GPU; "sdpa" or "auto" runs here')

    def linear(in_features: int, out_features: int) -> Linear.Config:
        return Linear.Config(
            in_features=in_features, out_features=out_features, param_init=_normal()
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
                    head_dim=m.per_head, wq=linear(m.dim, query), wkv=linear(m.dim, key_value)
                ),
                wo=linear(query, m.dim),
                qk_norm=norm(m.per_head) if m.qk_norm else None,
                inner_attention=inner[backend].Config(),
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
    )
    ranks = run.ranks()
    if any(ranks.values()) or m.mlp_activation != "silu":
        ColaConverter.Config(
            ranks=ranks,
            activation=run.cola.activation,
            bias=run.cola.bias,
            mlp_activation=m.mlp_activation,
            memory=run.cola.memory,
            grouped=run.cola.grouped,
        ).build().convert(config)
    return config


def build_model_spec(run: RunConfig) -> ModelSpec:
    """The model with the functions by which torchtitan lays it out over devices."""
    from lowline.train.hf import LlamaStateDictAdapter

    kind = "cola" if any(run.ranks().values()) else "dense"
    return ModelSpec(
        name="lowline",
        flavor=f"{kind}-d{run.model.dim}-l{run.model.n_layers}",
        model=build_model_config(run),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        post_optimizer_build_fn=None,
        state_dict_adapter=LlamaStateDictAdapter,
    )


def parallelize(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    compile_config: CompileConfig,
    ac_config: Any,
    dump_folder: str,
    **kwargs: Any,
) -> nn.Module:
    """torchtitan's layout, with a reduction that gloo knows (it has no pre-multiplied sum).

    One process in one precision has nothing to shard or cast: it goes without FSDP, which would
    copy every parameter and gradient all the same.
    """
    if parallel_dims.world_size == 1 and training.mixed_precision_param == "float32":
        if ac_config is not None:
            ac_config.build(dump_folder=dump_folder).apply(model)
        if compile_config.enable:
            apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
        return model
    model = parallelize_llama(
        model,
        parallel_dims=parallel_dims,
        training=training,
        compile_config=compile_config,
        ac_config=ac_config,
        dump_folder=dump_folder,
        **kwargs,
    )
    if not torch.accelerator.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def pipeline(model: nn.Module, **kwargs: Any) -> Any:
    """torchtitan's pipeline, with the step() that it expects added to torch 2.13's schedule."""
    schedule, parts, first, last = pipeline_llm(model, **kwargs)
    if "arg_mbs" not in inspect.signature(type(schedule).step).parameters:
        schedule.step = partial(_step_microbatches, schedule)
    return schedule, parts, first, last


def _step_microbatches(
    schedule: Any,
    *,
    arg_mbs: Any = None,
    kwarg_mbs: Any = None,
    target_mbs: Any = None,
    losses: Any = None,
    return_outputs: bool = False,
    loss_kwargs: Any = None,
) -> None:
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    n = schedule._n_microbatches
    schedule._step_microbatches(
        arg_mbs or [()] * n,
        kwarg_mbs or [{}] * n,
        target_mbs,
        losses,
        return_outputs,
        loss_kwargs=loss_kwargs,
    )
