"""What each head needs, measured: costs by their definition, the best allocation, the command."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers.models import architecture, scrambled, teacher, tokens
from transformers import AutoModelForCausalLM

from lowline.errors import LowlineError
from lowline.linearize.body.cache import state_bytes
from lowline.linearize.budget import (
    Text,
    _kept,
    _recording,
    allocate,
    budget_text,
    head_costs,
    sizes_up_to,
)
from lowline.linearize.convert import convert, linearized_config, save
from lowline.linearize.mixers.base import HeadShape
from lowline.linearize.mixers.budgets import parse_budget
from lowline.linearize.mixers.memory import Memory
from lowline.linearize.mixers.options import MemoryOptions
from lowline.tools.commands.inspect_budget import inspect_budget
from lowline.train.data.tokenizer import load_tokenizer

T = 40
OPTIONS = MemoryOptions(window=8, sinks=2, block=4, horizon=0)


@pytest.mark.parametrize("merged", [0, 1])
def test_costs_are_half_the_squared_change_of_the_loss_to_first_order(merged):
    """Errors are those of the mixer on the model's own q, k and v; gradients those of autograd."""
    model, ids = teacher(), tokens(1, T)[0]
    text = Text(ids=ids, scored=torch.arange(10, T - 1), drawn=False)
    sizes = [(8, 0), (13, 0), (8, 4), (T, 0), (8, T)]
    costs = head_costs(model, text, sizes, replace(OPTIONS, merged=merged))
    assert all(p.requires_grad for p in model.parameters())
    assert costs.shape == (3, 2, 5) and costs[..., 3:].max() < 1e-8

    with _recording(model) as recorders:
        losses = torch.nn.functional.cross_entropy(
            model(inputs_embeds=model.get_input_embeddings()(ids[None]).requires_grad_(),
                  use_cache=False).logits[0, text.scored],
            ids[text.scored + 1], reduction="sum",
        )  # fmt: skip
        losses.backward()
        kept = [recorder.kept for recorder in recorders]
    shape = HeadShape(hidden_size=64, n_heads=4, n_kv_heads=2, head_dim=16)
    one, zero = torch.ones(1, T, 16), torch.zeros(1, T, 16)
    for layer, (q, k, v, o) in enumerate(kept):
        for n, (window, exact) in enumerate(sizes[:3]):
            head = f"{window}+{exact}" if exact else str(window)
            options = MemoryOptions(sinks=2, block=4, budget=f"{head}, {head}", merged=merged)
            ours, _ = Memory(shape, options)(
                *(x.transpose(1, 2) for x in (q, k, v)), rope=(one, zero), x_BTE=one
            )
            change = (ours.transpose(1, 2) - o.detach()) * o.grad
            change = change[0].unflatten(0, (2, -1))[:, :, text.scored].sum((1, 3))
            expected = change.square().sum(-1) / 2
            # rows are chosen by the complete softmax, not by that over what was kept
            rel = 1e-3 if not exact else 0.5
            assert costs[layer, :, n].tolist() == pytest.approx(expected.tolist(), rel=rel), n


def test_rows_hold_the_tokens_of_most_attention():
    received = torch.zeros(1, 4, 16)  # blocks of 4 queries
    received[0, :, :] = torch.tensor([0, 9, 1, 5, 2, 7, 3, 4, 8, 6, 1, 1, 0, 0, 0, 0.0])
    kept = _kept(received, torch.tensor([3, 7, 11, 15]), [(32, 0), (4, 2)],
                 MemoryOptions(window=4, sinks=1, block=4, horizon=0))  # fmt: skip
    held = [row.nonzero()[:, 0].tolist() for row in kept[1][0]]
    assert kept.keys() == {1} and held == [[], [1, 3], [1, 5], [1, 8]]


def test_the_allocation_is_the_best_of_all():
    costs = torch.tensor([[9.0, 4, 1], [5, 4.5, 4], [30, 20, 12], [1, 0.1, 0]])
    sizes = torch.tensor([1, 2, 4])

    def score(chosen):
        return sum(costs[n, i].item() for n, i in enumerate(chosen))

    for total in range(4, 17):
        fitting = [c for c in product(range(3), repeat=4) if sizes[list(c)].sum() <= total]
        ours = allocate(costs, sizes, total)
        assert tuple(ours) in fitting and score(ours) <= 1.1 * min(map(score, fitting)), total
    assert allocate(costs, sizes, 16) == [2, 2, 2, 2] and allocate(costs, sizes, 10) == [2, 0, 2, 0]
    with pytest.raises(LowlineError, match="do not hold the smallest size of every head"):
        allocate(costs, sizes, 3)


def test_sizes_and_their_text():
    sizes = sizes_up_to(50, 16)
    assert sizes == [(32, 0), (48, 0), (16, 16), (16, 24), (16, 32)]
    assert budget_text([0, 3, 2, 1], sizes, 2) == "32, 16+24; 16+16, 48"


def test_the_command_prints_a_table_of_as_many_bytes(tmp_path, capsys):
    config = architecture("llama")
    config.vocab_size = 4096
    model = scrambled(AutoModelForCausalLM.from_config(config))
    folder = save(model, load_tokenizer("embedded").hf, tmp_path / "model")
    budget = inspect_budget(str(folder), tokens=60, seq_len=(256, 300), copies=1, window=16)
    table = tomllib.loads(capsys.readouterr().out)["mixer"]
    assert table == {
        "name": "memory",
        "options": {"sinks": 4, "horizon": 512, "budget": budget},
    }
    window = linearized_config(config, mixer="sink_window", options={"window": 60, "sinks": 4})
    ours = convert(folder, mixer=table["name"], options=table["options"])
    assert 0.95 * state_bytes(window) < state_bytes(ours.config) <= state_bytes(window)
    assert ours(tokens(1, 80)).logits.isfinite().all()
    few = {"tokens": 30, "seq_len": (256,), "window": 16, "cache_dtype": "int8"}
    inspect_budget(str(folder), copies=1, distances=(40, 180), **few)
    told = capsys.readouterr().err
    assert "strings after 40 tokens 1 of 1" in told and "strings after 180 tokens 1 of 1" in told
    far = inspect_budget(str(folder), copies=1, far=2, **few | {"tokens": 60})
    (told,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("copying, ")]
    heads = re.findall(r"\((\d), (\d)\)", told)
    windows = [far.split("; ")[int(n)].split(", ")[int(g)] for n, g in heads]
    assert windows == ["192", "192"]
    inspect_budget(str(folder), copies=0, **few)
    table = tomllib.loads(capsys.readouterr().out)["mixer"]
    assert table["options"]["cache_dtype"] == "int8"
    less = linearized_config(config, mixer="sink_window", options={"window": 30, "sinks": 4})
    of_8_bits = linearized_config(config, mixer=table["name"], options=table["options"])
    assert 0.9 * state_bytes(less) < state_bytes(of_8_bits) <= state_bytes(less)
    rows = [sum(head) for layer in parse_budget(table["options"]["budget"]) for head in layer]
    assert sum(rows) / len(rows) > 45  # of heads of 16 features, which are 20 bytes
    for options, words in (({"seq_len": (300, 64)}, "seq_len = 64; at least 256"),
                           ({"distances": (64, 8)}, "distances = 8; at least 32"),
                           ({"tokens": 60, "far": 6, "seq_len": (256,)}, "far = 6: so few bytes"),
                           ({"far": 2, "copies": 0}, "copies = 0; at least 1"),
                           ({"far": 7, "seq_len": (256,)}, "far = 7; the model has 6"),
                           ({"tokens": 1, "seq_len": (256,)}, "give more")):  # fmt: skip
        with pytest.raises(LowlineError, match=words):
            inspect_budget(str(folder), **options)
    save(ours, load_tokenizer("embedded").hf, tmp_path / "ours")
    with pytest.raises(LowlineError, match="converted before; give the model it was made from"):
        inspect_budget(str(tmp_path / "ours"))
