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
from contextlib import contextmanager
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


@contextmanager
def serving(folder: Path, memory: str) -> Iterator[tuple[str, int]]:
    """Yield the address of a server, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*LOWLINE, "serve", str(folder), "--port", str(port), "--memory", memory]
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
        yield url, process.pid
    finally:
        process.terminate()  # SIGINT is ignored by what a shell runs in the background
        process.wait(120)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with serving(folder, "0.25") as (url, _):
        yield url


def test_eight_clients_at_once(model, server: str) -> None:
    asked = prompts(3 * CLIENTS)
    expected = greedy(model, asked)

    def client(ids: list[int]) -> list[int]:
        made = ask(f"{server}/v1/completions", model="small", prompt=ids, temperature=0,
                   max_tokens=8, ignore_eos=True, return_token_ids=True)  # fmt: skip
        return made["choices"][0]["token_ids"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert list(clients.map(client, asked)) == expected


def held_bytes(pid: int) -> int:
    """Return the memory of a process and its children."""
    import psutil

    server = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (server, *server.children(recursive=True)))


def still_there(url: str) -> list[float]:
    """Return how many requests run and wait, and the part of the pages that is taken."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found = [
        float(x.split()[-1]) for x in lines if x.startswith(tuple(f"vllm:{n}{{" for n in names))
    ]
    assert len(found) == len(names)
    return found


@pytest.mark.slow
def test_200_requests_of_random_lengths_of_which_a_quarter_is_cancelled(model, folder) -> None:
    """No wrong token, no request lost, no memory, and those that have left take no pages."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(1, 400, (200,), generator=generator).tolist()
    news = torch.randint(1, 48, (200,), generator=generator).tolist()
    asked = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    expected = [greedy(model, [ids], new)[0] for ids, new in zip(asked, news, strict=True)]

    def client(url: str, n: int) -> list[int]:
        body = {"model": "small", "prompt": asked[n], "max_tokens": news[n], "stream": True,
                "temperature": 0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        wanted = news[n] // 2 if n % 4 == 3 else news[n]  # then the client leaves
        made: list[int] = []
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as lines:
            for line in lines:
                if len(made) >= wanted:
                    break
                if line.startswith(b"data: {"):
                    made += json.loads(line[6:])["choices"][0]["token_ids"] or []
        assert len(made) >= wanted
        return made

    with serving(folder, "0.02") as (url, pid), ThreadPoolExecutor(2 * CLIENTS) as clients:
        held = []
        for part in (range(100), range(100, 200)):
            for n, made in zip(part, clients.map(lambda n: client(url, n), part), strict=True):
                assert made == expected[n][: len(made)], n
            held.append(held_bytes(pid))
        left = [still_there(url)]
        while any(left[-1]) and len(left) < 20:  # numbers are those of the last step
            client(url, 0)
            left.append(still_there(url))
        assert not any(left[-1]), left
    print(
        f"the server held {held[0] / 1e6:.0f} MB after 100 requests, {held[1] / 1e6:.0f} after 200"
    )
    assert held[1] - held[0] < 32e6


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
