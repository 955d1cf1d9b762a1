"""What can be known to fail before any process group starts.

Every rank checks the same, so all stop alike and none waits for another.
"""

from __future__ import annotations

from pathlib import Path

from lowline.train.checkpoint import saved_steps
from lowline.train.config import RunConfig
from lowline.train.load_config import ConfigError, load_config


def check_run(run: RunConfig, world_size: int) -> None:
    """Raise ConfigError, ValueError or FileNotFoundError if `run` cannot work here."""
    from lowline.train.data import check_saved_lanes, open_source
    from lowline.train.data.tokenizer import load_tokenizer

    run.local_batch_size(world_size)
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.get_vocab_size() > run.model.vocab_size:
        raise ConfigError(
            f"tokenizer {run.tokenizer!r} makes ids up to {tokenizer.get_vocab_size() - 1}, but "
            f"model.vocab_size = {run.model.vocab_size}; set it to at least "
            f"{tokenizer.get_vocab_size()}, or choose another tokenizer"
        )
    open_source(run.data)
    if run.evaluation.enable:
        open_source(run.evaluation.data)
    folder = Path(run.output) / "checkpoint"
    if run.checkpoint.enable and (steps := saved_steps(folder)):
        newest = folder / f"step-{steps[-1]}"
        if not run.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume = false, but {newest} exists and would be overwritten; choose "
                "another output folder, or remove this one"
            )
        check_same_model(run, newest)
        check_saved_lanes(newest, run.training.global_batch_size)
    elif run.checkpoint.initial_weights is not None:
        _check_initial_weights(run, Path(run.checkpoint.initial_weights))


def check_same_model(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError unless a run's step folder holds the parameters of this run's model."""
    saved = load_config(checkpoint / "config.toml")
    for key in ("dim", "n_layers", "n_heads", "kv_heads", "per_head", "ffn_dim", "vocab_size"):
        _compare(checkpoint, f"model.{key}", getattr(saved.model, key), getattr(run.model, key))
    for key in ("tie_embeddings", "qk_norm"):
        _compare(checkpoint, f"model.{key}", getattr(saved.model, key), getattr(run.model, key))
    for name, rank in run.ranks().items():
        _compare(checkpoint, f"cola.rank of {name}", saved.ranks()[name], rank)
    _compare(checkpoint, "cola.bias", saved.cola.bias, run.cola.bias)


def _compare(checkpoint: Path, key: str, saved: object, now: object) -> None:
    if saved != now:
        raise ConfigError(
            f"{checkpoint} was written with {key} = {saved}, this run has {now}; set it back, or "
            "choose another output folder"
        )


def _check_initial_weights(run: RunConfig, folder: Path) -> None:
    if (folder / ".metadata").is_file():
        check_same_model(run, folder)
        return
    from lowline.train.hf import check_same_model as check_same_hf_model

    check_same_hf_model(folder, run.model, run.cola)
