"""Chat templates, which come with a model from anywhere, run under a limit.

transformers runs them in a sandbox: they reach no files and no attributes of Python's own. What
is left is a template that does not end. It gets `_SECONDS` of processor time, no operator that
makes numbers of any size in one step, and a bound on what it writes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 5.0  # of processor time; rendering a conversation takes well below a millisecond
_WRITTEN = 1_000_000, 100  # characters that may be written: so many, and so many for each given
_FILE = "<template>"  # the name under which jinja2 compiles


class TemplateRefusalError(Exception):
    """What a chat template, or Python in its place, says against a conversation."""


class _TooLongError(Exception):
    pass


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> Any:
    """Return the text that a tokenizer's chat template makes of messages (a list: of each).

    Raises:
        TemplateRefusalError: the template refuses the messages.
        LowlineError: the template is no template, or does not end.
    """
    import jinja2

    check_template_source(tokenizer.get_chat_template())
    try:
        with _limited(_SECONDS):
            rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateSyntaxError as error:
        raise LowlineError(
            f"the tokenizer's chat template is broken: {error}. Correct it, or take another "
            "tokenizer"
        ) from error
    except (_TooLongError, MemoryError) as error:
        raise LowlineError(
            f"the tokenizer's chat template did not end within {_SECONDS:g} seconds, or took all "
            "memory: take another tokenizer"
        ) from error
    except Exception as error:  # a template may raise anything; it runs nothing of ours
        raise TemplateRefusalError(
            f"the tokenizer's chat template refuses the conversation: {_said(error)}"
        ) from error
    texts: list[str] = rendered if isinstance(rendered, list) else [rendered]
    written, given = sum(map(len, texts)), len(str(messages))
    least, factor = _WRITTEN
    if written > least + factor * given:
        raise LowlineError(
            f"the tokenizer's chat template writes {written} characters for a conversation of "
            f"{given}: take another tokenizer"
        )
    return rendered


def render_question(tokenizer: PreTrainedTokenizerBase, messages: Any) -> str:
    """Return messages, or a user's one, up to where the answer begins; errors of `render_chat`."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return str(render_chat(tokenizer, messages, add_generation_prompt=True))


@lru_cache(maxsize=16)
def check_template_source(template: str) -> None:
    """Raise LowlineError for a template that could make a number of any size in one step."""
    import jinja2

    try:
        tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template)]
    except jinja2.TemplateSyntaxError:
        return  # rendering says where
    if ("operator", "**") in tokens:
        raise LowlineError(
            "the tokenizer's chat template raises numbers to powers (**), which may never end: "
            "remove that from it, or take another tokenizer"
        )


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLongError in this thread's templates once they have run for so long.

    Signals would reach the main thread only, and belong to others. A trace function is called
    for each line of a template, and for each function that it calls.
    """
    end = time.thread_time() + seconds

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLongError
        return trace if frame.f_code.co_filename == _FILE else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
