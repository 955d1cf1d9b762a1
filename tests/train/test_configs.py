"""Every configuration that comes with lowline, and the messages for those that cannot run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowline.cola.accounting import flops_per_token, parameters
from lowline.train.config.load import ConfigError, known_keys, load_config, to_toml
from lowline.train.config.optimizer import MuonConfig
from lowline.train.config.run import RunConfig
from lowline.train.cost.dry_run import dry_run
from lowline.train.cost.memory import shape_of
from lowline.train.model.build import build_model_config

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("60m", "130m", "350m", "1b", "7b")

# Parameters in millions, as published (the controls': as counted).
PARAMETERS = {
    "cola_60m": 42.77,
    "cola_130m": 94.00,
    "cola_350m": 185.22,
    "cola_1b": 609.31,
    "cola_7b": 2820.94,
    "dense_60m": 58.07,
    "dense_130m": 134.11,
    "dense_350m": 367.97,
    "dense_1b": 1339.08,
    "dense_7b": 6738.42,
    "shrunk_60m": 39.18,
    "linear_60m": 42.77,
}
PARAMETERS |= {
    f"{kind}_{size}": PARAMETERS[f"cola_{size}"] for kind in ("cola2", "colam") for size in SIZES
}
# size: learning rate, steps, warm-up, the SwiGLU's own non-linearity
RECIPE = {
    "60m": (6e-3, 10_000, 2_000, "silu"),
    "130m": (3e-3, 20_000, 2_000, "silu"),
    "350m": (3e-3, 60_000, 6_000, "identity"),
    "1b": (2e-3, 100_000, 10_000, "identity"),
    "7b": (1e-3, 150_000, 15_000, "identity"),
}
DEMOS = {f"demo_{kind}" for kind in ("dense", "cola", "cola2", "colam", "linear", "shrunk")}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def without(run: RunConfig, **sections: object) -> RunConfig:
    return dataclasses.replace(run, output="", **sections)


def test_which_configs_there_are() -> None:
    assert set(PARAMETERS) | DEMOS == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_builds_and_dry_runs(name: str) -> None:
    run = config(name)
    assert run.output == f"outputs/{name}"
    with torch.device("meta"):
        model = build_model_config(run).build()
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(shape_of(run)).total
    if name in PARAMETERS:
        assert round(count / 1e6, 2) == PARAMETERS[name]
    for world_size in (1, 2) if name in DEMOS else (1, 8, 16):
        report = dry_run(run, world_size, "cuda")
        assert report.parameters.total == count
        assert report.memory.peak < 80 * 2**30 or name in ("dense_7b", "dense_1b")
    assert load_config_text(to_toml(run)) == run


def load_config_text(text: str) -> RunConfig:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(text)
        return load_config(path)


@pytest.mark.parametrize("size", SIZES)
def test_published_recipe(size: str) -> None:
    run = config(f"cola_{size}")
    lr, steps, warmup, mlp_activation = RECIPE[size]
    assert (run.optimizer.lr, run.training.steps, run.schedule.warmup_steps) == (lr, steps, warmup)
    assert run.model.mlp_activation == mlp_activation
    assert (run.model.vocab_size, run.tokenizer) == (32_000, "google-t5/t5-base")
    assert (run.training.seq_len, run.training.global_batch_size) == (256, 512)
    assert (run.optimizer.betas, run.optimizer.weight_decay) == ((0.9, 0.999), 0.01)
    assert (run.training.max_norm, run.training.precision) == (0.5, "bfloat16")
    assert (run.schedule.kind, run.schedule.min_lr_fraction) == ("cosine", 0.1)
    assert (run.data.path, run.data.name, run.data.streaming) == ("allenai/c4", "en", True)
    assert (run.held_out().path, run.held_out().split) == ("allenai/c4", "validation")


@pytest.mark.parametrize("size", SIZES)
def test_pairs_differ_in_what_they_compare(size: str) -> None:
    cola, colam, dense = (config(f"{kind}_{size}") for kind in ("cola", "colam", "dense"))
    assert without(colam, cola=cola.cola) == without(cola)
    assert dataclasses.replace(colam.cola, memory="cola") == cola.cola
    same = dict(cola=dense.cola, optimizer=dense.optimizer)
    mlp = dataclasses.replace(cola.model, mlp_activation="silu")
    assert without(cola, model=mlp, **same) == without(dense)


@pytest.mark.parametrize("size", [*SIZES, "demo"])
def test_cola2_differs_in_how_it_learns(size: str) -> None:
    names = ("demo_cola", "demo_cola2") if size == "demo" else (f"cola_{size}", f"cola2_{size}")
    cola, cola2 = (config(name) for name in names)
    assert without(cola2, cola=cola.cola, optimizer=cola.optimizer) == without(cola)
    assert dataclasses.replace(cola2.cola, init="published") == cola.cola
    o = cola2.optimizer
    assert isinstance(o, MuonConfig)
    assert (o.lr, o.betas, o.weight_decay) == (cola.optimizer.lr, (0.9, 0.999), 0.01)
    wanted = 4e-3 if size == "demo" else cola.optimizer.lr / 3
    assert o.muon_lr == pytest.approx(wanted, rel=0.06)  # written with one digit or two


def test_controls() -> None:
    cola, linear, shrunk = (config(f"{kind}_60m") for kind in ("cola", "linear", "shrunk"))
    assert without(linear, cola=cola.cola) == without(cola)
    assert linear.cola.activation == "identity"
    for target, control in (("cola_60m", shrunk), ("demo_cola", config("demo_shrunk"))):
        wanted = flops_per_token(shape_of(config(target)), 256)
        assert flops_per_token(shape_of(control), 256) == pytest.approx(wanted, rel=5e-3)


def test_demos_are_one_shape() -> None:
    dense, cola, colam, linear = (config(f"demo_{k}") for k in ("dense", "cola", "colam", "linear"))
    assert dense.model == cola.model == colam.model == linear.model
    assert dense.training == cola.training == colam.training == linear.training
    assert dataclasses.replace(colam.cola, memory="cola") == cola.cola
    assert dataclasses.replace(linear.cola, activation="silu") == cola.cola
    assert {run.training.precision for run in (dense, cola, colam)} == {"float32"}
    assert dense.tokenizer == "embedded"
    assert dense.data.dataset == "embedded"


MINIMAL = """
[data]
[model]
dim = 64
n_layers = 2
n_heads = 4
ffn_dim = 128
vocab_size = 100
[training]
steps = 10
seq_len = 32
global_batch_size = 8
[optimizer]
lr = 1e-3
"""


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "function-" not in text, "pydantic's own names are noise"
    return text


def test_command_line_over_file_over_defaults(path: Path) -> None:
    run = load_config(path, ["--training.steps=20", "--optimizer.name=muon"])
    assert run.training.steps == 20
    assert run.optimizer.name == "muon"
    assert run.training.seq_len == 32
    assert run.training.precision == "bfloat16"
    last = load_config(path, ["--training.steps=20", "--training.steps=30"])
    assert last.training.steps == 30
    assert load_config(path, ["--cola.rank={q = 8, gate = 0.25}"]).ranks()["gate"] == 16


def test_resolved_config_reproduces_the_run(path: Path) -> None:
    run = load_config(
        path,
        [
            *("--cola.rank={q = 8, up = 0.5}", "--data.dataset=files", '--data.path=["a", "b"]'),
            "--evaluation.data.split=validation",
        ],
    )
    assert load_config_text(to_toml(run)) == run


def test_unknown_key(path: Path) -> None:
    text = message(path, "--training.stesp=3")
    assert text.startswith("command line: training.stesp = 3: unknown key.")
    assert "Did you mean training.steps?" in text
    assert "global_batch_size" in text
    path.write_text(MINIMAL + "momentum = 0.9\n")
    text = message(path)
    assert text.startswith(f"{path}: optimizer.momentum = 0.9: unknown key.")
    assert "muon_momentum" in text
    assert "Known in the top level: model" in message(path, "--modle.dim=3")


def test_several_mistakes_are_told_at_once(path: Path) -> None:
    text = message(path, "--training.stesp=3", "--model.dmi=5")
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--training.steps=ten", "training.steps = 'ten': Input should be a valid integer"),
        ("--training.steps=1.5", "training.steps = 1.5: Input should be a valid integer"),
        ("--training.steps=0", "training.steps = 0: Input should be greater than 0"),
        ("--training.precision=fp8", "'float32' or 'bfloat16'"),
        ("--optimizer.betas=[0.9, 2.0]", "optimizer.betas = 2.0: Input should be less than"),
        ("--compile=1", "compile = 1: Input should be a valid boolean"),
        ("--cola.activation=tanh", "'silu', 'gelu', 'relu' or 'identity'"),
        ("--cola.rank=wide", "'wide': Input should be a valid integer or a valid number or"),
        ("--model.n_heads=3", "model: dim = 64 is not a multiple of n_heads = 3"),
        ("--model=3", "model = 3"),
    ],
)
def test_wrong_value(path: Path, override: str, expected: str) -> None:
    text = message(path, override)
    assert "command line" in text.partition(": ")[0]
    assert expected in text
    assert len(text.splitlines()) == 1


def test_missing_key(path: Path) -> None:
    path.write_text(MINIMAL.replace("lr = 1e-3", ""))
    assert message(path) == f"{path}: optimizer.lr is missing: number > 0 is required"
    path.write_text(MINIMAL.partition("[optimizer]")[0])
    assert message(path) == f"{path}: optimizer is missing: a table is required"


def test_unreadable_file(path: Path, tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "absent.toml")
    path.write_text("[model\n")
    assert "run.toml: not readable as TOML" in message(path)
    path.write_bytes(b"\xff\xfe")
    assert "not readable as TOML" in message(path)
    assert "not readable" in message(tmp_path)
    path.write_text(MINIMAL + "weight_decay = 1979-05-27\n")
    assert "optimizer.weight_decay" in message(path)


def test_malformed_argument(path: Path) -> None:
    assert "write --section.key=value" in message(path, "training.steps=3")
    assert "write --training.steps=VALUE" in message(path, "--training.steps")
    assert "a value, not a table" in message(path, "--compile=true", "--compile.mode=fast")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--cola.rank=65"], "rank q = 65 does not fit the 64 -> 64 projection"),
        (["--cola.rank={q = 65}"], "rank = {q = ..., ...}"),
        (["--cola.rank={Q = 8}"], "names ['Q']; the projections are ['q', 'k'"),
        (["--cola.rank=1.5"], "an absolute rank is written without a decimal point"),
        (["--cola.memory=cola-m"], "give all seven projections a rank"),
        (["--data.dataset=files", "--data.path=a.jsonl"], "no [evaluation.data]: name held-out"),
        (
            ["--cola.rank=8", "--cola.memory=cola-m", "--activation_checkpoint=full"],
            "recompute the same block twice",
        ),
        (["--model.max_seq_len=16"], "training.seq_len = 32 is longer than model.max_seq_len"),
        (["--schedule.warmup_steps=11"], "schedule.warmup_steps = 11 is more than"),
        (
            ["--model.tie_embeddings=true", "--parallelism.pipeline_parallel=2"],
            "untie them or set pipeline_parallel = 1",
        ),
        (["--model.n_kv_heads=3"], "n_heads = 4 is not a multiple of n_kv_heads = 3"),
        (["--model.head_dim=7"], "head_dim = 7 is odd"),
        (["--parallelism.data_parallel_shard=0"], "-1 for what is left"),
        (["--parallelism.pipeline_schedule=ZBVZeroBubble"], "pipeline_schedule"),
        (["--optimizer.betas=[0.9, 1.0]"], "never move; choose values below 1"),
        (["--evaluation.max_tokens=31"], "less than one row of training.seq_len = 32"),
    ],
)
def test_combinations_that_cannot_run(path: Path, overrides: list[str], expected: str) -> None:
    text = message(path, *overrides)
    assert expected in text
    assert len(text.splitlines()) == 1


def test_world_size_that_does_not_divide(path: Path) -> None:
    run = load_config(path)
    with pytest.raises(ValueError, match="global_batch_size = 8 .* 3 data-parallel"):
        run.local_batch_size(3)
    with pytest.raises(ValueError, match="does not divide model.n_heads = 4"):
        load_config(path, ["--parallelism.tensor_parallel=8"]).local_batch_size(8)
    with pytest.raises(ValueError, match="does not make 3 process.*nproc_per_node"):
        load_config(path, ["--parallelism.data_parallel_shard=2"]).local_batch_size(3)
    assert run.local_batch_size(4) == 2
    for overrides, expected in (
        (["--parallelism.tensor_parallel=2", "--training.seq_len=31"], "training.seq_len = 31"),
        (
            ["--parallelism.pipeline_parallel=2", "--parallelism.pipeline_microbatch_size=3"],
            "microbatch_size = 3 does not divide the 8 sequences",
        ),
        (["--parallelism.pipeline_parallel=64"], "makes 64 stages of"),
    ):
        degree = 64 if "64" in overrides[0] else 2
        with pytest.raises(ValueError, match=expected):
            load_config(path, overrides).local_batch_size(degree)


def test_known_keys_are_those_of_the_resolved_config(path: Path) -> None:
    keys = known_keys()
    assert keys["training.steps"] == "integer > 0"
    assert keys["checkpoint.keep"] == "integer >= 2"
    assert {"output", "evaluation.data.split", "model.rope_scaling.factor"} <= set(keys)


def test_a_file_stands_over_its_bases(path: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    child = tmp_path / "deep" / "child.toml"
    middle = tmp_path / "middle.toml"
    middle.write_text('base = "run.toml"\n[training]\nsteps = 11\nseed = 5\n')
    child.write_text('base = "../middle.toml"\n[training]\nseed = 6\n')
    run = load_config(child, ["--training.seq_len=16"])
    assert (run.model.dim, run.training.steps, run.training.seed) == (64, 11, 6)
    assert run.training.seq_len == 16
    assert run == load_config(
        path, ["--training.steps=11", "--training.seed=6", "--training.seq_len=16"]
    )
    other = tmp_path / "other.toml"
    other.write_text("[training]\nsteps = 12\nseed = 7\n[optimizer]\nlr = 0.5\n")
    child.write_text('base = ["../middle.toml", "../other.toml"]\ntraining.seed = 8\n')
    run = load_config(child)
    assert (run.training.steps, run.training.seed, run.optimizer.lr) == (12, 8, 0.5)
    child.write_text('base = "demo_cola.toml"\n[cola]\nrank = 32\n')  # of those that ship
    cola = config("demo_cola")
    assert load_config(child) == dataclasses.replace(
        cola, cola=dataclasses.replace(cola.cola, rank=32)
    )


def test_mistakes_name_the_base_that_made_them(path: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.toml"
    child.write_text('base = "run.toml"\ncompile = 3\n')
    path.write_text(MINIMAL.replace("lr = 1e-3", "lr = -1"))
    of_base, of_child = sorted(message(child).splitlines(), key=lambda line: "child" in line)
    assert of_base.startswith(f"{path}: optimizer.lr = -1: Input should be greater than 0")
    assert of_child.startswith(f"{child}: compile = 3: Input should be a valid boolean")
    path.write_text('base = "child.toml"' + MINIMAL)
    assert "base leads back to the file itself" in message(child)
    child.write_text('base = "absent.toml"\n')
    assert f"{child}: base = 'absent.toml': neither {tmp_path / 'absent.toml'} nor" in message(
        child
    )
    child.write_text("base = 3\n")
    assert f"{child}: base = 3: give a TOML file or a list" in message(child)
    path.write_text(MINIMAL)
    assert "command line: base = 'run.toml': unknown key" in message(path, "--base=run.toml")


def test_warmup_is_steps_or_a_fraction_of_them(path: Path) -> None:
    cases = (("0.1", 75, 7, 15), ("0.29", 100, 29, 58), ("3", 10, 3, 3), ("1.0", 10, 10, 20))
    for value, steps, expected, in_twice_as_many in cases:
        run = load_config(path, [f"--schedule.warmup={value}", f"--training.steps={steps}"])
        assert run.schedule.warmup_steps == expected
        assert load_config_text(to_toml(run)) == run
        twice = dataclasses.replace(run.training, steps=2 * steps)
        twice = dataclasses.replace(run, training=twice)
        assert twice.schedule.warmup_steps == in_twice_as_many
    assert config("cola_60m", "--training.steps=2").schedule.warmup_steps == 0
    path.write_text(MINIMAL + "[schedule]\nwarmup = 0.5\n")
    old = load_config(path, ["--schedule.warmup_steps=2"]).schedule
    assert (old.warmup, old.warmup_steps) == (None, 2)
    path.write_text(MINIMAL + "[schedule]\nwarmup_steps = 5\n")
    assert load_config(path, ["--schedule.warmup=0.2"]).schedule.warmup_steps == 2
    assert "warmup = 1.5: Input should be" in message(path, "--schedule.warmup=1.5")
    assert "warmup_steps = 11 is more than" in message(path, "--schedule.warmup=11")
    both = message(path, "--schedule.warmup=0.5", "--schedule.warmup_steps=5")
    assert "say the same thing twice" in both


def test_command_line_values_have_the_type_of_their_key(path: Path) -> None:
    hub = ["--data.dataset=hub", "--data.path=a/b", "--evaluation.enable=false"]
    run = load_config(
        path, [*hub, "--output=2026-01-31", "--data.name=2024", "--data.revision=12e4567"]
    )
    assert (run.output, run.data.name, run.data.revision) == ("2026-01-31", "2024", "12e4567")
    run = load_config(path, ["--output='quoted'", "--training.seed=3"])
    assert (run.output, run.training.seed) == ("quoted", 3)
    assert "data.path = 2026-01-31: dates" in message(path, "--data.path=[2026-01-31]")
    assert load_config(path, ["--checkpoint.fallback"]).checkpoint.fallback
    for switch in ("--output", "--model", "--no.such"):
        assert f"{switch}: a value is missing; write {switch}=VALUE" in message(path, switch)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optimizer.lr=inf", "optimizer.lr = inf: Input should be a finite number"),
        ("--optimizer.eps=inf", "optimizer.eps = inf: Input should be a finite number"),
        ("--model.norm_eps=nan", "model.norm_eps = nan: Input should be"),
        ("--model.rope_theta=inf", "model.rope_theta = inf: Input should be a finite number"),
        ("--training.seed=9223372036854775808", "Input should be less than 9223372036854775808"),
        ("--output=", "output = '': String should have at least 1 character"),
        (
            '--model.rope_scaling={kind="yarn", factor=inf, original_max_seq_len=8}',
            "model.rope_scaling.factor = inf: Input should be a finite number",
        ),
    ],
)
def test_values_without_a_meaning(path: Path, override: str, expected: str) -> None:
    assert expected in message(path, override)


HEAVY = ("torch", "torchtitan", "transformers", "numpy", "datasets")


@pytest.mark.parametrize("arguments", ["", "--training.stesp=3"])
@pytest.mark.parametrize("name", ["cola_60m", "linearize/lowline_llama3_8b"])
def test_a_configuration_is_checked_without_torch(name: str, arguments: str) -> None:
    """So that the answer to a mistyped key, or to --help, does not wait for seconds."""
    load = "list(s.run(n, teacher='t') for s in [load_stages({0!r}, {1})] for n in range(2))"
    load = load if "/" in name else "load_config({0!r}, {1})"
    code = (
        "import sys\n"
        "from lowline.train.config.load import ConfigError, known_keys, load_config\n"
        "from lowline.train.config.stages import load_stages\n"
        f"try: {load.format(str(CONFIGS / f'{name}.toml'), [arguments] if arguments else [])}\n"
        "except ConfigError as error: print('Did you mean training.steps?' in str(error))\n"
        "else: print('loaded')\n"
        f"known_keys(); print([m for m in {HEAVY} if m in sys.modules])"
    )
    line = [sys.executable, "-P", "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:2] == ["True" if arguments else "loaded", "[]"]


def test_a_conversion_is_sent_to_its_command() -> None:
    assert "lowline linearize --config" in message(CONFIGS / "linearize" / "demo_smollm2.toml")
