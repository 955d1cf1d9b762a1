"""vLLM's greedy answers are transformers': of every mixer and family, in a batch, prompts cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

from helpers.models import ARCHITECTURES
from helpers.serving import BUDGET, answers, engine, greedy, prompts, served_model

from lowline.linearize.mixers.options import OPTIONS

HYBRID = "all but 1"
BODIES: dict[str, dict[str, Any]] = {
    **{mixer: {"mixer": mixer} for mixer in OPTIONS},
    "memory, budget": {"mixer": "memory", "options": BUDGET},
    **{f"{n}, slots": {"mixer": "slots", "layers": HYBRID, "name": n} for n in ARCHITECTURES},
    "cola": {"mixer": None, "name": "cola"},
    "cola, QK-norm, mixed": {"mixer": None, "name": "cola, QK-norm, mixed"},
    "cola, cr-net": {"mixer": None, "name": "cola", "variant": "cr-net"},
    "cola, lax": {"mixer": None, "name": "cola", "variant": "lax"},
}


@pytest.mark.parametrize("body", BODIES)
def test_answers_are_those_of_transformers(body: str, tmp_path: Path) -> None:
    model = served_model(**BODIES[body])
    model.save_pretrained(tmp_path)
    asked = prompts()
    expected = greedy(model, asked)
    with engine(tmp_path) as made:
        assert answers(made, asked) == expected
    assert len({tuple(answer) for answer in expected}) > len(asked) // 2  # answers differ
