"""Lets a saved model of ours load where nobody has imported `lowline`: `auto_map` and its file.

transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` follow `auto_map` in config.json
to a Python file beside it when they are called with `trust_remote_code=True`. Ours imports the
model's classes from lowline; transformers names the package where it is not installed. A process
that has imported lowline does not need the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

MODELING_FILE = "modeling_lowline.py"
TEMPLATE = '''"""This model's classes, for trust_remote_code=True. They need: pip install lowline"""

import {module} as lowline_model


class {config}(lowline_model.{config}):
    pass


class {body}(lowline_model.{body}):
    config_class = {config}


class {causal_lm}(lowline_model.{causal_lm}):
    config_class = {config}
'''


def add_remote_code(config: PreTrainedConfig, folder: str | os.PathLike[str]) -> None:
    """Write the modeling file to `folder`, and name its classes in `config.auto_map`.

    Nothing happens where the configuration is one of transformers' own.

    Args:
        config: of the model that is saved there; save it afterwards.
        folder: an existing directory.
    """
    ours = next((c for c in type(config).__mro__ if _is_ours(c)), None)
    if ours is None:
        return
    autos: Any = (AutoModel, AutoModelForCausalLM)
    body, causal_lm = (auto._model_mapping[ours].__name__ for auto in autos)
    text = TEMPLATE.format(
        module=ours.__module__, config=ours.__name__, body=body, causal_lm=causal_lm
    )
    (Path(folder) / MODELING_FILE).write_text(text, encoding="utf-8")
    module = Path(MODELING_FILE).stem
    classes = {"AutoConfig": ours.__name__, "AutoModel": body, "AutoModelForCausalLM": causal_lm}
    config.auto_map = {auto: f"{module}.{name}" for auto, name in classes.items()}


def _is_ours(kind: type) -> bool:
    return issubclass(kind, PreTrainedConfig) and kind.__module__.startswith("lowline.")


class SavesRemoteCode(PreTrainedModel):
    """Makes `save_pretrained` write what `from_pretrained(..., trust_remote_code=True)` needs."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **how: Any
    ) -> None:
        os.makedirs(save_directory, exist_ok=True)
        add_remote_code(self.config, save_directory)
        super().save_pretrained(save_directory, *args, **how)
