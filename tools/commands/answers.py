"""A file of prompts to a file of answers, for `lowline generate --prompts FILE --output FILE`.

Answers are written batch by batch, one write each. A command that is given again takes the batches
that are complete as they are, cuts what follows them, and so ends with the file of one run. Each
batch is sampled with a seed of its own; vLLM samples each prompt with one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError


def check_files(
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    batch_size: int,
    alone: Sequence[str],
) -> None:
    """Raise LowlineError unless a prompt is given, or a file of them with what fits.

    Args:
        alone: options that are given, and are for one prompt.
    """
    if (prompts is None) == (prompt is None):
        raise LowlineError("give one prompt, or a file of them (--prompts FILE --output FILE)")
    if (prompts is None) != (output is None):
        raise LowlineError("prompts and output are files that belong together; give both")
    if prompts is not None and alone:
        raise LowlineError(f"{alone[0]} is for one prompt; leave it out with a file of prompts")
    if prompts is not None and not prompts.is_file():
        raise LowlineError(f"prompts = {prompts} is no file")
    if batch_size < 1:
        raise LowlineError(f"batch_size = {batch_size}; at least 1")


Answering = Callable[[list[str], bool, int], list[str]]
"""From texts, whether they begin with what the tokenizer puts before a text, and a seed, to the
answers."""


def by_transformers(model: Any, tokenizer: Any, how: dict[str, Any]) -> Answering:
    """Return what answers with `generate` of transformers, which is given `how`."""
    import torch

    def answering(texts: list[str], begins: bool, seed: int) -> list[str]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=begins).to(model.device)  # fmt: skip
        torch.manual_seed(seed)
        made = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(made, skip_special_tokens=True)

    return answering


def by_vllm(engine: Any, tokenizer: Any, how: dict[str, Any]) -> Answering:
    """Return what answers with an `Engine` of vLLM's, whose `answer` is given `how`."""

    def answering(texts: list[str], begins: bool, seed: int) -> list[str]:
        ids = tokenizer(texts, add_special_tokens=begins)["input_ids"]
        return tokenizer.batch_decode(
            engine.answer(ids, seed=seed, **how), skip_special_tokens=True
        )

    return answering


def answer_file(
    answering: Answering,
    tokenizer: Any,
    prompts: Path,
    output: Path,
    batch_size: int,
    *,
    chat: bool,
    seed: int,
) -> None:
    """Write the answer to each prompt.

    Args:
        chat: send a "prompt" as a message; "messages" are always sent so.

    Raises:
        LowlineError: a line that is no prompt, or an output that is another file's answers.
    """
    rows = _rows(prompts)
    texts = [_text(tokenizer, row, chat, f"{prompts}, line {line}") for line, row in rows]
    done = _resumed(output, [row for _, row in rows], batch_size)
    with output.open("ab") as file:
        for start in range(done, len(rows), batch_size):
            part = slice(start, start + batch_size)
            sent = any("messages" in row for _, row in rows[part]) or chat
            answers = answering(texts[part], not sent, seed + start)
            lines = [json.dumps(_answered(row, answer), ensure_ascii=False)
                     for (_, row), answer in zip(rows[part], answers, strict=True)]  # fmt: skip
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
            print(f"{start + len(lines)} of {len(rows)} prompts answered", file=sys.stderr)


def _rows(prompts: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the numbers and objects of a file's lines."""
    rows = []
    for line, text in enumerate(prompts.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise LowlineError(f"{prompts}, line {line} is not JSON ({error})") from None
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise LowlineError(
                f'{prompts}, line {line}: write an object with a text as "prompt", or with a list '
                'of {"role", "content"} as "messages"'
            )
        rows.append((line, row))
    if not rows:
        raise LowlineError(f"{prompts} has no prompts; write a JSON object a line")
    if len({"messages" in row for _, row in rows}) > 1:
        raise LowlineError(f'{prompts} has both "prompt" and "messages"; use one of them')
    return rows


def _text(tokenizer: Any, row: dict[str, Any], chat: bool, place: str) -> str:
    value = row.get("messages", row.get("prompt"))
    if isinstance(value, str) != ("prompt" in row) or not value:
        raise LowlineError(f"{place}: {str(value)[:60]!r} is no prompt")
    return asked(tokenizer, value, place) if chat or "messages" in row else value


def _answered(row: dict[str, Any], answer: str) -> dict[str, Any]:
    if "prompt" in row:
        return row | {"response": answer}
    return row | {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _resumed(output: Path, rows: list[dict[str, Any]], batch_size: int) -> int:
    """Return how many prompts have been answered, in complete batches; cut off all that follows.

    Raises:
        LowlineError: the file holds something else.
    """
    if not output.is_file():
        return 0
    held = output.read_bytes().splitlines(keepends=True)
    if held and not held[-1].endswith(b"\n"):  # a kill has cut it short
        held.pop()
    if len(held) < len(rows):
        held = held[: len(held) // batch_size * batch_size]
    for number, line in enumerate(held):
        try:
            found = json.loads(line)
            same = number < len(rows) and found == _answered(rows[number], _answer_of(found))
        except (ValueError, KeyError, TypeError, IndexError):
            same = False
        if not same:
            raise LowlineError(
                f"{output}, line {number + 1} is no answer to prompt {number + 1}; give another "
                "output, or remove it"
            )
    os.truncate(output, sum(map(len, held)))
    return len(held)


def _answer_of(row: dict[str, Any]) -> str:
    answer: str = row["response"] if "response" in row else row["messages"][-1]["content"]
    return answer


def asked(tokenizer: Any, messages: Any, source: str) -> str:
    """Return messages, or a user's one, as the model's chat template has them, up to where the
    answer begins.

    Args:
        source: what to name in an error.
    """
    from lowline.train.data.template import TemplateRefusalError, render_question

    if tokenizer.chat_template is None:
        raise LowlineError(
            f"chat: {source} has no chat template; leave out --chat to continue a text"
        )
    try:
        return render_question(tokenizer, messages)
    except TemplateRefusalError as error:
        raise LowlineError(f"chat: {error}") from error
