"""Converted and CoLA models in vLLM, as a plugin: entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. The models are transformers' ones
(`lowline.linearize.body.hf`, `lowline.cola.hf`), whose states, keys and values lie in vLLM's pages
(`model`); vLLM batches, schedules, preempts and samples. `settings` refuses what they cannot do.

Left out: weights on several devices, LoRA, quantization, speculative decoding, CUDA graphs.
"""

from __future__ import annotations

BACKEND = "LOWLINE"
MODELS = "lowline.linearize.serving.model"


def register() -> None:
    """Register lowline's configurations with transformers, and its models with vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from lowline.cola.hf import CoLAForCausalLM
    from lowline.linearize.body.hf import FAMILIES
    from lowline.linearize.serving.settings import Settings

    if BACKEND not in MambaAttentionBackendEnum.__members__:  # vLLM may call this twice
        path = "lowline.linearize.serving.backend.MixerBackend"
        register_backend(BACKEND, path, is_mamba=True)  # type: ignore[arg-type]
    names = {family.causal_lm.__name__: "ServedLinearized" for family in FAMILIES.values()}
    for name, served in {**names, CoLAForCausalLM.__name__: "ServedCoLA"}.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{MODELS}:{served}")
        MODELS_CONFIG_MAP[name] = Settings  # type: ignore[assignment]
