"""The command line itself: words, options, keys, help, mistakes, exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest

from lowline import LowlineError, command_line
from lowline.command_line import Keys, Mark, Positional
from lowline.tools.cli import COMMANDS, main
from lowline.train.config.shipped import find_config, shipped_configs

ROOT = Path(__file__).parents[2]


# -------------------------------------------------------------------------------- the parser


def sample(
    source: Path,
    *,
    rate: float = 0.5,
    sizes: tuple[int, ...] = (1, 2),
    kind: Literal["one", "two"] = "one",
    quick: bool = False,
    plots: bool = True,
    limit: int | None = None,
) -> int:
    """Do something.

    More about it.

    Args:
        source: Where from, 100% of
            it.
        rate: How fast.

    Returns:
        Nothing.
    """
    raise AssertionError


def with_keys(
    file: Positional = None,
    *,
    dry: command_line.Annotated[int | None, Mark("bare", 0)] = None,
    quick: bool = False,
    keys: Keys = (),
) -> int:
    """Do something with keys."""
    raise AssertionError


def parse(function, line: str) -> dict:
    return command_line.parse(function, line.split(), "lowline sample")


def test_values_have_the_types_of_the_signature() -> None:
    assert parse(sample, "a/b") == dict(
        source=Path("a/b"), rate=0.5, sizes=(1, 2), kind="one", quick=False, plots=True, limit=None
    )
    line = "--rate=2 a --kind two --sizes 3 4 --quick --no-plots --limit 7"
    assert parse(sample, line) == dict(
        source=Path("a"), rate=2.0, sizes=(3, 4), kind="two", quick=True, plots=False, limit=7
    )
    assert parse(sample, "a --no-quick")["quick"] is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "missing: SOURCE"),
        ("a b", "unrecognized arguments: b"),
        ("a --rate", "--rate: expected one argument"),
        ("a --rate x", "--rate: invalid float value: 'x'"),
        ("a --kind three", "--kind: 'three': choose from one, two"),
        ("a --size 3", "--size: no such option; did you mean --sizes?"),
        ("a --model.dim=3", "--model.dim: no such option"),
    ],
)
def test_what_a_command_refuses(line: str, message: str) -> None:
    with pytest.raises(command_line.UsageError) as error:
        parse(sample, line)
    assert message in str(error.value) and "`lowline sample --help`" in str(error.value)


def test_keys_are_written_with_a_space_or_an_equals_sign() -> None:
    line = "f.toml --a.b=c --quick --a.b_c d --output X --stage.one-two.x -1 --empty="
    assert parse(with_keys, line) == dict(
        file="f.toml", dry=None, quick=True,
        keys=("--a.b=c", "--a.b_c=d", "--output=X", "--stage.one-two.x=-1", "--empty="),
    )  # fmt: skip
    assert parse(with_keys, "--dry f.toml") == dict(file="f.toml", dry=0, quick=False, keys=())
    assert parse(with_keys, "--dry=64")["dry"] == 64
    for line in ("--a.b", "--a.b --quick"):  # a switch, or refused where the key's type is known
        assert parse(with_keys, line)["keys"] == ("--a.b",)


def test_help_names_arguments_and_shows_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = command_line.parser_of(sample, "lowline sample").format_help()
    assert text.startswith("usage: lowline sample [OPTIONS] SOURCE\n\nDo something.\n\nMore about")
    words = " ".join(text.split())
    assert "SOURCE Where from, 100% of it." in words
    assert "--rate X How fast. (default: 0.5)" in words
    assert "--kind {one,two}" in text and "--sizes [N ...]" in text and "--no-plots" in text
    assert "--no-quick" not in text and "Returns" not in text and "Nothing" not in text


# ----------------------------------------------------------------- mistakes and exit codes


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LowlineError("key = 3; at most 2"), "lowline x: key = 3; at most 2\n"),
        (FileNotFoundError(2, "No such file or directory", "a"),
         "lowline x: [Errno 2] No such file or directory: 'a'\n"),
        (ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint"),
         "lowline x: gguf is not installed, which this needs: pip install 'lowline[gguf]'\n"),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"),
         "lowline x: lm_eval is not installed, which this needs: pip install 'lowline[eval]'\n"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(error, message, capsys) -> None:
    assert command_line.run(raising(error), [], prog="lowline x") == 2
    assert capsys.readouterr().err == message
    assert command_line.run(raising(error), ["--debug"], prog="lowline x") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith(message)


def test_a_rank_that_fails_alone_is_heard(capsys, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("lowline.command_line.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert command_line.run(raising(LowlineError("no space")), [], prog="lowline x") == 2
    assert capsys.readouterr().err == "lowline x: rank 3: no space\n" and waited == [20.0]


def test_torchrun_ends_with_the_code_of_a_rank(monkeypatch) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api, errors

    from lowline.tools.launch import torchrun

    def failure(code: int) -> errors.ChildFailedError:
        failed = errors.ProcessFailure(local_rank=1, pid=9, exitcode=code, error_file="none")
        return errors.ChildFailedError("train", {1: failed})

    stopped = api.SignalException("stopped", signal.SIGTERM)
    for raised, code in ((failure(2), 2), (failure(-9), 137), (stopped, 143)):
        monkeypatch.setattr(run, "main", Mock(side_effect=raised))
        assert torchrun(["x"]) == code
    monkeypatch.setattr(run, "main", Mock())
    assert torchrun(["x"]) == 0


@pytest.mark.parametrize("error", [ValueError("of torch"), ImportError("cannot import name")])
def test_what_is_no_mistake_of_the_user_is_not_swallowed(error) -> None:
    with pytest.raises(type(error)):
        command_line.run(raising(error), [], prog="lowline x")


def test_ctrl_c_is_130_without_a_traceback(capsys) -> None:
    assert command_line.run(raising(KeyboardInterrupt()), [], prog="lowline x") == 130
    assert capsys.readouterr().err == "\n"


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in command_line.EXTRAS.items():
        names = [line.partition(">")[0] for line in extras["optional-dependencies"][extra]]
        assert package.replace("_", "-") in names


# ------------------------------------------------------------------------------------ words


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowline {version('lowline')}\n"


def test_the_overview_lists_every_command(capsys) -> None:
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    for words, command in COMMANDS.items():
        assert f"  {words:16} {command.about}\n" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("group", ["bench", "inspect", "plan"])
def test_a_group_lists_its_commands(group: str, capsys) -> None:
    assert main([group, "--help"]) == 0 and main([group]) == 2
    listed = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert listed == 2 * [words for words in COMMANDS if words.startswith(f"{group} ")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is not a command; did you mean `lowline train`? `lowline --help`"),
        (["bench", "deocde"], "did you mean `lowline bench decode`? `lowline bench --help`"),
        (["xyzzy"], "lowline: 'xyzzy' is not a command; `lowline --help` lists them"),
    ],
)
def test_an_unknown_command(words: list[str], message: str, capsys) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err and not out


LIGHT = """
import contextlib, io, json, sys
from lowline.tools.cli import main
slow = ["torch", "transformers", "torchtitan", "datasets", "tokenizers", "numpy", "rich"]
lines, more = json.loads(sys.argv[1])
answers, slow = {}, slow + more
for line in lines:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(line)
    names = [name for name in slow if name in sys.modules]
    assert not names, (line, names)
    answers[" ".join(line)] = [code, out.getvalue()]
print(json.dumps(answers))
"""
PLAIN, STAGES = "demo_cola", "lolcats_smollm2_135m"


def answers(*lines: str, slow: tuple[str, ...] = ()) -> dict[str, list]:
    """Return what commands say, in one process that has imported nothing slow by its end."""
    words = json.dumps([[line.split() for line in lines], slow])
    given = [sys.executable, "-P", "-c", LIGHT, words]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_imports_nothing_slow() -> None:
    lines = [f"{words} --help" for words in COMMANDS]
    sections = [f"{words} --help training" for words, command in COMMANDS.items() if command.keys]
    assert len(sections) == 4
    for line, (code, said) in answers(*lines, *sections).items():
        assert code == 0, line
        words = line.partition(" --help")[0]
        if line in sections:
            assert said.startswith("[training]: How long") and "--training.steps=" in said, line
        else:
            assert said.startswith(f"usage: lowline {words} [OPTIONS]"), line
            assert ("\n  [optimizer] " in said) is COMMANDS[words].keys, line


WRONG_PATHS = {  # of every command that takes one
    "train": "no/where",
    "configs": "no/where",
    "export": "no/where out",
    "import": "./nowhere",
    "linearize": "./nowhere --config " + STAGES,
    "compress": "./nowhere out",
    "draft": "./nowhere out 2",
    "plan blockwise": "./nowhere",
    "generate": "./nowhere text",
    "serve": "./nowhere",
    "context save": "./nowhere text out.safetensors",
    "evaluate": "./nowhere",
    "inspect cost": "no/where",
    "inspect rank": "./nowhere",
    "inspect budget": "./nowhere",
    "bench decode": "./nowhere",
    "bench serve": "./nowhere",
    "bench linearize": "no/where",
}


def test_mistakes_import_nothing_slow() -> None:
    without_path = {"bench pretrain", "bench kernels", "demo", "demo linearize"}
    assert WRONG_PATHS.keys() == COMMANDS.keys() - without_path
    wrong_options = [f"{words} --hepl" for words in COMMANDS]
    wrong_keys = {
        f"train {PLAIN} --trainin.steps=1": "trainin: unknown key. Did you mean training.seed?",
        f"train {PLAIN} --training.stpes=1": "training.stpes = 1: unknown key. Did you mean "
        "training.steps?",
        f"train {STAGES} --source=./nowhere --training.stpes=1": "training.stpes = 1: unknown key",
        f"linearize --config {STAGES} --stage.lora.lora.rnk=1":
        "stage 'lora': command line: lora.rnk = 1: unknown key. Did you mean lora.rank?",
        f"bench linearize {STAGES} --training.stpes=1": "training.stpes = 1: unknown key",
        f"inspect cost {PLAIN} --optimizer.muon_lr=1": 'unknown key with name = "adamw"; "muon"',
        f"inspect cost {PLAIN} --model.dim=x": "model.dim = 'x': Input should be a valid integer",
    }  # fmt: skip
    others = {
        "train": "give a TOML file, or the name of one that `lowline configs` lists",
        f"train {STAGES} --source=./nowhere": "./nowhere: no such file or directory",
        f"linearize ./nowhere --config {PLAIN}": "no [[stage]]: a conversion needs one at least",
        f"linearize --config {STAGES} --procesess=1": "did you mean --processes?",
        "linearize": "--config is missing",
        "generate a b --max-tokens=3": "did you mean --max-new-tokens?",
        "configs cola_60n": "did you mean cola_60m",
        "configs /": "/: a folder, not a TOML file",
        "inspect rank . --text=no-text": "text = no-text: not a readable UTF-8 file",
        "import . --output=/": "/ exists; give another output",
        "export a": "missing: OUTPUT",
        "trian x": "did you mean `lowline train`?",
    }
    paths = [f"{words} {rest}" for words, rest in WRONG_PATHS.items() if words != "linearize"]
    said = answers(*paths, "linearize --config no/where", slow=("pydantic", "huggingface_hub"))
    paths = list(said)
    paths.append(f"linearize {WRONG_PATHS['linearize']}")
    said |= answers(paths[-1], *wrong_options, *wrong_keys, *others)
    assert {line: code for line, (code, _) in said.items()} == dict.fromkeys(said, 2)
    for line in wrong_options:
        assert "--hepl: no such option; did you mean --help?" in said[line][1], line
    for line in paths:
        assert "where: no " in said[line][1] and "working directory" in said[line][1], line
    for line, message in (wrong_keys | others).items():
        assert message in said[line][1], line


# --------------------------------------------------------------------------- configurations


def test_shipped_configurations_are_found_by_name() -> None:
    known = shipped_configs()
    assert {"cola_60m", "demo_smollm2"} <= known.keys()
    folder = ROOT / "configs"
    for name in ("cola_60m", "cola_60m.toml", "configs/cola_60m.toml", f"{folder}/cola_60m.toml"):
        assert find_config(name).samefile(folder / "cola_60m.toml")
    for name in ("demo_smollm2", "configs/linearize/demo_smollm2.toml", "linearize/demo_smollm2"):
        assert find_config(name).samefile(folder / "linearize" / "demo_smollm2.toml")
    for name in ("other/cola_60m", "cola_60n"):
        with pytest.raises(LowlineError, match="no such file"):
            find_config(name)


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch) -> None:
    (tmp_path / "cola_60m").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_config("cola_60m") == Path("cola_60m")


def test_two_files_are_refused(capsys) -> None:
    assert main(["train", "one.toml", "--config", "cola_60m"]) == 2
    assert "'one.toml' is not understood: --config cola_60m names" in capsys.readouterr().err


def test_the_reference_page_is_made_from_the_table() -> None:
    """`python -m lowline.tools.cli_reference > docs/reference/cli.md` renews it."""
    from lowline.tools.cli_reference import cli_reference

    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert page == cli_reference()
    assert page.count("\n## lowline ") == len(COMMANDS)


def test_a_configuration_is_printed_complete(capsys, tmp_path) -> None:
    from lowline.train.config.load import load_config
    from lowline.train.config.stages import load_stages

    for name, load in (("demo_cola", load_config), ("lolcats_smollm2_135m", load_stages)):
        assert main(["configs", name]) == 0
        mine = tmp_path / f"{name}.toml"
        mine.write_text(capsys.readouterr().out)
        assert not re.search(r"^base", mine.read_text(), re.MULTILINE)
        ours, theirs = load(mine), load(find_config(name))
        if load is load_stages:
            ours, theirs = (
                [s.run(n, teacher="t") for n in range(len(s.names))] for s in (ours, theirs)
            )
        assert ours == theirs


def test_the_table_of_configurations_fits_100_columns(capsys) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (line,) = [line for line in lines if line.startswith("cola_60m ")]
    assert line.split()[:3] == ["cola_60m", "43M", "CoLA-60M"]
    assert {line.split(" ")[0] for line in lines} >= shipped_configs().keys()


@pytest.mark.parametrize(
    "words", [["train"], ["train", "schedule"], ["train", "lora"], ["evaluate"]]
)
def test_help_fits_a_terminal_of_80_columns(words, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([words[0], "--help", *words[1:]]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_an_export_to_a_used_folder_is_refused_before_torch_is_imported(tmp_path, capsys) -> None:
    from lowline.train.config.folder import check_output

    (tmp_path / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "exists; give another output"), (True, "no config.json")):
        with pytest.raises(LowlineError, match=message):
            check_output(tmp_path, overwrite)
    assert main(["import", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} exists; give another output" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    check_output(tmp_path, True)


def test_training_stages_ends_with_the_next_step(capsys, monkeypatch) -> None:
    monkeypatch.setattr("lowline.tools.commands.train.start", lambda *args, **options: 0)
    assert main(["train", "lolcats_smollm2_135m", "--output=out"]) == 0
    assert capsys.readouterr().out == "try it   lowline generate out/model 'Once upon a time'\n"
    assert main(["train", "demo_cola"]) == 0  # its run prints the next step itself
    assert capsys.readouterr().out == ""


def test_a_dry_run_names_a_batch_that_divides(capsys) -> None:
    given = ["--dry-run=64", "--training.global_batch_size=512", "--training.local_batch_size=16"]
    assert main(["train", "demo_cola", *given]) == 2
    assert "--training.local_batch_size=8 would work" in capsys.readouterr().err
