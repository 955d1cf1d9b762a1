"""`lowline generate`: a model continues a prompt.

lowline generate exported/ "A list is" --max-new-tokens 64
lowline generate converted/ "What is a list?" --chat --stats
lowline generate converted/ "In short:" --context read.safetensors
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.command_line import DType
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.commands.context import after_context, read_context

if TYPE_CHECKING:
    from transformers import TextStreamer


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
    context: Path | None = None,
    stats: bool = False,
) -> str:
    """Continue a prompt; the text is printed as it is generated.

    Args:
        model: A Hugging Face directory (exported, converted or neither), a hub id or a GGUF file.
        prompt: The text to continue.
        chat: Send the prompt as a message, in the model's chat template, and print the answer.
        max_new_tokens: At most so many tokens are generated.
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: Sample among the most likely tokens that hold this share of the probability.
        seed: The seed of the sampling.
        dtype: The type that is computed in.
        context: What the model has read before, a file of `lowline context save`; the prompt
            follows it.
        stats: Print speed, and the bytes of state between tokens, to stderr.

    Returns:
        The prompt and its continuation; with `chat` the answer.

    Raises:
        ValueError: no such model, an empty prompt, no chat template, a number out of its range,
            or the context of another model.
    """
    if temperature < 0:
        raise LowlineError(f"temperature = {temperature}; 0 is greedy, above 0 samples")
    if not 0 < top_p <= 1:
        raise LowlineError(f"top_p = {top_p}; it lies in (0, 1]")
    if max_new_tokens < 1:
        raise LowlineError(f"max_new_tokens = {max_new_tokens}; at least 1")
    check_source(model)
    import torch
    from transformers import TextStreamer

    from lowline.linearize.source import load_teacher, load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    held = None if context is None else read_context(context)
    tokenizer = load_tokenizer(model)
    body: Any = load_teacher(model, dtype=getattr(torch, dtype)).eval()
    body.to("cuda" if torch.cuda.is_available() else "cpu")
    begins = not chat and held is None  # with what the tokenizer puts before every text
    inputs: Any = tokenizer(_asked(tokenizer, prompt, model) if chat else prompt,
                            add_special_tokens=begins, return_tensors="pt")  # fmt: skip
    if inputs["input_ids"].shape[1] == 0:
        raise LowlineError(f"prompt = {prompt!r} has no tokens; give some text to continue")
    inputs = {"input_ids": inputs["input_ids"].to(body.device)}
    before = 0
    if held is not None:
        held.attach(body)
        inputs["input_ids"] = after_context(held, inputs["input_ids"], tokenizer)
        inputs["past_key_values"], before = held, held.get_seq_length()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    printed = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    streamer = _Clocked(printed, skip=before)
    made = body.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    if stats:
        print(_stats(body.config, made.past_key_values, streamer.times), file=sys.stderr)
    start = inputs["input_ids"].shape[1] if chat else before
    return str(tokenizer.decode(made.sequences[0, start:], skip_special_tokens=True))


def _asked(tokenizer: Any, message: str, model: str) -> str:
    """Return a user's message as the model's chat template has it, up to where the answer
    begins.
    """
    if tokenizer.chat_template is None:
        raise LowlineError(
            f"chat: {model} has no chat template; leave out --chat to continue a text"
        )
    from lowline.train.data.template import TemplateRefusalError, render_chat

    messages = [{"role": "user", "content": message}]
    try:
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    except TemplateRefusalError as error:
        raise LowlineError(f"chat: {error}") from error


class _Clocked:
    """A streamer that notes when the prompt and each token came, before another prints them.

    `skip` tokens at the start of the prompt are not printed.
    """

    def __init__(self, streamer: TextStreamer, skip: int) -> None:
        self.streamer, self.skip = streamer, skip
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if not self.times:
            value = value[:, self.skip :]
        self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _stats(config: Any, cache: Any, times: list[float]) -> str:
    """Return one line about speed and memory."""
    from lowline.linearize.body.cache import break_even_length, state_bytes
    from lowline.linearize.body.hf import LinearizedConfig

    new, first = len(times) - 1, times[1] - times[0]
    said = f"{new} tokens, the first after {first:.2f} s"
    if new > 1:
        said += f", the others at {(new - 1) / (times[-1] - times[1]):.1f} tokens/s"
    held, seen = state_bytes(cache), cache.get_seq_length()
    if isinstance(config, LinearizedConfig) and config.converted_layers():
        length = break_even_length(config)
        even = "never as much" if length is None else f"as much as the keys and values of {length}"
        return f"{said}; {held / 1e6:.2f} MB held between tokens, {even} tokens in those layers"
    return f"{said}; {held / 1e6:.2f} MB held between tokens, the keys and values of {seen} tokens"
