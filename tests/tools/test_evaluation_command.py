"""`lowline evaluate` as it is typed, on tiny models: its rows, its files, going on, bad input."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from helpers import forked
from helpers.models import architecture, moved, scrambled, teacher
from transformers import AutoModelForCausalLM

from lowline.linearize.body.cache import LinearizedCache, state_bytes
from lowline.linearize.convert import convert, load_config, load_tokenizer, save
from lowline.linearize.evaluation.report import Results
from lowline.linearize.evaluation.rows import rows_of, window_of_state
from lowline.tools.cli import main
from lowline.tools.commands.evaluate import LOSSES
from lowline.train.data import tokenizer as embedded

TASKS = ("perplexity", "second-copy", "passkey", "needle", "shares")
SMALL = ("--tokens", "600", "--contexts", "32", "128", "--distances", "32", "64",
         "--lengths", "90", "--depths", "0", "1", "--samples", "1")  # fmt: skip
OPTIONS = {"window": 8, "sinks": 4, "backend": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher and two conversions of it, one of them of two layers in three."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = embedded.load_tokenizer("embedded").hf
    config = architecture("llama")
    config.vocab_size = len(tokenizer)
    save(scrambled(AutoModelForCausalLM.from_config(config)), tokenizer, folder / "original")
    for name, mixer, layers in (("lolcats", "lolcats", "all"), ("liger", "liger_gla", "0, 2")):
        model = convert(folder / "original", mixer=mixer, layers=layers, options=OPTIONS)
        save(moved(model), tokenizer, folder / name)
    return folder


def lowline(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Return the command in a process of its own."""
    return forked.run(["-m", "lowline.tools.cli", "evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """What the command printed and the directory it wrote."""
    output = tmp_path_factory.mktemp("out") / "deep" / "evaluation"
    done = lowline(folder / "lolcats", folder / "liger", *SMALL, "--tasks", *TASKS,
                   "--output", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, output


def records(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())["records"]


def test_every_model_stands_beside_its_teacher_and_windows(run):
    printed, output = run
    labels = list(dict.fromkeys(record["label"] for record in records(output)))
    same = [label for label in labels if "same state" in label]
    assert labels == [
        "teacher",
        same[0],
        "window 8 + 4 sinks",
        "window 8",
        "lolcats",
        "lolcats, linear part off",
        same[1],
        "window 8 + 4 sinks, 2 of 3 layers",
        "window 8, 2 of 3 layers",
        "liger",
        "liger, linear part off",
    ]
    flat = printed.replace("\n", " ")
    for label in ("teacher", "window 8", "lolcats", "ppl", "copy", "passkey", "needle", "share"):
        assert label in flat


def test_each_score_is_printed_as_it_ends(run):
    printed, output = run
    lines, _, table = printed.partition("model ")
    lines = [re.sub(r"\(\d+ s\)$", "(- s)", line.rstrip()) for line in lines.splitlines()]
    scores = records(output)
    assert len([line for line in lines if line.endswith("(- s)")]) == len(scores)
    for record in scores:
        if record["task"] == "perplexity":
            values = ", ".join(
                f"ppl @{score['context']} {score['perplexity']:.2f}" for score in record["scores"]
            )
            assert f"{record['label']}: perplexity  {values}  (- s)" in lines
        if record["task"] == "shares":
            share = fmean(score["share"] for score in record["scores"])
            assert f"{record['label']}: shares  linear share {share:.3f}  (- s)" in lines


def test_what_each_of_them_was_asked(run):
    _, output = run
    asked = {(record["label"], record["task"]) for record in records(output)}
    assert {task for label, task in asked if label == "lolcats"} == set(TASKS)
    assert {task for label, task in asked if label == "teacher"} == set(TASKS) - {"shares"}
    off = {task for label, task in asked if label == "liger, linear part off"}
    assert off == {"perplexity", "second-copy"}
    for task in TASKS:
        settings = [record["settings"] for record in records(output) if record["task"] == task]
        assert settings and all(other == settings[0] for other in settings)


def test_files(run):
    _, output = run
    names = ("perplexity", "second_copy", "passkey", "needle", "shares")
    assert {path.name for path in output.iterdir()} == {"results.json"} | {
        f"{name}.png" for name in names
    }
    for name in names:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_library(run, folder):
    """Models loaded here, and the perplexity from their own logits."""
    from lowline.linearize.evaluation.text import Text
    from lowline.train.data.embedded import embedded_documents

    _, output = run
    by_label = {(r["label"], r["task"]): r["scores"] for r in records(output)}
    tokenizer = load_tokenizer(folder / "original")
    ids = Text.of(embedded_documents("validation"), tokenizer, 600).rows(128)
    rows = rows_of(str(folder / "lolcats"), teacher=None, dtype=torch.float32)
    for row in rows[:5]:
        with torch.no_grad():
            losses = row.load()(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss = -losses.gather(2, ids[:, 1:, None]).mean().item()
        assert by_label[row.label, "perplexity"][1]["loss"] == pytest.approx(loss, rel=1e-5)
    of_rows = [by_label[row.label, "perplexity"][1]["loss"] for row in rows]
    assert len(set(of_rows)) == 6  # the rows are different models


@pytest.mark.slow
def test_the_long_suite(folder, tmp_path, capsys):
    document = " ".join(f"{n} is a number, and" for n in range(200))
    text = tmp_path / "articles.jsonl"
    text.write_text(json.dumps({"text": document}) + "\n" + json.dumps({"text": "short"}) + "\n")
    words = ["evaluate", str(folder / "lolcats"), "--suite", "long", "--text", str(text)]
    words += ["--contexts", "512", "--distances", "32", "--lengths", "420", "--samples", "1"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "ppl last" in printed and "multikey" in printed
    assert {r["task"] for r in records(tmp_path)} == {*LOSSES, "ruler"}
    rows = rows_of(str(folder / "lolcats"), teacher=None, dtype=torch.float32, long=True)
    assert [row.label for row in rows] == list(
        dict.fromkeys(record["label"] for record in records(tmp_path))
    )


def test_a_stream_is_read_by_models_that_do_not_grow(folder, tmp_path, capsys):
    words = ["evaluate", str(folder / "lolcats"), "--tasks", "stream", "--tokens", "150"]
    assert main([*words, "--contexts", "64", "--output", str(tmp_path)]) == 0
    labels = [r["label"] for r in records(tmp_path)]
    assert "lolcats" in labels and "teacher" not in labels and len(labels) >= 4
    printed = capsys.readouterr().out
    assert "end 64" in printed and "alone 64" in printed
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_int8_has_the_window_of_int8_beside_it(folder, tmp_path):
    model = convert(
        folder / "original", mixer="memory", layers="all",
        options={"window": 16, "exact": 16, "merged": 0, "cache_dtype": "int8"},
    )  # fmt: skip
    save(model, embedded.load_tokenizer("embedded").hf, tmp_path / "memory")
    rows = rows_of(str(tmp_path / "memory"), teacher=None, dtype=torch.float32)
    assert [row.label.endswith(", int8 (same state)") for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[2].state_bytes(1000) <= rows[-1].state_bytes(1000) < 1.2 * rows[2].state_bytes(1000)


def test_rows_of_as_many_bytes(folder):
    """Bytes are those of the tensors in caches that were filled."""
    rows = rows_of(str(folder / "lolcats"), teacher=None, dtype=torch.float32, long=True)
    label, held = rows[3].label, {}
    assert label.startswith("eviction: window 8, ") and label.endswith("(same state)")
    assert rows[2].label.endswith(" + 4 sinks, int8 (same state)")
    assert int(rows[2].label.split()[1]) > 2 * int(rows[1].label.split()[1])
    for row in rows:
        if "same state" in row.label or row.label == "lolcats":
            cache = LinearizedCache(row.config)
            with torch.no_grad():
                row.load()(torch.arange(40)[None], past_key_values=cache)
            held[row.label] = state_bytes(cache)
            assert held[row.label] == row.state_bytes(10_000)
    shape, layers = rows[3].config.head_shape(0), rows[2].config.num_hidden_layers
    a_row = (2 * shape.head_dim + 2) * 4 * shape.n_kv_heads * layers  # attention received, count
    assert held["lolcats"] - a_row < held[label] <= held["lolcats"]


def test_going_on_asks_only_what_is_missing(run, folder, tmp_path, monkeypatch):
    _, output = run
    again = tmp_path / "again"
    again.mkdir()
    kept = records(output)
    known = [r for r in kept if r["label"] != "lolcats"]
    (again / "results.json").write_text(json.dumps({"records": known}))
    command = ["evaluate", str(folder / "lolcats"), *SMALL, "--tasks", *TASKS]
    assert main([*command, "--output", str(again)]) == 0
    new = records(again)[len(known) :]
    assert records(again)[: len(known)] == known
    assert [record["task"] for record in new] == list(TASKS)
    assert new == [record for record in kept if record["label"] == "lolcats"]  # deterministic
    assert main([*command, "--output", str(again), "--seed", "1"]) == 0
    asked_anew = {record["task"] for record in records(again)[len(kept) :]}
    assert asked_anew == {"second-copy", "passkey", "needle"}


def test_a_model_that_was_written_anew_is_measured_anew(folder, tmp_path):
    source = tmp_path / "model"
    tokenizer = load_tokenizer(folder / "original")
    model = convert(folder / "original", mixer="lolcats", options=OPTIONS)
    save(model, tokenizer, source)
    command = ["evaluate", str(source), "--tasks", "perplexity", *SMALL, "--no-baselines"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == main(command) == 0
    assert [r["label"] for r in records(tmp_path / "out")] == ["model", "model, linear part off"]
    moved(model).save_pretrained(source)
    assert main(command) == 0
    first, _, second, _ = records(tmp_path / "out")
    assert first["label"] == second["label"] and first["scores"] != second["scores"]


def test_a_model_that_was_not_converted_is_evaluated_alone(folder, tmp_path):
    command = ["evaluate", str(folder / "original"), "--tasks", "perplexity", *SMALL]
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert [record["label"] for record in records(tmp_path)] == ["original"]


def test_text_from_files_and_piqa(folder, tmp_path):
    """The same documents in three kinds of files give the same scores."""
    documents = ["A list is mutable. " * 40, "A tuple is not. " * 40]
    (tmp_path / "a.txt").write_text(documents[0])
    lines = "".join(json.dumps({"body": text}) + "\n" for text in documents[:1])
    (tmp_path / "a.jsonl").write_text(lines)
    import datasets

    datasets.Dataset.from_dict({"body": documents[:1]}).to_parquet(str(tmp_path / "a.parquet"))
    item = {"goal": "Sort", "sol1": "sorted(x)", "sol2": "Shuffle it.", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(item) + "\n")
    scores = []
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        output = tmp_path / f"of {name}"
        command = ["evaluate", str(folder / "original"), "--tasks", "perplexity", *SMALL]
        command += ["--text", str(tmp_path / name), "--output", str(output)]
        command += ["--piqa", str(tmp_path / "piqa.jsonl")]
        command += [] if name == "a.txt" else ["--text-key", "body"]
        assert main(command) == 0
        assert [record["task"] for record in records(output)] == ["perplexity", "piqa"]
        scores.append([record["scores"] for record in records(output)])
    assert scores[0] == scores[1] == scores[2]
    assert scores[0][1]["items"] == 1


# --------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("name, layers", [("lolcats", 3), ("liger", 2)])
def test_a_window_of_the_same_state_is_the_widest_that_holds_no_more(folder, name, layers):
    config, before = load_config(folder / name), load_config(folder / "original")
    window = window_of_state(config, before, torch.float32)
    rows = rows_of(str(folder / name), teacher=None, dtype=torch.float32)
    same, itself = rows[1], rows[4]
    assert f"window {window} + 4 sinks" in same.label and itself.converted
    one_more = layers * 2 * 2 * 16 * 4  # a key and a value, 2 heads of 16, float32
    assert 0 <= state_bytes(config) - state_bytes(same.config) < one_more
    assert same.state_bytes(1000) - same.state_bytes(0) == (3 - layers) * 1000 * 2 * 2 * 16 * 4
    mixers = [type(layer.self_attn).__name__ for layer in same.load().model.layers]
    assert mixers.count("LinearizedAttention") == layers


def test_teachers_that_are_none_are_refused(folder, tmp_path):
    def rows(source, teacher=None):
        return rows_of(str(source), teacher=teacher and str(teacher), dtype=torch.float32)

    narrow = teacher()
    save(narrow, load_tokenizer(folder / "original"), tmp_path / "narrow")
    with pytest.raises(
        ValueError, match="cannot be the teacher of .*vocab_size is 97 there and 4096 here"
    ):
        rows(folder / "lolcats", tmp_path / "narrow")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: cannot be loaded"):
        rows(folder / "lolcats", tmp_path / "empty")
    model = convert(narrow, mixer="lolcats", options=OPTIONS)  # made in memory: of no name
    save(model, load_tokenizer(folder / "original"), tmp_path / "orphan")
    with pytest.raises(ValueError, match="does not say what it was converted from"):
        rows(tmp_path / "orphan")
    assert [row.label for row in rows(tmp_path / "orphan", tmp_path / "narrow")][-2] == "orphan"
    config = json.loads((tmp_path / "orphan" / "config.json").read_text())
    config["teacher"] = str(tmp_path / "empty")
    (tmp_path / "orphan" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="orphan names as its teacher; give another"):
        rows(tmp_path / "orphan")


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "absent.jsonl"], "absent.jsonl"),
        (
            ["--tasks", "perplexitty"],
            "'perplexitty' is not one of perplexity, second-copy, passkey",
        ),
        (["--contexts", "5000", "--tokens", "600"], "context = 5000, but the text has 600 tokens"),
        (["--lengths", "20"], "lengths: 20 tokens are too few"),
        (["--distances", "5"], "distances: 5 is below 32"),
        (["--piqa", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--samples", "0"], "samples = 0; at least 1"),
        (["--limit", "0"], "limit = 0; at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    folder, tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    theirs = SimpleNamespace(all_tasks=["piqa"])  # lm-eval takes many seconds to list its own
    monkeypatch.setattr("lowline.linearize.evaluation.harness._task_manager", lambda _: theirs)
    output = tmp_path / "out"
    command = ["evaluate", str(folder / "lolcats"), "--quick", *arguments, "--output", str(output)]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_no_models_no_tokenizer_no_results(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    convert(folder / "original", mixer="lolcats", options=OPTIONS).save_pretrained(bare)
    assert main(["evaluate", str(bare), "--output", str(tmp_path / "out")]) == 2
    assert "bare has no tokenizer" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert "empty has no tokenizer" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    for text in ("{", "[]", '{"records": [{"label": "?"}]}'):
        (tmp_path / "out" / "results.json").write_text(text)
        command = ["evaluate", str(folder / "original"), *SMALL, "--tasks", "perplexity"]
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        assert "holds no results of an evaluation" in capsys.readouterr().err
        assert (tmp_path / "out" / "results.json").read_text() == text
    assert Results.read(tmp_path / "nowhere.json").records == []
