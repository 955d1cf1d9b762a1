"""Hugging Face weights and the training body: names, shapes and values, both ways.

Left out, each refused by name: quantized weights, pickled (.bin) weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.train.config.run import ColaConfig, MixerConfig, ModelConfig
from lowline.train.hf.config import (
    check_mixers,
    config_from_hf,
    essence,
    mixer_from_hf,
    read_config,
)
from lowline.train.model.names import from_hf_names, to_hf_names


class LlamaStateDictAdapter(StateDictAdapter):
    """Lets torchtitan's checkpointer read and write Hugging Face safetensors, each rank its shards.

    Args:
        model_config: the training body; asked only whether its embeddings are tied.
        hf_assets_path: the run's tokenizer; no weights are looked for there.
    """

    def __init__(self, model_config: BaseModel.Config, hf_assets_path: str | None) -> None:
        super().__init__(model_config, None)
        self.tied: bool = getattr(model_config, "enable_weight_tying", False)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return to_hf_names(state_dict, tied=self.tied)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return from_hf_names(hf_state_dict, tied=self.tied)

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        if from_quantized:
            raise LowlineError("quantized Hugging Face weights cannot be trained; dequantize them")
        return HuggingFaceStorageReader(path)


def check_same_model(
    source: str | Path, model: ModelConfig, cola: ColaConfig, mixer: MixerConfig | None = None
) -> None:
    """Check that the weights of `source` fit a run's tables and mean the same there.

    What may differ is what no weight depends on: the longest context and how attention and memory
    are handled. Layers that are softmax in `source` may have a mixer in the run, which then begins
    anew. Of the weights only the headers are read.

    Raises:
        ValueError: names every key that differs, or every weight that does, with both values.
    """
    hf = read_config(source)
    ours, theirs = essence(model, cola), essence(*config_from_hf(hf))
    wrong = [
        f"{key} = {ours[key]} (run), {theirs[key]} (checkpoint)"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if wrong:
        raise LowlineError(
            f"{source} is another model than the configuration's: {'; '.join(wrong)}. "
            "Set these keys to the checkpoint's values"
        )
    check_mixers(mixer_from_hf(hf), mixer, model.n_layers, str(source))
    _check_fit({k: s for k, s, _ in _safetensors(hf_directory(source))}, hf, source)


FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
OTHERS = ["*/*", "consolidated*"]  # the same weights for other libraries


def hf_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint; of a hub id what `FILES` names is downloaded.

    Raises:
        ValueError: there is neither such a directory nor such a model on the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    check_source(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=FILES, ignore_patterns=OTHERS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise LowlineError(
            f"{source}: neither a directory (working directory {Path.cwd()}) nor a model that the "
            f"Hugging Face hub gives: {error}"
        ) from None


def load_hf_state_dict(
    source: str | Path, *, gguf_file: str | None = None
) -> dict[str, torch.Tensor]:
    """Return all weights of a Hugging Face checkpoint under the training body's names.

    Safetensors are mapped, not read: memory is touched where a weight is used, in the dtype of the
    file. A GGUF file is dequantized to float32 by transformers.

    Args:
        source: a directory, or a hub id.
        gguf_file: a GGUF file in that directory to read instead of safetensors.

    Raises:
        ValueError: an unsupported model; no safetensors; a weight that is missing, unexpected or
            of another shape, named with both shapes.
    """
    hf = read_config(source, gguf_file)
    model, _ = config_from_hf(hf)
    if gguf_file is not None:
        body = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf_file,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
        weights = body.state_dict()
    else:
        weights = {name: read() for name, _, read in _safetensors(hf_directory(source))}
    _check_fit({name: tuple(weight.shape) for name, weight in weights.items()}, hf, source)
    known = hf_shapes(hf)
    return from_hf_names({k: weights[k] for k in known}, tied=model.tie_embeddings)


def hf_shapes(hf: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight such a checkpoint holds (tied heads left out)."""
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(hf)
    shapes = {name: tuple(weight.shape) for name, weight in body.state_dict().items()}
    if hf.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that a checkpoint holds exactly the expected weights.

    Raises:
        ValueError: names the first few weights that are missing, unexpected or of another shape.
    """
    problems = [f"{k} is missing, expected {expected[k]}" for k in expected if k not in found]
    problems += [f"{k} {found[k]} is unexpected" for k in found if k not in expected]
    problems += [
        f"{k} is {found[k]}, expected {expected[k]}"
        for k in expected
        if k in found and found[k] != expected[k]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise LowlineError(
            f"{where}: the weights do not fit its configuration: {'; '.join(problems[:5])}{more}"
        )


def _check_fit(found: dict[str, tuple[int, ...]], hf: PreTrainedConfig, source: str | Path) -> None:
    # Old checkpoints carry RoPE's frequencies, which are computed; some carry a tied head twice.
    idle = {"lm_head.weight"} if hf.tie_word_embeddings else set()
    idle |= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    found = {name: shape for name, shape in found.items() if name not in idle}
    check_shapes(found, hf_shapes(hf), str(source))


def _safetensors(
    directory: Path,
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Yield name, shape and, on demand, value of every weight in a directory's safetensors."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise LowlineError(f"{index}: {name!r} is not the name of a file beside it")
        if not (directory / name).is_file():
            raise LowlineError(
                f"{directory / name}: no such file; weights are read from safetensors. Convert "
                "others with transformers: from_pretrained(...).save_pretrained(...)"
            )
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key)
