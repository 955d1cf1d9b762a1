"""What can be known to fail before any process group starts.

Every rank checks the same, so all stop alike and none waits for another.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.train.config.checksums import damage
from lowline.train.config.folder import check, is_step_folder, newest_intact, saved_steps
from lowline.train.config.identity import differences
from lowline.train.config.load import ConfigError, load_config
from lowline.train.config.run import MixerConfig, RunConfig

if TYPE_CHECKING:
    from lowline.train.engine.inputs import Inputs

INPUTS = "inputs.json"  # of a step folder: digests of what the run reads


def check_run(run: RunConfig, world_size: int, inputs: Inputs | None = None) -> None:
    """Raise ConfigError, ValueError or OSError if `run` cannot work.

    Args:
        inputs: where its batches come from; default: the documents of [data].
    """
    folder = Path(run.output) / "checkpoint"
    steps = saved_steps(folder) if run.checkpoint.enable else []
    if not steps and run.checkpoint.initial_weights is not None:
        check_initial_weights(run)  # first: other checks read the model that is there
    check_inputs(run, world_size, inputs)
    if steps:
        if not run.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume = false, but {folder}/step-{steps[-1]} exists and would be "
                "overwritten; choose another output folder, or remove this one"
            )
        newest = resume_point(run)
        assert newest is not None
        check_resumable(run, newest)


def resume_point(run: RunConfig, *, fallback: bool | None = None) -> Path | None:
    """Return the step folder that a run resumes from, by its small files and the sizes of all.

    Args:
        fallback: instead of `checkpoint.fallback`.

    Raises:
        ConfigError: the newest is damaged and an older one may not be used, or all are damaged.
    """
    from lowline.train.model.step_folder import unreadable

    seen: list[Path] = []

    def look(step: Path) -> str | None:
        seen.append(step)  # one that is to be named instead of another is read in full
        return damage(step, shards=len(seen) > 1) or unreadable(step)

    if fallback is None:
        fallback = run.checkpoint.fallback
    try:
        folder = Path(run.output) / "checkpoint"
        return newest_intact(folder, look, fallback=fallback)[0]
    except LowlineError as error:
        raise ConfigError(str(error)) from None


def check_resumable(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError or ValueError unless a run can resume from a step folder."""
    from lowline.train.data import check_saved_lanes
    from lowline.train.model.step_folder import stored

    check_same_model(run, checkpoint)
    check_same_parts(run, checkpoint)
    check_same_data(run, checkpoint)
    check_saved_lanes(stored(checkpoint), run.training.global_batch_size)


def check_inputs(run: RunConfig, world_size: int, inputs: Inputs | None = None) -> None:
    """Raise what `check_run` does, but for the weights that a run begins with and its folder."""
    from lowline.train.data import open_source
    from lowline.train.data.chat import check_template
    from lowline.train.data.tokenizer import load_tokenizer
    from lowline.train.engine.inputs import DOCUMENTS
    from lowline.train.hf.settings import check_exportable

    run.local_batch_size(world_size)
    _check_rank_measurement(run)
    tokenizer = load_tokenizer(run.tokenizer)
    chat = run.data.chats
    if chat:
        check_template(tokenizer.hf)
    needed = tokenizer.get_vocab_size(special=chat)
    if needed > run.model.vocab_size:
        raise ConfigError(
            f"tokenizer {run.tokenizer!r} makes ids up to {needed - 1}, but model.vocab_size = "
            f"{run.model.vocab_size}; set it to at least {needed}, or choose another tokenizer"
        )
    if run.block is None:  # a group of layers is exported with the others of its stage
        check_exportable(run, tokenizer.hf)
    run.objective.check_files(run)
    (inputs or DOCUMENTS).check(run)
    if run.evaluation.enable:
        open_source(run.held_out())


def check_same_model(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError unless a run's step folder holds the parameters of this run's model.

    How attention and memory are handled may differ, and the longest context: no weight depends on
    them.
    """
    saved = load_config(checkpoint / "config.toml")
    for d in differences(saved, run, by={"weights"}):
        if d.key.startswith(("model.", "cola.")):
            raise _other(checkpoint, d.key, d.before, d.now)


def check_same_data(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError if a run reads or starts from something else than its step folder says.

    `checkpoint.allow_changes` lets it.
    """
    saved = load_config(checkpoint / "config.toml")
    changed = differences(saved, run, by={"data"})
    if changed and not run.checkpoint.allow_changes:
        raise ConfigError(
            f"{checkpoint} was trained with {'; '.join(map(str, changed))}: one curve of both "
            "would mean nothing. Set it back, choose another output folder, or allow it with "
            "--checkpoint.allow_changes=true"
        )
    if not run.checkpoint.allow_changes:
        _check_same_tokenizer(run, checkpoint)


def _check_same_tokenizer(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError if a tokenizer's files have changed; its name has not."""
    from lowline.train.data.tokenizer import load_tokenizer

    file = checkpoint / INPUTS
    if not file.exists():  # an earlier version wrote the checkpoint, or a conversion made it
        return
    try:
        before = json.loads(file.read_bytes()).get("tokenizer")
    except (ValueError, AttributeError):
        raise ConfigError(f"{file} is damaged: it is no JSON object. Restore it") from None
    if before is not None and load_tokenizer(run.tokenizer).fingerprint() != before:
        raise ConfigError(
            f"{checkpoint} was trained with other contents of the tokenizer {run.tokenizer!r}: its "
            "files have changed, and a row of the weights is another token's. Restore them, choose "
            "another output folder, or allow it with --checkpoint.allow_changes=true"
        )


def check_same_parts(run: RunConfig, checkpoint: Path) -> None:
    """Raise ConfigError unless this run trains what the run of a step folder trained.

    Beside the model: its mixers but for how they are computed, its adapters, its objective.
    """
    from lowline.train.hf.config import resolved_mixers

    saved = load_config(checkpoint / "config.toml")
    before, now = (resolved_mixers(r.mixer, r.model.n_layers) for r in (saved, run))
    if before != now:
        raise _other(checkpoint, "mixer", saved.mixer, run.mixer)
    for name, one, other in (
        ("lora", saved.lora, run.lora),
        ("block", saved.layers(), run.layers()),
        ("objective.kind", saved.objective.kind, run.objective.kind),
        ("objective.trainable", saved.trainable(), run.trainable()),
        ("objective.frozen", sorted(saved.objective.frozen), sorted(run.objective.frozen)),
        ("optimizer.name", saved.optimizer.name, run.optimizer.name),
    ):
        if one != other:
            raise _other(checkpoint, name, one, other)
    if (saved.optimizer.mixer_lr is None) != (run.optimizer.mixer_lr is None):
        rates = saved.optimizer.mixer_lr, run.optimizer.mixer_lr
        raise _other(checkpoint, "optimizer.mixer_lr", *rates)


def initial_mixer(run: RunConfig) -> MixerConfig | None:
    """Return the mixer that comes with `checkpoint.initial_weights`, if one does."""
    from lowline.linearize.source import read_config
    from lowline.train.hf.config import mixer_from_hf

    if run.checkpoint.initial_weights is None:
        return None
    folder = Path(run.checkpoint.initial_weights)
    if is_step_folder(folder):
        return load_config(folder / "config.toml").mixer
    return mixer_from_hf(read_config(folder))


def check_initial_weights(run: RunConfig) -> None:
    """Raise ConfigError or ValueError unless `checkpoint.initial_weights` fits the model."""
    path = run.checkpoint.initial_weights
    assert path is not None
    folder = Path(path)
    if is_step_folder(folder):
        from lowline.train.hf.config import check_mixers

        check(folder, shards=False)
        check_same_model(run, folder)
        check_mixers(initial_mixer(run), run.mixer, run.model.n_layers, path)
    elif (folder / "config.json").is_file():
        from lowline.train.hf.weights import check_same_model as check_same_hf_model

        check_same_hf_model(folder, run.model, run.cola, run.mixer)
    else:
        raise ConfigError(
            f"checkpoint.initial_weights = {path!r} is neither a Hugging Face directory "
            "(config.json) nor a checkpoint/step-N folder of a run; `lowline export` makes the "
            "former of the latter"
        )


def _other(checkpoint: Path, key: str, before: Any, now: Any) -> ConfigError:
    return ConfigError(
        f"{checkpoint} was written with {key} = {before}, this run has {now}; set it back, or "
        "choose another output folder"
    )


def _check_rank_measurement(run: RunConfig) -> None:
    every = run.metrics.rank_every
    if every and not any(run.ranks().values()):
        raise ConfigError(
            f"metrics.rank_every = {every} with a dense model, which has no bottleneck to measure; "
            "set it to 0 (`lowline inspect rank` measures the activations of any model)"
        )
    if every and run.parallelism.pipeline_parallel > 1:
        raise ConfigError(
            f"metrics.rank_every = {every} with parallelism.pipeline_parallel = "
            f"{run.parallelism.pipeline_parallel}; set rank_every = 0: a stage "
            "cannot be run alone for a measurement"
        )


def check_writable(output: Path) -> None:
    """Raise ConfigError where a run's folder cannot be made or written to."""
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ConfigError(
            f"output = {str(output)!r} cannot be written to: {error}; choose another folder"
        ) from None
