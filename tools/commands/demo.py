"""`lowline demo`: dense, shrunk dense and low rank at equal FLOPs, on real text.

Each model is trained by the command a user would type, `torchrun --nproc_per_node=2 -m
lowline.train --config configs/demo_*.toml`, on the English documentation inside CPython. What they
did is read back from their output folders: a table, a plot of the loss against FLOPs and tokens,
and the low-rank model as a Hugging Face directory from which a new process generates text.

All have Muon for the matrices of their blocks, each at the learning rate that was best for it after
1M tokens (docs/dev/log.md), and train until they have used the FLOPs of the low-rank model's run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.files import write_text
from lowline.plotting import colour, finish, new_figure, save_plot
from lowline.tools.launch import lowline, train

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig

LOW_RANK = "cola2"
MODELS = ("dense", "shrunk", LOW_RANK)  # dense made narrower until a token costs low rank's FLOPs
MUON = ("--optimizer.name=muon", "--optimizer.lr=3e-3", "--optimizer.muon_lr=5e-3")
OVERRIDES = {"dense": MUON, "shrunk": MUON, LOW_RANK: ()}
PROMPT = "Return a new list containing"
TURNS = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run reported."""

    name: str
    run: RunConfig
    losses: dict[int, float]
    memory_gib: dict[int, float]
    perplexity: float

    @property
    def flops_per_step(self) -> float:
        return _flops_per_token(self.run) * _tokens_per_step(self.run)

    def row(self) -> dict[str, Any]:
        """Return the table's columns."""
        from lowline.cola.accounting import parameters, saved_by_model
        from lowline.train.cost.memory import policy_of, shape_of

        shape, policy, steps = shape_of(self.run), policy_of(self.run), self.run.training.steps
        return {
            "model": self.name,
            "parameters": parameters(shape).total,
            "flops_per_token": _flops_per_token(self.run),
            "saved_bytes_per_token": saved_by_model(shape, policy, device="cpu").bytes(4),
            "tokens": steps * _tokens_per_step(self.run),
            "flops": steps * self.flops_per_step,
            "peak_memory_gib": max(self.memory_gib.values()),
            "perplexity": self.perplexity,
        }


def demo(output: Path = Path("outputs/demo"), *, processes: int = 2, steps: int = 300) -> int:
    """Pretrain dense, shrunk dense and low-rank models at equal FLOPs, compare, export, generate.

    Args:
        output: Folder of the runs, the table (results.json) and the plot (loss.png).
        processes: Number of processes a run is sharded over.
        steps: Steps of the low-rank model; the others get as many as cost the same FLOPs.
    """
    from rich.console import Console

    from lowline.tools.bench.pretrain import load_run

    console = Console()
    target = _flops_per_token(load_run(f"demo_{LOW_RANK}"))
    for name in MODELS:
        console.rule(f"demo_{name}")
        equal = round(steps * target / _flops_per_token(load_run(f"demo_{name}")))
        _train(name, output / name, processes, equal)
    results = {name: _read(name, output / name) for name in MODELS}
    rows = [result.row() for result in results.values()]
    console.rule("the time of a step, in turns")
    for row, seconds in zip(rows, _seconds_per_token(results), strict=True):
        row["tokens_per_second"] = 1 / seconds
    write_text(output / "results.json", json.dumps(rows, indent=2))
    _print_table(console, rows)
    _print_winner(console, results)
    _plot(list(results.values()), output / "loss.png")
    console.print(f"plot: {output / 'loss.png'}   numbers: {output / 'results.json'}")
    console.print(f"TensorBoard: tensorboard --logdir {output}")

    console.rule("CoLA-M: the same model, less memory")
    equal_losses = _compare_memory(console, results[LOW_RANK], output / "colam", processes)

    console.rule("the low-rank model as a Hugging Face directory, in a new process")
    exported = output / f"{LOW_RANK}-hf"
    _command("export", str(output / LOW_RANK), str(exported), "--overwrite")
    _command("generate", str(exported), PROMPT, "--temperature", "0.8", "--max-new-tokens", "48")
    return 0 if equal_losses else 1


def _compare_memory(console: Any, plain: Result, output: Path, processes: int) -> bool:
    """Train the first tenth of the low-rank model's steps with CoLA-M; return if losses agree."""
    steps = plain.run.schedule.warmup_steps  # to its end the learning rates are the same
    options = (f"--schedule.warmup={steps}", "--cola.memory=cola-m")
    _train(LOW_RANK, output, processes, steps, *options)
    less = _read("colam", output)
    both = sorted(plain.losses.keys() & less.losses.keys())
    equal = sum(plain.losses[step] == less.losses[step] for step in both)
    saved = [result.row()["saved_bytes_per_token"] / 1e3 for result in (plain, less)]
    peaks = [max(result.memory_gib[step] for step in both) for result in (plain, less)]
    console.print(
        f"CoLA-M: equal losses in {equal} of {len(both)} logged steps; {saved[1]:.0f} kB of "
        f"activations kept per token where CoLA keeps {saved[0]:.0f}; peak memory of a process "
        f"{peaks[1]:.2f} GiB, CoLA {peaks[0]:.2f}"
    )
    return equal == len(both)


def _train(name: str, output: Path, processes: int, steps: int, *options: str) -> None:
    with as_file(files("lowline.configs") / f"demo_{name}.toml") as config:
        arguments = ["--config", str(config), f"--output={output}", f"--training.steps={steps}"]
        _check(train(*arguments, *OVERRIDES[name], *options, processes=processes), f"demo_{name}")


def _command(*words: str) -> None:
    _check(lowline(*words), words[0])


def _check(code: int, what: str) -> None:
    if code:
        raise SystemExit(f"lowline demo: {what} ended with {code}")


def _read(name: str, output: Path) -> Result:
    from lowline.train.config.load import load_config
    from lowline.train.engine.metrics import read_metrics

    records = read_metrics(output)
    steps = [r for r in records if "loss" in r]
    return Result(
        name=name,
        run=load_config(output / "config.toml"),
        losses={r["step"]: r["loss"] for r in steps},
        memory_gib={r["step"]: r["memory_gib"] for r in steps},
        perplexity=[r["eval_perplexity"] for r in records if "eval_perplexity" in r][-1],
    )


def _flops_per_token(run: RunConfig) -> float:
    from lowline.cola.accounting import flops_per_token
    from lowline.train.cost.memory import shape_of

    return flops_per_token(shape_of(run), run.training.seq_len)


def _tokens_per_step(run: RunConfig) -> int:
    return run.training.global_batch_size * run.training.seq_len


def _seconds_per_token(results: dict[str, Result]) -> list[float]:
    """Measure forward + backward of every model on one thread; they take turns."""
    from lowline.tools.bench.pretrain import built_model, model_step, random_batch
    from lowline.tools.bench.timing import Cases, interleave, threads_of_operators

    with threads_of_operators(1):
        steps: Cases = {
            name: model_step(built_model(result.run), random_batch(result.run))
            for name, result in results.items()
        }
        timings = interleave(steps, TURNS)
    return [timings[n].wall / _tokens_per_step(result.run) for n, result in results.items()]


def _print_table(console: Any, rows: list[dict[str, Any]]) -> None:
    from lowline.tools.show import print_table

    columns = ("model", "params (M)", "MFLOPs/token", "tokens", "TFLOPs", "tokens/s", "perplexity")
    print_table(
        console,
        "equal FLOPs; held-out perplexity; tokens/s: forward + backward, one thread, fp32",
        columns,
        {
            row["model"]: (
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['flops_per_token'] / 1e6:.1f}",
                f"{row['tokens']:,}",
                f"{row['flops'] / 1e12:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['perplexity']:.1f}",
            )
            for row in rows
        },
    )


def _print_winner(console: Any, results: dict[str, Result]) -> None:
    ours = results[LOW_RANK].perplexity
    best = min((r for r in results.values() if r.name != LOW_RANK), key=lambda r: r.perplexity)
    less = ours / best.perplexity - 1
    if less < 0:
        console.print(f"low rank's perplexity is {-less:.1%} below that of {best.name}")
    else:
        console.print(
            f"low rank's perplexity is {less:.1%} above that of {best.name}: it does not win at "
            "this budget. docs/results.md shows from which on it does."
        )


def _plot(results: list[Result], path: Path) -> None:
    figure, axes = new_figure(columns=2, width=5.5, height=4)
    for number, result in enumerate(results):
        label = f"{result.name}: {result.perplexity:.1f} held-out perplexity"
        scales = (result.flops_per_step / 1e12, _tokens_per_step(result.run) / 1e3)
        for panel, scale in zip(axes, scales, strict=True):
            x = [step * scale for step in result.losses]
            panel.plot(x, list(result.losses.values()), color=colour(number), label=label)
    finish(axes[0], x="TFLOPs", y="training loss (nats per token)")
    finish(axes[1], x="thousand tokens", y="training loss (nats per token)")
    axes[0].legend()
    figure.suptitle("lowline demo")
    save_plot(figure, path)
