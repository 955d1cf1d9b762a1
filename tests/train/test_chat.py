"""Conversations: the template's tokens, labels on the answers alone, packed like documents."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from lowline.errors import LowlineError
from lowline.train.data import (
    IGNORE_INDEX,
    LaneDataLoader,
    SourceConfig,
    evaluation_rows,
    open_source,
)
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


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREETED = [{"role": "assistant", "content": "Hello!"}, *TALK[:2]]


def answers(tokenizer, messages) -> list[str]:
    """Return the texts between which there is no label."""
    _, labels = document_rows(conversation(messages), tokenizer)
    runs = "".join(" " if label == IGNORE_INDEX else "x" for label in labels).split()
    kept = [label for label in labels.tolist() if label != IGNORE_INDEX]
    found = []
    for run in runs:
        found.append(tokenizer.decode(kept[: len(run)]))
        kept = kept[len(run) :]
    return found


def test_a_conversation_that_the_assistant_begins(tokenizer):
    """Its greeting is learned where the template renders what precedes it; else it is context."""
    answer = "A sequence of items.<|endoftext|>\n"
    assert answers(tokenizer, GREETED) == ["Hello!<|endoftext|>\n", answer]
    needs_one = load_tokenizer("embedded")
    needs_one.hf.chat_template = "{{ messages[0]['role'][0] }}" + CHATML
    assert answers(needs_one, GREETED) == [answer]
    needs_one.hf.chat_template = (
        "{% if not messages or messages[0].role != 'system' %}"
        "<|system|>{{ messages | length > 0 }}<|endoftext|>\n{% endif %}" + CHATML
    )
    assert answers(needs_one, GREETED) == [answer]


def refusing(template=STRICT):
    found = load_tokenizer("embedded")
    found.hf.chat_template = template
    return found


def chat_file(tmp_path, *conversations):
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in conversations))
    return {"dataset": "files", "path": str(file), "messages_key": "talk"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_the_template_refuses(tmp_path, caplog, streaming):
    refused = [TALK[0], *TALK]
    options = chat_file(tmp_path, TALK[:2], refused, GREETED, TALK[2:])
    tokenizer = refusing()
    source = open_source(SourceConfig(**options, streaming=streaming))
    with pytest.raises(LowlineError) as info:
        evaluation_rows(source, tokenizer, seq_len=8)
    said = str(info.value)
    assert said.startswith(f"{options['path']}, line 2: the tokenizer's chat template refuses")
    assert "roles must alternate" in said and 'data.on_bad_row = "skip"' in said
    options["on_bad_row"] = "skip"
    source = open_source(SourceConfig(**options, streaming=streaming))
    rows = evaluation_rows(source, tokenizer, seq_len=8)
    kept, _ = (document_rows(conversation(TALK[i : i + 2]), tokenizer)[0] for i in (0, 2))
    expected = [document_rows(conversation(TALK[i : i + 2]), tokenizer)[0] for i in (0, 2)]
    tokens = np.concatenate(expected)
    assert rows.input.flatten()[: len(tokens)].tolist() == tokens.tolist()
    assert (rows.labels.flatten()[len(tokens) :] == IGNORE_INDEX).all()
    assert source.bad_rows.skipped == 2 and "line 3" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_resumes_among_refused_conversations(tmp_path, streaming):
    talks = [TALK[:2], [TALK[0], *TALK], TALK[2:], GREETED, TALK]
    options = chat_file(tmp_path, *talks, *talks)
    source = SourceConfig(**options, streaming=streaming, on_bad_row="skip")
    tokenizer = refusing()

    def build(state):
        config = LaneDataLoader.Config(source=source, global_batch_size=2)
        rest = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 7, "local_batch_size": 2}
        loader = config.build(tokenizer=tokenizer, **rest)
        loader.load_state_dict(state)
        return loader

    straight = build({})
    states, rows = [], []
    for inputs, labels in islice(iter(straight), 14):
        rows.append(torch.stack([inputs["input"], labels, inputs["positions"]]))
        states.append(straight.state_dict())
    for step in range(0, 12, 3):
        inputs, labels = next(iter(build(states[step])))
        again = torch.stack([inputs["input"], labels, inputs["positions"]])
        assert torch.equal(again, rows[step + 1])


def test_a_template_that_refuses_everything_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lowline.train.data.packing._PATIENCE", 20)
    options = chat_file(tmp_path, [TALK[0], *TALK])
    loader = LaneDataLoader.Config(
        source=SourceConfig(**options, on_bad_row="skip"), global_batch_size=1
    ).build(dp_world_size=1, dp_rank=0, tokenizer=refusing(), seq_len=8, local_batch_size=1)
    with pytest.raises(LowlineError, match="20 conversations one.*line 1: .*template refuses"):
        next(iter(loader))


BILLION = "{% for a in range(9999) %}" * 6 + "{% set b = a %}" + "{% endfor %}" * 6


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (BILLION, "did not end within"),
        ("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "refuses the conv"),
        ("{% for a in range(20) %}{{ 'x' * 99999 }}{% endfor %}", "writes 1999980 characters"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "powers"),
        ("{% for m in messages %}", "is broken"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "refuses the conv"),
        ("{{ nothing.at_all }}", "refuses the conv.*nothing"),
        ("{{ 1 / 0 }}", "refuses the conv.*zero"),
    ],
)
def test_hostile_templates_end(monkeypatch, template, message):
    monkeypatch.setattr("lowline.train.data.template._SECONDS", 0.5)
    with pytest.raises(LowlineError, match=message):
        document_rows(conversation(), refusing(template))
