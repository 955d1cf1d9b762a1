"""A memory whose window and rows differ by key and value head."""

from __future__ import annotations

import pytest
import torch
from helpers.models import error, teacher, tokens

from lowline.errors import LowlineError
from lowline.linearize.body.cache import LinearizedCache, state_bytes
from lowline.linearize.convert import convert, save
from lowline.linearize.mixers.options import MemoryOptions
from lowline.linearize.source import load_teacher
from lowline.train.data.tokenizer import load_tokenizer

BUDGET = "4+3, 6; 5, 5; 2+1, 3+7"
"""Of a tiny model: three layers, two key and value heads of 16."""


def with_budget(budget: str = BUDGET, **options):
    options = {"sinks": 1, "block": 2, "budget": budget} | options
    return convert(teacher(), mixer="memory", options=options).eval()


def test_a_budget_gives_each_head_its_window_and_rows():
    assert MemoryOptions(budget=BUDGET, block=2).heads() == [
        [(4, 3), (6, 0)],
        [(5, 0), (5, 0)],
        [(2, 1), (3, 7)],
    ]
    assert MemoryOptions(budget=BUDGET, block=2, sinks=1).softmax_tokens == (36 // 6) + 1
    assert MemoryOptions(window=8, block=2, exact=9, merged=2).softmax_tokens == 8 + 9 + 2 + 4
    model = with_budget()
    sizes = [layer.self_attn.mixer.sizes for layer in model.model.layers]
    assert sizes == [[(4, 3), (6, 0)], [(5, 0)], [(2, 1), (3, 7)]]


@torch.no_grad()
@pytest.mark.parametrize("merged", [0, 1])
def test_equal_heads_are_the_memory_without_a_budget(merged):
    same = with_budget("; ".join(["4+3, 4+3"] * 3), horizon=6, merged=merged)
    plain = with_budget("", window=4, exact=3 - merged, horizon=6, merged=merged)
    ids = tokens(2, 24)
    assert torch.equal(same(ids).logits, plain(ids).logits)
    assert state_bytes(same.config) == state_bytes(plain.config)
    assert error(with_budget(horizon=6)(ids).logits, plain(ids).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("merged", [0, 1])
def test_layers_and_heads_hold_what_they_were_given(merged):
    model, ids = with_budget(merged=merged), tokens(2, 24)
    expected = model(ids, use_cache=False).logits
    for pieces in ([24], [9, 1, 14], [20, 1, 1, 1, 1]):
        cache, logits = LinearizedCache(model.config), []
        for part in ids.split(pieces, 1):
            logits.append(model(part, past_key_values=cache).logits)
        assert error(torch.cat(logits, 1), expected) <= 1e-5
        # keys and values of windows, rows and sinks; 8 bytes of a group's length
        kept = [4 + 3 + 1, 6 + 1, 5 + 1, 5 + 1, 2 + 1 + 1, 3 + 7 + 1]
        received = [4 + 3, 2 + 1, 3 + 7]
        rows, groups, with_rows = 3 + 1 + 7, 5, 3
        energies = with_rows * (16 // 2 + 1)
        held = 4 * (sum(kept) * 2 * 16 + sum(received) + rows + energies) + 8 * groups
        assert state_bytes(cache) == state_bytes(model.config) == held


@torch.no_grad()
def test_a_saved_budget_is_the_same_model(tmp_path):
    model, ids = with_budget(), tokens(1, 24)
    again = load_teacher(save(model, load_tokenizer("embedded").hf, tmp_path / "model")).eval()
    assert again.config.mixers == model.config.mixers
    assert again.config.mixers[2]["budget"] == BUDGET
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "budget, words",
    [
        ("4, 4; 4, 4", "budget has 2 layers, the model 3"),
        ("4, 4; 4; 4, 4", "budget has 1 heads in layer 1, the model 2 key and value heads"),
    ],
)
def test_a_budget_of_another_model_is_refused(budget, words):
    with pytest.raises(LowlineError, match=words):
        with_budget(budget)
