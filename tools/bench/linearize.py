"""`lowline bench linearize`: what a step of each stage costs, against the teacher's forward pass.

    lowline bench linearize configs/linearize/lolcats_smollm2_135m.toml --repeats 5
    lowline bench linearize lolcats_llama3_1b.toml --model.n_layers=2 --training.seq_len=512

The model is that of the file's [model] with random weights, the text the embedded one; what the
stage before would have learnt makes no difference to time. A step is the trainer's, loading of data
included; the teacher reads as many tokens, its logits included, without gradients. The two take
turns, and their ratio is the median of the turns' own (`lowline.tools.bench.timing`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.command_line import Keys
from lowline.tools.bench.pretrain import trainer_step
from lowline.tools.bench.timing import (
    at_least_one,
    interleave,
    machine,
    ratio,
    threads_of_operators,
)
from lowline.tools.show import print_table, wide_console, write_report

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig


def bench_linearize(
    config: str,
    *,
    repeats: int = 5,
    threads: int = 1,
    json: Path | None = None,
    overrides: Keys = (),
) -> dict[str, Any]:
    """Measure a step of every stage of a conversion on this CPU.

    Args:
        config: A file of stages, or the name of one that `lowline configs` lists.
        repeats: Turns; medians are over these.
        threads: Threads per operator.
        json: A file for the numbers.
        overrides: Keys of the configuration.

    Returns:
        What `json` holds: "machine", and of each stage the tokens of a step, the timings in seconds
        and the ratio.

    Raises:
        ValueError: a number that is not positive, or a file or key that is not right.
    """
    from lowline.train.config.shipped import find_config

    at_least_one(repeats=repeats, threads=threads)
    path = find_config(config)
    from lowline.train.config.stages import load_stages

    stages = load_stages(path, overrides)
    report: dict[str, Any] = {"config": config, "machine": machine(threads), "stages": {}}
    with threads_of_operators(threads), tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        for number, name in enumerate(stages.names):
            run = _alone(stages.run(number, teacher=teacher), Path(folder) / name)
            if run.objective.needs_teacher and not teacher.exists():
                save_random(run, teacher)
            report["stages"][name] = bench_stage(run, repeats)
    _print(report, repeats)
    write_report(report, json)
    return report


def _alone(run: RunConfig, output: Path) -> RunConfig:
    """Return the run of a stage as it steps, without what came before it and what it leaves."""
    return replace(
        run,
        output=str(output),
        tokenizer="embedded",
        data=replace(run.data, dataset="embedded"),
        checkpoint=replace(run.checkpoint, enable=False, initial_weights=None),
        evaluation=replace(run.evaluation, enable=False),
        metrics=replace(run.metrics, log_every=1_000_000),
        objective=replace(run.objective, calibration_steps=0),
    )


def save_random(run: RunConfig, folder: Path) -> None:
    """Write the dense model of a run with random weights, as a Hugging Face directory."""
    from transformers import AutoModelForCausalLM

    from lowline.quiet import quiet_libraries
    from lowline.train.hf.config import config_to_hf

    quiet_libraries()
    config = config_to_hf(run.model, run.cola, max_seq_len=run.training.seq_len)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)


def bench_stage(run: RunConfig, repeats: int) -> dict[str, Any]:
    """Measure the time per step of a run beside its teacher's forward pass over as many tokens."""
    with ExitStack() as stack:
        step, trainer = trainer_step(run, stack)
        forward = teacher_forward(run, next(iter(trainer.dataloader))[0])
        timings = interleave({"teacher": forward, "step": step}, repeats)
    return {
        "tokens": run.training.global_batch_size * run.training.seq_len,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "step_over_teacher": ratio(timings["step"], timings["teacher"]),
    }


def teacher_forward(run: RunConfig, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs what a run converts over the tokens of a step, given a local
    batch.
    """
    import torch

    from lowline.train.config.run import default_objective
    from lowline.train.model.build import build_model_config

    optimizer = replace(run.optimizer, mixer_lr=None)
    plain = replace(run, mixer=None, lora=None, objective=default_objective(), optimizer=optimizer)
    model = build_model_config(plain).build()
    with torch.no_grad():
        model.init_states()
    batches = run.training.global_batch_size // len(batch["input"])

    @torch.no_grad()
    def forward() -> None:
        for _ in range(batches):
            model(batch["input"], positions=batch["positions"])

    return forward


def _print(report: dict[str, Any], repeats: int) -> None:
    columns = ("stage", "tokens", "teacher's\nforward, s", "step, s", "step /\nteacher",
               "the same in\nCPU time")  # fmt: skip
    rows = {}
    for name, stage in report["stages"].items():
        seconds, over = stage["seconds"], stage["step_over_teacher"]
        rows[name] = [
            *(f"{stage['tokens']:,}", f"{seconds['teacher']['wall']:.3f}"),
            *(f"{seconds['step']['wall']:.3f}", f"{over['wall']:.2f}x", f"{over['cpu']:.2f}x"),
        ]
    title = f"{report['config']}, {report['machine']['threads']} thread(s), medians of {repeats}"
    print_table(wide_console(), title, columns, rows)
