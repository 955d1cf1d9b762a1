"""Conversations as documents: rendered by the tokenizer's chat template, trained on the answers.

A conversation's tokens are what the template makes of it. Labels are the tokens that the model
writes: for each of the assistant's messages, those that follow the template's generation prompt,
its end-of-turn token included; nothing of what the user and the system say.

Left out: tools, images, and templates under which a longer conversation does not begin with the
tokens of a shorter one, such as those that drop earlier thoughts: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lowline.errors import LowlineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"


class Message(NamedTuple):
    """One turn; `role` is "system", "user" or "assistant" in most templates."""

    role: str
    content: str


class Conversation(tuple[Message, ...]):
    """Messages in order."""

    def strip(self) -> Conversation:
        """The conversation if there is an answer in it with text, an empty one if not."""
        answered = any(m.role == ASSISTANT and m.content.strip() for m in self)
        return self if answered else Conversation()


def conversation_of(*row: Any, name: str) -> Conversation:
    """The conversation in a row: a list of {"role", "content"}, or a prompt and a response.

    Raises:
        ValueError: messages of another form. `name` says where they come from.
    """
    if len(row) == 2:
        prompt, response = row
        return Conversation((Message("user", prompt or ""), Message(ASSISTANT, response or "")))
    (messages,) = row
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise LowlineError(
            f"{name}: messages = {str(messages)[:80]!r}; a list of "
            '{"role": ..., "content": ...} is needed: set data.messages_key'
        )
    return Conversation(_message(message, name) for message in messages)


def _message(message: Any, name: str) -> Message:
    role, content = (
        (message.get("role"), message.get("content"))
        if isinstance(message, Mapping)
        else (None, None)
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise LowlineError(
            f'{name}: message {str(message)[:80]!r} has no "role" and "content" of text'
        )
    return Message(role, content)


def conversation_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) int64, and whether each was written by the assistant (n,) bool.

    Raises:
        ValueError: the tokenizer has no chat template, or one that cannot be masked (see above).
    """
    if not tokenizer.chat_template:
        raise LowlineError(
            "conversations need a tokenizer with a chat template, and this one has none: take the "
            "tokenizer of an instruction-tuned model, or set data.text_key to train on plain text"
        )

    def render(turns: int, *, prompt: bool) -> list[int]:
        messages = [message._asdict() for message in conversation[:turns]]
        rendered: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=True
        )
        return list(rendered["input_ids"])

    tokens = render(len(conversation), prompt=False)
    written = np.zeros(len(tokens), bool)
    for turn, message in enumerate(conversation):
        if message.role != ASSISTANT:
            continue
        asked, answered = render(turn, prompt=True), render(turn + 1, prompt=False)
        if tokens[: len(answered)] != answered or answered[: len(asked)] != asked:
            raise LowlineError(
                "the tokenizer's chat template renders the beginning of a conversation otherwise "
                "once more follows, so its answers cannot be told apart: give conversations of "
                "one answer, or another template"
            )
        written[len(asked) : len(answered)] = True
    return np.array(tokens, dtype=np.int64), written
