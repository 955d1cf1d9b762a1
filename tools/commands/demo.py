"""`lowline demo`: dense, CoLA and CoLA-M on real text, compared.

Each model is trained by the command a user would type, `torchrun --nproc_per_node=2 -m
lowline.train --config configs/demo_*.toml`, on the English documentation inside CPython. What they
did is read back from their output folders: a table, a plot of the loss curves, and the CoLA model
as a Hugging Face directory from which a new process generates text.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.plotting import colour, finish, new_figure, save_plot
from lowline.tools.launch import lowline, train

if TYPE_CHECKING:
    from rich.table import Table

    from lowline.train.config.run import RunConfig

MODELS = ("dense", "cola", "colam")
PROMPT = "Return a new list containing"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run reported."""

    name: str
    run: RunConfig
    losses: dict[int, float]
    perplexity: float
    tokens_per_second: float
    memory_gib: float

    def row(self) -> dict[str, Any]:
        """Return the table's columns."""
        from lowline.cola.accounting import flops_per_token, parameters, saved_by_model
        from lowline.train.cost.memory import policy_of, shape_of

        shape, policy = shape_of(self.run), policy_of(self.run)
        return {
            "model": self.name,
            "parameters": parameters(shape).total,
            "flops_per_token": flops_per_token(shape, self.run.training.seq_len),
            "saved_bytes_per_token": saved_by_model(shape, policy, device="cpu").bytes(4),
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_gib": self.memory_gib,
            "perplexity": self.perplexity,
        }


def demo(
    output: Path = Path("outputs/demo"), *, processes: int = 2, steps: int | None = None
) -> int:
    """Pretrain dense, CoLA and CoLA-M, compare them, export CoLA and generate text.

    Args:
        output: Folder of the runs, the table (results.json) and the plot (loss.png).
        processes: Number of processes a run is sharded over.
        steps: Steps a run; default: as its configuration says.
    """
    from rich.console import Console

    console = Console()
    for name in MODELS:
        console.rule(f"demo_{name}")
        _train(name, output / name, processes, steps)
    results = [_read(name, output / name) for name in MODELS]
    rows = [result.row() for result in results]
    (output / "results.json").write_text(json.dumps(rows, indent=2))
    console.print(_table(rows))
    console.print("saved: activations kept for the backward pass; peak: resident memory a process")
    _plot(results, output / "loss.png")
    console.print(f"loss curves: {output / 'loss.png'}   numbers: {output / 'results.json'}")
    console.print(f"TensorBoard: tensorboard --logdir {output}")

    cola, colam = results[1], results[2]
    equal = sum(colam.losses[step] == loss for step, loss in cola.losses.items())
    console.print(
        f"CoLA's and CoLA-M's losses are equal in {equal} of {len(cola.losses)} logged steps"
    )

    console.rule("CoLA as a Hugging Face directory, in a new process")
    exported = output / "cola-hf"
    _command("export", str(output / "cola"), str(exported), "--overwrite")
    _command("generate", str(exported), PROMPT, "--temperature", "0.8", "--max-new-tokens", "48")
    return 0 if equal == len(cola.losses) else 1


def _train(name: str, output: Path, processes: int, steps: int | None) -> None:
    with as_file(files("lowline.configs") / f"demo_{name}.toml") as config:
        arguments = ["--config", str(config), f"--output={output}"]
        if steps is not None:
            arguments += [f"--training.steps={steps}", f"--schedule.warmup_steps={steps // 10}"]
        _check(train(*arguments, processes=processes), f"demo_{name}")


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
        perplexity=[r["eval_perplexity"] for r in records if "eval_perplexity" in r][-1],
        tokens_per_second=statistics.median(r["tokens_per_second"] for r in steps[1:] or steps),
        memory_gib=max(r["memory_gib"] for r in steps),
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="the same data, the same steps, fp32")
    for column in (
        "model",
        "params\n(M)",
        "MFLOPs\n/ token",
        "saved kB\n/ token",
        "tokens\n/ s",
        "peak\nGiB",
        "held-out\nperplexity",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['flops_per_token'] / 1e6:.1f}",
            f"{row['saved_bytes_per_token'] / 1e3:.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_gib']:.2f}",
            f"{row['perplexity']:.2f}",
        )
    return table


def _plot(results: list[Result], path: Path) -> None:
    figure, (axes,) = new_figure(width=7, height=4)
    for number, (result, style) in enumerate(zip(results, ("-", "-", "--"), strict=True)):
        label = f"{result.name}: {result.perplexity:.1f} held-out perplexity"
        line = list(result.losses), list(result.losses.values())
        axes.plot(*line, style, color=colour(number), label=label)
    finish(axes, x="step", y="training loss (nats per token)")
    axes.set_title("lowline demo")
    axes.legend()
    save_plot(figure, path)
