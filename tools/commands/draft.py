"""`lowline draft`: a smaller model for speculative decoding, made of some layers of the target.

lowline draft target/ draft/ 6 > draft.toml
lowline train draft.toml
lowline export outputs/draft trained_draft/
lowline generate target/ "A list is" --draft trained_draft/
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.commands.import_ import set_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADER = """\
# Distills the draft {draft} from {target}; `lowline train FILE` runs it.
# [data] is the text that comes with lowline, a small start: name text like the target's answers
# (`lowline generate --prompts` writes them), and raise training.steps to what it needs.
# Layers of the target, from 0: {layers}.
"""


def draft(
    target: str,
    *,
    output: Path,
    layers: int,
    choose: Literal["spread", "first", "last"] = "spread",
) -> None:
    """Make a draft model of some layers of a model, and print the TOML that distills it.

    Embeddings, norms and head are the target's. Untrained, such a draft is rarely right; the
    printed configuration trains it towards the target's logits.

    Args:
        target: The directory of a Hugging Face model, converted or low-rank ones included.
        output: A new directory for the draft.
        layers: How many layers it has.
        choose: "spread" takes layers at equal distances, the first and the last among them;
            "first" and "last" take those of one end.
    """
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        raise LowlineError(f"output = {output} exists and is not empty; give another directory")
    check_source(target)
    if not (Path(target) / "config.json").is_file():
        raise LowlineError(
            f"{target} is no directory of a Hugging Face model, which a teacher has to be: "
            f"`lowline import {target} --output DIR` makes one"
        )
    import tomli_w

    from lowline.linearize.convert import save
    from lowline.linearize.source import load_config, load_teacher, load_tokenizer
    from lowline.quiet import quiet_libraries
    from lowline.train.hf.config import config_from_hf, mixer_from_hf

    quiet_libraries()
    total = load_config(target).num_hidden_layers
    if not 0 < layers < total:
        raise LowlineError(f"layers = {layers}; {target} has {total}, a draft 1 to {total - 1}")
    taken = chosen_layers(total, layers, choose)
    small = with_layers(load_teacher(target), taken)
    save(small, load_tokenizer(target), output)
    model, cola = config_from_hf(small.config)
    mixer = mixer_from_hf(small.config)
    tables = {
        "output": f"outputs/{output.resolve().name}",
        "tokenizer": str(output),
        "model": set_fields(model),
        "cola": set_fields(cola),
        "mixer": {} if mixer is None else asdict(mixer),
        "checkpoint": {"initial_weights": str(output)},
        "objective": {"kind": "distill", "teacher": target, "trainable": "all"},
        "training": {"steps": 200, "seq_len": min(512, model.max_seq_len or 512)}
        | {"global_batch_size": 8},
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "cosine"},
        "data": {"dataset": "embedded"},
    }
    print(HEADER.format(draft=output, target=target, layers=taken), end="")
    print(tomli_w.dumps({name: table for name, table in tables.items() if table}), end="")


def chosen_layers(total: int, n: int, choose: str) -> list[int]:
    """Return the numbers of n of all layers."""
    if choose == "first":
        return list(range(n))
    if choose == "last" or n == 1:
        return list(range(total - n, total))
    return [k * (total - 1) // (n - 1) for k in range(n)]


def with_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Return a model of these layers of another, with its other weights.

    Raises:
        LowlineError: a low-rank model whose layers take something from each other.
    """
    from lowline.cola.variants import variant_of
    from lowline.linearize.source import model_of

    config: Any = model.config
    variant = getattr(config, "variant", "cola")
    if variant_of(variant).crosses:
        raise LowlineError(
            f"{config.name_or_path}: variant = {variant!r} hands outputs from layer to layer, so "
            'none can be left out; drafts are made of cola.variant = "cola" or "dlr"'
        )
    fields: dict[str, Any] = config.to_dict() | {"name_or_path": config.name_or_path}
    fields["num_hidden_layers"] = len(layers)
    for name in ("mixers", "softmax_layer_types", "layer_types"):
        if fields.get(name):
            fields[name] = [fields[name][layer] for layer in layers]
    for stale in ("model_type", "architectures", "transformers_version", "quantization_config"):
        fields.pop(stale, None)
    weights = {}
    for name, tensor in model.state_dict().items():
        place = re.match(r"model\.layers\.(\d+)\.", name)
        if place is None:
            weights[name] = tensor
        elif int(place[1]) in layers:
            weights[f"model.layers.{layers.index(int(place[1]))}.{name[place.end() :]}"] = tensor
    small = type(config)(**fields)
    made = model_of(type(model), small, weights, model.dtype)
    made.generation_config = model.generation_config
    return made.eval()
