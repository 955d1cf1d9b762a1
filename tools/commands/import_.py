"""`lowline import`: the configuration under which a Hugging Face model trains.

lowline import HuggingFaceTB/SmolLM2-135M --output smollm2/ > model.toml
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.train.config.folder import check_output

START = {"steps": 100, "seq_len": 512, "global_batch_size": 8}
HEADER = """\
# Continues the training of {name}; `lowline train FILE` runs it.
# [data] is the text that comes with lowline, a small start: name your own there, and raise
# training.steps and training.global_batch_size to what it needs.
"""


def import_tables(
    source: str,
    *,
    output: Path | None = None,
    gguf_file: str | None = None,
    overwrite: bool = False,
) -> None:
    """Print the configuration under which a Hugging Face model trains on, as TOML.

    It runs as it is, on a small text; [training], [optimizer] and [data] are there to be changed.

    Args:
        source: A directory, a GGUF file, or a hub id.
        output: Copy the weights to this directory, which a hub model or a GGUF file needs.
        gguf_file: The GGUF file to read of a directory or hub id that holds several.
        overwrite: Replace OUTPUT if it is a Hugging Face directory.
    """
    check_source(source)
    if source.endswith(".gguf") and gguf_file is None:
        source, gguf_file = str(Path(source).parent), Path(source).name
    if output is None and not (Path(source) / "config.json").is_file():
        raise LowlineError(
            f"{source} is not a directory of safetensors: give --output, where its weights are "
            "copied to"
        )
    if output is not None:
        check_output(output, overwrite)  # before torch is imported
    import tomli_w

    from lowline.quiet import quiet_libraries
    from lowline.train.hf.config import config_from_hf

    quiet_libraries()
    model, cola = config_from_hf(source, gguf_file=gguf_file)
    if output is not None:
        from lowline.train.hf.export import import_weights

        import_weights(source, output, gguf_file=gguf_file, overwrite=overwrite)
    weights = str(output or source)
    tables = {
        "output": f"outputs/{Path(weights).resolve().name}",
        "tokenizer": weights,
        "model": set_fields(model),
        "cola": set_fields(cola),
        "checkpoint": {"initial_weights": weights},
        "training": START | {"seq_len": min(START["seq_len"], model.max_seq_len or 1 << 30)},
        "optimizer": {"lr": 1e-5},
        "schedule": {"kind": "cosine"},
        "data": {"dataset": "embedded"},
    }
    print(HEADER.format(name=Path(source).name), end="")
    print(tomli_w.dumps({name: table for name, table in tables.items() if table}), end="")


def set_fields(section: Any) -> dict[str, Any]:
    """Return a section's fields that differ from their defaults."""
    return {
        f.name: value if not dataclasses.is_dataclass(value) else set_fields(value)
        for f in dataclasses.fields(section)
        if (value := getattr(section, f.name)) != f.default
    }
