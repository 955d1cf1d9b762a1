"""Conversions in stages: their files, what each stage gets, and those that come with lowline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowline.kernels.window.op import not_on_triton
from lowline.linearize.mixers import MIXERS
from lowline.train.config.load import ConfigError
from lowline.train.config.stages import check_model, load_stages, model_of
from lowline.train.cost.dry_run import dry_run
from lowline.train.cost.parameters import mixer_on_meta

FOLDER = Path(__file__).parents[2] / "configs" / "linearize"
CONFIGS = sorted(path for path in FOLDER.glob("*.toml") if path.stem != "demo_smollm2")
MODELS = {
    "smollm2_135m": 134_515_008,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mistral_7b": 7_248_023_552,
    "qwen2_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
}
"""Parameters of the published checkpoints."""
METHODS = {
    "lolcats": "lolcats",
    "liger_gla": "liger_gla",
    "liger_hgrn2": "liger_hgrn2",
    "liger_gsa": "liger_gsa",
    "hedgehog": "hedgehog",
    "lowline": "slots",
}
OTHERS = {"memory_int8": "memory"}
OTHERS |= {name: name for name in ("gated_deltanet", "memory", "mamba1", "mamba2")}
OF_MAMBA = {"llama3_8b_instruct": 8_030_261_248, "zephyr_7b": 7_241_732_096}
MINIMAL = """
output = "out"
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
vocab_size = 4096
[mixer]
name = "lolcats"
[training]
seq_len = 32
global_batch_size = 2
precision = "float32"
[[stage]]
name = "transfer"
training.steps = 3
optimizer.lr = 1e-2
objective.kind = "transfer"
[[stage]]
name = "distill"
training.steps = 2
optimizer.lr = 1e-4
objective.kind = "distill"
"""


def written(tmp_path: Path, text: str = MINIMAL) -> Path:
    file = tmp_path / "stages.toml"
    file.write_text(text)
    return file


def test_every_method_and_model_has_a_file() -> None:
    names = {path.stem for path in CONFIGS}
    for method in METHODS:
        assert f"{method}_smollm2_135m" in names and f"{method}_llama3_8b" in names
    for model in MODELS:
        assert f"lowline_{model}" in names and f"lolcats_{model}" in names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_run_dry(path: Path) -> None:
    """Every stage is a run that fits together, of the published model."""
    stages = load_stages(path)
    methods = METHODS | OTHERS
    method = next(name for name in methods if path.stem.startswith(name))
    size = path.stem.removeprefix(f"{method}_")
    assert stages.source and stages.output == Path("outputs") / path.stem
    for number in range(len(stages.names)):
        run = stages.run(number, teacher=stages.source)
        assert run.mixer is not None and run.mixer.name == methods[method] in MIXERS
        training = run.training  # as many processes as it has sequences, each over its ranks
        rows = training.global_batch_size // (training.local_batch_size or 1)
        processes = rows * run.parallelism.tensor_parallel
        assert processes == {"llama3_405b": 64}.get(size, rows) and rows <= 8
        report = dry_run(run, processes, "cuda")
        assert report.parameters.total == (MODELS | OF_MAMBA)[size]
        assert 0 < report.memory.peak < 80 * 2**30


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.startswith("lolcats")])
def test_windows_with_features_run_in_triton(path: Path) -> None:
    run = load_stages(path).run(0, teacher="teacher")
    features = 2 * mixer_on_meta(run).map_q.shape[-1]
    sizes = (run.model.per_head, run.model.per_head, features)
    assert not_on_triton(torch.bfloat16, *sizes) is None


def test_stages_follow_each_other(tmp_path: Path) -> None:
    stages = load_stages(written(tmp_path), ["--training.seq_len=16"])
    first, second = (stages.run(n, teacher="teacher") for n in (0, 1))
    assert first.output == "out/stages/1-transfer" and second.output == "out/stages/2-distill"
    assert first.checkpoint.initial_weights == "teacher" and first.tokenizer == "teacher"
    assert first.objective.teacher is None and second.objective.teacher == "teacher"
    assert first.training.seq_len == second.training.seq_len == 16
    stages = load_stages(written(tmp_path), [f"--output={tmp_path / 'out'}"])
    folder = stages.folder(0) / "checkpoint" / "step-3"
    folder.mkdir(parents=True)
    assert stages.run(1, teacher="teacher").checkpoint.initial_weights == str(folder)


def test_stages_stand_over_those_of_a_base(tmp_path: Path) -> None:
    base = written(tmp_path)
    child = tmp_path / "child.toml"
    child.write_text(
        'base = "stages.toml"\n[[stage]]\nname = "distill"\ntraining.steps = 9\n'
        '[[stage]]\nname = "more"\ntraining.steps = 0\n'
    )
    stages = load_stages(child)
    assert stages.names == ("transfer", "distill", "more") and stages.output == Path("out")
    runs = [stages.run(n, teacher="t") for n in (0, 1)]
    assert [run.training.steps for run in runs] == [3, 9]
    assert runs[1].optimizer.lr == 1e-4
    with pytest.raises(ConfigError, match=f"'more': {child}: training.steps = 0: Input should be"):
        stages.run(2, teacher="t")
    base.write_text(MINIMAL.replace("lr = 1e-4", "lr = -1"))
    with pytest.raises(ConfigError, match=f"'distill': {base}: optimizer.lr = -1"):
        load_stages(child).run(1, teacher="t")


def test_a_stage_of_pairs_leaves_conversations_behind(tmp_path: Path) -> None:
    rows = '[data]\ndataset = "files"\npath = "a.jsonl"\n'
    chats = rows + 'prompt_key = "question"\nresponse_key = "answer"\non_bad_row = "skip"\n'
    chats += '[evaluation.data]\ndataset = "files"\npath = "a.jsonl"\nmessages_key = "turns"\n'
    pairs = '[stage.data]\npath = "b.jsonl"\nchosen_key = "good"\nrejected_key = "bad"\n'
    text = MINIMAL.replace("[[stage]]", f"{chats}[[stage]]", 1).replace(
        'kind = "distill"', 'kind = "dpo"'
    )
    stages = load_stages(written(tmp_path, text + pairs + pairs.replace("data", "evaluation.data")))
    first, second = (stages.run(n, teacher="t") for n in (0, 1))
    assert first.data.prompt_key == "question" and first.held_out().messages_key == "turns"
    for source in (second.data, second.held_out()):
        assert (source.chosen_key, source.rejected_key) == ("good", "bad")
        assert source.messages_key is source.prompt_key is source.response_key is None
    assert second.data.on_bad_row == "skip" and second.data.path == "b.jsonl"


def test_command_line_of_one_stage(tmp_path: Path) -> None:
    file = written(tmp_path)
    stages = load_stages(file, ["--stage.distill.training.steps=7"])
    assert [stages.run(n, teacher="t").training.steps for n in (0, 1)] == [3, 7]
    other = written(tmp_path, MINIMAL.replace('"distill"', '"the-last"', 1))
    assert "the-last" in load_stages(other).names
    stages = load_stages(other, ["--stage.the-last.optimizer.mixer-lr=0.5"])
    assert stages.run(stages.names.index("the-last"), teacher="t").optimizer.mixer_lr == 0.5
    file = written(tmp_path)
    stages = load_stages(file, ["--training.steps=5"])  # over what the stages say
    assert [stages.run(n, teacher="t").training.steps for n in (0, 1)] == [5, 5]


def test_another_model_than_the_source(tmp_path: Path) -> None:
    stages = load_stages(written(tmp_path))
    theirs = {**stages.common["model"], "n_layers": 3, "rope_theta": 5e5}
    with pytest.raises(ConfigError, match=r"model.n_layers = 2 \(source: 3\)"):
        check_model(stages, theirs)
    check_model(stages, {**stages.common["model"], "rope_theta": 5e5, "max_seq_len": 64})
    stages = load_stages(written(tmp_path, MINIMAL.replace("[mixer]", "norm_eps = 1e-5\n[mixer]")))
    check_model(stages, {**stages.common["model"], "norm_eps": 9.99999974e-6})  # GGUF's, in fp32
    with pytest.raises(ConfigError, match="norm_eps"):
        check_model(stages, {**stages.common["model"], "norm_eps": 9.9e-6})


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[mixer]\nname = 'lolcats'\n", [], r"no \[\[stage\]\]"),
        (MINIMAL.replace('name = "distill"', 'name = "transfer"'), [], "stands twice"),
        (MINIMAL.replace('name = "distill"', ""), [], "name = None"),
        (MINIMAL.replace('name = "distill"', 'name = "../x"'), [], "letters, digits"),
        ("tokenizer = 'x'" + MINIMAL, [], "tokenizer is not set in a"),
        (MINIMAL, ["--checkpoint.initial_weights=x"], "command line: checkpoint.initial_weights"),
        (MINIMAL, ["--stage.sft.training.steps=1"], "one of transfer, distill"),
        (MINIMAL + "training.stepz = 1", [], "'distill'.*stepz.*Did you mean training.steps"),
        (MINIMAL, ["--stage.distill.muon_lr=1"], "'distill': command line: muon_lr = 1: unknown"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_stages(written(tmp_path, text), arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace('"lolcats"', '"lolkats"'), "'transfer'.*lolkats.*did you mean 'lolcats'"),
        (
            MINIMAL.replace('name = "lolcats"', 'name = "lolcats"\nlayers = "5"'),
            "layers are 0 to 1",
        ),
    ],
)
def test_bad_stages(tmp_path: Path, text: str, message: str) -> None:
    stages = load_stages(written(tmp_path, text))
    with pytest.raises(ConfigError, match=message):
        for number in range(len(stages.names)):
            stages.run(number, teacher="teacher")


def test_model_of(tmp_path: Path) -> None:
    file = written(tmp_path)
    model, cola = model_of(file, {"model": load_stages(file).common["model"]})
    assert (model.dim, model.n_layers, cola.rank) == (32, 2, 0)
    with pytest.raises(ConfigError, match=r"no \[model\]"):
        model_of(file, {})
