"""vLLM's greedy answers are transformers': of every mixer and family, in a batch, prompts cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

from helpers.models import ARCHITECTURES
from helpers.serving import BUDGET, answers, engine, greedy, prompts, served_model

from lowline.linearize.body import reach
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


@pytest.mark.parametrize("mixer, options", [
    ("sink_window", {"window": 8, "sinks": 2}),
    ("memory", BUDGET | {"sinks": 2}),
    ("memory", BUDGET | {"sinks": 2, "cache_dtype": "int8", "merged": 0}),
])  # fmt: skip
def test_answers_beyond_the_known_positions(mixer, options, tmp_path: Path, monkeypatch) -> None:
    """Of 24: prompts end before, at and far after them; a period has 6 tokens."""
    monkeypatch.setattr(reach, "PERIODS", 4)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    model = served_model(mixer, options=options, max_position_embeddings=24)
    model.save_pretrained(tmp_path)
    asked = prompts((1, 17, 20, 24, 25, 31, 64, 150))
    expected = greedy(model, asked, 20)
    with engine(tmp_path, max_model_len=200) as made:
        assert answers(made, asked, 20) == expected
    monkeypatch.setattr(type(model.model), "reach", lambda *_: None)
    assert greedy(model, asked, 20) != expected
