"""Tensor parallelism of CoLA's block: which rank holds what, and what ranks send each other."""

from __future__ import annotations

from dataclasses import replace

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    rowwise_config,
    set_gqa_inner_attention_local_map,
)
from torchtitan.protocols.sharding import ShardingConfig

from lowline.cola.block import ColaBlock, TitanLowRankLinear


def set_cola_sharding(block: ColaBlock.Config) -> None:
    """Set tensor parallelism along the bottleneck, with sequence parallelism between the pieces.

    Outside the pieces a rank holds a part of the sequence, and what the block keeps, x, h and every
    z, is that part. A of q, k, v, gate, up and σ run on it; σ(z) is gathered to the full sequence
    and B is split by output feature. A of o and down is split by input feature; its partial sums
    are reduced to a part of the sequence *before* σ, and B runs on that part. So everything sent is
    r wide, 7r elements per token and direction where the dense block sends 4d (BOOST, 2512.12131);
    CoLA-M gathers 5r once more in the backward pass.
    """
    part, whole = dense_sequence_parallel_placement(), dense_activation_placement(tp=spmd.R)
    gathered = replace(
        colwise_config(), in_src_shardings={"input": part}, in_dst_shardings={"input": whole}
    )
    on_part = ShardingConfig(in_src_shardings={"input": part}, out_src_shardings=part)
    replicated = {n: dense_param_placement(tp=spmd.R) for n in ("weight", "bias")}
    norm = norm_config(enable_sp=True)
    block.attention_norm.sharding_config = norm
    block.ffn_norm.sharding_config = norm
    attention, mlp = block.attention, block.feed_forward
    assert mlp is not None
    qkv = attention.qkv_linear
    for linear in (qkv.wq, qkv.wk, qkv.wv, mlp.w1, mlp.w3):
        if isinstance(linear, TitanLowRankLinear.Config):
            linear.A.sharding_config = replace(on_part, state_shardings=replicated)
            linear.B.sharding_config = gathered
        else:
            linear.sharding_config = gathered
    for linear in (attention.wo, mlp.w2):
        if isinstance(linear, TitanLowRankLinear.Config):
            linear.A.sharding_config = rowwise_config(output_sp=True)
            linear.B.sharding_config = replace(on_part, state_shardings=replicated)
        else:
            linear.sharding_config = rowwise_config(output_sp=True)
    for entry in (block.qkv_entry, block.mlp_entry):
        if entry is not None:
            entry.sharding_config = on_part
    attention.rope.sharding_config = ShardingConfig(
        state_shardings={"cache": dense_param_placement(tp=spmd.R)}
    )
    if attention.qk_norm is not None:
        heads = dense_activation_placement(tp=spmd.S(2))
        attention.qk_norm.sharding_config = ShardingConfig(
            state_shardings=replicated, in_src_shardings={"input": heads}, out_src_shardings=heads
        )
    set_gqa_inner_attention_local_map(attention.inner_attention)
