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
from lowline.cola.hf import CoLAConfig, CoLAForCausalLM
from lowline.cola.low_rank import LowRankLinear
from lowline.cola.variants import Variant
from lowline.linearize.convert import linearized_config
from lowline.train.config.load import load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.hf.export import export
from lowline.train.hf.weights import check_same_model, load_hf_state_dict


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


# ------------------------------------------------------------------------------- across layers

CROSSING = {
    "lax": {"variant": "lax"},
    "lax, bias, ranks": {
        "variant": "lax",
        "bias": True,
        "activation": "gelu",
        "rank": dict(q=3, k=5, v=7, o=9, gate=11, up=13, down=15),
    },
    "cr-net": {"variant": "cr-net"},
    "cr-net, silu, bias": {"variant": "cr-net", "activation": "silu", "bias": True},
}
SIGMA = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "identity": lambda z: z,
}


def plain_model(w: dict[str, torch.Tensor], run: RunConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model in plain arithmetic, z and y of every layer kept by name."""
    m, c, length = run.model, run.cola, tokens.shape[1]
    z: dict[tuple[int, str], torch.Tensor] = {}
    y: dict[tuple[int, str], torch.Tensor] = {}

    def project(layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        here, before, sigma = f"layers.{layer}.{name}", (layer - 1, name), SIGMA[c.sigma]
        if c.variant == "cr-net" and layer == 0:
            y[layer, name] = x @ w[f"{here}.weight"].T
            return y[layer, name]
        bottleneck = x @ w[f"{here}.A.weight"].T + w.get(f"{here}.A.bias", 0.0)
        if c.variant == "lax" and layer:
            bottleneck = bottleneck + w[f"{here}.gate"] * sigma(z[before])
        out = sigma(bottleneck) @ w[f"{here}.B.weight"].T + w.get(f"{here}.B.bias", 0.0)
        if c.variant == "cr-net":
            out = out + w[f"{here}.gate"] * y[before]
        z[layer, name], y[layer, name] = bottleneck, out
        return out

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + m.norm_eps) * w[f"{name}.weight"]

    x = w["tok_embeddings.weight"][tokens]
    future = torch.ones(length, length).triu(1).bool()
    for n in range(m.n_layers):
        a = norm(x, f"layers.{n}.attention_norm")
        q, k, v = (
            project(n, f"attention.qkv_linear.w{i}", a).unflatten(-1, (-1, m.per_head))
            for i in ("q", "k", "v")
        )
        q, k = (exact_rope(t).transpose(1, 2) for t in (q, k))
        scores = q @ k.transpose(2, 3) / math.sqrt(m.per_head)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v.transpose(1, 2)
        h = x + project(n, "attention.wo", mixed.transpose(1, 2).flatten(2))
        f = norm(h, f"layers.{n}.ffn_norm")
        inner = SIGMA["silu"](project(n, "feed_forward.w1", f)) * project(n, "feed_forward.w3", f)
        x = h + project(n, "feed_forward.w2", inner)
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("memory, grouped", [("cola", False), ("cola-m", True), ("cola-m", False)])
@pytest.mark.parametrize("case", CROSSING)
def test_a_model_is_the_formula(case: str, memory: str, grouped: bool) -> None:
    """Logits and every gradient, in fp64, gates included."""
    run = make_run(
        model=dict(dim=16, ffn_dim=24, n_layers=3, vocab_size=30),
        cola=dict(rank=5) | CROSSING[case] | dict(memory=memory, grouped=grouped),
    )
    body = build(run).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for layer in body.layers.values():  # torchtitan's table is in fp32
        layer.attention.rope.forward = lambda q, k, p: tuple(map(exact_rope, (q, k)))
    tokens = torch.randint(30, (2, 9))
    upstream = torch.randn(2, 9, 30, dtype=torch.float64)
    weights = dict(body.named_parameters())
    results = []
    for logits in (body(tokens), plain_model(weights, run, tokens)):
        results.append((logits, *torch.autograd.grad((logits * upstream).sum(), weights.values())))
    gates = [name for name in weights if name.endswith(".gate")]
    assert len(gates) == 2 * 7
    for name, actual, expected in zip(["logits", *weights], *results, strict=True):
        assert expected.abs().max() > 0, name
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name}: {error}"


def exact_rope(x_BLNH: torch.Tensor) -> torch.Tensor:
    """Turn pair (i, i + H/2) by position · θ^(-2i/H); torchtitan's own rounds to fp32."""
    half = x_BLNH.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x_BLNH.shape[1], dtype=torch.float64)[:, None, None] * frequency
    pairs = torch.complex(x_BLNH[..., :half], x_BLNH[..., half:])
    pairs = pairs * torch.complex(angle.cos(), angle.sin())
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("case", CROSSING)
def test_exported_directory_has_equal_logits_and_generates(case: str, tmp_path: Path) -> None:
    body, theirs = exported(CROSSING[case], tmp_path)
    ids = torch.randint(4096, (2, 32))
    with torch.no_grad():
        logits = body(ids)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-6)
        for layer in theirs.model.layers:
            for name, parameter in layer.named_parameters():
                parameter.mul_(0.5 if name.endswith(".gate") else 1)
        assert (theirs(ids).logits - logits).abs().max() > 1e-4  # gates are felt
    how = dict(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    cached, fresh = (
        theirs.generate(ids[:, :7], attention_mask=torch.ones(2, 7), use_cache=c, **how)
        for c in (True, False)
    )
    assert torch.equal(cached, fresh) and cached.shape == (2, 13)
    run = load_config(tmp_path / "checkpoint" / "step-3" / "config.toml")
    check_same_model(tmp_path / "hf", run.model, run.cola)
    again = load_hf_state_dict(tmp_path / "hf")
    assert again.keys() == body.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in body.state_dict().items())


@pytest.mark.parametrize("variant", ["lax", "cr-net"])
def test_gradient_checkpointing_in_transformers_changes_no_gradient(variant: str) -> None:
    size = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    ranks = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 4)
    config = CoLAConfig(**size, num_attention_heads=2, ranks=ranks, variant=variant)
    model, ids = CoLAForCausalLM(config).train(), torch.randint(40, (2, 9))
    found = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(map(torch.equal, *found)) and all(g.abs().max() > 0 for g in found[0])


def test_a_model_with_crossing_layers_is_not_converted() -> None:
    config = CoLAConfig(num_hidden_layers=2, ranks=dict.fromkeys("qkvo", 4), variant="lax")
    with pytest.raises(ValueError, match="variant = 'lax' hands outputs .* are not converted"):
        linearized_config(config, mixer="lolcats")


# --------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "variant, override, words",
    [
        ("dlr", "parallelism.tensor_parallel=2", "tensor_parallel = 2, which does not know it"),
        ("dlr", "activation_checkpoint=selective", "activation_checkpoint = 'selective', which"),
        ("dlr", "cola.rank=0", "cola.variant = 'dlr' without bottlenecks"),
        ("dlrr", "cola.bias=true", "cola.variant"),
        ("lax", "activation_checkpoint=full", "= 'full', which does not know it; set"),
        ("lax", "parallelism.tensor_parallel=2", "tensor_parallel = 2, which does not know it"),
        ("cr-net", "parallelism.pipeline_parallel=2", "pipeline_parallel = 2, which does not"),
        ("cr-net", "mixer.name=lolcats", r"mixer = 'lolcats', .* leave \[mixer\] out"),
        ("cr-net", "cola.rank={q = 8}", "give all seven projections a rank"),
    ],
)
def test_what_does_not_go_with_a_variant_is_refused(
    variant: str, override: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(training.TINY[1], [f"--cola.variant={variant}", f"--{override}"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dlr", "lax", "cr-net"])
def test_a_run_resumes_bit_for_bit(variant: str, tmp_path: Path) -> None:
    arguments = (f"--cola.variant={variant}", "--optimizer.name=muon", "--cola.memory=cola-m")
    arguments += ("--training.steps=6", "--checkpoint.every=3")
    assert training.train_here(tmp_path / "one", *arguments) == 0
    training.cut(tmp_path / "one", tmp_path / "run", 3)
    assert training.train_here(tmp_path / "run", *arguments) == 0
    assert training.curve(tmp_path / "run") == training.curve(tmp_path / "one")


def test_the_activation_of_a_variant_is_its_own_unless_set() -> None:
    base = load_config(training.TINY[1], ["--cola.activation=silu"])
    assert base == load_config(training.TINY[1]) and base.cola.activation is None
    for variant, given, sigma in (
        ("lax", [], "silu"),
        ("cr-net", [], "identity"),
        ("cr-net", ["--cola.activation=silu"], "silu"),
    ):
        run = load_config(training.TINY[1], [f"--cola.variant={variant}", *given])
        assert run.cola.sigma == sigma
