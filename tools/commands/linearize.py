"""`lowline linearize`: a pretrained Transformer becomes a linear-attention model, in stages.

    lowline linearize SOURCE --config configs/linearize/NAME.toml [--processes N] [--key=value ...]

SOURCE is a hub id, a directory or a GGUF file. `lowline.train` runs the stages of the file
(`lowline.train.config.stages`) one after another and writes what they end with to OUTPUT/model as a
Hugging Face directory; here it is evaluated beside the teacher into OUTPUT/report. Given again, the
same command resumes where it was stopped.

    OUTPUT/teacher       the source as safetensors, where it was something else
    OUTPUT/stages/N-X    the run of each stage: checkpoints, TensorBoard, its configuration
    OUTPUT/model         the converted model
    OUTPUT/report        evaluation: table, JSON, plots

With --block-size K transfer stages run in blocks of K layers, for models too large to train at
once: the inputs of every block are written to disk first (--inputs-dtype, bfloat16 or float32),
then each block trains by itself, and the results are stitched. --blocks 0,3 (or 0-3) trains those
blocks only and stops, so that machines can share them.
"""

from __future__ import annotations

from typing import Any, Literal

from lowline.command_line import DType, Keys, Positional
from lowline.tools.commands.export import next_step
from lowline.tools.commands.train import start
from lowline.train.__main__ import DryRun, InputsDtype
from lowline.train.config.errors import ConfigError


def linearize(
    source: Positional = None,
    *,
    config: str | None = None,
    processes: int | None = None,
    dry_run: DryRun = None,
    block_size: int | None = None,
    blocks: str | None = None,
    inputs_dtype: InputsDtype | None = None,
    dtype: DType | None = None,
    evaluation: Literal["quick", "full", "none"] = "quick",
    overrides: Keys = (),
) -> int:
    """Convert a pretrained Transformer to a linear-attention model, in stages.

    The stages of the configuration run one after another. The result is written to OUTPUT/model as
    a Hugging Face directory, and evaluated beside the model it was made of into OUTPUT/report. The
    same command, given again, resumes where it was stopped. A key is that of every stage; as
    --stage.NAME.KEY=VALUE it is that of one.

    Args:
        source: A hub id, a directory or a GGUF file; default: the configuration's.
        config: A TOML file with stages, or the name of one that `lowline configs` lists.
        processes: Processes on this machine; default: one per GPU, or one.
        dry_run: Print sizes, FLOPs and memory of every stage and stop; with a number, those on so
            many GPUs.
        block_size: Run transfer stages in blocks of so many layers, for models that are too large
            to train at once: the inputs of every block are written to disk first.
        blocks: Train these blocks only and stop, such as 0,3 or 0-3, so that machines can share
            them; none writes the inputs alone.
        inputs_dtype: Of the stored inputs; default: bfloat16.
        dtype: Of the weights in OUTPUT/model; default: that of the source. Another one, given
            later, writes them again; the stages are trained in training.precision.
        evaluation: How much to evaluate at the end.
        overrides: Keys of the configuration.

    Raises:
        ConfigError: a configuration or a source that cannot run.
    """
    from lowline.train.config.shipped import find_config

    if config is None:
        raise ConfigError(
            "--config is missing; give a TOML file with stages, or the name of one that "
            "`lowline configs` lists"
        )
    path = find_config(config)
    from lowline.train.config.stages import load_stages

    load_stages(path, overrides)  # refuses a file without stages
    options: dict[str, Any] = {"source": source, "block_size": block_size, "blocks": blocks,
                               "inputs_dtype": inputs_dtype, "dtype": dtype}  # fmt: skip
    code = start(path, processes, overrides, dry_run=dry_run, **options)
    if code or dry_run is not None or blocks is not None:
        return code
    from lowline.linearize.card import add_to_card
    from lowline.tools.launch import lowline
    from lowline.train.conversion import load_conversion

    conversion = load_conversion(path, overrides, **options)
    model, report = conversion.model, conversion.stages.output / "report"
    if evaluation != "none":
        line = ["--teacher", str(conversion.teacher()), "--output", str(report)]
        code = lowline("evaluate", str(model), *line, *["--quick"] * (evaluation == "quick"))
        add_to_card(model, results=report / "results.json")
        print(f"model    {model}")
    print(next_step(model))
    return code
