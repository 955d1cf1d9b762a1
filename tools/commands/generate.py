"""`lowline generate`: a model continues a prompt.

lowline generate exported/ "A list is" --max-new-tokens 64
lowline generate converted/ "What is a list?" --chat --stats
lowline generate converted/ "Summarize: ..." --lookup
lowline generate converted/ "A list is" --draft smaller/
lowline generate converted/ "In short:" --context read.safetensors
lowline generate teacher/ --prompts questions.jsonl --output answers.jsonl --chat
lowline generate converted/ --prompts questions.jsonl --output answers.jsonl --engine vllm
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lowline.command_line import DType, Mark, Positional, Weights
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.commands.answers import (
    answer_file,
    asked,
    by_transformers,
    by_vllm,
    check_files,
)
from lowline.tools.commands.context import after_context, read_context

if TYPE_CHECKING:
    from transformers import TextStreamer


LOOKUP = 8  # tokens


def generate(
    model: str,
    *,
    prompt: Positional = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    lookup: Annotated[int | None, Mark("bare", LOOKUP)] = None,
    draft: str | None = None,
    dtype: DType = "float32",
    weights: Weights = "float",
    context: Path | None = None,
    stats: bool = False,
    prompts: Path | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    engine: Literal["transformers", "vllm"] = "transformers",
    memory: float = 2.0,
) -> str:
    """Continue a prompt; the text is printed as it is generated.

    With `prompts` and `output` a file of prompts is answered into a file of answers instead.

    Args:
        model: A Hugging Face directory (exported, converted or neither), a hub id or a GGUF file.
        prompt: The text to continue.
        chat: Send the prompt as a message, in the model's chat template, and print the answer.
        max_new_tokens: At most so many tokens are generated.
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: Sample among the most likely tokens that hold this share of the probability.
        seed: The seed of the sampling.
        lookup: Speculative decoding: propose so many tokens (8 if no number is given) that followed
            the last ones before, in the prompt or the answer, and verify them at once. The result
            is that without it; it pays where the answer repeats parts of the prompt.
        draft: Speculative decoding: a smaller model of the same tokenizer proposes tokens.
        dtype: The type that is computed in.
        weights: int8: those of linear layers are rounded to 8 bits when the model is loaded, which
            decodes faster on a CPU.
        context: What the model has read before, a file of `lowline context save`; the prompt
            follows it.
        stats: Print speed, and the bytes of state between tokens, to stderr.
        prompts: A file of JSON lines, each with a text as "prompt" or a conversation as "messages".
        output: A new file of JSON lines: each prompt with "response", or its messages with the
            answer. Given again after an interruption, the command resumes after its last batch.
            `data.prompt_key = "prompt"` with `data.response_key = "response"`, or
            `data.messages_key = "messages"`, train on it.
        batch_size: Prompts that are answered at once.
        engine: What answers a file of prompts; vllm has to be installed (lowline[vllm]).
        memory: GiB of states, keys and values, for vllm.

    Returns:
        The prompt and its continuation; with `chat` the answer; with `prompts` nothing.

    Raises:
        ValueError: no such model, an empty prompt, no chat template, a number out of its range, a
            draft of another tokenizer, or the context of another model.
    """
    if temperature < 0:
        raise LowlineError(f"temperature = {temperature}; 0 is greedy, above 0 samples")
    if not 0 < top_p <= 1:
        raise LowlineError(f"top_p = {top_p}; it lies in (0, 1]")
    if max_new_tokens < 1:
        raise LowlineError(f"max_new_tokens = {max_new_tokens}; at least 1")
    if lookup is not None and lookup < 1:
        raise LowlineError(f"lookup = {lookup}; at least 1, or leave it out")
    alone = [n for n, v in (("lookup", lookup), ("draft", draft), ("context", context)) if v]
    check_files(prompt, prompts, output, batch_size, [*alone, *["stats"] * stats])
    if lookup is not None and draft is not None:
        raise LowlineError("lookup and draft both propose tokens; give one of them")
    for source in (model,) if draft is None else (model, draft):
        check_source(source)
    if engine == "vllm":
        if prompts is None or output is None:
            raise LowlineError("engine = vllm answers a file of prompts (--prompts, --output)")
        if weights != "float":
            raise LowlineError(f"weights = {weights!r} with engine = vllm: leave it out")
        if memory <= 0:
            raise LowlineError(f"memory = {memory}; above 0")
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        _answer_with_vllm(model, prompts, output, batch_size, dtype, memory, chat, seed, how)
        return ""
    import torch
    from transformers import TextStreamer

    from lowline.cola.drafts import ExactDrafts
    from lowline.cola.int8 import check_int8, to_int8
    from lowline.linearize.source import load_teacher, load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    check_int8(weights, dtype)
    held = None if context is None else read_context(context)
    tokenizer = load_tokenizer(model)
    body: Any = load_teacher(model, dtype=getattr(torch, dtype)).eval()
    body = to_int8(body) if weights == "int8" else body
    body.to("cuda" if torch.cuda.is_available() else "cpu")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if prompts is not None and output is not None:
        how = sampling | {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        answering = by_transformers(body, tokenizer, how)
        answer_file(answering, tokenizer, prompts, output, batch_size, chat=chat, seed=seed)
        return ""
    assert prompt is not None
    begins = not chat and held is None  # with what the tokenizer puts before every text
    inputs: Any = tokenizer(asked(tokenizer, prompt, model) if chat else prompt,
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
    speculation: dict[str, Any] = {}
    speculates = lookup is not None or draft is not None
    if speculates and held is not None and not isinstance(body, ExactDrafts):
        raise LowlineError(
            f"context with lookup or draft: converted and CoLA models only, and {model} is neither"
        )
    if lookup is not None:
        speculation = {"prompt_lookup_num_tokens": lookup}
    elif draft is not None:
        _check_draft(tokenizer, load_tokenizer(draft), model, draft)
        assistant: Any = load_teacher(draft, dtype=getattr(torch, dtype)).eval()
        speculation = {"assistant_model": assistant.to(body.device)}
    torch.manual_seed(seed)
    printed = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    streamer = _Clocked(printed, skip=before)
    made = body.generate(
        **inputs,
        **sampling,
        **speculation,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    if stats:
        print(_stats(body.config, made.past_key_values, streamer), file=sys.stderr)
    if speculation:
        steps, new = len(streamer.times) - 1, sum(streamer.counts)
        print(f"{new} tokens in {steps} steps, {new / steps:.2f} tokens per step, of which "
              f"{new / steps - 1:.2f} were proposed", file=sys.stderr)  # fmt: skip
    start = inputs["input_ids"].shape[1] if chat else before
    return str(tokenizer.decode(made.sequences[0, start:], skip_special_tokens=True))


def _answer_with_vllm(
    model: str,
    prompts: Path,
    output: Path,
    batch_size: int,
    dtype: str,
    memory: float,
    chat: bool,
    seed: int,
    how: dict[str, Any],
) -> None:
    from transformers import GenerationConfig

    from lowline.linearize.serving.offline import Engine
    from lowline.linearize.source import load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    engine = Engine(model, dtype=dtype, memory=int(memory * 2**30), max_requests=batch_size)
    try:  # the tokens at which transformers' `generate` stops
        ends = GenerationConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
    except OSError:
        ends = tokenizer.eos_token_id
    stop = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    answering = by_vllm(engine, tokenizer, how | {"stop": stop})
    answer_file(answering, tokenizer, prompts, output, batch_size, chat=chat, seed=seed)


def _check_draft(tokenizer: Any, other: Any, model: str, draft: str) -> None:
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise LowlineError(
            f"draft = {draft}: its tokenizer is another than that of {model}, token {token!r} is "
            f"{theirs.get(token)} there and {ours.get(token)} here; give a draft of the same one"
        )


class _Clocked:
    """A streamer that notes when the prompt and the tokens of each step came, then prints them.


    `skip` tokens at the start of the prompt are not printed.
    """

    def __init__(self, streamer: TextStreamer, skip: int) -> None:
        self.streamer, self.skip = streamer, skip
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: Any) -> None:
        if self.times:
            self.counts.append(value.numel())
        else:
            value = value[:, self.skip :]
        self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _stats(config: Any, cache: Any, streamer: _Clocked) -> str:
    """Return one line about speed and memory."""
    from lowline.linearize.body.cache import break_even_length, state_bytes
    from lowline.linearize.body.hf import LinearizedConfig

    times, new = streamer.times, sum(streamer.counts)
    said = f"{new} tokens, the first after {times[1] - times[0]:.2f} s"
    if len(times) > 2:
        rest = (new - streamer.counts[0]) / (times[-1] - times[1])
        said += f", the others at {rest:.1f} tokens/s"
    held, seen = state_bytes(cache), cache.get_seq_length()
    if isinstance(config, LinearizedConfig) and config.converted_layers():
        length = break_even_length(config)
        even = "never as much" if length is None else f"as much as the keys and values of {length}"
        return f"{said}; {held / 1e6:.2f} MB held between tokens, {even} tokens in those layers"
    return f"{said}; {held / 1e6:.2f} MB held between tokens, the keys and values of {seen} tokens"
