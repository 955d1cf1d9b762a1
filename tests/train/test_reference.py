"""Every key is described; help, the reference page and the JSON schema say the same."""

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from lowline.errors import LowlineError
from lowline.linearize.mixers.options import OPTIONS
from lowline.train.config.compress import CompressConfig
from lowline.train.config.load import known_keys
from lowline.train.config.reference import PAGE, SCHEMA, help_keys, page, schema, sections

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def described() -> list:
    return [key for _, keys in sections().values() for key in keys]


def test_every_key_has_a_sentence_of_its_own() -> None:
    for key in described():
        words = key.about.rstrip(".").lower().split()
        assert key.about.endswith(".") and len(words) > 2, key
        assert " ".join(words) != key.name.rpartition(".")[2].replace("_", " "), key


def test_the_reference_has_the_keys_that_are_accepted() -> None:
    own = {f"compress.{field.name}" for field in dataclasses.fields(CompressConfig)}
    assert {key.name for key in described()} == {*known_keys(), *own}


def test_committed_reference_is_what_the_sources_say() -> None:
    """`python -m lowline.train.config.reference --write` renews both files."""
    assert PAGE == ROOT / "docs" / "reference" / "configuration.md"
    assert PAGE.read_text() == page()
    assert json.loads(SCHEMA.read_text()) == schema()


def test_the_files_are_compared_from_any_folder(tmp_path) -> None:
    line = [sys.executable, "-P", "-m", "lowline.train.config.reference"]
    assert subprocess.run(line, cwd=tmp_path).returncode == 0


def test_every_option_of_a_mixer_is_described() -> None:
    rows = page().partition("## Options of mixers")[2]
    for name, cls in OPTIONS.items():
        for field in dataclasses.fields(cls):
            row = re.search(
                rf"^\| `{name}` \| `{field.name}` \| (.*) \| (.+) \|$", rows, re.MULTILINE
            )
            assert row is not None and len(row[2].split()) > 2, (name, field.name)
            assert row[1] == ("" if field.default is None else f"`{json.dumps(field.default)}`")
    assert "| `lolcats` | `features` |  | Columns F of W; φ has 2F." in rows


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_schema_accepts_every_shipped_file(path: Path) -> None:
    jsonschema.Draft202012Validator(schema()).validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "[model]\ndimm = 3",
        "[training]\nsteps = 0",
        '[optimizer]\nname = "adamw"\nmuon_lr = 0.1',
        '[[stage]]\nname = "a"\n[stage.training]\nstesp = 1',
    ],
)
def test_schema_refuses_what_lowline_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(tomllib.loads(text))


def test_help_explains_a_section_with_limits_defaults_and_variants(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # lines are as long as the terminal is wide
    text = help_keys("schedule")
    assert '--schedule.kind=  "cosine" or "linear" or "wsd" or "constant", default "cosine"' in text
    assert "--schedule.decay_fraction=" in text and 'with kind = "wsd"' in text
    assert "--training.steps=  integer > 0, required" in help_keys("training")
    assert max(map(len, help_keys(None).splitlines())) <= 100
    for name in sections():
        assert f"{name}" in help_keys(None)
    with pytest.raises(LowlineError, match="the sections are model, training"):
        help_keys("trianing")


def test_configurations_are_short() -> None:
    """What runs share is in base files; a run's own file shows what the run is about."""
    lines = {path: len(path.read_text().splitlines()) for path in CONFIGS}
    assert sum(lines.values()) <= 1000
    runs = [path for path in lines if path.parent.name in ("configs", "linearize")]
    assert len(runs) == 70 and max(lines[path] for path in runs) <= 25
