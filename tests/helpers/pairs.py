"""Pairs of answers, of which one is better, and a chat template for them."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KEYS = {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"}


def pair(n: int) -> dict[str, str]:
    good, bad = f"It is {n + n}, for {n} and {n} make it.", f"A list of {n * 'no '}"
    return {"prompt": f"What is {n} and {n}?", "chosen": good, "rejected": bad}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
