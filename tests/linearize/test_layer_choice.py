"""Which layers stay softmax: costs, measured layer by layer, are those of complete conversions."""

from __future__ import annotations

import pytest
import torch
from helpers.models import VOCAB, teacher, tokens

from lowline import LowlineError
from lowline.linearize.convert import convert
from lowline.linearize.evaluation.second_copy import SecondCopy
from lowline.linearize.layer_choice import costliest, distances, measure_layers, stand_in, work
from lowline.linearize.layers import auto_count, parse_layers

OPTIONS = {"window": 5, "sinks": 2}


@torch.no_grad()
def of_complete_conversions(model, copies, rows):
    """Return the same costs from a model of its own for each layer."""

    def scores(model):
        recall = [score["second"] for score in copies(model, lambda n: None)]
        log_p = model(rows).logits[:, rows.shape[1] // 2 :].float().log_softmax(-1)
        return sum(recall) / len(recall), log_p

    recall, log_p = scores(model)
    costs = []
    for layer in range(model.config.num_hidden_layers):
        after, log_q = scores(convert(model, mixer="sink_window", layers=[layer], options=OPTIONS))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        costs.append({"layer": layer, "recall": after - recall, "kl": kl})
    return costs


@pytest.mark.parametrize("name", ["llama", "qwen2, windows above", "cola, QK-norm, mixed"])
def test_costs_are_those_of_complete_conversions(name):
    model, rows = teacher(name), tokens(2, 24)
    before = model(rows).logits
    copies = SecondCopy(
        vocabulary=list(range(1, VOCAB)), beginning=[], distances=(8, 20), length=6, samples=2,
        seed=3, batch_tokens=1000, filler=tokens(1, 40)[0].tolist(),
    )  # fmt: skip
    done: list[int] = []
    how = dict(mixer="sink_window", options=OPTIONS, copies=copies, rows_NT=rows)
    found = measure_layers(model, **how, advance=done.append)
    expected = of_complete_conversions(model, copies, rows)
    assert [cost["layer"] for cost in found] == [0, 1, 2]
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours["recall"] - theirs["recall"]) < 1e-5
        assert abs(ours["kl"] - theirs["kl"]) < 1e-5 + 1e-4 * theirs["kl"]
    assert max(cost["kl"] for cost in expected) > 0.01  # and is no comparison of zeros
    assert torch.equal(model(rows).logits, before)
    assert sum(done) == work(rows.numel() + copies.tokens, 3)
    assert measure_layers(model, **how, advance=done.append) == found


def test_the_costliest_layers_come_first():
    costs = [
        {"layer": 0, "recall": 1.0, "kl": 0.1},
        {"layer": 1, "recall": 3.0, "kl": 0.2},
        {"layer": 2, "recall": 1.0, "kl": 0.3},
    ]
    assert [costliest(costs, n) for n in range(4)] == [[], [1], [1, 2], [0, 1, 2]]
    assert costliest(costs, 1, by="kl") == [2]


def test_mixers_are_measured_as_windows():
    assert stand_in("memory", {"exact": 3}) == ("sink_window", {"window": 64, "sinks": 4})
    assert stand_in("lolcats", {"window": 8, "sinks": 2}) == (
        "sink_window",
        OPTIONS | {"window": 8},
    )
    assert stand_in("t2r", {}) == ("sink_window", {"window": 64, "sinks": 4})
    assert distances(64) == distances(0) == (128, 512) and distances(5) == (32, 64)


@pytest.mark.parametrize("pattern", ["auto", "auto:", "auto:x", "auto:-1", "auto:13", "automatic"])
def test_a_count_that_does_not_fit_is_refused(pattern):
    with pytest.raises(LowlineError, match="write 'auto:K', where K layers stay softmax, from 0"):
        auto_count(pattern, 12)


def test_a_count_is_for_conversions():
    assert auto_count("auto:12", 12) == 12 and auto_count(" auto: 0", 12) == 0
    assert auto_count("all", 12) is None and auto_count([1], 12) is None
    with pytest.raises(LowlineError, match="'auto:4' is measured in a conversion.*name layers"):
        parse_layers("auto:4", 12)
