"""A conversion in stages, each a run of the engine, from one TOML file.

    source = "HuggingFaceTB/SmolLM2-135M-Instruct"       # what is converted; the command may say
    output = "outputs/smollm2-lowline"

    [mixer]                                              # keys of a run, common to all stages
    name = "lolcats"

    [[stage]]                                            # keys of this stage's run, over those
    name = "transfer"
    objective.kind = "transfer"
    training.steps = 70

    [[stage]]
    name = "distill"
    ...

Stage N of name X is the run OUTPUT/stages/N-X. It begins with the weights that the stage before it
ended with, the first with the source's, and gets [model], [cola], the tokenizer and the teacher
from the source. A transfer may also run block by block (`lowline.train.blockwise`). A [model] in
the file must be that of the source: by it the stages can be checked where the source is not at
hand.

With a [compress] the stages train a low-rank model of the source, OUTPUT/low-rank, which `lowline
compress --for-training` made; the source is the teacher. Until it is there, ranks that keep as much
of every projection stand in for its own, for dry runs.

With `mixer.layers = "auto:K"` the layers that stay softmax are those of OUTPUT/layers.json, which
`lowline.train.layer_choice` writes before the first stage. A run has an explicit list; until the
file is there, K other layers stand in for them, since sizes and checks depend on K alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowline.linearize.layers import LayerCost, auto_count, costliest, is_auto
from lowline.train.config.compress import CompressConfig, compress_config
from lowline.train.config.fields import adapter
from lowline.train.config.folder import saved_steps
from lowline.train.config.identity import keys_that_decide
from lowline.train.config.load import COMMAND_LINE, check_keys, parse_override, validate
from lowline.train.config.objective import KIND, OBJECTIVES
from lowline.train.config.run import ColaConfig, ModelConfig, RunConfig
from lowline.train.config.tables import ConfigError, assign, leaves, merged, read_layers, stages_of

DERIVED = {  # keys that a stage gets from its place, and from what is converted
    "output": "it is the folder of all stages",
    "tokenizer": "it is the source's",
    "checkpoint.initial_weights": "they are those of the stage before",
    "objective.teacher": "it is the source",
    "checkpoint.enable": "a stage hands its weights on as a checkpoint",
}


WEIGHTS = keys_that_decide(ModelConfig, "weights")


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What a file and a command line say; `run` makes the configuration of one stage."""

    path: Path
    source: str | None
    output: Path
    names: tuple[str, ...]
    common: dict[str, Any]
    own: tuple[dict[str, Any], ...]
    origin: dict[str, str]
    compress: CompressConfig | None = None

    def folder(self, stage: int) -> Path:
        """Return where a stage runs (counted from 0)."""
        return self.output / "stages" / f"{stage + 1}-{self.names[stage]}"

    @property
    def low_rank(self) -> Path:
        """The low-rank model of the source, with [compress]."""
        return self.output / "low-rank"

    @property
    def has_low_rank(self) -> bool:
        """Tell whether that model is there."""
        return (self.low_rank / "config.json").is_file()

    @property
    def measured(self) -> Path:
        """The file of what the conversion of each layer costs."""
        return self.output / "layers.json"

    def layer_costs(self) -> dict[str, Any] | None:
        """Return what `measured` holds; None where there is no such file.

        Raises:
            ConfigError: it is damaged.
        """
        if not self.measured.is_file():
            return None
        try:
            held = json.loads(self.measured.read_text(encoding="utf-8"))
            costs = [
                LayerCost(layer=c["layer"], recall=float(c["recall"]), kl=float(c["kl"]))
                for c in held["costs"]
            ]
            if [cost["layer"] for cost in costs] == list(range(len(costs))):
                return {"settings": dict(held["settings"]), "costs": costs}
        except (ValueError, KeyError, TypeError):
            pass
        raise ConfigError(f"{self.measured} is damaged; remove it to measure the layers again")

    def _named_layers(self, pattern: Any, n_layers: int) -> list[int]:
        """Return the layers that get the mixer by "auto:K"."""
        count = auto_count(pattern, n_layers) or 0
        held = self.layer_costs()
        if held is None:
            softmax = [(2 * n + 1) * n_layers // (2 * count) for n in range(count)]
        elif len(held["costs"]) == n_layers:
            softmax = costliest(held["costs"], count)
        else:
            raise ConfigError(
                f"{self.measured} has {len(held['costs'])} layers, the model {n_layers}: give "
                "another output, or remove it to measure the layers again"
            )
        return [layer for layer in range(n_layers) if layer not in softmax]

    def newest_step(self, stage: int) -> Path | None:
        """Return a stage's newest checkpoint."""
        folder = self.folder(stage) / "checkpoint"
        steps = saved_steps(folder)
        return folder / f"step-{steps[-1]}" if steps else None

    def run(
        self,
        stage: int,
        *,
        teacher: str | Path,
        model: dict[str, Any] | None = None,
        cola: dict[str, Any] | None = None,
    ) -> RunConfig:
        """Return the configuration of a stage.

        Args:
            stage: counted from 0.
            teacher: the Hugging Face directory of what is converted.
            model, cola: its tables; None for the file's own.

        Raises:
            ConfigError: a key or value that is not allowed, with its stage.
        """
        tree = merged(self.common, self.own[stage])
        if model is not None:
            tree["model"] = merged(model, _free_of(tree.get("model", {})))
            tree["cola"] = merged(cola or {}, tree.get("cola", {}))
        initial = str(teacher if self.compress is None else self.low_rank)
        if stage:
            newest = self.newest_step(stage - 1)
            initial = str(newest or self.folder(stage - 1) / "checkpoint" / "step-0")
        tree["output"], tree["tokenizer"] = str(self.folder(stage)), str(teacher)
        assign(tree, "checkpoint.initial_weights", initial)
        if _needs_teacher(tree):
            assign(tree, "objective.teacher", str(teacher))
        with self._named(stage):
            pattern, n_layers = _layers_of(tree), tree.get("model", {}).get("n_layers")
            if is_auto(pattern) and isinstance(n_layers, int):
                try:
                    tree["mixer"]["layers"] = self._named_layers(pattern, n_layers)
                except ValueError as error:
                    raise ConfigError(f"[mixer]: {error}") from None
            run = validate(tree, self._origin_of(stage), str(self.path))
            if self.compress is not None and not self.has_low_rank:
                run = self.compress.in_place_of(run)
            return run

    def first_auto(self) -> int | None:
        """Return the first stage whose layers are chosen by measurement."""
        patterns = [_layers_of(merged(self.common, own)) for own in self.own]
        return next((number for number, p in enumerate(patterns) if is_auto(p)), None)

    def check_keys(self) -> None:
        """Raise ConfigError for a key of a stage that a run does not have."""
        for stage, own in enumerate(self.own):
            with self._named(stage):
                tree = merged(self.common, own)
                check_keys(tree, self._origin_of(stage), str(self.path))

    def _origin_of(self, stage: int) -> dict[str, str]:
        """Return where each key of a stage's run was written."""
        own = f"stage.{self.names[stage]}."
        origin = {k: place for k, place in self.origin.items() if not k.startswith("stage.")}
        return origin | {
            k.removeprefix(own): place for k, place in self.origin.items() if k.startswith(own)
        }

    @contextmanager
    def _named(self, stage: int) -> Iterator[None]:
        """Begin the message of an error with the stage's name."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"stage {self.names[stage]!r}: {error}") from None


def _layers_of(tree: dict[str, Any]) -> Any:
    mixer = tree.get("mixer")
    return mixer.get("layers") if isinstance(mixer, dict) else None


def has_stages(path: str | Path) -> bool:
    """Tell whether a file has stages; raises ConfigError where it cannot be read."""
    return bool(stages_of(read_layers(Path(path))[0]))


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> Stages:
    """Read a conversion's file and `--key=value` arguments.

    An argument `--training.steps=10` sets the key of every stage, `--stage.NAME.training.steps=10`
    of one.

    Raises:
        ConfigError: an unreadable file, no stage, a stage without a name of its own, or a key that
            is not a stage's to set.
    """
    path = Path(path)
    tree, origin = read_layers(path)
    if not (stages := stages_of(tree)):
        raise ConfigError(f"{path}: no [[stage]]: a conversion needs one at least, with a name")
    del tree["stage"]
    names = [_name(path, stage) for stage in stages]
    everywhere: dict[str, Any] = {}
    given: list[dict[str, Any]] = [{} for _ in names]
    for argument in overrides:
        key, value = parse_override(argument)
        chosen = list(names)
        if key.startswith("stage."):
            _, name, key = (*key.split(".", 2), "")[:3]
            if name not in names or not key:
                raise ConfigError(
                    f"{COMMAND_LINE}: {argument!r}: write --stage.NAME.section.key=value, where "
                    f"NAME is one of {', '.join(names)}"
                )
            chosen = [name]
        else:
            assign(everywhere, key, value)
            origin[key] = COMMAND_LINE
        if key in ("source", "output") or key.partition(".")[0] == "compress":
            continue
        for name in chosen:
            assign(given[names.index(name)], key, value)
            origin[f"stage.{name}.{key}"] = COMMAND_LINE
    tree = merged(tree, everywhere)
    stages = [merged(*pair) for pair in zip(stages, given, strict=True)]
    source, output = tree.pop("source", None), tree.pop("output", None)
    compress = tree.pop("compress", None)
    for key, value in (("source", source), ("output", output)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(
                f"{origin.get(key, path)}: {key} = {value!r} should be a string of at least 1 "
                "character"
            )
    for prefix, part in (
        ("", tree),
        *((f"stage.{n}.", s) for n, s in zip(names, stages, strict=True)),
    ):
        for derived in DERIVED.keys() & dict(leaves(part)).keys():
            raise ConfigError(
                f"{origin[prefix + derived]}: {derived} is not set in a conversion: "
                f"{DERIVED[derived]}"
            )
    made = Stages(
        path=path,
        source=source,
        output=Path(output or f"outputs/{path.stem}"),
        names=tuple(names),
        common=tree,
        own=tuple(stages),
        origin=origin,
        compress=None if compress is None else compress_config(compress, str(path)),
    )
    made.check_keys()
    return made


def check_model(stages: Stages, model: dict[str, Any]) -> None:
    """Raise ConfigError where the file's [model] says something else than the source's."""
    ours = dict(leaves(stages.common.get("model", {})))
    theirs = dict(leaves(model))
    wrong = [
        f"model.{key} = {value!r} (source: {theirs.get(key)!r})"
        for key, value in ours.items()
        if key.partition(".")[0] in WEIGHTS and not _same(theirs.get(key), value)
    ]
    if wrong:
        raise ConfigError(
            f"{stages.path}: it is written for another model than the source: {', '.join(wrong)}. "
            "Correct [model], or leave it out: it follows from the source"
        )


def _needs_teacher(tree: dict[str, Any]) -> bool:
    kind = KIND.value_of(tree.get("objective", {}))
    section: Any = KIND.section(kind) if kind in OBJECTIVES else None
    return section is not None and section.needs_teacher


def _same(theirs: Any, ours: Any) -> bool:
    """Equal, or as near as fp32, in which GGUF has its numbers, can tell."""
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return bool(theirs == ours)


def model_of(path: Path, tree: dict[str, Any]) -> tuple[ModelConfig, ColaConfig]:
    """Return the [model] and [cola] of a file that has a [model].

    Raises:
        ConfigError: there is none, or it is not one.
    """
    if "model" not in tree:
        raise ConfigError(f"{path}: no [model]; give what is to be converted instead")
    try:
        model = adapter(ModelConfig).validate_json(json.dumps(tree["model"]))
        cola = adapter(ColaConfig).validate_json(json.dumps(tree.get("cola", {})))
    except ValidationError as error:
        raise ConfigError(f"{path}: [model] or [cola]: {error}") from None
    return model, cola


def _free_of(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in WEIGHTS}


def table(section: Any) -> dict[str, Any]:
    """Return a section as TOML has it, without what is None."""
    tree = dataclasses.asdict(section)
    return {k: v for k, v in tree.items() if v is not None}


def _name(path: Path, stage: dict[str, Any]) -> str:
    name = stage.pop("name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"{path}: [[stage]] name = {name!r}: give each stage a name of letters, digits, - and _"
        )
    return name
