"""Hugging Face weights and the training body: names, shapes and values, both ways.

Which files are read, and what is refused, is `lowline.linearize.source`'s to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from lowline.errors import LowlineError
from lowline.linearize.source import (
    checked_weights,
    hf_directory,
    hf_shapes,
    load_teacher,
    locate,
    read_config,
    read_weights,
)
from lowline.train.config.identity import Body, differences
from lowline.train.config.run import ColaConfig, MixerConfig, ModelConfig
from lowline.train.hf.config import check_mixers, config_from_hf, mixer_from_hf
from lowline.train.model.names import from_hf_names, to_hf_names

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


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
        return SafetensorsReader(path)


class SafetensorsReader(HuggingFaceStorageReader):
    """Reads the weights of a Hugging Face directory, those that `checked_weights` finds.

    torch's own takes every file of the directory that ends in .safetensors; where two hold one
    name, the file system's order decides.
    """

    def read_metadata(self) -> Metadata:
        """Return name, shape and dtype of every weight.

        Raises:
            LowlineError: the directory is damaged, or lacks a weight that its configuration has.
        """
        directory = Path(self.path)
        weights, places = dict[str, STORAGE_TYPES](), dict[MetadataIndex, Any]()
        for name, stored in checked_weights(directory, read_config(directory)).items():
            shape, origin = torch.Size(stored.shape), torch.Size([0] * len(stored.shape))
            dtype = _DTYPES[stored.dtype]
            weights[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=shape,
                chunks=[ChunkStorageMetadata(offsets=origin, sizes=shape)],
            )
            places[MetadataIndex(fqn=name, offset=origin)] = _HFStorageInfo(
                relative_path=str(stored.file), shape=shape, dtype=dtype
            )
        meta = StorageMeta(load_id=self.load_id)
        return Metadata(state_dict_metadata=weights, storage_data=places, storage_meta=meta)


def check_same_model(
    source: str | Path, model: ModelConfig, cola: ColaConfig, mixer: MixerConfig | None = None
) -> None:
    """Check that the weights of `source` fit a run's tables and mean the same there.

    What may differ is what no weight depends on: the longest context and how attention and memory
    are handled. Layers that are softmax in `source` may have a mixer in the run, which is then
    initialized. Of the weights only the headers are read.

    Raises:
        ValueError: names every key that differs, or every weight that does, with both values.
    """
    hf = read_config(source)
    their_model, their_cola = config_from_hf(hf)
    theirs, ours = Body(model=their_model, cola=their_cola), Body(model=model, cola=cola)
    wrong = [
        f"{d.key} = {d.now} (run), {d.before} (checkpoint)"
        for d in differences(theirs, ours, by={"weights"})
    ]
    if wrong:
        raise LowlineError(
            f"{source} is another model than the configuration's: {'; '.join(wrong)}. "
            "Set these keys to the checkpoint's values"
        )
    check_mixers(mixer_from_hf(hf), mixer, model.n_layers, str(source))
    checked_weights(hf_directory(source), hf)


def load_hf_state_dict(
    source: str | Path, *, gguf_file: str | None = None
) -> dict[str, torch.Tensor]:
    """Return all weights of a Hugging Face checkpoint under the training body's names.

    Safetensors are mapped, not read: memory is touched where a weight is used, in the dtype of the
    file. A GGUF file is dequantized to float32 by transformers.

    Args:
        source: a directory, a hub id, or a GGUF file.
        gguf_file: a GGUF file in that directory to read instead of safetensors.

    Raises:
        ValueError: an unsupported model; no safetensors; a weight that is missing, unexpected or
            of another shape, named with both shapes.
    """
    place, gguf_file = locate(source, gguf_file)
    if gguf_file is not None:
        body = load_teacher(place, gguf_file=gguf_file, dtype=torch.float32)
        model, _ = config_from_hf(body.config)
        held = body.state_dict()
        weights = {name: held[name] for name in hf_shapes(body.config)}
    else:
        directory = hf_directory(place)
        hf = read_config(directory)
        model, _ = config_from_hf(hf)
        weights = read_weights(directory, hf)
    return from_hf_names(weights, tied=model.tie_embeddings)
