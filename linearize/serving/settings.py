"""Which of vLLM's settings lowline's models cannot be served with; importable without vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowline.errors import LowlineError
from lowline.linearize.body.reach import CHANGING_ROPES


class Settings:
    """vLLM's hook for what a model says about a configuration, before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise LowlineError for settings that cannot work."""
        refuse_settings(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Do nothing: a model's own configuration is complete."""


def refuse_settings(vllm_config: Any) -> None:
    """Raise LowlineError for the first setting that lowline's models cannot be served with."""
    for setting, why in _refused(vllm_config):
        raise LowlineError(f"{setting}: {why}")


def _refused(vllm_config: Any) -> Iterator[tuple[str, str]]:
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "tensor_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            yield (
                f"{name} = {size}",
                "lowline's models are served on one device; leave it at 1 and start a server for "
                "each device",
            )
    if vllm_config.lora_config is not None:
        yield "enable_lora", "adapters are not applied to lowline's models; merge them first"
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if (name := model.quantization) is not None:
        yield f"quantization = {name!r}", "lowline's models are served in float types; leave it out"
    if vllm_config.speculative_config is not None:
        yield (
            "speculative_config",
            "a state cannot take proposed tokens back here; `lowline generate --lookup` can",
        )
    if vllm_config.kv_transfer_config is not None:
        yield "kv_transfer_config", "states are not sent to other servers; leave it out"
    if (name := str(cache.cache_dtype)) not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield f"kv_cache_dtype = {name!r}", "keys and values have the model's type; leave it out"
    rope = getattr(model.hf_config, "rope_parameters", None) or {}
    if (kind := str(rope.get("rope_type"))) in CHANGING_ROPES:
        yield (
            f"rope_type = {kind!r} in the model's config.json",
            "its frequencies depend on the longest text of a batch; `lowline generate` serves it",
        )
