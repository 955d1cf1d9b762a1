"""`mixer.layers = "auto:K"`: each layer's cost is measured once, before the first stage.

`lowline.linearize.layer_choice` says what is measured. The teacher measured is the conversion's
source, on one device; the text is the start of the first such stage's data. OUTPUT/layers.json
keeps the costs, which every process and stage reads, and which a resumed conversion does not
measure again. The choice is made before training: stages train the layers that it converts, so that
a measurement afterwards would come too late for the layers that are to be softmax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lowline.errors import LowlineError
from lowline.files import write_text
from lowline.fingerprint import fingerprint
from lowline.linearize.layers import costliest
from lowline.train.config.run import RunConfig
from lowline.train.config.stages import Stages
from lowline.train.config.tables import ConfigError, leaves

ROWS, ROW = 2, 512  # of text, and tokens of each
SAMPLES = 2  # strings for each distance
FILLER = 8_192  # tokens of text, of which those between two copies are taken


def choose_layers(stages: Stages, runs: list[RunConfig]) -> None:
    """Measure the layers of a conversion with "auto:K", unless they were measured before.

    Args:
        stages: the conversion.
        runs: of its stages.

    Raises:
        ConfigError: the layers were measured with other settings.
    """
    number = stages.first_auto()
    assert number is not None
    run = runs[number]
    assert run.mixer is not None
    softmax = run.model.n_layers - len(run.mixer_layers())
    if softmax in (0, run.model.n_layers):
        return
    from lowline.linearize.layer_choice import distances, stand_in

    mixer, options = stand_in(run.mixer.name, run.mixer.options)
    teacher = Path(run.tokenizer)
    settings: dict[str, Any] = {
        "weights": fingerprint(teacher),
        "mixer": {"name": mixer, **options},
        "seed": run.training.seed,
        "precision": run.training.precision,
        "data": {"dataset": run.data.dataset, "path": run.data.path},
        "rows": ROWS,
        "seq_len": min(ROW, run.training.seq_len),
        "samples": SAMPLES,
        "distances": list(distances(int(options.get("window", 0)))),
    }
    settings = json.loads(json.dumps(settings))
    held = stages.layer_costs()
    if held is None:
        costs = _measure(run, teacher, settings)
        _print(costs)
        held = stages.layer_costs()
        if held is None:  # no other job for the same output was faster
            held = {"settings": settings, "costs": costs}
            write_text(stages.measured, json.dumps(held, indent=1) + "\n")
    before = dict(leaves(held["settings"]))
    for key, now in leaves(settings):
        if before.get(key) != now:
            raise ConfigError(
                f"{stages.measured} was measured with {key} = {before.get(key)!r}, not {now!r}: "
                "set it back, give another output, or remove that file to measure again"
            )
    kept = costliest(held["costs"], softmax)
    print(f"layers   {', '.join(map(str, kept))} stay softmax, see {stages.measured}", flush=True)


def _measure(run: RunConfig, teacher: Path, settings: dict[str, Any]) -> list[Any]:
    from rich.console import Console
    from rich.progress import Progress

    from lowline.linearize.evaluation.second_copy import SecondCopy
    from lowline.linearize.evaluation.text import Text
    from lowline.linearize.layer_choice import measure_layers, work
    from lowline.linearize.source import load_teacher, load_tokenizer
    from lowline.train.data import open_source

    tokenizer = load_tokenizer(teacher)
    count = settings["rows"] * settings["seq_len"]
    documents = (str(document) for document in open_source(run.data).documents())
    ids = Text.of(documents, tokenizer, count + FILLER).ids
    if len(ids) < count + settings["seq_len"]:
        raise LowlineError(
            f'mixer.layers = "auto:K": the text has {len(ids)} tokens, and measuring layers takes '
            f"{count + settings['seq_len']} at least; give more in [data], or name the layers"
        )
    copies = SecondCopy.of(
        tokenizer,
        distances=tuple(settings["distances"]),
        samples=settings["samples"],
        seed=settings["seed"],
        batch_tokens=1,
        filler=ids[count:],
    )
    model: Any = load_teacher(teacher, dtype=getattr(torch, settings["precision"])).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = dict(settings["mixer"])
    rows_NT = torch.tensor(ids[:count]).view(settings["rows"], -1)
    total = work(count + copies.tokens, model.config.num_hidden_layers)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("measuring layers", total=total)
        return list(
            measure_layers(
                model,
                mixer=options.pop("name"),
                options=options,
                copies=copies,
                rows_NT=rows_NT,
                advance=lambda n: progress.advance(shown, n),
            )
        )


def _print(costs: list[Any]) -> None:
    print("layers   what the conversion of each alone costs, in nats per token")
    for cost in sorted(costs, key=lambda cost: -cost["recall"]):
        print(f"  {cost['layer']:4}  recall {cost['recall']:8.4f}  KL {cost['kl']:8.5f}")
