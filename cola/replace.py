"""A model of torch or transformers gets low-rank layers: `to_cola(model, rank=64)`.

    model = LlamaForCausalLM(config)
    to_cola(model, rank=64)  # the seven projections of each layer
    to_cola(model, rank=64, where=lambda name, layer: "mlp" in name)

The new layers begin with the published random values (`lowline.cola.low_rank.init_std`), so this is
for pretraining. The model's class stays what it was; for a model that `from_pretrained` loads,
build `lowline.cola.hf.CoLAForCausalLM` or train with `lowline.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from lowline.cola.low_rank import LowRankLinear
from lowline.cola.projections import PROJECTIONS
from lowline.errors import LowlineError

Model = TypeVar("Model", bound=nn.Module)
Rank = int | float | Mapping[str, int | float]
_LEAVES = {projection.hf_leaf: name for name, projection in PROJECTIONS.items()}


def to_cola(
    model: Model,
    *,
    rank: Rank,
    activation: str = "silu",
    where: Callable[[str, nn.Linear], bool] | None = None,
) -> Model:
    """Replace linear layers of a model by `LowRankLinear` in place, and return the model.

    Args:
        model: any module; its linear layers named q_proj, k_proj, v_proj, o_proj, gate_proj,
            up_proj and down_proj are replaced, as Llama-like models of transformers have them.
        rank: of every layer; an integer, a fraction of the layer's smaller width, or a table of
            these by projection (q, k, v, o, gate, up, down), where those left out stay dense.
        activation: σ, a name from `lowline.cola.low_rank.ACTIVATIONS`.
        where: chooses layers instead by their full names: `where(name, layer)`.

    Raises:
        LowlineError: no layer is chosen, an unknown projection, or a rank that is not at least 1.
    """
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(PROJECTIONS))):
        raise LowlineError(f"rank names {unknown}; allowed are {list(PROJECTIONS)}")
    chosen = [
        (name, layer, name.rpartition(".")[2])
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    chosen = [c for c in chosen if (where(c[0], c[1]) if where else c[2] in _LEAVES)]
    made = {}
    for name, layer, leaf in chosen:
        r = rank.get(_LEAVES.get(leaf, ""), 0) if isinstance(rank, Mapping) else rank
        if isinstance(rank, Mapping) and not r:
            continue
        width = min(layer.in_features, layer.out_features)
        made[name] = LowRankLinear(
            layer.in_features,
            layer.out_features,
            int(r * width) if isinstance(r, float) else r,
            activation=activation,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
    if not made:
        raise LowlineError(
            f"no linear layer of {type(model).__name__} is to be replaced; give "
            "where=lambda name, layer: ... to choose layers by their names"
        )
    for name, low_rank in made.items():
        model.set_submodule(name, low_rank)
    return model
