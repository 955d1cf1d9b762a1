"""Predicted parameters, FLOPs and saved activations against the models and what they keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.live_bytes import LiveBytes
from helpers.runs import build, make_run
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from lowline.cola.accounting import (
    Shape,
    flops_per_token,
    parameters,
    recomputed_flops_per_token,
    saved_by_block,
    saved_by_model,
)
from lowline.cola.projections import PROJECTIONS
from lowline.train.config.run import RunConfig
from lowline.train.cost.memory import shape_of
from lowline.train.model.build import build_model_config

B, L = 2, 32
SMALL = dict(dim=64, n_layers=2, n_heads=4, ffn_dim=176, vocab_size=96, attention="sdpa")

# size: dim, ffn, layers, heads, rank, CoLA parameters, of which low-rank, dense parameters
PUBLISHED = {
    "60m": (512, 1376, 8, 8, 128, 42.77, 9.99, 58.07),
    "130m": (768, 2048, 12, 12, 256, 94.00, 44.83, 134.11),
    "350m": (1024, 2736, 24, 16, 256, 185.22, 119.64, 367.97),
    "1b": (2048, 5461, 24, 32, 512, 609.31, 478.14, 1339.08),
    "7b": (4096, 11008, 32, 32, 1024, 2820.94, 2558.53, 6738.42),
}


def published(size: str, *, dense: bool = False) -> Shape:
    dim, ffn, layers, heads, rank = PUBLISHED[size][:5]
    return Shape(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=ffn,
        vocab_size=32000,
        ranks=dict.fromkeys(PROJECTIONS, 0 if dense else rank),
    )


def small_run(cola: dict | None = None, **model: object) -> RunConfig:
    return make_run(
        model={**SMALL, **model},
        training=dict(seq_len=L, global_batch_size=B, precision="float32"),
        cola=cola or {},
    )


def built(run: RunConfig, policy: str = "all") -> torch.nn.Module:
    model = build(run)
    if policy in ("full", "selective"):
        (FullAC if policy == "full" else SelectiveAC).Config().build().apply(model)
    return model


def batch(documents: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BL = torch.randint(0, SMALL["vocab_size"], (B, L))
    return tokens_BL, torch.arange(L // documents).repeat(B, documents)


LOW_RANK = {"rank": 16}
COLA_M = {"rank": 16, "memory": "cola-m"}
CASES = {
    "dense": ("all", {}, {}),
    "dense, grouped queries": ("all", {}, {"n_kv_heads": 2}),
    "dense, qk_norm": ("all", {}, {"qk_norm": True, "head_dim": 24}),
    "dense, biases": ("all", {}, {"qkv_bias": True, "n_kv_heads": 2}),
    "dense, identity MLP": ("all", {}, {"mlp_activation": "identity"}),
    "cola": ("all", LOW_RANK, {}),
    "cola, grouped": ("all", {**LOW_RANK, "grouped": True}, {}),
    "cola, identity MLP": ("all", LOW_RANK, {"mlp_activation": "identity"}),
    "cola, grouped queries": ("all", LOW_RANK, {"n_kv_heads": 2}),
    "cola, qk_norm": ("all", LOW_RANK, {"qk_norm": True}),
    "cola, gelu and bias": ("all", {**LOW_RANK, "activation": "gelu", "bias": True}, {}),
    "cola, relu": ("all", {**LOW_RANK, "activation": "relu"}, {}),
    "linear bottleneck": ("all", {**LOW_RANK, "activation": "identity"}, {}),
    "ranks by projection": ("all", {"rank": {"q": 8, "gate": 24, "down": 40}}, {}),
    "dlr": ("all", {**LOW_RANK, "variant": "dlr"}, {}),
    "lax": ("all", {**LOW_RANK, "variant": "lax"}, {"n_layers": 3}),
    "lax, grouped": ("all", {**LOW_RANK, "variant": "lax", "grouped": True}, {}),
    "lax, linear": ("all", {**LOW_RANK, "variant": "lax", "activation": "identity"}, {}),
    "lax, cola-m": ("cola-m", {**COLA_M, "variant": "lax"}, {"n_layers": 3}),
    "lax, cola-m, grouped": ("cola-m", {**COLA_M, "variant": "lax", "grouped": True}, {}),
    "cr-net": ("all", {**LOW_RANK, "variant": "cr-net"}, {"n_layers": 3}),
    "cr-net, grouped queries": ("all", {**LOW_RANK, "variant": "cr-net"}, {"n_kv_heads": 2}),
    "cr-net, silu": ("all", {**LOW_RANK, "variant": "cr-net", "activation": "silu"}, {}),
    "cr-net, one layer": ("all", {**LOW_RANK, "variant": "cr-net"}, {"n_layers": 1}),
    "cr-net, cola-m": ("cola-m", {**COLA_M, "variant": "cr-net"}, {"n_layers": 3}),
    "cr-net, cola-m, grouped": (
        "cola-m",
        {**COLA_M, "variant": "cr-net", "grouped": True},
        {"n_kv_heads": 2},
    ),
    "dlr, cola-m": ("cola-m", {**COLA_M, "variant": "dlr"}, {}),
    "cola-m": ("cola-m", COLA_M, {}),
    "cola-m, grouped": ("cola-m", {**COLA_M, "grouped": True}, {}),
    "cola-m, grouped queries": ("cola-m", COLA_M, {"n_kv_heads": 2}),
    "cola-m, ranks": (
        "cola-m",
        {**COLA_M, "rank": dict(zip(PROJECTIONS, range(8, 64, 8), strict=True))},
        {},
    ),
    "dense, whole block": ("full", {}, {}),
    "cola, whole block": ("full", LOW_RANK, {}),
    "dense, selective": ("selective", {}, {}),
    "cola, selective": ("selective", LOW_RANK, {}),
    "cola, grouped, selective": ("selective", {**LOW_RANK, "grouped": True}, {}),
    "cola, grouped queries, selective": ("selective", LOW_RANK, {"n_kv_heads": 2}),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> tuple[str, RunConfig]:
    policy, cola, model = CASES[request.param]
    return policy, small_run(cola, **model)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size: str) -> None:
    cola, low_rank, dense = PUBLISHED[size][5:]
    assert round(parameters(published(size)).total / 1e6, 2) == cola
    assert round(parameters(published(size)).low_rank / 1e6, 2) == low_rank
    assert round(parameters(published(size, dense=True)).total / 1e6, 2) == dense


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models(case: tuple[str, RunConfig], tied: bool) -> None:
    _, run = case
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, tie_embeddings=tied))
    config = build_model_config(run)
    with torch.device("meta"):
        model = config.build()
    expected = parameters(shape_of(run))
    assert sum(p.numel() for p in model.parameters()) == expected.total
    bottleneck = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(part in name for part in (".A.", ".B.", ".gate"))
    )
    assert bottleneck == expected.low_rank
    assert config.get_nparams_and_flops(model, L) == (
        expected.total,
        flops_per_token(shape_of(run), L),
    )


def test_published_flop_formulas() -> None:
    """The two formulas of the paper's table, a layer and a token of context n."""
    n = 256
    for size in PUBLISHED:
        cola, dense = published(size), published(size, dense=True)
        d, f, r, layers = cola.dim, cola.ffn_dim, cola.ranks["q"], cola.n_layers
        head = 6 * d * 32000
        assert flops_per_token(dense, n) == layers * (24 * d * d + 12 * n * d + 18 * d * f) + head
        assert flops_per_token(cola, n) == (
            layers * (48 * d * r + 12 * n * d + 18 * r * (d + f)) + head
        )


def _attention_flops(
    q_shape: tuple, k_shape: tuple, v_shape: tuple, *args: object, **_: object
) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def counted_flops(run: RunConfig, policy: str) -> tuple[int, int]:
    """(forward, backward) FLOPs per token as torch counts them, without attention's own backward.

    torch's counter does not know the CPU's attention; its forward is given to it here.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    model, (tokens, positions) = built(run, policy), batch(documents=1)
    with FlopCounterMode(display=False, custom_mapping=attention) as forward:
        out = model(tokens, positions=positions)
    with FlopCounterMode(display=False, custom_mapping=attention) as backward:
        out.sum().backward()
    return forward.get_total_flops() // (B * L), backward.get_total_flops() // (B * L)


def test_flops_are_torchs_count(case: tuple[str, RunConfig]) -> None:
    policy, run = case
    shape = shape_of(run)
    total = flops_per_token(shape, L)
    attention = 4 * shape.n_layers * shape.query_width * L
    forward, backward = counted_flops(run, policy)
    assert forward == total // 3
    recomputed = recomputed_flops_per_token(shape, L, policy, "cpu")  # type: ignore[arg-type]
    assert backward == 2 * (total // 3 - attention) + recomputed


def test_cola_m_recomputes_what_is_wide() -> None:
    """At r = d/4 and ffn = 8d/3: at most 17ndr FLOPs beside attention, 3.75nd elements a layer."""
    shape = dataclasses.replace(
        published("1b"), ffn_dim=5461, ranks=dict.fromkeys(PROJECTIONS, 512)
    )
    d, r, layers = shape.dim, 512, shape.n_layers
    attention = layers * 4 * d * 256
    redone = recomputed_flops_per_token(shape, 256, "cola-m") - attention
    assert 16.6 * d * r < redone / layers <= 17 * d * r
    assert saved_by_block(shape, "cola-m").elements == 3.75 * d
    assert saved_by_block(shape, "full").elements == d


@pytest.mark.parametrize("documents", [1, 2])
def test_saved_activations_are_what_stays_alive(
    case: tuple[str, RunConfig], documents: int
) -> None:
    policy, run = case
    model, (tokens, positions) = built(run, policy), batch(documents)
    with LiveBytes(ignore=[*model.parameters(), *model.buffers()]) as alive:
        logits = model(tokens, positions=positions)
        kept = alive.now()
    mask = 0 if documents == 1 else B * L * L * 4
    assert kept == alive_bytes(run, policy, logits, mask)


def test_saved_activations_in_bf16() -> None:
    for policy, cola in (("all", {}), ("all", LOW_RANK), ("cola-m", COLA_M), ("full", LOW_RANK)):
        run = small_run(cola)
        model, (tokens, positions) = built(run, policy).bfloat16(), batch(documents=2)
        for layer in model.layers.values():
            layer.attention.rope.cache = layer.attention.rope.cache.float()
        with LiveBytes(ignore=[*model.parameters(), *model.buffers()]) as alive:
            logits = model(tokens, positions=positions)
            kept = alive.now()
        assert kept == alive_bytes(run, policy, logits, mask=B * L * L * 2)


def alive_bytes(run: RunConfig, policy: str, logits: torch.Tensor, mask: int) -> int:
    saved = saved_by_model(shape_of(run), policy, device="cpu")  # type: ignore[arg-type]
    return round(B * L * saved.bytes(logits.element_size())) + logits.nbytes + mask


def test_without_positions_the_rotary_table_is_shared() -> None:
    run = small_run(LOW_RANK)
    model, (tokens, _) = built(run), batch(documents=1)
    with LiveBytes(ignore=[*model.parameters(), *model.buffers()]) as alive:
        logits = model(tokens)
        kept = alive.now()
    saved = saved_by_model(shape_of(run), "all", device="cpu", positions=False)
    assert kept == B * L * saved.bytes(4) + logits.nbytes


def test_ranks_name_every_projection() -> None:
    with pytest.raises(ValueError, match="exactly .*'gate'.*0 where"):
        dataclasses.replace(published("60m"), ranks={"q": 8})


def test_live_bytes_forgets_what_is_freed_and_counts_views_once() -> None:
    weight = torch.ones(10)
    with LiveBytes(count=[weight]) as alive:
        a = torch.zeros(100)
        view = a[10:].reshape(9, 10)
        assert alive.now() == 440
        del a
        assert alive.now() == 440  # the view holds it
        doubled = view * 2
        del view
        assert alive.now() == 400
        doubled.untyped_storage().resize_(0)
        assert alive.now() == 40
        assert alive.peak == 40 + 400 + 360
    with LiveBytes(ignore=[weight]) as alive:
        turned = weight.reshape(5, 2).t()
        assert alive.now() == 0
        assert turned.shape == (2, 5)
