"""`lowline plan blockwise`: disk, time and GPUs of blockwise transfer, before any of it is paid.

lowline plan blockwise llama3_405b --block-size 1 9
lowline plan blockwise meta-llama/Llama-3.1-8B --tokens 20e6 --device a100
"""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lowline.cola.accounting import Shape
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.show import print_table, wide_console, write_report


def plan_blockwise(
    model: str,
    *,
    block_size: tuple[int, ...] | None = None,
    tokens: float = 50e6,
    epochs: int = 1,
    device: Literal["a100", "h100", "h200", "b200"] = "h100",
    utilization: float = 0.4,
    json: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Print what blockwise transfer of a model costs.

    Args:
        model: a model of the conversions that come with lowline (llama3_8b, llama3_70b,
            llama3_405b, ...), a TOML file with a [model] table, a Hugging Face directory or hub id.
        block_size: Layers per block; a row for each. Default: 1 and 9, or all where there are
            fewer.
        tokens: Tokens whose hidden states are stored.
        epochs: Passes over them.
        device: What trains.
        utilization: Part of its peak that is reached: an assumption, time follows from it.
        json: A file for the numbers.
        json_file: The earlier name of --json.

    Raises:
        ValueError: no such model, or a number out of its range.
    """
    shape = _shape(model)
    from lowline.train.blockwise import plan

    if block_size is None:
        block_size = tuple(dict.fromkeys((1, min(9, shape.n_layers))))
    plans = [
        plan.plan_blockwise(
            shape,
            block_size=size,
            tokens=tokens,
            epochs=epochs,
            device=device,
            utilization=utilization,
        )  # fmt: skip
        for size in block_size
    ]
    title = f"{model}: {shape.n_layers} layers, width {shape.dim}, {tokens / 1e6:g}M tokens"
    columns = ("layers\na block", "blocks", "disk\nTB", "writing:\nGPUs", "\nhours",
               "a block:\nGPUs", "\nhours", "in all\nGPU hours")  # fmt: skip
    rows = {}
    for row in plans:
        hours = row.teacher_seconds / 3600, row.block_seconds / 3600
        total = row.teacher_devices * hours[0] + row.devices * hours[1]
        rows[str(row.block_size)] = [
            *(str(row.blocks), f"{row.disk / 1e12:,.2f}"),
            *(str(row.teacher_devices), f"{hours[0]:,.2f}", str(row.block_devices)),
            *(f"{hours[1]:,.2f}", f"{total:,.1f}"),
        ]
    console = wide_console()
    print_table(console, title, columns, rows)
    console.print(
        "writing: the teacher's forward pass that writes every block's inputs; then all blocks can "
        f"train at once.\nhours: on {device}, at {utilization:.0%} of its bf16 peak: an assumption"
    )
    write_report([asdict(row) for row in plans], json or json_file)


def _shape(model: str) -> Shape:
    from lowline.train.config.shipped import find_config, shipped_configs

    known = {
        name.removeprefix("lowline_"): path
        for name, path in shipped_configs().items()
        if name.startswith("lowline_")
    }
    path = known.get(model) or shipped_configs().get(model)
    if path is None and model.endswith(".toml"):
        path = find_config(model)
    if path is not None:
        from lowline.train.config.stages import model_of
        from lowline.train.config.tables import read_layers
        from lowline.train.cost.parameters import shape_of_model

        return shape_of_model(*model_of(path, read_layers(path)[0]))
    if not Path(model).exists() and "/" not in model:
        near = difflib.get_close_matches(model, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LowlineError(
            f"{model}: no such model; {hint}The names are {', '.join(known)}; a TOML file, a "
            "Hugging Face directory or a hub id OWNER/NAME is accepted, too"
        )
    check_source(model)
    from lowline.train.cost.parameters import shape_of_model
    from lowline.train.hf.config import config_from_hf

    return shape_of_model(*config_from_hf(model))
