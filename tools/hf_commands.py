"""`lowline export`, `lowline import` and `lowline generate`.

lowline export outputs/demo_cola exported/
lowline generate exported/ --prompt "A list is" --max-new-tokens 64
lowline import HuggingFaceTB/SmolLM2-135M --output smollm2/ > model.toml
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]


def export(
    checkpoint: Path, output: Path, *, dtype: DType = "float32", overwrite: bool = False
) -> None:
    """Write a training checkpoint as a Hugging Face directory.

    Args:
        checkpoint: A run's output folder (its latest step is taken), or one step folder.
        output: The directory to make.
        dtype: Of the weights.
        overwrite: Replace an earlier export.
    """
    from lowline.tools.export import export

    folder = export(checkpoint, output, dtype=dtype, overwrite=overwrite)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def import_tables(
    source: str,
    *,
    output: Path | None = None,
    gguf_file: str | None = None,
    overwrite: bool = False,
) -> None:
    """Print the [model], [cola] and [checkpoint] tables under which a Hugging Face model trains.

    Args:
        source: A directory, a GGUF file, or a hub id.
        output: Copy the weights to this directory, which a hub model or a GGUF file needs.
        gguf_file: The GGUF file to read of a directory or hub id that holds several.
        overwrite: Replace OUTPUT if it is a Hugging Face directory.
    """
    import tomli_w

    from lowline.train.hf import config_from_hf

    if source.endswith(".gguf") and gguf_file is None:
        source, gguf_file = str(Path(source).parent), Path(source).name
    if output is None and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no directory of safetensors: give --output to make one")
    model, cola = config_from_hf(source, gguf_file=gguf_file)
    if output is not None:
        from lowline.tools.export import import_weights

        import_weights(source, output, gguf_file=gguf_file, overwrite=overwrite)
    weights = str(output or source)
    tables = {
        "tokenizer": weights,
        "model": _set_fields(model),
        "cola": _set_fields(cola),
        "checkpoint": {"initial_weights": weights},
    }
    print(tomli_w.dumps({name: table for name, table in tables.items() if table}), end="")


def _set_fields(section: Any) -> dict[str, Any]:
    """A section's fields that differ from their defaults."""
    return {
        f.name: value if not dataclasses.is_dataclass(value) else _set_fields(value)
        for f in dataclasses.fields(section)
        if (value := getattr(section, f.name)) != f.default
    }


def generate(
    model: str,
    *,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DType = "float32",
) -> str:
    """Continue a prompt, printing the text while it is made.

    Args:
        model: A Hugging Face directory (exported or not) or a hub id.
        prompt: The text to continue.
        max_new_tokens: Stop after so many tokens, if the model does not end the text before.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample among the likeliest tokens that hold this share of the probability.
        seed: Of the sampling.
        dtype: To compute in.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: no such model, an empty prompt, or a number out of its range.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    import lowline.cola.hf  # noqa: F401  (registers cola_llama)

    if temperature < 0:
        raise ValueError(f"temperature = {temperature}; 0 is greedy, above 0 samples")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}; it lies in (0, 1]")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}; at least 1")
    try:
        body = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: no Hugging Face model there (working directory {Path.cwd()}); a training "
            f"checkpoint becomes one with `lowline export`: {error}"
        ) from None
    body.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(prompt, return_tensors="pt").to(body.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"prompt = {prompt!r} has no tokens; give some text to continue")
    inputs.pop("token_type_ids", None)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    tokens = body.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
