"""`lowline export`: a training checkpoint as a Hugging Face directory.

lowline export outputs/demo_cola exported/
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from lowline.command_line import DType


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: DType | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a training checkpoint as a Hugging Face directory.

    Args:
        checkpoint: A run's output folder (its latest step is taken), or one step folder.
        output: The directory to make.
        dtype: Of the weights. Default: that of the checkpoint's weights, or of the model that was
            converted where the checkpoint stores what was not trained in another.
        adapter: Leave LoRA's factors out of them; OUTPUT/adapter has those, in PEFT's format.
        overwrite: Replace an earlier export.
    """
    from lowline.train.config.folder import check_output, find_checkpoint

    find_checkpoint(checkpoint)  # mistakes are reported before torch is imported
    check_output(output, overwrite)
    from lowline.quiet import quiet_libraries
    from lowline.train.hf.export import export

    quiet_libraries()
    folder = export(checkpoint, output, dtype=dtype, adapter=adapter, overwrite=overwrite)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    print(next_step(folder))


def next_step(model: Path) -> str:
    """Return the line that says how to try a model."""
    return f"try it   lowline generate {quote(str(model))} 'Once upon a time'"
