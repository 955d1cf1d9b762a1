"""Names of models: paths are not looked for on the hub, and a hub that is away is one sentence."""

from __future__ import annotations

import ast
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi

from lowline.errors import LowlineError, MissingFileError
from lowline.hub import check_source, looks_like_a_path

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", False),
        ("owner/name", False),
        ("./gpt2", True),
        ("~/gpt2", True),
        ("/gpt2", True),
        ("a/b/c", True),
        ("model.gguf", True),
        ("runs/nope", True),
    ],
)
def test_what_is_a_path(name, path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(LowlineError, match="no such file or directory") as error:
        check_source(name)
    assert looks_like_a_path(name) is path
    assert asked == ([] if path else [name])
    assert isinstance(error.value, MissingFileError) is path
    assert ("hub cannot be reached: no network" in str(error.value)) is not path


def test_what_is_there_is_not_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", None)
    check_source(tmp_path)


def calls() -> list[tuple[str, ast.Call]]:
    """Return every call of a `from_pretrained` in the package."""
    found = []
    for folder in ("kernels", "cola", "linearize", "train", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                method = getattr(getattr(node, "func", None), "attr", None)
                if isinstance(node, ast.Call) and method == "from_pretrained":
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_no_code_and_no_pickles_are_loaded() -> None:
    """`trust_remote_code=False` stands in every call, `use_safetensors=True` in every model's."""
    assert len(calls()) >= 9
    for place, call in calls():
        options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        assert options.get("trust_remote_code") is False, place
        loader = ast.unparse(call.func)
        if not loader.startswith(("AutoConfig", "AutoTokenizer")):
            assert options.get("use_safetensors") is True, place
