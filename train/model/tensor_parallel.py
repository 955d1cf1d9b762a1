"""How each layer of the training body is split by tensor parallelism.

Between layers a rank holds a part of the sequence. q, k, v, gate and up are split by output
feature, o and down by input feature, and what they make is summed into parts of the sequence
(Megatron, arXiv 1909.08053; 2205.05198). A CoLA block is split along its bottlenecks
(`lowline.cola.parallel.set_cola_sharding`), LoRA's factors as the projections that they adapt
(torchtitan), and mixers by their heads (`lowline.linearize.titan.split_heads`).
"""

from __future__ import annotations

from typing import Any

import spmd_types as spmd
from torchtitan.models.common.attention import QKVLinear
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    rowwise_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.protocols.sharding import ShardingConfig

from lowline.cola.block import ColaBlock
from lowline.cola.parallel import set_cola_sharding


def set_sharding(model: Any) -> None:
    """Say in a model's configuration how it is split; nothing is where no rank splits it."""
    set_decoder_sharding_config(model, enable_sp=True)
    for layer in model.layers:
        if isinstance(layer, ColaBlock.Config):
            set_cola_sharding(layer)
        else:
            _set_dense_sharding(layer)


def _set_dense_sharding(block: Llama3TransformerBlock.Config) -> None:
    """As torchtitan's Llama, but k and v may have a configuration each, and q and k a norm."""
    part, whole = dense_sequence_parallel_placement(), dense_activation_placement(tp=spmd.R)
    block.attention_norm.sharding_config = block.ffn_norm.sharding_config = norm_config(
        enable_sp=True
    )
    attention, qkv = block.attention, block.attention.qkv_linear
    attention.sharding_config = ShardingConfig(
        in_src_shardings={"x_BLD": part}, in_dst_shardings={"x_BLD": whole}
    )
    attention.rope.sharding_config = ShardingConfig(
        state_shardings={"cache": dense_param_placement(tp=spmd.R)}
    )
    names = ("wq", "wkv") if isinstance(qkv, QKVLinear.Config) else ("wq", "wk", "wv")
    for name in names:
        getattr(qkv, name).sharding_config = colwise_config()
    attention.wo.sharding_config = rowwise_config(output_sp=True)
    if attention.qk_norm is not None:
        heads = dense_activation_placement(tp=spmd.S(2))
        attention.qk_norm.sharding_config = ShardingConfig(
            state_shardings={"weight": dense_param_placement(tp=spmd.R)},
            in_src_shardings={"input": heads},
            out_src_shardings=heads,
        )
    set_gqa_inner_attention_local_map(attention.inner_attention)
    assert block.feed_forward is not None
    set_dense_ffn_sharding(block.feed_forward, attn_x_layout=part, enable_sp=True)
