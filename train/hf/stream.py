"""A model's weights read tensor by tensor and written shard by shard, never held at once.

`StepWeights` reads a run's step folder, however many ranks wrote it, merges LoRA's factors and
folds what a variant adds into one weight at a time. `save_directory` writes a Hugging Face
directory: config.json, generation_config.json and safetensors of at most `SHARD_BYTES`, with an
index where there are several. What is in memory is one output file, and of what is read one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowline.cola.dlr import folded
from lowline.cola.remote_code import add_remote_code
from lowline.cola.variants import variant_of
from lowline.train.config.folder import check
from lowline.train.config.load import load_config
from lowline.train.model.lora import factor_names, is_lora, merged
from lowline.train.model.step_folder import StepReader, load

SHARD_BYTES = 5 * 10**9

Kind = tuple[tuple[int, ...], torch.dtype]
Read = Callable[[str], torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class StepWeights:
    """The weights in a step folder, by the training body's names.

    Args:
        folder: of a complete checkpoint, with its run's config.toml.
        merge: add LoRA's factors to the weights that they adapt.
    """

    def __init__(self, folder: Path, *, merge: bool = True) -> None:
        check(folder)
        self._reader = StepReader(folder)
        self._stored = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and _is_weight(name)
        }
        run = load_config(folder / "config.toml")
        self._lora = run.lora if merge else None
        self._folds = variant_of(run.cola.variant).folds

    @property
    def kinds(self) -> dict[str, Kind]:
        """Shape and dtype of each weight; LoRA's factors are none."""
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._stored.items()
            if not is_lora(name)
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a weight on the CPU.

        Args:
            name: a key of `kinds`.
            dtype: default: the stored one.
        """
        wanted = [name]
        if self._lora is not None:
            wanted += [factor for factor in factor_names(name) if factor in self._stored]
        found = {
            n: torch.empty(self._stored[n].size, dtype=self._stored[n].properties.dtype)
            for n in wanted
        }
        load(found, self._reader, no_dist=True)
        weight = found.pop(name)
        dtype = dtype or weight.dtype
        if found:
            assert self._lora is not None
            A, B = found.values()
            weight = merged(weight, A, B, self._lora)
        if self._folds and name.endswith(".B.weight"):
            weight = folded(weight)
        return weight.to(dtype)


def _is_weight(name: str) -> bool:
    return name.startswith(("layers.", "tok_embeddings.", "norm.", "lm_head."))


def save_directory(
    folder: Path,
    hf: PreTrainedConfig,
    shapes: Shapes,
    dtype: torch.dtype,
    read: Read,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write the configuration and the weights of a model as `save_pretrained` would.

    Args:
        folder: there already.
        shapes: of all weights, by their Hugging Face names.
        dtype: of the weights.
        read: returns a weight in that dtype.
        generation: what generation_config.json holds; None: what follows from `hf`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype, trust_remote_code=False)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    for elsewhere in ("auto_map", "transformers_weights"):  # files that are not written here
        if getattr(model.config, elsewhere, None) is not None:
            delattr(model.config, elsewhere)
    add_remote_code(model.config, folder)
    model.config.save_pretrained(folder)
    if generation is None:
        model.generation_config.save_pretrained(folder)
    else:
        text = json.dumps(generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    write_shards(folder, shapes, dtype, read)


def write_shards(
    folder: Path, shapes: Shapes, dtype: torch.dtype, read: Read, *, limit: int | None = None
) -> None:
    """Write weights as safetensors of at most `limit` bytes (default: `SHARD_BYTES`) each.

    A weight that is larger than that has a file of its own.
    """
    limit = limit or SHARD_BYTES
    groups: list[list[str]] = [[]]
    filled = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled, total = filled + size, total + size
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        held = {name: read(name).contiguous() for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})
        del held  # before the next file's weights are read
    if len(groups) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
