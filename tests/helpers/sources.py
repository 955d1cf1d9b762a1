"""Tiny checkpoints as other programs write them: Hugging Face directories and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from helpers.models import scrambled
from lowline.linearize.source import load_teacher
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.hf.weights import SafetensorsReader, load_hf_state_dict
from lowline.train.model.names import to_hf_names

SHAPE: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=0,
)


def hf_directory(
    folder: Path, *, shards: bool = False, config: PreTrainedConfig | None = None, seed: int = 0
) -> Path:
    """Write a tiny Llama with random weights and the embedded tokenizer."""
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE))
    scrambled(model, seed).save_pretrained(folder, max_shard_size="200KB" if shards else "5GB")
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """Write a safetensors file of a header, which may be wrong, and bytes."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def gguf_tensors(layers: int = 2) -> dict[str, np.ndarray]:
    """Return the tensors of a tiny Llama by their GGUF names."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (4096, 16), "output_norm": (16,), "output": (4096, 16)}
    of_layer = {
        **{"attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16)},
        **{"attn_v": (8, 16), "attn_output": (16, 16)},
        **{"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)},
    }
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    draw = random.standard_normal
    return {f"{n}.weight": draw(shape, dtype=np.float32) for n, shape in shapes.items()}


def gguf_file(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    without: tuple[str, ...] = (),
    **keys: int | str,
) -> Path:
    """Write a tiny Llama of two layers as GGUF.

    Args:
        path: the file.
        tensors: instead of those of the two layers.
        without: keys to leave out.
        keys: more keys, with _ for a dot.
    """
    import gguf

    values: dict[str, Any] = dict(
        context_length=64,
        embedding_length=16,
        block_count=2,
        feed_forward_length=24,
        head_count=2,
        head_count_kv=1,
        layer_norm_rms_eps=1e-5,
        rope_freq_base=1e4,
        vocab_size=4096,
    )
    tokenizer = load_tokenizer("embedded").hf
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    values |= dict(tokenizer_model="gpt2", token_list=[token for token, _ in vocabulary])
    values |= dict(token_merges=["a b"], eos_token_id=0, bos_token_id=0)
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in values.items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    for name, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    for name, tensor in (gguf_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights that conversion and evaluation read."""
    model = load_teacher(source)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def by_import(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights that import and stitching read."""
    weights = load_hf_state_dict(source)
    return to_hf_names(weights, tied="lm_head.weight" not in weights)


def by_training(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights that training, teachers and inputs of layer groups read."""
    reader = SafetensorsReader(str(source))
    kinds = reader.read_metadata().state_dict_metadata
    weights = {n: torch.empty(k.size, dtype=k.properties.dtype) for n, k in kinds.items()}
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return weights


READERS = {"transformers": by_transformers, "import": by_import, "training": by_training}
