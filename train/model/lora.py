"""Low-rank adapters beside frozen weights: into the model, merged, and out in PEFT's format.

    W' = W + (alpha / rank) · B·A        (LoRA, arXiv 2106.09685, section 4.1)

The layers are torchtitan's. A checkpoint of a run with adapters holds W, A (`.lora_a`) and B
(`.lora_b`); whoever takes the model on, by export or as another run's initial weights, gets W'.

Left out: adapters of low-rank projections, dropout, several adapters at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.attention import QKVLinear
from torchtitan.protocols.module import Module

from lowline.cola.block import ColaQKVLinear
from lowline.cola.projections import PROJECTIONS
from lowline.cola.sharded import init_unsharded
from lowline.train.config.load import load_config
from lowline.train.config.run import LoraConfig
from lowline.train.model.names import to_hf_name
from lowline.train.model.step_folder import StepReader, load

_A, _B = ".lora_a.weight", ".lora_b.weight"

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A of (rank, in) and B of (out, rank) by the name of the weight they adapt."""


def add_lora(model: Module.Config, lora: LoraConfig) -> Module.Config:
    """Return the configuration of a model with adapters beside the named projections."""
    for layer in model.layers:  # type: ignore[attr-defined]
        qkv = layer.attention.qkv_linear
        if isinstance(qkv, QKVLinear.Config):  # it has one configuration for k and v
            layer.attention.qkv_linear = ColaQKVLinear.Config(
                head_dim=qkv.head_dim, wq=qkv.wq, wk=qkv.wkv, wv=_copy(qkv.wkv)
            )
    targets = [PROJECTIONS[name].titan_leaf for name in lora.projections]
    how = LoRAConverter.Config(rank=lora.rank, alpha=lora.alpha, target_modules=targets)
    return how.build().convert(model)


def _copy(config: Module.Config) -> Module.Config:
    return type(config)(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})


def init_factors_unsharded(model: nn.Module) -> None:
    """Let A begin alike however it is sharded; torchtitan draws it shard by shard."""
    for name, module in model.named_modules():
        if name.endswith(".lora_a"):
            assert isinstance(module, Module) and module._param_init is not None
            module._param_init = {"weight": init_unsharded(module._param_init["weight"])}


def is_lora(name: str) -> bool:
    """Return whether a parameter of the training body is one of an adapter's factors."""
    return name.endswith((_A, _B))


def factor_names(name: str) -> tuple[str, str]:
    """Return the names that A and B have where they adapt the weight of that name."""
    module = name.removesuffix(".weight")
    return module + _A, module + _B


def merged(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, lora: LoraConfig
) -> torch.Tensor:
    """Return W + (alpha / rank) · B·A in fp32, on W's device and sharded as it is."""
    change = ((lora.alpha / lora.rank) * (B @ A)).to(weight.device)
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        change = distribute_tensor(change, mesh, placements, src_data_rank=None)
    return weight + change


def stored_factors(step_folder: Path) -> Factors:
    """Return the adapters in a run's step folder, unsharded, on the CPU; none without [lora]."""
    reader = StepReader(step_folder)
    stored = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(stored[name].size) for name in stored if is_lora(name)}  # type: ignore[union-attr]
    if found:
        load(found, reader, no_dist=True)
    adapted = [name.removesuffix(_A) for name in found if name.endswith(_A)]
    return {f"{name}.weight": (found[name + _A], found[name + _B]) for name in adapted}


def merge_stored_lora(weights: Mapping[str, torch.Tensor], step_folder: Path) -> None:
    """Add a step folder's adapters to those of its weights, sharded or not, in place."""
    if not (factors := stored_factors(step_folder)):
        return
    lora = load_config(step_folder / "config.toml").lora
    assert lora is not None
    for name in sorted(weights.keys() & factors.keys()):
        weight = weights[name]
        weight.copy_(merged(weight, *factors[name], lora))  # which may round, once


def save_adapter(folder: Path, factors: Factors, lora: LoraConfig, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads on `base`.

    Args:
        folder: the directory to make.
        factors: `stored_factors` of the run.
        base: the model that is adapted, as `from_pretrained` would be given it.
    """
    weights = {}
    for name, (A, B) in factors.items():
        module = f"base_model.model.{to_hf_name(name).removesuffix('.weight')}"
        weights[f"{module}.lora_A.weight"] = A.contiguous()
        weights[f"{module}.lora_B.weight"] = B.contiguous()
    targets = [PROJECTIONS[name].hf_leaf for name in lora.projections]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
