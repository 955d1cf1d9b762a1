"""Variants of the low-rank layer: their formulas in fp64, and what is refused beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training
from helpers.runs import build, make_run
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM

from lowline.cola.dlr import folded
from lowline.cola.low_rank import LowRankLinear
from lowline.cola.variants import Variant
from lowline.train.config.load import load_config, to_toml
from lowline.train.hf.export import export
from lowline.train.hf.weights import check_same_model


def exported(cola: dict[str, Any], folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a training body and the model of its exported directory."""
    run = make_run(
        model=dict(dim=16, ffn_dim=24, n_layers=3, n_kv_heads=2, vocab_size=4096),
        cola=dict(rank=5) | cola,
        training=dict(seq_len=32),
    )
    body = build(run)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    step = folder / "checkpoint" / "step-3"
    dcp.save(body.state_dict(), checkpoint_id=step, no_dist=True)
    (step / "config.toml").write_text(to_toml(run))
    export(folder, folder / "hf")
    return body.eval(), AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


# ------------------------------------------------------------------------------------------- DLR


@pytest.mark.parametrize("width", [12, 14, 3])
def test_dlr_is_the_formula_and_folds(width: int) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(7, width, 4, variant="dlr", dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    h = layer.A(x) * torch.sigmoid(layer.A(x))
    copies = math.ceil(width / 4)
    expected = h @ layer.B.weight.T
    for i in range(width):
        expected[..., i] += h[..., i // copies] / math.sqrt(copies)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(h @ folded(layer.B.weight).T, expected, rtol=1e-13, atol=1e-13)


def test_dlr_trains_as_cola_that_begins_at_the_folded_b() -> None:
    """The gradients are the same, so only weight decay tells the two apart."""
    torch.manual_seed(0)
    layers = [LowRankLinear(7, 10, 4, variant=v, dtype=torch.float64) for v in ("dlr", "cola")]
    with torch.no_grad():
        layers[1].A.weight.copy_(layers[0].A.weight)
        layers[1].B.weight.copy_(folded(layers[0].B.weight))
    start = layers[1].B.weight.detach().clone()
    for layer in layers:
        adam = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            adam.zero_grad()
            x = torch.randn(9, 7, dtype=torch.float64, generator=generator)
            layer(x).square().mean().backward()
            adam.step()
    dlr, cola = (layer.B.weight for layer in layers)
    torch.testing.assert_close(folded(dlr), cola, rtol=1e-10, atol=1e-12)
    assert (cola - start).abs().max() > 1e-2


def test_dlr_is_exported_as_plain_cola(tmp_path: Path) -> None:
    body, theirs = exported({"variant": "dlr"}, tmp_path)
    ids = torch.randint(4096, (2, 32))
    with torch.no_grad():
        logits = body(ids)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-6)
        for module in body.modules():
            if isinstance(module, LowRankLinear):
                module.variant = Variant()
        assert (body(ids) - logits).abs().max() > 1e-3  # the term is felt
    run = load_config(tmp_path / "checkpoint" / "step-3" / "config.toml")
    with pytest.raises(ValueError, match="cola.variant = dlr .run., cola .checkpoint."):
        check_same_model(tmp_path / "hf", run.model, run.cola)


# --------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "parallelism.tensor_parallel=2",
            "tensor_parallel = 2, which knows CoLA alone",
        ),
        ("activation_checkpoint=selective", "activation_checkpoint = 'selective', which knows"),
        ("cola.rank=0", "cola.variant = 'dlr' without bottlenecks"),
        ("cola.variant=dlrr", "cola.variant"),
    ],
)
def test_what_does_not_go_with_a_variant_is_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(training.TINY[1], ["--cola.variant=dlr", f"--{override}"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dlr"])
def test_a_run_resumes_bit_for_bit(variant: str, tmp_path: Path) -> None:
    arguments = (f"--cola.variant={variant}", "--optimizer.name=muon", "--cola.memory=cola-m")
    arguments += ("--training.steps=6", "--checkpoint.every=3")
    assert training.train_here(tmp_path / "one", *arguments) == 0
    training.cut(tmp_path / "one", tmp_path / "run", 3)
    assert training.train_here(tmp_path / "run", *arguments) == 0
    assert training.curve(tmp_path / "run") == training.curve(tmp_path / "one")
