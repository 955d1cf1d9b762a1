"""Conversations as documents: rendered by the tokenizer's chat template, trained on the answers.

A conversation's tokens are what the template makes of it. Labels are the tokens that the model
writes: for each of the assistant's messages, those that follow the template's generation prompt,
its end-of-turn token included; nothing of what the user and the system say.

A conversation that the assistant begins has its greeting as context where the template cannot
render the place before it.

Left out: tools, images, and templates under which a longer conversation does not begin with the
tokens of a shorter one, such as those that drop earlier thoughts: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lowline.errors import LowlineError
from lowline.train.data.template import TemplateRefusalError, check_template_source, render_chat
from lowline.train.data.values import BadRowError, Number, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"


class Message(NamedTuple):
    """One turn; `role` is "system", "user" or "assistant" in most templates."""

    role: str
    content: str


class Conversation(tuple[Message, ...]):
    """Messages in order, and the row they stand in, which error messages name."""

    place: Place | None = None

    def strip(self) -> Conversation:
        """Return the conversation if there is an answer in it with text, an empty one if not."""
        answered = any(m.role == ASSISTANT and m.content.strip() for m in self)
        return self if answered else Conversation()


class Pair(tuple[Conversation, ...]):
    """Two conversations that end in the better and in the worse answer."""

    place: Place | None = None

    def strip(self) -> Pair:
        """Return the pair if both answers have text, an empty one if not."""
        return self if all(c.strip() for c in self) else Pair()


def pair_of(*row: Any, place: Place) -> Pair:
    """Return the pair in a row: its prompt, if there is one, and two answers, as text or messages.

    Raises:
        BadRowError: values of another form, or an answer that is not the assistant's.
    """
    *prompt, chosen, rejected = row
    asked = [message for value in prompt for message in _turns(value, "user", place)]
    found = Pair(Conversation(asked + _turns(v, ASSISTANT, place)) for v in (chosen, rejected))
    for one in found:
        one.place = place
        if not asked and len(one) < 2 or one[-1].role != ASSISTANT:
            raise BadRowError(
                place,
                f"pair {str(list(map(tuple, one)))[:80]} is not a prompt and an answer of the "
                "assistant: set data.prompt_key, or give complete lists of messages",
            )
    found.place = place
    return found


def _turns(value: Any, role: str, place: Place) -> list[Message]:
    """Return messages that are given as a list, or as the text of one of `role`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_message(message, place) for message in value]
    return [
        _message({"role": role, "content": None if isinstance(value, Number) else value}, place)
    ]


def conversation_of(*row: Any, place: Place) -> Conversation:
    """Return the conversation in a row: a list of {"role", "content"}, or a prompt and a response.

    Raises:
        BadRowError: messages of another form.
    """
    if len(row) == 2:
        prompt, response = row
        found = Conversation((Message("user", prompt or ""), Message(ASSISTANT, response or "")))
    else:
        (messages,) = row
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise BadRowError(
                place,
                f"messages = {str(messages)[:80]!r}; a list of "
                '{"role": ..., "content": ...} is needed: set data.messages_key',
            )
        found = Conversation(_message(message, place) for message in messages)
    found.place = place
    return found


def _message(message: Any, place: Place) -> Message:
    role, content = (
        (message.get("role"), _content(message.get("content")))
        if isinstance(message, Mapping)
        else (None, None)
    )
    if not isinstance(role, str) or isinstance(role, Number) or content is None:
        raise BadRowError(
            place, f'message {str(message)[:80]!r} has no "role" and "content" of text'
        )
    return Message(role, content)


def _content(content: Any) -> str | None:
    """Return what a message says: text, a number as it is written, or the text of its parts."""
    if isinstance(content, str):  # a JSON file's numbers, too
        return str(content)
    if isinstance(content, int | float) and not isinstance(content, bool):
        return repr(content)
    if isinstance(content, list) and content:
        parts = [_part(part) for part in content]
        return None if None in parts else "".join(part for part in parts if part)
    return None


def _part(part: Any) -> str | None:
    if isinstance(part, Mapping) and part.get("type") == "text" and type(part.get("text")) is str:
        return part["text"]
    return None


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise LowlineError unless the tokenizer has a chat template that may be run."""
    if not tokenizer.chat_template:
        raise LowlineError(
            "conversations need a tokenizer with a chat template, and this one has none: take the "
            "tokenizer of an instruction-tuned model, or set data.text_key to train on plain text"
        )
    check_template_source(tokenizer.get_chat_template())


def conversation_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens (n,) int64, and whether each was written by the assistant (n,) bool.

    Raises:
        LowlineError: the tokenizer has no chat template, or one that does not end.
        BadRowError: the template refuses the conversation, or cannot be masked (see above).
    """
    check_template(tokenizer)
    place = conversation.place or Place("a conversation", "row", 0)

    def render(turns: int, *, prompt: bool) -> list[int]:
        messages = [message._asdict() for message in conversation[:turns]]
        # A list of conversations, for transformers does not take an empty one alone.
        (text,) = render_chat(tokenizer, [messages], add_generation_prompt=prompt)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    try:
        tokens = render(len(conversation), prompt=False)
        written = np.zeros(len(tokens), bool)
        for turn, message in enumerate(conversation):
            if message.role != ASSISTANT:
                continue
            try:
                asked = render(turn, prompt=True)
            except TemplateRefusalError:
                if turn:
                    raise
                continue  # the template needs a message: a greeting is context, no answer
            answered = render(turn + 1, prompt=False)
            if tokens[: len(answered)] != answered or answered[: len(asked)] != asked:
                if not turn:  # it renders no messages at all otherwise than the first one
                    continue
                raise TemplateRefusalError(
                    "the tokenizer's chat template renders the beginning of a conversation "
                    "otherwise once more follows, so its answers cannot be told apart: give "
                    "conversations of one answer, or another template"
                )
            written[len(asked) : len(answered)] = True
    except TemplateRefusalError as error:
        raise BadRowError(place, str(error)) from error
    return np.array(tokens, dtype=np.int64), written
