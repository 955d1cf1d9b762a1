"""The low-rank layer, the rank rule and the CoLA block against plain formulas.

Legend: B batch, L sequence length, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.runs import build, make_run

from lowline.cola.low_rank import ACTIVATIONS, LowRankLinear, init_std
from lowline.cola.projections import PROJECTIONS
from lowline.cola.ranks import resolve_ranks
from lowline.kernels.low_rank import grouped_linear
from lowline.train.config.run import RunConfig
from lowline.train.model.attention import DocumentSDPA, document_mask

FORMULAS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: z * (z > 0),
    "identity": lambda z: z,
}
SHAPES = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64)}
SHAPES |= {"gate": (64, 176), "up": (64, 176), "down": (176, 64)}


def run_config(
    model: dict[str, Any] | None = None, cola: dict[str, Any] | None = None
) -> RunConfig:
    return make_run(model={"vocab_size": 48} | (model or {}), cola={"rank": 8} | (cola or {}))


# ----------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_is_the_formula(activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear.from_factors(
        nn.Linear(24, 6, bias=bias), nn.Linear(6, 40, bias=bias), activation
    )
    layer.double()
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    a, b = layer.A.weight, layer.B.weight
    shift, offset = (layer.A.bias, layer.B.bias) if bias else (0.0, 0.0)
    expected = FORMULAS[activation](x @ a.T + shift) @ b.T + offset
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.expand(layer.A(x)), layer(x), rtol=0, atol=0)
    assert (layer.in_features, layer.rank, layer.out_features) == (24, 6, 40)
    names = {"A.weight", "B.weight"} | ({"A.bias", "B.bias"} if bias else set())
    assert set(layer.state_dict()) == names


def test_layer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="activation = 'tanh'; choose from"):
        LowRankLinear.from_factors(nn.Linear(4, 2), nn.Linear(2, 4), "tanh")
    with pytest.raises(ValueError, match="A makes 2 features, B takes 3"):
        LowRankLinear.from_factors(nn.Linear(4, 2), nn.Linear(3, 4))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_grouped_linear_is_the_maps_side_by_side(bias: bool) -> None:
    torch.manual_seed(0)
    maps = [nn.Linear(12, out, bias=bias).double() for out in (3, 7, 2)]
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 12, dtype=torch.float64)
    results = []
    for y in (
        grouped_linear(x, [m.weight for m in maps], [m.bias for m in maps]),
        torch.cat([m(x) for m in maps], dim=-1),
    ):
        parameters = [p for m in maps for p in m.parameters()]
        results.append((y, *torch.autograd.grad((y * upstream).sum(), [x, *parameters])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ initialization


def test_initial_values_have_the_published_deviations() -> None:
    dim, ffn, rank = 256, 688, 64
    model = build(run_config({"dim": dim, "ffn_dim": ffn, "vocab_size": 512}, {"rank": rank}))
    checked = 0
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            std = (module.in_features + module.out_features) ** -0.5
            for factor in (module.A.weight, module.B.weight):
                # The deviation of m draws is known to 1/sqrt(2 m); five of those.
                slack = 5 / math.sqrt(2 * factor.numel())
                expected = rank**-0.25 * std**0.5
                assert factor.std().item() == pytest.approx(expected, rel=slack)
                assert abs(factor.mean().item()) < 5 * expected / math.sqrt(factor.numel())
            # The product's entries are dependent: their deviation is known to about 1/rank.
            product = module.B.weight @ module.A.weight
            assert product.std().item() == pytest.approx(std, rel=0.06)
            checked += 1
    assert checked == 2 * 7
    for dense in (model.tok_embeddings.weight, model.lm_head.weight):
        assert dense.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * dense.numel()))
    assert init_std(256, 688, 64) == pytest.approx(64**-0.25 * (256 + 688) ** -0.25)


@pytest.mark.parametrize(("into", "rank"), [(688, 64), (40, 64), (100, 48)])
def test_skip_start_is_half_noise_and_half_a_repeated_identity(into: int, rank: int) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(256, into, rank, init="skip")
    std = init_std(256, into, rank)
    kept = std * rank**0.5 / 2
    noise = layer.B.weight.detach().clone()
    for row in range(into):
        noise[row, row % rank] -= kept
    slack = 5 / math.sqrt(2 * noise.numel())
    assert noise.std().item() == pytest.approx(std / 2, rel=slack)
    assert layer.A.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * 256 * rank))
    with pytest.raises(ValueError, match="init = 'zero'; choose from"):
        LowRankLinear(256, into, rank, init="zero")


def test_skip_start_of_a_run_is_that_of_the_layer() -> None:
    run = run_config({"dim": 64, "ffn_dim": 160, "vocab_size": 97}, {"rank": 24, "init": "skip"})
    layers = [m for m in build(run).modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == 2 * 7
    for layer in layers:
        std = init_std(layer.in_features, layer.out_features, 24)
        diagonal = layer.B.weight.detach()[range(24), range(24)]
        assert diagonal.mean().item() == pytest.approx(std * 24**0.5 / 2, rel=0.5)
        assert abs(layer.A.weight.detach()[range(24), range(24)].mean().item()) < std


def test_biases_start_at_zero_and_seeds_differ() -> None:
    run = run_config(cola={"bias": True})
    one, same, other = build(run, 0), build(run, 0), build(run, 1)
    for (name, p), q, r in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if name.endswith("bias"):
            assert not p.any()
        elif p.ndim == 2:
            assert not torch.equal(p, r)


def test_no_two_weights_start_alike() -> None:
    weights = [p for p in build(run_config()).parameters() if p.ndim == 2]
    firsts = [p.flatten()[0].item() for p in weights]
    assert len(weights) == 2 * 14 + 2 and len(set(firsts)) == len(weights)


# ---------------------------------------------------------------------------------- rank rules


@pytest.mark.parametrize(
    "rank, expected",
    [
        (16, [16] * 7),
        (0, [0] * 7),
        (0.25, [16] * 7),
        (0.001, [1] * 7),
        ({"q": 4, "gate": 0.5}, [4, 0, 0, 0, 32, 0, 0]),
        ({name: i + 1 for i, name in enumerate(PROJECTIONS)}, [1, 2, 3, 4, 5, 6, 7]),
        ({"q": 64, "gate": 1.0}, [64, 0, 0, 0, 64, 0, 0]),
        ({}, [0] * 7),
    ],
)
def test_rank_rules(rank: Any, expected: list[int]) -> None:
    assert resolve_ranks(rank, 64, SHAPES) == dict(zip(PROJECTIONS, expected, strict=True))


@pytest.mark.parametrize(
    "rank, message",
    [
        ({"query": 4}, r"cola.rank names \['query'\]; the projections are \['q', 'k'"),
        (1.5, r"cola.rank q = 1.5; a fraction of dim lies in \(0, 1\]"),
        (0.0, "cola.rank q = 0.0; a fraction of dim"),
        ({"up": -0.5}, "cola.rank up = -0.5; a fraction of dim"),
        (-1, "cola.rank q = -1 does not fit the 64 -> 64 projection"),
        (33, "cola.rank k = 33 does not fit the 64 -> 32 projection; it lies between 0 .* and 32"),
        ({"v": 1.0}, "cola.rank v = 64 does not fit the 64 -> 32 projection"),
    ],
)
def test_rank_rules_refuse(rank: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_ranks(rank, 64, SHAPES)


# ----------------------------------------------------------------------------------- attention


def test_document_mask() -> None:
    assert document_mask(torch.arange(6).expand(2, -1), torch.float32) is None
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]), torch.float32)
    assert mask is not None and mask.shape == (2, 1, 5, 5)
    expected = torch.tril(torch.ones(5, 5))
    packed = expected.clone()
    packed[2:, :2] = 0
    assert torch.equal((mask == 0).float(), torch.stack([packed, expected])[:, None])
    assert torch.equal(mask.isinf(), mask != 0)


def test_document_mask_begins_a_document_in_the_middle() -> None:
    """A row that continues a document cut by the row before it: its position starts above 0."""
    mask = document_mask(torch.tensor([[7, 8, 0, 1]]), torch.float32)
    assert mask is not None
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def naive_attention(
    q_BLNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, allowed_BLL: torch.Tensor
) -> torch.Tensor:
    """Softmax attention, query head n reading key/value head n // (N / K); (B, L, N, H)."""
    group = q_BLNH.shape[2] // k_BLKH.shape[2]
    heads = []
    for n in range(q_BLNH.shape[2]):
        q, k, v = q_BLNH[:, :, n], k_BLKH[:, :, n // group], v_BLKH[:, :, n // group]
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~allowed_BLL, float("-inf")).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads, dim=2)


def allowed(positions_BL: torch.Tensor) -> torch.Tensor:
    """(B, L, L): may query i look at key j? Walks the row; no cumulative sums."""
    B, L = positions_BL.shape
    result = torch.zeros(B, L, L, dtype=torch.bool)
    for b in range(B):
        for i in range(L):
            for j in range(i, -1, -1):
                result[b, i, j] = True
                if positions_BL[b, j] == 0:
                    break
    return result


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_document_attention_is_softmax_attention(kv_heads: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    q, k, v = (torch.randn(2, 9, n, 6, dtype=torch.float64) for n in (4, kv_heads, kv_heads))
    actual = DocumentSDPA.Config().build()(
        q, k, v, attention_masks=document_mask(positions, q.dtype), enable_gqa=kv_heads < 4
    )
    torch.testing.assert_close(actual, naive_attention(q, k, v, allowed(positions)))


@pytest.mark.parametrize("memory", ["cola", "cola-m"])
def test_packed_documents_are_as_if_alone(memory: str) -> None:
    """Logits and gradients of three packed documents = those of the three, one after another."""
    model = build(run_config(cola={"memory": memory, "grouped": True})).double()
    lengths = [3, 8, 5]
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(48, (1, n), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(documents, dim=1), positions)
    packed.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(d, torch.arange(d.shape[1])[None]) for d in documents], dim=1)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-12)
    for p, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------------- the block


def plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def plain_rope(x_BLNH: torch.Tensor, positions_BL: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn pair (i, i + H/2) by positions · theta^(-2i/H), in complex numbers."""
    half = x_BLNH.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions_BL[:, :, None] * frequency)[:, :, None]
    turn = torch.complex(angle.cos(), angle.sin())
    turned = torch.complex(x_BLNH[..., :half], x_BLNH[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


class ExactRope(nn.Module):
    """Stands in for torchtitan's, which rounds to fp32 (tested against the same formula below)."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_rope(q, positions, self.theta), plain_rope(k, positions, self.theta)


def test_rope_is_the_formula() -> None:
    rope = build(run_config({"rope_theta": 500.0})).layers["0"].attention.rope
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 15]])
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    for actual, x in zip(rope(q, k, positions), (q, k), strict=True):
        expected = plain_rope(x.double(), positions, 500.0)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def plain_block(
    w: dict[str, torch.Tensor], run: RunConfig, x: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return a block in plain arithmetic from the weights `w` by their torchtitan names."""
    m, (B, L, _) = run.model, x.shape
    sigma = FORMULAS[run.cola.sigma]

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" in w:
            return x @ w[f"{name}.weight"].T
        z = x @ w[f"{name}.A.weight"].T + w.get(f"{name}.A.bias", 0.0)
        return sigma(z) @ w[f"{name}.B.weight"].T + w.get(f"{name}.B.bias", 0.0)

    a = plain_norm(x, w["attention_norm.weight"], m.norm_eps)
    q, k, v = (
        project(f"attention.qkv_linear.w{n}", a).view(B, L, -1, m.per_head) for n in ("q", "k", "v")
    )
    if m.qk_norm:
        q = plain_norm(q, w["attention.q_norm.weight"], m.norm_eps)
        k = plain_norm(k, w["attention.k_norm.weight"], m.norm_eps)
    q, k = (plain_rope(t, positions, m.rope_theta) for t in (q, k))
    h = x + project("attention.wo", naive_attention(q, k, v, allowed(positions)).flatten(2))
    f = plain_norm(h, w["ffn_norm.weight"], m.norm_eps)
    gate = project("feed_forward.w1", f)
    gate = FORMULAS[m.mlp_activation](gate)
    return h + project("feed_forward.w2", gate * project("feed_forward.w3", f))


BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "silu, silu": ({}, {}),
    "silu, identity": ({"mlp_activation": "identity"}, {}),
    "gelu, bias": ({}, {"activation": "gelu", "bias": True}),
    "linear bottleneck": ({}, {"activation": "identity"}),
    "relu": ({}, {"activation": "relu"}),
    "gqa": ({"n_kv_heads": 2}, {}),
    "one kv head": ({"n_kv_heads": 1}, {"rank": 4}),
    "head_dim, qk_norm": ({"qk_norm": True, "head_dim": 12, "n_kv_heads": 2}, {}),
    "rank of each": ({}, {"rank": dict(q=3, k=5, v=7, o=9, gate=11, up=13, down=32)}),
    "dense mix": ({"n_kv_heads": 2}, {"rank": {"q": 4, "v": 0.25, "up": 8, "down": 6}}),
    "dense, identity": ({"mlp_activation": "identity"}, {"rank": 0}),
    "grouped": ({"n_kv_heads": 2}, {"grouped": True, "bias": True}),
    "cola-m": ({"n_kv_heads": 2}, {"memory": "cola-m", "bias": True}),
    "cola-m grouped": ({"qk_norm": True}, {"memory": "cola-m", "grouped": True}),
}


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("case", BLOCKS)
def test_block_is_the_formula(case: str, layer: str) -> None:
    """Output and every gradient in fp64 against plain arithmetic; layer 1 is the one keeping v."""
    run = run_config(*BLOCKS[case])
    block = build(run).layers[layer].double()
    block.attention.rope = ExactRope(run.model.rope_theta)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():  # norms at 1 and biases at 0 would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, 32, dtype=torch.float64)
    weights = dict(block.named_parameters())

    actual = block(x, document_mask(positions, x.dtype), positions)
    actual_gradients = torch.autograd.grad((actual * upstream).sum(), [x, *weights.values()])
    expected = plain_block(weights, run, x, positions)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [x, *weights.values()])

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, one, other in zip(["x", *weights], actual_gradients, expected_gradients, strict=True):
        assert other.abs().max() > 0, name
        error = (one - other).norm() / other.norm()
        assert error < 1e-10, f"{name}: relative error {error}"


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = (build(run_config({"tie_embeddings": t})) for t in (True, False))
    assert tied.tok_embeddings.weight is tied.lm_head.weight
    count = sum(p.numel() for p in tied.parameters())
    assert sum(p.numel() for p in untied.parameters()) - count == 48 * 32
    assert tied.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    tokens = torch.randint(48, (1, 8), generator=torch.Generator().manual_seed(0))
    tied(tokens).sum().backward()
    both = tied.lm_head.weight.grad.clone()
    tied.zero_grad()
    hidden = F.embedding(tokens, tied.lm_head.weight.detach())
    for layer in tied.layers.values():
        hidden = layer(hidden, None, None)
    tied.lm_head(tied.norm(hidden)).sum().backward()
    assert not torch.allclose(both, tied.lm_head.weight.grad)  # the look-up's share is in `both`


def test_converted_blocks_hold_exactly_the_ranks_asked_for() -> None:
    ranks = dict(q=3, k=5, v=7, o=9, gate=11, up=0, down=32)
    block = build(run_config({"n_kv_heads": 2}, {"rank": ranks})).layers["0"]
    qkv, mlp = block.attention.qkv_linear, block.feed_forward
    projections = (qkv.wq, qkv.wk, qkv.wv, block.attention.wo, mlp.w1, mlp.w3, mlp.w2)
    shapes = run_config({"n_kv_heads": 2}).model.projection_shapes()
    for (name, rank), projection in zip(ranks.items(), projections, strict=True):
        assert (projection.in_features, projection.out_features) == shapes[name]
        assert isinstance(projection, LowRankLinear) == (rank > 0)
        if rank:
            assert projection.rank == rank
