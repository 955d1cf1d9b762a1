"""Checkpoints that the authors of Mamba in the Llama published (arXiv 2408.15237), read as ours.

Their config.json is the teacher's, mamba_config.json names the layers that kept attention, and the
others have `model.layers.N.mamba.*` where the teacher had `self_attn.*`:

    in_proj     [z; x; B; C; δ]: W_z; v; k; q; of Mamba2 W_δ, of Mamba1 W_r. Early ones of Mamba1
                have in_proj_z, in_proj_x, B_proj, C_proj and dt_proj_down.
    conv1d      of Mamba2 over v, k and q, of Mamba1 over v, repeated for each query head
    out_proj    attention's o

Where heads are shared, their Mamba1 repeats every group of N channels of keys and values on the
spot, so that a query's groups meet those of another place; ours repeats heads. Its channels are
brought into our order, in which the model computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from lowline.errors import LowlineError
from lowline.linearize.body.hf import FAMILIES, SOFTMAX, LinearizedConfig
from lowline.linearize.mixers.base import HeadShape

FILE = "mamba_config.json"
SPLIT_IN_PROJ = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")


def published_config(teacher: PreTrainedConfig, fields: Mapping[str, Any]) -> LinearizedConfig:
    """Return our configuration of a checkpoint.

    Args:
        teacher: what its config.json says.
        fields: of its mamba_config.json.

    Raises:
        LowlineError: a value that its authors' code did not write.
    """
    shape = HeadShape(
        hidden_size=teacher.hidden_size,
        n_heads=teacher.num_attention_heads,
        n_kv_heads=teacher.num_key_value_heads,
        head_dim=getattr(teacher, "head_dim", None)
        or teacher.hidden_size // teacher.num_attention_heads,
    )
    given = dict(fields.get("ssm_cfg") or {})
    second = "ngroups" in given
    inner = shape.n_heads * shape.head_dim
    expected = {
        "n_layer": (fields.get("n_layer"), teacher.num_hidden_layers),
        "d_inner": (fields.get("d_inner") or inner, inner),
        "d_xb": (fields.get("d_xb"), shape.n_kv_heads * shape.head_dim),
        "ssm_cfg.expand": (given.pop("expand", 1), 1),
        "ssm_cfg.ngroups": (given.pop("ngroups", shape.n_heads), shape.n_heads),
        "ssm_cfg.repeat_kv_before_conv": (
            given.pop("repeat_kv_before_conv", not second),
            not second,
        ),
    }
    options = {"conv": given.pop("d_conv", 4)}
    if second:
        expected["ssm_cfg.d_state"] = (given.pop("d_state", 128), shape.head_dim)
    else:
        options["states"] = given.pop("d_state", 16)
    expected |= {f"ssm_cfg.{key}": (value, "nothing") for key, value in given.items()}
    for key, (value, wanted) in expected.items():
        if value != wanted:
            raise LowlineError(f"{FILE}: {key} = {value!r}; what is read has {wanted!r} there")
    mixer = {"name": "mamba2" if second else "mamba1", **options}
    kept = fields.get("attn_layers") or []
    ours = teacher.to_dict() | {"name_or_path": teacher.name_or_path}
    for stale in ("model_type", "architectures", "transformers_version"):
        ours.pop(stale, None)
    ours["mixers"] = [
        {"name": SOFTMAX} if layer in kept else mixer for layer in range(teacher.num_hidden_layers)
    ]
    return FAMILIES[teacher.model_type].config(**ours)


def published_weights(
    weights: Mapping[str, torch.Tensor], config: LinearizedConfig
) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights by our names.

    Raises:
        LowlineError: a layer lacks one, or it has another shape.
    """
    found = {name: weight for name, weight in weights.items() if ".mamba." not in name}
    for layer in config.converted_layers():
        place = f"model.layers.{layer}."
        theirs = {
            name.removeprefix(f"{place}mamba."): weight
            for name, weight in weights.items()
            if name.startswith(f"{place}mamba.")
        }
        translate = _mamba2 if config.mixers[layer]["name"] == "mamba2" else _mamba1
        try:
            ours = translate(theirs, config.head_shape(layer), config.mixers[layer])
        except KeyError as error:
            raise LowlineError(f"{place}mamba.{error.args[0]} is missing") from None
        except (RuntimeError, IndexError) as error:
            raise LowlineError(
                f"{place}mamba has a weight of another shape than {FILE} says: {error}"
            ) from None
        found |= {f"{place}self_attn.{name}": weight for name, weight in ours.items()}
    return found


def _mamba2(
    theirs: dict[str, torch.Tensor], shape: HeadShape, mixer: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    H, D = shape.n_heads, shape.head_dim
    inner, shared = H * D, shape.n_kv_heads * D
    z, v, k, q, step = theirs["in_proj.weight"].split([inner, shared, shared, inner, H])
    taps = theirs["conv1d.weight"].squeeze(1).split([shared, shared, inner])
    biases = theirs["conv1d.bias"].split([shared, shared, inner])
    convs = {
        f"mixer.conv_{name}.{kind}": part
        for kind, parts in (("weight", taps), ("bias", biases))
        for name, part in zip("vkq", parts, strict=True)
    }
    return {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "o_proj.weight": theirs["out_proj.weight"],
        "mixer.gate.weight": z,
        "mixer.step.weight": step,
        "mixer.step_bias": theirs["dt_bias"],
        "mixer.log_rate_H": theirs["A_log"],
        "mixer.skip_H": theirs["D"],
        "mixer.norm_HD": theirs["norm.weight"].view(H, D),
        **convs,
    }


def _mamba1(
    theirs: dict[str, torch.Tensor], shape: HeadShape, mixer: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    inner, shared = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    if "in_proj.weight" in theirs:
        joined = theirs["in_proj.weight"]
    else:
        joined = torch.cat([theirs[f"{name}.weight"] for name in SPLIT_IN_PROJ])
    rank = len(joined) - 2 * (inner + shared)
    z, v, k, q, down = joined.split([inner, shared, shared, inner, rank])
    # Their channels: key and value head, its group, query head of it, channel; ours: heads first.
    sizes = (shape.n_kv_heads, -1, shape.queries_per_kv_head, mixer["states"])
    order = torch.arange(inner).view(sizes).transpose(1, 2).flatten()
    return {
        "q_proj.weight": q[order],
        "k_proj.weight": k,
        "v_proj.weight": v,
        "o_proj.weight": theirs["out_proj.weight"][:, order],
        "mixer.gate.weight": z[order],
        "mixer.step_down.weight": down,
        "mixer.step.weight": theirs["dt_proj.weight"][order],
        "mixer.step_bias": theirs["dt_proj.bias"][order],
        "mixer.log_rate_CN": theirs["A_log"][order],
        "mixer.skip_C": theirs["D"][order],
        "mixer.conv.weight": theirs["conv1d.weight"].squeeze(1)[order],
        "mixer.conv.bias": theirs["conv1d.bias"][order],
    }
