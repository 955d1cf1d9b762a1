"""Values and combinations that mean nothing are refused by name; older spellings give way."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowline.errors import LowlineError
from lowline.train.config.load import load_config
from lowline.train.config.stages import load_stages

CONFIGS = Path(__file__).parents[2] / "configs"
DENSE, COLA = CONFIGS / "demo_dense.toml", CONFIGS / "demo_cola.toml"


def message(*overrides: str, path: Path = COLA) -> str:
    with pytest.raises(LowlineError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("value", ["activation=gelu", "bias=true", "grouped=true", "init=skip"])
def test_what_only_bottlenecks_have(value: str) -> None:
    key, text = f"cola.{value}".split("=")
    shown = {"true": True}.get(text, text)
    assert message(f"--{key}={text}", path=DENSE) == (
        f"command line: {key} = {shown!r} without bottlenecks (cola.rank = 0); set cola.rank, or "
        "leave it out"
    )


def test_the_command_line_replaces_the_other_spelling_of_the_warm_up(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "demo_cola.toml"\nschedule.warmup_steps = 7\n')
    assert load_config(mine).schedule.warmup_steps == 7
    for value, expected in (("1", 1), ("0.5", 75)):
        run = load_config(mine, [f"--schedule.warmup={value}"])
        assert (run.schedule.warmup, run.schedule.warmup_steps) == (float(value), expected)
    mine.write_text('base = "linearize/lolcats_smollm2_135m.toml"\nschedule.warmup_steps = 7\n')
    stages = load_stages(mine, ["--schedule.warmup=1"])
    runs = [stages.run(number, teacher="t") for number in range(len(stages.names))]
    assert [run.schedule.warmup_steps for run in runs] == [1] * len(runs)


@pytest.mark.parametrize("table", ["data", "evaluation.data"])
@pytest.mark.parametrize(("key", "value"), [("text_key", "body"), ("on_bad_row", "skip")])
def test_embedded_text_has_no_rows(table: str, key: str, value: str) -> None:
    said = message(f"--{table}.{key}={value}")
    assert f": {table}.{key} = '{value}' with {table}.dataset = 'embedded', which" in said


def test_keys_of_rows_are_left_behind_with_the_files(tmp_path: Path) -> None:
    base = 'base = "demo_cola.toml"\n'
    files = '[data]\ndataset = "files"\npath = "x"\ntext_key = "body"\non_bad_row = "skip"\n'
    (tmp_path / "files.toml").write_text(f"{base}{files}[evaluation]\nenable = false\n")
    assert load_config(tmp_path / "files.toml").data.text_key == "body"
    run = load_config(tmp_path / "files.toml", ["--data.dataset=embedded"])
    assert (run.data.text_key, run.data.on_bad_row) == ("text", "error")
    hub = ["--data.dataset=hub", "--data.path=a/b"]
    assert load_config(tmp_path / "files.toml", hub).data.text_key == "body"


WINDOW = '--mixer={name = "lolcats", options = {window = %s}}'
ROPE = "--model.rope_scaling={kind = '%s', factor = 2.0, original_max_seq_len = 8, %s}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optimizer.eps=1e300", "optimizer.eps = 1e+300: Input should be less than"),
        ("--model.norm_eps=1e30", "model.norm_eps = 1e+30: Input should be less than"),
        ("--model.rope_theta=1e308", "model.rope_theta = 1e+308: Input should be less than"),
        (ROPE % ("llama3", "low_freq_factor = 4.0"),
         "low_freq_factor = 4.0 with high_freq_factor = 4.0; the first must be the smaller one"),
        (ROPE % ("yarn", "beta_slow = 64.0"), "beta_slow = 64.0 with beta_fast = 32.0"),
        (ROPE % ("llama3", "high_freq_factor = inf"), "Input should be a finite number"),
        ("--training.seed=18446744073709551616", "Input should be less than 9223372036854775808"),
        ("--training.steps=10000000000000000", "Input should be less than or equal to 10000000000"),
        ("--data.num_workers=100000000000000", "Input should be less than or equal to 1024"),
        ("--model.n_layers=10001", "model.n_layers = 10001: Input should be less than or equal to"),
        ("--model.dim=1000000000000", "Input should be less than or equal to 10000000"),
        ("--model.vocab_size=1000000000000", "Input should be less than or equal to 1000000000"),
        ("--tokenizer=", "tokenizer = '': String should have at least 1 character"),
        ("--checkpoint.initial_weights=", "String should have at least 1 character"),
        (WINDOW % 2**40, f"window = {2**40}; give an integer of at most {2**31 - 1}"),
        ('--mixer={name = "slots", options = {bias_init = inf}}', "bias_init = inf; give a number"),
        ('--mixer={name = "memory", options = {budget = "64, 64"}}', "budget has 1 layers"),
        ("--output=a\0b", "output = 'a\\x00b': null characters and bytes that are not UTF-8"),
        ("--output=\udcff", "null characters and bytes that are not UTF-8 are not allowed"),
        ("--output=" + 5000 * "x", "output: a text of 5000 characters; at most 4096 are read"),
        ("--training.seed=0x" + 4000 * "f", "training.seed: an integer of 16000 bits is larger"),
        ("--data.path=[" + 50 * "[" + 50 * "]" + "]", "lie in each other more than 16 deep"),
        ("--a" + 40 * ".a" + "=1", "lie in each other more than 16 deep"),
    ],
)  # fmt: skip
def test_nonsense(override: str, expected: str) -> None:
    said = message(override)
    assert expected in said and "\n" not in said
    assert said.startswith(("command line: ", f"{COLA}: "))


def test_a_value_of_the_command_line_sets_one_key() -> None:
    run = load_config(COLA, ["--output=x\ntraining.steps = 3", "--tokenizer=" + 3000 * "["])
    assert run.output == "x\ntraining.steps = 3" and run.training.steps == 150
    assert run.tokenizer == 3000 * "["


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a = " + b"[" * 3000 + b"]" * 3000, "lie in each other more than 16 deep"),
        (b"a" + b".a" * 900 + b" = 1", "lie in each other more than 16 deep"),
        (b"[training]\nsteps = " + b"9" * 5000, "not readable as TOML: Exceeds the limit"),
        (b"[data]\npath = [2026-01-31]", "data.path = 2026-01-31: dates and times have no use"),
        (
            "output = 'gr\u00fcn'".encode("latin-1"),
            "byte 12 is not UTF-8; save it",
        ),
        ("output = 'x'".encode("utf-16"), "byte 0 is not UTF-8"),
        (b'base = "a\\u0000b"', "'a\\x00b': null characters"),
        (b"base = '" + b"x" * 4000 + b"'", "is a file; a base is relative to"),
        (b"output = ''\n[[stage]]\nname = 'a'", "output = '' should be a string of at least 1"),
        (b"output.x = 1\n[[stage]]\nname = 'a'", "output = {'x': 1} should be a string"),
        (b"x" * 300 + b" = 1", "this is not the name of a key"),
    ],
    ids=range(11),
)
def test_files_that_are_no_configuration(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(data)
    with pytest.raises(LowlineError) as error:
        (load_stages if b"[[stage]]" in data else load_config)(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and expected in said and "\n" not in said


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "demo_cola.toml"\noutput = "gr\u00fcn"\n', encoding="utf-8-sig")
    assert load_config(path).output == "gr\u00fcn"
