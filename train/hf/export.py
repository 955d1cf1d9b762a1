"""A training checkpoint becomes a Hugging Face directory.

`OUTPUT/checkpoint/step-N`, which holds its run's config.toml, gives config.json, safetensors,
generation_config.json, the tokenizer and a model card: what `AutoModelForCausalLM.from_pretrained`
loads; a model that is low-rank or has mixers needs `import lowline` before, or
`trust_remote_code=True`. LoRA's factors are merged, or written beside it in PEFT's format.
`import_weights` makes such a directory of a hub model or a GGUF
file, for training to start from.

One process reads the shards of however many ranks wrote them, model weights only, tensor by tensor,
and writes the directory file by file (`lowline.train.hf.stream`): a model of any size passes
through the memory of one file. The directory appears complete or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from lowline.errors import LowlineError
from lowline.files import write_folder
from lowline.linearize.card import CARD
from lowline.linearize.source import check_shapes, hf_directory, hf_shapes, locate, read_config
from lowline.linearize.source import load_tokenizer as load_hf_tokenizer
from lowline.train.config.folder import check_output, find_checkpoint
from lowline.train.config.run import RunConfig
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.hf.card import model_card
from lowline.train.hf.settings import (
    began_with,
    exported_config,
    generation_settings,
    origin,
)
from lowline.train.hf.stream import StepWeights, save_directory
from lowline.train.hf.weights import load_hf_state_dict
from lowline.train.model.lora import save_adapter, stored_factors
from lowline.train.model.names import from_hf_name, to_hf_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a training checkpoint as a Hugging Face directory and return its path.

    Args:
        checkpoint: a run's output folder (its latest complete step is taken) or a step folder.
        output: the directory to make.
        dtype: of the weights: "float32", "bfloat16" or "float16". Default: the one in which the
            checkpoint stores all of them; where it stores some in another (those that were not
            trained), the dtype of the model that was converted, float32 if that is gone.
        adapter: do not merge LoRA's factors: `output`/adapter has them, in PEFT's format and fp32,
            and `output` the weights that they adapt, mixers included.
        overwrite: replace `output` if it is an earlier export.

    Raises:
        ValueError: no complete checkpoint, weights that do not fit the run's configuration, an
            unknown dtype, an adapter of a run without [lora], or an `output` that must not be
            overwritten.
        FileNotFoundError: the run's tokenizer is gone.
        OSError: the disk is full or cannot be written; `output` is then as it was.
    """
    if dtype is not None and dtype not in DTYPES:
        raise LowlineError(f"dtype = {dtype!r}; choose from {sorted(DTYPES)}")
    step_folder, run = find_checkpoint(checkpoint)
    if adapter and run.lora is None:
        raise LowlineError(f"{step_folder}: a run without [lora] has no adapter; export the model")
    tokenizer = load_tokenizer(run.tokenizer).hf
    source = began_with(run)
    hf = exported_config(run, tokenizer, source)
    generation = generation_settings(source, hf)
    weights, names = open_weights(step_folder, hf, merge=not adapter)
    kind = DTYPES[dtype] if dtype is not None else _dtype(run, weights)
    shapes = {name: weights.kinds[ours][0] for name, ours in names.items()}

    def read(name: str) -> torch.Tensor:
        return weights.read(names[name], kind)

    with _replaced_whole(Path(output), overwrite) as folder:
        save_directory(folder, hf, shapes, kind, read, generation)
        if adapter:
            assert run.lora is not None
            save_adapter(folder / "adapter", stored_factors(step_folder), run.lora, str(output))
        tokenizer.save_pretrained(folder)
        parameters = sum(map(math.prod, shapes.values()))
        name, step = Path(output).resolve().name, step_folder.name
        card = model_card(name, run, hf, parameters, step, base_model=origin(run))
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(output)


def _dtype(run: RunConfig, weights: StepWeights) -> torch.dtype:
    """Return the dtype of an export for which none was asked (see `export`)."""
    stored = {dtype for _, dtype in weights.kinds.values()}
    if len(stored) == 1:
        return stored.pop()
    source = origin(run)
    if source is not None and (Path(source) / "config.json").is_file():
        dtype = read_config(source).dtype
        if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
            return dtype
    return torch.float32


def import_weights(
    source: str | Path, output: str | Path, *, gguf_file: str | None = None, overwrite: bool = False
) -> Path:
    """Copy a hub model or a GGUF file to a directory that `checkpoint.initial_weights` takes.

    The weights are checked and keep their dtype; a GGUF file's are dequantized to float32.

    Args:
        source: a hub id, or a directory.
        output: the directory to make.
        gguf_file: the GGUF file in `source` to read instead of safetensors.
        overwrite: replace `output` if it is a Hugging Face directory.

    Raises:
        ValueError: a model that cannot be trained, or an `output` that must not be overwritten.
        OSError: the disk is full or cannot be written; `output` is then as it was.
    """
    place, gguf_file = locate(source, gguf_file)
    place = str(hf_directory(place)) if gguf_file is None else place
    hf = read_config(place, gguf_file)
    weights = load_hf_state_dict(place, gguf_file=gguf_file)
    weights = to_hf_names(weights, tied=hf.tie_word_embeddings)
    tokenizer = load_hf_tokenizer(place, gguf_file=gguf_file)
    generation = generation_settings(None if gguf_file is not None else Path(place), hf)
    with _replaced_whole(Path(output), overwrite) as folder:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        dtype = next(iter(weights.values())).dtype
        save_directory(folder, hf, shapes, dtype, lambda name: weights[name].clone(), generation)
        tokenizer.save_pretrained(folder)
    return Path(output)


def open_weights(
    step_folder: Path, hf: PreTrainedConfig, *, merge: bool = True
) -> tuple[StepWeights, dict[str, str]]:
    """Return the weights of a step, and their names there by their Hugging Face names.

    Args:
        merge: add LoRA's factors.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape than `hf` says.
    """
    expected = hf_shapes(hf)
    names = {name: from_hf_name(name) for name in expected}
    ours = {ours: name for name, ours in names.items()}
    weights = StepWeights(step_folder, merge=merge)
    found = {ours.get(name, name): shape for name, (shape, _) in weights.kinds.items()}
    if hf.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    check_shapes(found, expected, str(step_folder))
    return weights, names


@contextmanager
def _replaced_whole(output: Path, overwrite: bool) -> Iterator[Path]:
    """Return a new folder beside `output` that takes its place when the block ends without an
    error.
    """
    check_output(output, overwrite)
    try:
        with write_folder(output, replace=True) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"export to {output} failed, and {output} is as it was: {error}. "
            "Free disk space or give another output"
        ) from error
