"""What other libraries print, and do not print in our commands."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("quiet", [True, False])
def test_other_libraries_are_quiet(quiet, tmp_path, capsys) -> None:
    """What transformers and torch print while a model is written and loaded."""

    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    from lowline.quiet import quiet_libraries

    shown = transformers_logging.is_progress_bar_enabled()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    try:
        with warnings.catch_warnings():
            if quiet:
                quiet_libraries()
            else:
                transformers_logging.enable_progress_bar()
            model.save_pretrained(tmp_path)
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        (transformers_logging.enable_progress_bar if shown else
         transformers_logging.disable_progress_bar)()  # fmt: skip
    assert ("Loading weights" in capsys.readouterr().err) is not quiet
