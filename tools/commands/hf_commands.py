"""`lowline export`, `lowline import` and `lowline generate`.

lowline export outputs/demo_cola exported/
lowline generate exported/ "A list is" --max-new-tokens 64
lowline generate converted/ "What is a list?" --chat --stats
lowline import HuggingFaceTB/SmolLM2-135M --output smollm2/ > model.toml
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

from transformers import TextStreamer

from lowline.errors import LowlineError

DType = Literal["float32", "bfloat16", "float16"]


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: DType = "float32",
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a training checkpoint as a Hugging Face directory.

    Args:
        checkpoint: A run's output folder (its latest step is taken), or one step folder.
        output: The directory to make.
        dtype: Of the weights.
        adapter: Leave LoRA's factors out of them; OUTPUT/adapter has those, in PEFT's format.
        overwrite: Replace an earlier export.
    """
    from lowline.train.hf.export import export

    folder = export(checkpoint, output, dtype=dtype, adapter=adapter, overwrite=overwrite)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
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

    from lowline.train.hf.config import config_from_hf

    if source.endswith(".gguf") and gguf_file is None:
        source, gguf_file = str(Path(source).parent), Path(source).name
    if output is None and not (Path(source) / "config.json").is_file():
        raise LowlineError(f"{source} is no directory of safetensors: give --output to make one")
    model, cola = config_from_hf(source, gguf_file=gguf_file)
    if output is not None:
        from lowline.train.hf.export import import_weights

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
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DType = "float32",
    stats: bool = False,
) -> str:
    """Continue a prompt, printing the text while it is made.

    Args:
        model: A Hugging Face directory (exported, converted or neither), a hub id or a GGUF file.
        prompt: The text to continue.
        chat: Take the prompt as a message, through the model's chat template, and print the answer.
        max_new_tokens: Stop after so many tokens, if the model does not end the text before.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample among the likeliest tokens that hold this share of the probability.
        seed: Of the sampling.
        dtype: To compute in.
        stats: Say on stderr how fast it was, and what the model held between tokens.

    Returns:
        The prompt and its continuation; with `chat` the answer.

    Raises:
        ValueError: no such model, an empty prompt, no chat template, or a number out of its range.
    """
    import torch

    from lowline.linearize.convert import load_teacher, load_tokenizer

    if temperature < 0:
        raise LowlineError(f"temperature = {temperature}; 0 is greedy, above 0 samples")
    if not 0 < top_p <= 1:
        raise LowlineError(f"top_p = {top_p}; it lies in (0, 1]")
    if max_new_tokens < 1:
        raise LowlineError(f"max_new_tokens = {max_new_tokens}; at least 1")
    try:
        tokenizer = load_tokenizer(model)
        body: Any = load_teacher(model, dtype=getattr(torch, dtype)).eval()
    except ValueError as error:
        hint = "a training checkpoint becomes a model with `lowline export`"
        raise LowlineError(f"{error}; {hint}") from None
    body.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs: Any = tokenizer(_asked(tokenizer, prompt, model) if chat else prompt,
                            add_special_tokens=not chat, return_tensors="pt")  # fmt: skip
    if inputs["input_ids"].shape[1] == 0:
        raise LowlineError(f"prompt = {prompt!r} has no tokens; give some text to continue")
    inputs.pop("token_type_ids", None)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    streamer = _Clocked(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    made = body.generate(
        **inputs.to(body.device),
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    if stats:
        print(_stats(body.config, made.past_key_values, streamer.times), file=sys.stderr)
    start = inputs["input_ids"].shape[1] if chat else 0
    return str(tokenizer.decode(made.sequences[0, start:], skip_special_tokens=True))


def _asked(tokenizer: Any, message: str, model: str) -> str:
    """A user's message as the model's chat template has it, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise LowlineError(
            f"chat: {model} has no chat template; leave out --chat to continue a text"
        )
    messages = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class _Clocked(TextStreamer):
    """Prints the text, and keeps when the prompt and each token came."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def _stats(config: Any, cache: Any, times: list[float]) -> str:
    """One line about speed and memory."""
    from lowline.linearize.body.cache import break_even_length, state_bytes
    from lowline.linearize.body.hf import LinearizedConfig

    new, first = len(times) - 1, times[1] - times[0]
    said = f"{new} tokens, the first after {first:.2f} s"
    if new > 1:
        said += f", the others at {(new - 1) / (times[-1] - times[1]):.1f} a second"
    held, seen = state_bytes(cache), cache.get_seq_length()
    if isinstance(config, LinearizedConfig) and config.converted_layers():
        length = break_even_length(config)
        even = "never as many" if length is None else f"as many as keys and values of {length}"
        return f"{said}; {held / 1e6:.2f} MB held between tokens, {even} tokens in those layers"
    return f"{said}; {held / 1e6:.2f} MB held between tokens, keys and values of {seen}"
