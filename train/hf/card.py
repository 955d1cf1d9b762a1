"""The model card of a training run's export: `lowline.linearize.card` with the run's facts."""

from __future__ import annotations

import tomllib

import tomli_w
from transformers import PreTrainedConfig

from lowline.linearize import card
from lowline.train.config.load import to_toml
from lowline.train.config.run import RunConfig


def model_card(
    name: str,
    run: RunConfig,
    hf: PreTrainedConfig,
    parameters: int,
    step: str,
    base_model: str | None = None,
) -> str:
    """Return the card of an exported model, with the configuration of its run.

    Args:
        name: of the model.
        run: the training run.
        hf: the exported configuration.
        parameters: how many it has.
        step: of the run, by its folder's name.
        base_model: the hub id, directory or GGUF file that training began with.
    """
    path = run.data.path if run.data.dataset == "hub" else None
    return card.model_card(
        name,
        hf,
        parameters,
        made=f"{step} of a lowline run",
        base_model=base_model,
        data_set=path if isinstance(path, str) else None,
        toml=tomli_w.dumps(card.without_paths(tomllib.loads(to_toml(run)))),
    )
