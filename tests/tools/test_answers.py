"""`lowline generate --prompts FILE --output FILE`: answers, resumption, training on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.models import architecture, scrambled
from transformers import LlamaForCausalLM

from lowline.errors import LowlineError
from lowline.linearize.convert import save
from lowline.tools.commands.generate import generate
from lowline.train.data import SourceConfig, evaluation_rows, open_source
from lowline.train.data.tokenizer import load_tokenizer

ASKED = ["A list is", "Why?", "What is a set, and what a list?", "Who", "And the other one"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config, tokenizer = architecture("llama"), load_tokenizer("embedded").hf
    config.vocab_size = 4096
    tokenizer.chat_template = TEMPLATE
    body = scrambled(LlamaForCausalLM(config))
    return save(body, tokenizer, tmp_path_factory.mktemp("answers") / "model")


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(model: Path, prompts: Path, output: Path, **how) -> list[dict]:
    how = {"max_new_tokens": 6, "batch_size": 2} | how
    assert generate(str(model), prompts=prompts, output=output, **how) == ""
    return [json.loads(line) for line in output.read_text().split("\n")[:-1]]


def test_each_prompt_has_the_answer_that_it_has_alone(model, tmp_path):
    plain = write(tmp_path / "p.jsonl", [{"prompt": p, "n": n} for n, p in enumerate(ASKED)])
    for chat in (False, True):
        made = answers(model, plain, tmp_path / f"a{chat}.jsonl", chat=chat)
        for n, (row, prompt) in enumerate(zip(made, ASKED, strict=True)):
            said = generate(str(model), prompt=prompt, chat=chat, max_new_tokens=6)
            alone = said if chat else said.removeprefix(prompt)
            assert row == {"prompt": prompt, "n": n, "response": alone}
    asked = [[{"role": "user", "content": p}] for p in ASKED]
    talks = write(tmp_path / "m.jsonl", [{"messages": m} for m in asked])
    for row, other in zip(answers(model, talks, tmp_path / "t.jsonl"), made, strict=True):
        *before, last = row["messages"]
        assert last == {"role": "assistant", "content": other["response"]}
        assert before == [{"role": "user", "content": other["prompt"]}]
    tokenizer = load_tokenizer(str(model))
    keys = [{"messages_key": "messages"}, {"prompt_key": "prompt", "response_key": "response"}]
    files = ("t.jsonl", "aTrue.jsonl")
    sources = [
        SourceConfig(dataset="files", path=str(tmp_path / file), **key)
        for file, key in zip(files, keys, strict=True)
    ]
    rows = [evaluation_rows(open_source(source), tokenizer, 32) for source in sources]
    assert rows[0].labels.equal(rows[1].labels) and (rows[0].labels != -100).any()


def test_a_killed_command_resumes(model, tmp_path):
    """After any byte of the file, sampled too: the file of one run, and no prompt twice."""
    prompts = write(tmp_path / "p.jsonl", [{"prompt": p} for p in ASKED])
    how = {"temperature": 1.0, "seed": 3}
    answers(model, prompts, tmp_path / "one.jsonl", **how)
    complete = (tmp_path / "one.jsonl").read_bytes()
    lines = complete.splitlines(keepends=True)
    for size in (0, 7, len(lines[0]), len(lines[0]) + len(lines[1]) + 3, len(complete) - 1):
        output = tmp_path / f"{size}.jsonl"
        output.write_bytes(complete[:size])
        answers(model, prompts, output, **how)
        assert output.read_bytes() == complete, size


def test_what_cannot_be_answered_is_refused(model, tmp_path, monkeypatch):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    output = tmp_path / "a.jsonl"

    def refused(message: str, **how) -> None:
        with pytest.raises(LowlineError, match=message):
            generate(str(model), **{"prompts": prompts, "output": output, **how})

    refused("give one prompt, or a file", prompt="a")
    refused("give both", output=None)
    refused("lookup is for one prompt", lookup=3)
    refused("stats is for one prompt", stats=True)
    refused("batch_size = 0", batch_size=0)
    refused("no.jsonl is no file", prompts=tmp_path / "no.jsonl")
    for rows, message in (
        ([{"prompt": "a"}, {"text": "b"}], 'line 2: write an object with a text as "prompt"'),
        ([{"prompt": "a"}, {"prompt": 3}], "line 2: '3' is no prompt"),
        ([{"prompt": "a"}, {"messages": [1]}], "both"),
        ([], "has no prompts"),
    ):
        refused(message, prompts=write(tmp_path / "bad.jsonl", rows))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    refused("bad.jsonl, line 2 is not JSON", prompts=tmp_path / "bad.jsonl")
    write(output, [{"prompt": "a", "response": "x"}, {"prompt": "other", "response": "y"}])
    refused("line 2 is no answer to prompt 2")
    assert len(output.read_text().splitlines()) == 2
