"""Conversations: the template's tokens, labels on the answers alone, packed like documents."""

import json

import numpy as np
import pytest
import torch

from lowline.train.data import IGNORE_INDEX, SourceConfig, evaluation_rows, open_source
from lowline.train.data.chat import Conversation, Message, conversation_tokens
from lowline.train.data.packing import document_rows
from lowline.train.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence of items."},
    {"role": "user", "content": "And a set?"},
    {"role": "assistant", "content": "Items without order."},
]


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer("embedded")
    found.hf.chat_template = CHATML
    return found


def test_special_tokens_of_a_template_count(tmp_path):
    hf = load_tokenizer("embedded").hf
    hf.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    hf.save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert found.get_vocab_size() == 4096
    assert found.get_vocab_size(special=True) == 4098


def conversation(messages=TALK) -> Conversation:
    return Conversation(Message(**message) for message in messages)


def test_labels_are_the_answers(tokenizer):
    tokens, labels = document_rows(conversation(), tokenizer)
    end = tokenizer.eos_id
    rendered = "".join(f"<|{m['role']}|>{m['content']}<|endoftext|>\n" for m in TALK)
    assert tokenizer.decode(tokens.tolist()) == rendered
    # cut where a label was left out: what is between are the answers with their end
    answers, said = [], []
    for label in [*labels.tolist(), IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            said.append(label)
        elif said:
            answers.append(tokenizer.decode(said))
            said = []
    assert answers == [f"{m['content']}<|endoftext|>\n" for m in TALK[1::2]]
    kept = labels != IGNORE_INDEX
    assert np.array_equal(labels[:-1][kept[:-1]], tokens[1:][kept[:-1]])
    assert (tokens == end).sum() == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["messages", "exchange"])
def test_files(tmp_path, tokenizer, kind, streaming):
    file = tmp_path / "talk.jsonl"
    if kind == "messages":
        rows = [{"talk": TALK}, {"talk": [*TALK[:1], {"role": "assistant", "content": " "}]}]
        keys = {"messages_key": "talk"}
        talks = [conversation()]
    else:
        rows = [{"ask": "One?", "say": "1"}, {"ask": "Two?", "say": "2"}, {"ask": "", "say": None}]
        keys = {"prompt_key": "ask", "response_key": "say"}
        talks = [
            Conversation((Message("user", r["ask"]), Message("assistant", r["say"])))
            for r in rows[:2]
        ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(dataset="files", path=str(file), streaming=streaming, **keys))
    packed = evaluation_rows(source, tokenizer, seq_len=16)
    tokens, labels = (
        np.concatenate(x) for x in zip(*(document_rows(t, tokenizer) for t in talks), strict=True)
    )
    n = len(tokens)
    assert torch.equal(packed.input.flatten()[:n], torch.from_numpy(tokens))
    assert torch.equal(packed.labels.flatten()[:n], torch.from_numpy(labels))
    assert (packed.labels.flatten()[n:] == IGNORE_INDEX).all()  # without an answer: left out
    starts = [0, len(document_rows(talks[0], tokenizer)[0])][: len(talks)]
    assert all(packed.positions.flatten()[start] == 0 for start in starts)


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"a": "x"}, {"messages_key": "talk"}, "has no column 'talk'.*data.messages_key"),
        ({"talk": "hello"}, {"messages_key": "talk"}, "'hello'; a list of"),
        ({"talk": [{"role": "user"}]}, {"messages_key": "talk"}, 'no "role" and "content"'),
        ({"a": "x", "b": 3}, {"prompt_key": "a", "response_key": "b"}, "'b' holds int64"),
    ],
)
def test_bad_rows(tmp_path, row, keys, message):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        list(open_source(SourceConfig(dataset="files", path=str(file), **keys)).documents())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_key": "a"}, "give both"),
        ({"prompt_key": "a", "response_key": "b", "messages_key": "c"}, "keep one"),
        ({"dataset": "embedded", "path": (), "messages_key": "c"}, "no conversations"),
    ],
)
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"dataset": "files", "path": "x.jsonl"} | keys)


def test_template_that_cannot_be_masked(tokenizer):
    hf = load_tokenizer("embedded").hf
    with pytest.raises(ValueError, match="no.*none|chat template"):
        conversation_tokens(conversation(), hf)
    hf.chat_template = "{{ messages | length }}" + CHATML  # the beginning depends on the end
    with pytest.raises(ValueError, match="cannot be told apart"):
        conversation_tokens(conversation(), hf)
