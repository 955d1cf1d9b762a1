"""The configuration of an exported model: the run's, and what no key of a run holds.

What a run's tables describe comes from them. The rest (end tokens, sampling, fields of transformers
or of another program) is carried over from the Hugging Face directory that training began with.
"""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.body.hf import LinearizedConfig
from lowline.linearize.source import GENERATION, hf_shapes, named, read_config
from lowline.train.config.folder import is_step_folder
from lowline.train.config.load import load_config
from lowline.train.config.run import RunConfig
from lowline.train.data.template import check_template_source
from lowline.train.hf.config import config_to_hf
from lowline.weight_files import read_json

DECIDED = {  # what the tables of a run hold, or what names files that an export does not have
    *("architectures", "auto_map", "dtype", "model_type", "transformers_version"),
    *("transformers_weights", "quantization_config", "torch_dtype", "_name_or_path"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("layer_types", "mixers", "teacher", "softmax_layer_types"),
    *("ranks", "bottleneck_activation", "bottleneck_bias", "qk_norm", "pivoted"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger("lowline")


def exported_config(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Path | None
) -> PreTrainedConfig:
    """Return the configuration with which a run's model is exported.

    End tokens are those of the model that training began with and the tokenizer's own.

    Args:
        run: the training run.
        tokenizer: its tokenizer.
        source: the Hugging Face directory that it began with (`began_with`).

    Raises:
        LowlineError: a special token that the tokenizer names lies beyond the vocabulary, or that
            model's configuration cannot be read.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= run.model.vocab_size:
            raise LowlineError(
                f"tokenizer {run.tokenizer!r}: {name} = {getattr(tokenizer, name)!r} has the id "
                f"{number}, but model.vocab_size = {run.model.vocab_size}: the model could not be "
                f"exported. Set vocab_size to at least {number + 1}, or {name} in "
                "tokenizer_config.json to a token of the vocabulary"
            )
    before = None if source is None else read_config(source)
    end = _numbers(before.eos_token_id) if before is not None else []
    if tokenizer.eos_token_id not in (None, *end):
        end.append(tokenizer.eos_token_id)
    ids: dict[str, Any] = {"eos_token_id": _one_or_all(end)}
    for name in ("bos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        ids[name] = getattr(before, name, None) if number is None else number
    hf = config_to_hf(run.model, run.cola, run.mixer, max_seq_len=run.training.seq_len, **ids)
    if before is not None:
        for name, value in before.to_dict().items():
            if name not in DECIDED:
                setattr(hf, name, value)
    if isinstance(hf, LinearizedConfig):
        hf.teacher = origin(run)
    return hf


def generation_settings(source: Path | None, hf: PreTrainedConfig) -> dict[str, Any] | None:
    """Return what generation_config.json holds for a model; None for what `hf` alone gives.

    Args:
        source: the Hugging Face directory that it was made from.
        hf: its configuration, whose end tokens join those of `source`.

    Raises:
        LowlineError: the file in `source` is damaged.
    """
    fields = None if source is None else read_json(source / GENERATION)
    if fields is None:
        return None
    with named(source / GENERATION if source else ""):
        GenerationConfig.from_dict(fields)
        end = dict.fromkeys([*_numbers(fields.get("eos_token_id")), *_numbers(hf.eos_token_id)])
    return fields | ({"eos_token_id": _one_or_all(list(end))} if end else {})


def check_exportable(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise LowlineError, before anything is trained, where a run's export would fail.

    Checked are special tokens, the configuration, the generation settings, the chat template, and
    that the tokenizer can be saved.
    """
    source = began_with(run)
    hf = exported_config(run, tokenizer, source)
    generation_settings(source, hf)
    if isinstance(tokenizer.chat_template, str):
        check_template_source(tokenizer.chat_template)
    with named(run.tokenizer):
        hf_shapes(hf)
        _check_savable(tokenizer)


def _check_savable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a tokenizer where it is not kept; a disk without space says nothing about it."""
    try:
        room = tempfile.TemporaryDirectory()
    except OSError as error:
        raise LowlineError(
            f"temporary files cannot be written: {error}. Free space there, or set TMPDIR to a "
            "folder on another disk"
        ) from None
    try:
        with room as folder:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers package has no type for the system's errors
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        if not full and not any(f"(os error {number})" in str(error) for number in NO_SPACE):
            raise


def began_with(run: RunConfig) -> Path | None:
    """Return the Hugging Face directory whose weights a run, or the first run before it, took.

    None where there is none yet, or it is gone; the latter is logged.
    """
    if run.checkpoint.initial_weights is None:
        return None
    source = Path(run.checkpoint.initial_weights)
    if is_step_folder(source):
        return began_with(load_config(source / "config.toml"))
    if (source / "config.json").is_file():
        return source
    if source.parent.name == "checkpoint" and not source.parent.exists():
        return None  # of an earlier stage, which has not been trained yet
    logger.warning(
        "%s is gone: generation settings and other fields of its config.json are not carried over",
        source,
    )
    return None


def origin(run: RunConfig) -> str | None:
    """Return what a run converted: its teacher, or the Hugging Face directory that its stages began
    with.

    None where the run began with random weights, or with a step folder that is gone.
    """
    if run.objective.teacher is not None or run.checkpoint.initial_weights is None:
        return run.objective.teacher
    source = Path(run.checkpoint.initial_weights)
    if is_step_folder(source):
        return origin(load_config(source / "config.toml"))
    if not (source / "config.json").is_file():
        return None
    hf = read_config(source)
    return hf.teacher if isinstance(hf, LinearizedConfig) else str(source)


def _one_or_all(ids: list[int]) -> int | list[int] | None:
    """Return token ids as configurations have them: none, one, or a list."""
    return ids[0] if len(ids) == 1 else ids or None


def _numbers(ids: Any) -> list[int]:
    """Return token ids, of which configurations have none, one, or a list."""
    found = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if wrong := [n for n in found if not isinstance(n, int) or isinstance(n, bool)]:
        raise LowlineError(f"eos_token_id = {wrong[0]!r} is not a token id")
    return list(found)
