"""Scores of multiple choice against their formula and lm-eval's, and tasks that cannot be had."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.evaluation import by_hand, reader, tokenizer

from lowline.linearize.evaluation import harness
from lowline.linearize.evaluation.choices import Choices, read_piqa
from lowline.linearize.evaluation.harness import HarnessTask, check_tasks
from lowline.linearize.evaluation.measure import encode, quiet

ITEMS = [
    {"goal": "Sort a list", "sol1": "Call sorted(x).", "sol2": "Turn it over, twice.", "label": 0},
    {"goal": "Open a file", "sol1": "By hand.", "sol2": "With open(path) as file:", "label": 1},
    {"goal": "Add two numbers", "sol1": "a + b", "sol2": "Ask a friend who can add.", "label": 1},
    {"goal": "Leave a loop", "sol1": "break", "sol2": "continue", "label": 0},
]


def piqa_file(folder, items=ITEMS):
    path = folder / "piqa.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_choices_are_scored_by_their_log_likelihood(tmp_path, batch_tokens):
    items = read_piqa(piqa_file(tmp_path))
    score = Choices(name="piqa", items=items, tokenizer=tokenizer(), batch_tokens=batch_tokens)
    right, right_norm = [], []
    for item in ITEMS:
        context = f"Question: {item['goal']}\nAnswer:"
        start = len(encode(tokenizer(), context))
        sums, texts = [], [str(item["sol1"]), str(item["sol2"])]
        for text in texts:
            row = encode(tokenizer(), f"{context} {text}")
            sums.append(-sum(by_hand(reader(), row)[start - 1 :]))
        norms = [total / len(text) for total, text in zip(sums, texts, strict=True)]
        right.append(float((sums[1] > sums[0]) == item["label"]))
        right_norm.append(float((norms[1] > norms[0]) == item["label"]))
    got = score(reader(), quiet)
    assert (got["items"], got["acc"]) == (4, sum(right) / 4)
    assert got["acc_norm"] == sum(right_norm) / 4
    p = got["acc"]
    assert got["acc_stderr"] == pytest.approx((p * (1 - p) / 3) ** 0.5)


def test_log_likelihoods_of_choices(tmp_path):
    """The sums themselves, which the fractions above hide."""
    items = read_piqa(piqa_file(tmp_path))
    score = Choices(name="piqa", items=items, tokenizer=tokenizer(), batch_tokens=100)
    pairs = score._encoded()
    got = score._log_likelihoods(reader(), pairs)
    want = [-sum(by_hand(reader(), ids)[start - 1 :]) for ids, start in pairs]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)


def test_limit_and_broken_files(tmp_path):
    path = piqa_file(tmp_path)
    assert [item.label for item in read_piqa(path, 3)] == [0, 1, 1]
    separated = [ITEMS[0] | {"goal": "Two\u2028lines\u0085?"}]
    path = piqa_file(tmp_path, separated)
    path.write_text(path.read_text().encode().decode("unicode_escape"))
    assert "Two\u2028lines\u0085?" in read_piqa(path)[0].context
    with pytest.raises(ValueError, match="cannot be read"):
        read_piqa(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="line 2: no JSON object with goal"):
        read_piqa(piqa_file(tmp_path, [ITEMS[0], {"goal": "?"}]))
    with pytest.raises(ValueError, match="line 1: label = 2"):
        read_piqa(piqa_file(tmp_path, [ITEMS[0] | {"label": 2}]))
    with pytest.raises(ValueError, match="has no items"):
        read_piqa(piqa_file(tmp_path, []))


def test_lm_eval_scores_the_same(tmp_path):
    """Its multiple choice on the same items, from a YAML file in its format."""
    path, task = piqa_file(tmp_path), tmp_path / "task.yaml"
    task.write_text(
        "task: local_piqa\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{validation: {path}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\n'
        'doc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    check_tasks([str(task)], ["perplexity"])
    theirs = HarnessTask(task=str(task), tokenizer=tokenizer(), limit=None, batch_size=2, seed=0)(
        reader(), quiet
    )
    items = read_piqa(path)
    ours = Choices(name="piqa", items=items, tokenizer=tokenizer(), batch_tokens=60)(
        reader(), quiet
    )
    for metric in ("acc", "acc_norm"):
        assert theirs[metric] == ours[metric]  # type: ignore[literal-required]


@pytest.mark.slow  # lm-eval lists its thousands of tasks
def test_names_of_lm_eval():
    names = ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"]
    check_tasks(names, ["perplexity"])
    with pytest.raises(ValueError, match="did you mean 'arc_easy'"):
        check_tasks(["arc_eazy"], ["perplexity"])


def test_without_lm_eval(monkeypatch):
    def absent(_):
        raise ModuleNotFoundError("No module named 'lm_eval'")

    monkeypatch.setattr(harness, "_task_manager", absent)
    with pytest.raises(ValueError, match=r"need lm-eval \(No module .*'\): pip install lm-eval"):
        check_tasks(["arc_easy"], ["perplexity"])
