"""vLLM's greedy answers are transformers': of every mixer and family, in a batch, prompts cut."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

from helpers.models import ARCHITECTURES
from helpers.serving import answers, engine, greedy, prompts, served_model

from lowline.linearize.mixers.options import OPTIONS

HYBRID = "all but 1"
BODIES = {
    **{mixer: (mixer, "all", "llama") for mixer in OPTIONS},
    **{f"{name}, slots": ("slots", HYBRID, name) for name in ARCHITECTURES},
    "cola": (None, "all", "cola"),
    "cola, QK-norm, mixed": (None, "all", "cola, QK-norm, mixed"),
}


@pytest.mark.parametrize("body", BODIES)
def test_answers_are_those_of_transformers(body: str, tmp_path: Path) -> None:
    model = served_model(*BODIES[body])
    model.save_pretrained(tmp_path)
    asked = prompts()
    expected = greedy(model, asked)
    with engine(tmp_path) as made:
        assert answers(made, asked) == expected
    assert len({tuple(answer) for answer in expected}) > len(asked) // 2  # answers differ
