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


@pytest.mark.parametrize("made", ["checkpoint", ".metadata"])
def test_a_run_is_no_model(made, tmp_path) -> None:
    """Said before torch is imported; a Hugging Face directory may hold anything else beside."""
    (tmp_path / made).mkdir() if made == "checkpoint" else (tmp_path / made).touch()
    with pytest.raises(LowlineError, match=f"lowline export {tmp_path} MODEL"):
        check_source(tmp_path)
    (tmp_path / "config.json").touch()
    check_source(tmp_path)


def calls() -> list[tuple[str, str, ast.Call]]:
    """Return place, class and call of what may load code in the package."""
    found = []
    for folder in ("kernels", "cola", "linearize", "train", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner, method = ast.unparse(node.func.value), node.func.attr
                auto = owner.startswith("Auto") and method == "from_config"
                if method in ("from_pretrained", "pipeline") or auto:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", owner, node))
    return found


def test_no_code_and_no_pickles_are_loaded() -> None:
    """`trust_remote_code=False` stands in every call, `use_safetensors=True` in every model's."""
    assert len(calls()) >= 9
    for place, owner, call in calls():
        options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        assert options.get("trust_remote_code") is False, place
        assert isinstance(call.func, ast.Attribute)
        of_json = owner in ("AutoConfig", "AutoTokenizer", "GenerationConfig")
        if call.func.attr == "from_pretrained" and not of_json:
            assert options.get("use_safetensors") is True, place


def test_safetensors_are_opened_by_the_loader_and_for_files_of_our_own() -> None:
    """Nothing else reads weights past the checks; `torch.load` only takes what is no pickle.

    A saved context is no weights: it has a SHA-256 of its own.
    """
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "cola", "linearize", "train", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text() for word in ("safe_open(", "load_file(", "torch.load("))
    }
    ours = {"blockwise/store.py", "model/step_folder.py", "objectives/logit_cache.py"}
    assert users == {
        "linearize/source.py",
        "linearize/body/context_file.py",
        *(f"train/{name}" for name in ours),
    }
