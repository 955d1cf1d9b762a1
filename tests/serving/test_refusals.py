"""Settings that lowline's models cannot be served with end vLLM's start, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

from helpers.serving import engine, served_model

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("refused")
    served_model("slots").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size = 2: lowline's models"),
        ({"pipeline_parallel_size": 2}, "[Pp]ipeline"),  # vLLM's own refusal
        ({"enable_lora": True}, "enable_lora: adapters"),
        ({"speculative_config": NGRAM}, "speculative_config: a state"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype = 'fp8_e5m2'"),
        ({"quantization": "fp8"}, "quantization"),
        ({"max_model_len": 4096}, "max_model_len"),
        ({"model_impl": "transformers"}, "not compatible with vLLM|Cannot find model module"),
        ({"model_impl": "transformers", "trust_remote_code": True}, "not compatible|vLLM plugin"),
    ],
)
def test_it_does_not_start(folder: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=named), engine(folder, **settings):
        pass
