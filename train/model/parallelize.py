"""How a run's model lies on its devices: torchtitan's FSDP and tensor parallelism, mixers apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.configs import CompileConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.llama3.parallelize import parallelize_llama

from lowline.linearize.mixers.base import Mixer


def parallelize(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    compile_config: CompileConfig,
    ac_config: Any,
    dump_folder: str,
    mixers_apart: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Lay a model out as torchtitan does, with a reduction that gloo knows.

    Gloo has no pre-multiplied sum.

    With `mixers_apart` FSDP gathers a mixer on its own, not with its block: where nothing else has
    a backward pass, the blocks' weights are gathered for the forward pass only. What does not train
    is stored in the compute precision. One process in one precision has nothing to shard or cast:
    it goes without FSDP, which would copy every parameter and gradient all the same.
    """
    if parallel_dims.world_size == 1 and training.mixed_precision_param == "float32":
        if ac_config is not None:
            ac_config.build(dump_folder=dump_folder).apply(model)
        if compile_config.enable:
            apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
        return model
    store_frozen(model, TORCH_DTYPE_MAP[training.mixed_precision_param])
    if mixers_apart:
        if parallel_dims.tp_enabled:  # which comes before FSDP
            model.parallelize(parallel_dims)  # type: ignore[operator]
        _shard_mixers(model, parallel_dims, training)
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


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store in `dtype` what does not train, except for mixers.

    FSDP casts a parameter to the compute precision whenever it gathers it, so a frozen one gives
    the same results when it is stored in that precision, in half the memory. FSDP takes both kinds
    in one group: it asks for one dtype only of those that train. What a mixer holds fixed is small
    and was made by a stage of the conversion (centroids), so it stays exact.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".mixer." not in name:
            parameter.data = parameter.data.to(dtype)


def _shard_mixers(model: nn.Module, parallel_dims: ParallelDims, training: TrainingConfig) -> None:
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    precision = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    previous = None
    for module in model.modules():
        if isinstance(module, Mixer):
            mixer = fully_shard(module, mesh=parallel_dims.get_mesh(names), mp_policy=precision)
            # FSDP's own choice is what ran before: the block, whose weights no backward pass needs
            # nor frees, so that the complete model was gathered. Itself stands for none.
            mixer.set_modules_to_backward_prefetch([previous or mixer])
            previous = mixer
