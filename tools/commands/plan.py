"""`lowline plan blockwise`: disk, time and GPUs of blockwise transfer, before any of it is paid.

lowline plan blockwise llama3_405b --block-size 1 9
lowline plan blockwise meta-llama/Llama-3.1-8B --tokens 20e6 --device a100
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from lowline.cola.accounting import Shape


def plan_blockwise(
    model: str,
    *,
    block_size: tuple[int, ...] = (1, 9),
    tokens: float = 50e6,
    epochs: int = 1,
    device: Literal["a100", "h100", "h200", "b200"] = "h100",
    utilization: float = 0.4,
    json_file: Path | None = None,
) -> None:
    """Print what blockwise transfer of a model costs.

    Args:
        model: a model of the conversions that come with lowline (llama3_8b, llama3_70b,
            llama3_405b, ...), a TOML file with a [model] table, a Hugging Face directory or hub id.
        block_size: Layers a block; a row for each.
        tokens: Tokens whose hidden states are stored.
        epochs: Passes over them.
        device: What trains.
        utilization: Part of its peak that is reached: an assumption, time follows from it.
        json_file: A file for the numbers.

    Raises:
        ValueError: no such model, or a number out of its range.
    """
    from lowline.train.blockwise import plan

    shape = _shape(model)
    plans = [
        plan.plan_blockwise(
            shape,
            tokens=tokens,
            block_size=size,
            epochs=epochs,
            device=device,
            utilization=utilization,
        )
        for size in block_size
    ]
    title = f"{model}: {shape.n_layers} layers, width {shape.dim}, {tokens / 1e6:g}M tokens"
    table = Table(title=title)
    for column in ("layers\na block", "blocks", "disk\nTB", "writing:\nGPUs", "\nhours",
                   "a block:\nGPUs", "\nhours", "in all\nGPU hours"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in plans:
        hours = row.teacher_seconds / 3600, row.block_seconds / 3600
        total = row.teacher_devices * hours[0] + row.devices * hours[1]
        table.add_row(
            *(str(row.block_size), str(row.blocks), f"{row.disk / 1e12:,.2f}"),
            *(str(row.teacher_devices), f"{hours[0]:,.2f}", str(row.block_devices)),
            *(f"{hours[1]:,.2f}", f"{total:,.1f}"),
        )
    console = Console()
    console.print(table)
    console.print(
        "writing: the teacher's forward pass that writes every block's inputs; then all blocks can "
        f"train at once.\nhours: on {device}, at {utilization:.0%} of its bf16 peak: an assumption"
    )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in plans], indent=2) + "\n")


def _shape(model: str) -> Shape:
    from lowline.train.config.stages import model_of
    from lowline.train.config.tables import read_layers
    from lowline.train.cost.memory import shape_of_model
    from lowline.train.hf.config import config_from_hf

    known = files("lowline.configs") / "linearize" / f"lowline_{model}.toml"
    if known.is_file():
        return shape_of_model(*model_of(Path(str(known)), read_layers(Path(str(known)))[0]))
    if model.endswith(".toml"):
        return shape_of_model(*model_of(Path(model), read_layers(Path(model))[0]))
    return shape_of_model(*config_from_hf(model))
