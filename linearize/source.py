"""One loader of pretrained models: a hub id, a directory of safetensors, or a GGUF file.

Whatever reads weights from outside reads them here or through `checked_weights`, so that import,
conversion, training, stitching and evaluation take the same files and refuse the same faults: a
tensor that is missing, unexpected, there twice, or of another shape or dtype; a damaged file; a
configuration that ties the head to the embedding beside a head of its own, which is untied.

transformers parses configurations and tokenizers, and reads GGUF files. Neither code nor pickles
from a directory are loaded. Left out: weights that are pickled (.bin) or quantized in another form
than GGUF.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowline.errors import LowlineError, one_line
from lowline.hub import check_source
from lowline.linearize import mamba_in_llama
from lowline.linearize.body.hf import FAMILIES, PREFIX
from lowline.linearize.gguf_header import ROPE_FACTORS, Header, read_header
from lowline.weight_files import (
    INDEX,
    WEIGHTS,
    Stored,
    has_weights,
    is_computed,
    read_json,
    stored_weights,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
GENERATION = "generation_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # of a hub model
OTHERS = ["*/*", "consolidated*"]  # the same weights for other libraries

logger = logging.getLogger("lowline")


def load_teacher(
    source: str | Path, *, dtype: torch.dtype | None = None, gguf_file: str | None = None
) -> PreTrainedModel:
    """Return a checkpoint of a supported architecture as a model of transformers.

    Args:
        source: a hub id, a directory, a GGUF file or a directory with one.
        dtype: of the weights; None for the checkpoint's (float32 of a GGUF file).
        gguf_file: the GGUF file to read in a directory or hub id that holds several.

    Raises:
        ValueError: no such source, an architecture that is not supported, weights that are
            quantized (but for GGUF), pickled, damaged, missing, unexpected or of another shape.
    """
    place, gguf_file = locate(source, gguf_file)
    if gguf_file is not None:
        return _load_gguf(_gguf_path(place, gguf_file), dtype or torch.float32)
    with named(source):
        fields, _ = PreTrainedConfig.get_config_dict(place)
        family_of(fields, str(source))
    directory = hf_directory(place)
    config = read_config(directory)
    if (published := read_json(directory / mamba_in_llama.FILE)) is None:
        weights = read_weights(directory, config)
    else:
        config = mamba_in_llama.published_config(config, published)
        with named(directory):
            weights = mamba_in_llama.published_weights(_read(stored_weights(directory)), config)
        if config.tie_word_embeddings:
            weights.pop(HEAD, None)
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
        check_shapes(found, hf_shapes(config), str(directory))
    kind: Any = dtype or config.dtype
    if not isinstance(kind, torch.dtype):  # a configuration need not name one
        kind = next(iter(weights.values())).dtype
    model = model_of(type(_without_weights(config)), config, weights, kind)
    model.config.name_or_path = place
    if (generation := read_json(directory / GENERATION)) is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def model_of(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return a model of this class with exactly these weights, in `dtype`."""
    name = config.name_or_path
    loaded: Any = cls.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, found = loaded
    assert not any(found.values()), found
    model.config.name_or_path = name  # from_pretrained writes the None it was given
    return model


def load_config(source: str | Path, *, gguf_file: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a checkpoint of a supported architecture, converted or not.

    Arguments and errors are `load_teacher`'s.
    """
    config = read_config(source, gguf_file)
    family_of(config, str(source))
    return config


def read_config(source: str | Path, gguf_file: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a checkpoint of any architecture.

    Where it ties the head to the embedding, and the directory's weights hold another head, it is
    untied, with a warning.

    Raises:
        ValueError: there is none that can be read.
    """
    place, gguf_file = locate(source, gguf_file)
    if gguf_file is not None:
        path = _gguf_path(place, gguf_file)
        _check_gguf(path)
        place, gguf_file = str(path.parent), path.name
    with named(source):
        config = AutoConfig.from_pretrained(place, gguf_file=gguf_file, trust_remote_code=False)
    if gguf_file is not None:
        return config
    if (other := getattr(config, "transformers_weights", None)) not in (None, WEIGHTS, INDEX):
        raise LowlineError(
            f"{source}: transformers_weights = {other!r} names other weights than {WEIGHTS} and "
            f"{INDEX}, the only ones that are read; remove the key, or rename the file"
        )
    directory, tied = Path(place), config.tie_word_embeddings
    if tied and has_weights(directory) and _has_own_head(stored_weights(directory)):
        _warn_untied(str(source))
        config.tie_word_embeddings = False
    return config


def load_tokenizer(source: str | Path, *, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub id, a directory, a GGUF file or a directory with one.

    Raises:
        ValueError: there is none.
    """
    place, gguf_file = locate(source, gguf_file)
    local = Path(place).is_dir() and gguf_file is None
    if local and not any((Path(place) / name).is_file() for name in TOKENIZER_FILES):
        raise LowlineError(
            f"{source} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); "
            "put the one its model was trained with there"
        )
    if gguf_file is not None:
        path = _gguf_path(place, gguf_file)
        _check_gguf(path)
        place, gguf_file = str(path.parent), path.name
    with named(source):
        return AutoTokenizer.from_pretrained(place, gguf_file=gguf_file, trust_remote_code=False)


def checked_weights(directory: Path, config: PreTrainedConfig) -> dict[str, Stored]:
    """Return where every weight of a directory is, and no other tensor; only headers are read.

    Raises:
        LowlineError: a file is damaged, or the weights do not fit the configuration.
    """
    stored = stored_weights(directory)
    if config.tie_word_embeddings:
        if _has_own_head(stored):
            raise LowlineError(
                f"{directory}: its weights hold an output head of its own, where the model's is "
                "tied to the embedding; set tie_word_embeddings (model.tie_embeddings) to false"
            )
        stored.pop(HEAD, None)  # some checkpoints carry a tied head twice
    stored = {name: entry for name, entry in stored.items() if not is_computed(name)}
    found = {name: entry.shape for name, entry in stored.items()}
    with named(directory):  # a configuration of which no model can be made
        expected = hf_shapes(config)
    check_shapes(found, expected, str(directory))
    return stored


def read_weights(directory: Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return every weight of a directory, by its Hugging Face name.

    Files are mapped, not read: memory is touched where a weight is used, in the dtype of the file.

    Raises:
        LowlineError: as `checked_weights`.
    """
    return _read(checked_weights(directory, config))


def _read(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in dict.fromkeys(entry.file for entry in stored.values()):
        with safe_open(path, framework="pt") as file:
            weights |= {n: file.get_tensor(n) for n in stored if stored[n].file == path}
    return weights


def hf_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight such a checkpoint holds (tied heads left out)."""
    weights = _without_weights(config).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
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
            f"{where} cannot be loaded: the weights do not fit its configuration: "
            f"{'; '.join(problems[:5])}{more}"
        )


def locate(source: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """Return the directory or hub id, and the GGUF file in it if that is what is to be read."""
    check_source(source)
    path = Path(source)
    if gguf_file is not None:
        return str(source), gguf_file
    if path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) > 1:
            raise LowlineError(f"{source} holds {', '.join(files)}; say which as gguf_file")
        return str(source), files[0] if files else None
    return str(source), None


def hf_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint; of a hub id what `FILES` names is downloaded.

    Raises:
        ValueError: there is neither such a directory nor such a model on the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    check_source(source)
    from huggingface_hub import snapshot_download

    with _from_hub(source):
        return Path(snapshot_download(str(source), allow_patterns=FILES, ignore_patterns=OTHERS))


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong in a library's parser into a LowlineError that names the source.

    Parsers of foreign files raise what the damage happens to lead to, KeyError and struct.error
    included.
    """
    try:
        yield
    except LowlineError:
        raise
    except ImportError:  # an optional package, which the command line names
        raise
    except Exception as error:
        before = error.__cause__ or error.__context__
        while before is not None:  # a library may try something else after our refusal
            if isinstance(before, LowlineError):
                raise LowlineError(f"{source}: {before}") from error
            before = before.__cause__ or before.__context__
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise LowlineError(
            f"{source}: cannot be loaded as a directory (working directory {Path.cwd()}), a GGUF "
            f"file or a model of the Hugging Face hub: {kind}{one_line(error)}"
        ) from error


def family_of(config: PreTrainedConfig | Mapping[str, Any], name: str = "") -> str:
    """Return the key of `FAMILIES` for a configuration, converted before or not."""
    fields = config if isinstance(config, Mapping) else config.to_dict()
    model_type = str(fields.get("model_type"))
    name = name or fields.get("_name_or_path") or type(config).__name__
    if model_type.removeprefix(PREFIX) not in FAMILIES:
        raise LowlineError(
            f"{name}: model_type = {model_type!r} cannot be converted; supported: "
            f"{', '.join(FAMILIES)}"
        )
    quantized = fields.get("quantization_config")
    if not isinstance(quantized, Mapping):
        quantized = {"quant_method": quantized} if quantized else {}
    if quantized and not quantized.get("dequantize"):  # which a GGUF file's may be
        raise LowlineError(
            f"{name}: its weights are quantized ({quantized.get('quant_method')}); give the "
            "checkpoint they were made from, or a GGUF file"
        )
    return model_type.removeprefix(PREFIX)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a GGUF file, dequantized by transformers."""
    header = _check_gguf(path)
    packed = hasattr(transformers, "GgufConfig")  # older ones unpack it
    how = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    with named(path):
        fields, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
        family_of(fields, str(path))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **how,
        )
    model, found = loaded
    # Of a file that lacks tensors transformers leaves weights random; what it has no name for it
    # passes over. Every weight of these architectures is one tensor of the file.
    expected = hf_shapes(model.config)
    there = {k: shape for k, shape in expected.items() if k not in set(found["missing_keys"])}
    check_shapes(there, expected, str(path))
    if len(held := header.tensors.keys() - {ROPE_FACTORS}) != len(expected):
        of_layers = model.config.num_hidden_layers
        extra = [
            n for n in sorted(held) if n.startswith("blk.") and int(n.split(".")[1]) >= of_layers
        ]
        raise LowlineError(
            f"{path} cannot be loaded: it holds {len(held)} tensors, a model of its keys has "
            f"{len(expected)}{'; unexpected: ' if extra else ''}{', '.join(extra[:5])}"
        )
    model.config.name_or_path = str(path)  # transformers names the directory alone
    return model


def _check_gguf(path: Path) -> Header:
    """Return a GGUF file's header, or raise LowlineError where transformers would misread it."""
    header = read_header(path)
    header.check_keys(path)
    if ROPE_FACTORS in header.tensors:
        shape, start = header.tensors[ROPE_FACTORS], header.rope_factors
        factors = np.fromfile(path, "<f4", shape[-1], offset=start)
        if (factors != 1).any():
            raise LowlineError(
                f"{path} cannot be loaded: its rotary frequencies are scaled ({ROPE_FACTORS}), "
                "which transformers does not read from GGUF; give the model's safetensors"
            )
    return header


def _gguf_path(place: str, gguf_file: str) -> Path:
    if Path(place).is_dir():
        return Path(place, gguf_file)
    from huggingface_hub import hf_hub_download

    with _from_hub(place):
        return Path(hf_hub_download(place, gguf_file))


@contextmanager
def _from_hub(source: str | Path) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise LowlineError(
            f"{source}: neither a directory (working directory {Path.cwd()}) nor a model that the "
            f"Hugging Face hub gives: {error}"
        ) from None


def _has_own_head(stored: Mapping[str, Stored]) -> bool:
    """Return whether weights hold a head that is not the embedding."""
    if HEAD not in stored or EMBEDDING not in stored:
        return False
    if stored[HEAD].shape != stored[EMBEDDING].shape:
        return True
    files = [stored[name].file for name in (HEAD, EMBEDDING)]
    return _differ(*files, *(os.stat(file).st_mtime_ns for file in files))


@functools.cache
def _warn_untied(source: str) -> None:
    logger.warning(
        "%s: tie_word_embeddings = true, but its weights hold an output head of its own: the "
        "model is taken as untied",
        source,
    )


@functools.lru_cache(maxsize=8)
def _differ(head_file: Path, embedding_file: Path, *times: int) -> bool:
    with (
        safe_open(head_file, framework="pt") as head,
        safe_open(embedding_file, framework="pt") as embedding,
    ):
        rows = zip(
            head.get_tensor(HEAD).split(4096), embedding.get_tensor(EMBEDDING).split(4096),
            strict=True,
        )  # fmt: skip
        return not all(torch.equal(one.float(), other.float()) for one, other in rows)
