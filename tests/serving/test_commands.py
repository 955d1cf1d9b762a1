"""`lowline serve` and `lowline generate --engine vllm`, as they are typed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

import torch
from helpers.serving import greedy, served_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 256  # a token for each byte
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CLIENTS, PATIENCE = 8, 900  # seconds
LOWLINE = [sys.executable, "-m", "lowline.tools.cli"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served_model("memory", "0, 2", vocab=VOCAB)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "small"
    model.save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="!", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + 20 * n for n in range(count)]
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def ask(url: str, **body) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*LOWLINE, "serve", str(folder), "--port", str(port), "--memory", "0.25"]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONSAFEPATH": "1"})
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not answer"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield url
    finally:
        process.terminate()  # SIGINT is ignored by what a shell runs in the background
        process.wait(120)


def test_eight_clients_at_once(model, server: str) -> None:
    asked = prompts(3 * CLIENTS)
    expected = greedy(model, asked)

    def client(ids: list[int]) -> list[int]:
        made = ask(f"{server}/v1/completions", model="small", prompt=ids, temperature=0,
                   max_tokens=8, ignore_eos=True, return_token_ids=True)  # fmt: skip
        return made["choices"][0]["token_ids"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert list(clients.map(client, asked)) == expected


def test_a_prompt_that_is_too_long_is_refused(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{server}/v1/completions", model="small", prompt=[1] * 600, max_tokens=8)
    assert error.value.code == 400 and b"512" in error.value.read()


def test_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    """The answers of `generate` without vLLM, and what was interrupted resumes."""
    asked = ["A list is", "Why?", "What is a set, and what a list?", "Who", "And the other one"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))

    def run(output: str, *options: str) -> bytes:
        line = ["generate", str(folder), "--prompts", "p.jsonl", "--output", output]
        more = ["--max-new-tokens", "12", "--batch-size", "2", *options]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        subprocess.run([*LOWLINE, *line, *more], check=True, cwd=tmp_path, env=environment)
        return (tmp_path / output).read_bytes()

    vllm = ("--engine", "vllm", "--memory", "0.25")
    complete = run("a.jsonl", *vllm, "--chat")
    assert complete == run("b.jsonl", "--chat")
    lines = complete.splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:5])
    assert run("c.jsonl", *vllm, "--chat") == complete
    sampled = [run(f"{n}.jsonl", *vllm, "--temperature", "1", "--seed", "3") for n in "de"]
    assert sampled[0] == sampled[1]
