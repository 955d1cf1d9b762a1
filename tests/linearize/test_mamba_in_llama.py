"""Published Mamba-in-the-Llama checkpoints load, and compute what the paper says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import SHAPE, error, scrambled, tokens
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.convert import convert, save
from lowline.linearize.source import load_teacher
from lowline.train.data.tokenizer import load_tokenizer

H, G, D, E, N = 4, 2, 32, 64, 16  # N states of a channel in Mamba1, half a head
INNER, SHARED, RANK = H * D, G * D, math.ceil(E / 16)
KEPT = [1]  # the layer that is left attention
CONFIG = {
    "d_model": E, "rms_norm_eps": 1e-6, "vocab_size": None, "d_inner": INNER, "d_xb": SHARED,
    "intermediate_size": 96, "hidden_act": "silu", "n_layer": 3, "attn_layers": KEPT,
}  # fmt: skip
SECOND = {"expand": 1, "ngroups": H, "d_state": D}


def sizes(second: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a layer, as the authors' modules have them."""
    taken = INNER + 2 * SHARED if second else INNER
    common = {
        "in_proj.weight": (2 * INNER + 2 * SHARED + (H if second else RANK), E),
        "conv1d.weight": (taken, 1, 4),
        "conv1d.bias": (taken,),
        "out_proj.weight": (E, INNER),
    }
    if second:
        return common | {"dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (INNER,)}
    steps = {"dt_proj.weight": (INNER, RANK), "dt_proj.bias": (INNER,)}
    return common | steps | {"A_log": (INNER, N), "D": (INNER,)}


def layer_weights(second: bool, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(size, generator=random) for name, size in sizes(second).items()}
    for name in ("in_proj.weight", "out_proj.weight"):
        made[name] /= made[name].shape[1] ** 0.5
    return {name: weight / 2 if weight.dim() < 3 else weight for name, weight in made.items()}


def convolved(x_TC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x_TC, (0, 0, 3, 0))
    rows = [(padded[t : t + 4].T * weight[:, 0]).sum(1) for t in range(len(x_TC))]
    return F.silu(torch.stack(rows) + bias)


def repeated(x: torch.Tensor, width: int) -> torch.Tensor:
    """Repeat every group of `width` channels for the queries of a head, as their `repeat_kv`."""
    return x.unflatten(-1, (-1, width)).repeat_interleave(H // G, -2).flatten(-2)


def mamba2(w: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    """Section 2.2 and the Mamba2 variant, one sequence (T, E), token by token."""
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([INNER, INNER + 2 * SHARED, H], -1)
    x, B, C = convolved(xBC, w["conv1d.weight"], w["conv1d.bias"]).split(
        [SHARED, SHARED, INNER], -1
    )
    x, B, C = (t.unflatten(-1, (H, D)) for t in (repeated(x, D), repeated(B, D), C))
    delta, A = F.softplus(dt + w["dt_bias"], threshold=50), -w["A_log"].exp()
    h, rows = torch.zeros(H, D, D, dtype=u.dtype), []
    for t in range(len(u)):
        step = delta[t][:, None, None]
        h = (step * A[:, None, None]).exp() * h + step * x[t][:, :, None] * B[t][:, None, :]
        rows.append((h * C[t][:, None, :]).sum(-1) + w["D"][:, None] * x[t])
    y = torch.stack(rows) * F.silu(z).unflatten(-1, (H, D))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (y.flatten(1) * w["norm.weight"]) @ w["out_proj.weight"].T


def mamba1(w: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split([INNER, SHARED, SHARED, INNER, RANK], -1)
    x = convolved(repeated(x, N), w["conv1d.weight"], w["conv1d.bias"])
    delta = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"], threshold=50)
    A, h, rows = -w["A_log"].exp(), torch.zeros(INNER, N, dtype=u.dtype), []
    B, C = (t.unflatten(-1, (-1, N)).repeat_interleave(N, 1) for t in (repeated(B, N), C))
    for t in range(len(u)):
        h = (delta[t][:, None] * A).exp() * h + (delta[t] * x[t])[:, None] * B[t]
        rows.append((h * C[t]).sum(-1) + w["D"] * x[t])
    return (torch.stack(rows) * F.silu(z)) @ w["out_proj.weight"].T


class Reference(torch.nn.Module):
    """A layer's mixer in the place of transformers' attention, in fp64."""

    def __init__(self, weights: dict[str, torch.Tensor], second: bool) -> None:
        super().__init__()
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.compute = mamba2 if second else mamba1

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.stack([self.compute(self.weights, row) for row in hidden_states]), None


@pytest.fixture(scope="module", params=["mamba2", "mamba1", "mamba1, apart", "mamba2, tied"])
def published(request, tmp_path_factory):
    """A directory as their training writes it, and the model that it means."""
    name, _, variant = request.param.partition(", ")
    second, folder = name == "mamba2", tmp_path_factory.mktemp(name)
    config = LlamaConfig(**SHAPE, head_dim=D, tie_word_embeddings=variant == "tied")
    reference = scrambled(LlamaForCausalLM(config)).double()
    weights = {k: w.float() for k, w in reference.state_dict().items()}
    if variant == "tied":
        del weights["lm_head.weight"]
    for layer in {0, 1, 2}.difference(KEPT):
        place = f"model.layers.{layer}."
        weights = {k: w for k, w in weights.items() if not k.startswith(f"{place}self_attn")}
        own = layer_weights(second, layer)
        reference.model.layers[layer].self_attn = Reference(own, second)
        if variant == "apart":
            parts = own.pop("in_proj.weight").split([INNER, SHARED, SHARED, INNER, RANK])
            names = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
            own |= {f"{n}.weight": w.clone() for n, w in zip(names, parts, strict=True)}
        weights |= {f"{place}mamba.{k}": w for k, w in own.items()}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = CONFIG | {"ssm_cfg": SECOND if second else {"expand": 1}}
    (folder / "mamba_config.json").write_text(json.dumps(fields))
    return folder, reference


@torch.no_grad()
def test_logits_are_the_papers(published, tmp_path):
    folder, reference = published
    ids = tokens(2, 13)
    expected = reference(ids, use_cache=False).logits
    model = load_teacher(folder)
    assert model.config.model_type == "linearized_llama"
    assert [m["name"] == "softmax" for m in model.config.mixers] == [False, True, False]
    # the norm divides a head's small outputs, and their rounding, by their size
    assert error(model(ids).logits.double(), expected) < 1e-4
    assert error(model.double()(ids).logits, expected) < 1e-11
    cache = LinearizedCache(model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 4], 1)]
    assert error(torch.cat(pieces, 1), expected) < 1e-11
    # and from then on it is a directory like any other
    ours = convert(folder, mixer="softmax", layers="none", dtype=torch.float64)
    save(ours, load_tokenizer("embedded").hf, tmp_path / "ours")
    assert error(load_teacher(tmp_path / "ours")(ids).logits, expected) < 1e-11


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_xb": 128}, r"mamba_config.json: d_xb = 128; what is read has 64 there"),
        ({"n_layer": 4}, "n_layer = 4"),
        ({"ssm_cfg": SECOND | {"d_state": 16}}, "ssm_cfg.d_state = 16"),
        ({"ssm_cfg": SECOND | {"rmsnorm": False}}, "ssm_cfg.rmsnorm = False"),
        ({"ssm_cfg": {"expand": 2}}, "ssm_cfg.expand = 2"),
        ({"ssm_cfg": {"expand": 1}}, r"model.layers.0.mamba.dt_proj.weight is missing"),
        ({"attn_layers": []}, r"model.layers.1.mamba.in_proj.weight is missing"),
        ({"attn_layers": [0, 1]}, "model.layers.0.self_attn.q_proj.weight is missing"),
    ],
)
@pytest.mark.parametrize("published", ["mamba2"], indirect=True)
def test_what_does_not_fit_is_refused(published, changes, words, tmp_path):
    folder, _ = published
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    fields = json.loads((folder / "mamba_config.json").read_text()) | changes
    (tmp_path / "mamba_config.json").unlink()
    (tmp_path / "mamba_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=words):
        load_teacher(tmp_path)
