"""Mixers that begin from the teacher's keys: which keys, on any number of ranks, and what for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowline.linearize.mixers.slots import Slots, centres
from lowline.linearize.titan import MixerAttention
from lowline.train.config.load import ConfigError, load_config
from lowline.train.engine import trainer as engine
from lowline.train.hf.export import export
from lowline.train.objectives import calibration
from lowline.train.objectives.calibration import SINKS, evenly

STEPS = 2
SLOTS = (
    *('--mixer.name="slots"', "--mixer.options={window = 8, slots = 5}", "--cola.rank=0"),
    *('--objective.kind="transfer"', f"--objective.calibration_steps={STEPS}"),
    *("--training.steps=2", "--schedule.warmup_steps=1", "--optimizer.lr=1e-12"),
    "--evaluation.enable=false",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return training.save_teacher(tmp_path_factory.mktemp("teacher") / "dense")


def centroids(output: Path, folder: Path) -> list[torch.Tensor]:
    export(output, folder)
    weights = load_file(folder / "model.safetensors")
    return [weights[f"model.layers.{i}.self_attn.mixer.centroids"] for i in range(2)]


def test_even_places():
    wanted = torch.zeros(3, 10, dtype=torch.bool)
    wanted[0, 4:] = True
    wanted[1, 7:9] = True
    assert evenly(wanted, 3).tolist() == [4, 6, 8, 17, 17, 18, 20, 20, 20]


def test_keys_are_the_teachers_and_the_data_is_not_used_up(teacher, tmp_path, monkeypatch):
    keys, read = [], []
    of_slots, of_trainer = Slots.calibrate, engine.Trainer.post_dataloading_process

    def calibrate(self, k_TGD):
        keys.append(k_TGD)
        return of_slots(self, k_TGD)

    def post(self, inputs, labels):
        read.append((inputs["input"].clone(), inputs["positions"].clone(), labels.clone()))
        return of_trainer(self, inputs, labels)

    monkeypatch.setattr(Slots, "calibrate", calibrate)
    monkeypatch.setattr(engine.Trainer, "post_dataloading_process", post)
    started = f"--checkpoint.initial_weights={teacher}"
    assert training.train_here(tmp_path / "run", started, *SLOTS) == 0
    before, after = read[:STEPS], read[STEPS:]
    assert len(after) == 2
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # keys of the first layer, before the rotary embedding, of tokens that are no sinks
    layer = AutoModelForCausalLM.from_pretrained(teacher).model
    wanted = []
    for ids, positions, labels in before:
        x = layer.layers[0].input_layernorm(layer.embed_tokens(ids))
        k = layer.layers[0].self_attn.k_proj(x).flatten(0, 1)
        places = evenly((labels != -100) & (positions >= SINKS), 64)
        assert (positions.flatten()[places] >= SINKS).all()
        wanted.append(k[places].unflatten(-1, (2, -1)))
    torch.testing.assert_close(keys[0], torch.cat(wanted).detach(), rtol=1e-4, atol=1e-5)
    for found, of_layer in zip(centroids(tmp_path / "run", tmp_path / "hf"), keys, strict=True):
        expected = torch.stack([centres(k, 5) for k in of_layer.unbind(1)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mixers_that_were_trained_are_left(teacher, tmp_path, capsys):
    """A later stage, which the command line may give the same key."""
    trained = (*SLOTS[:-2], "--training.steps=2", "--optimizer.lr=1e-2")
    first = (f"--checkpoint.initial_weights={teacher}", *trained, "--evaluation.enable=false")
    assert training.train_here(tmp_path / "first", *first) == 0
    step = tmp_path / "first" / "checkpoint" / "step-2"
    still = (f"--checkpoint.initial_weights={step}", *SLOTS)
    assert training.train_here(tmp_path / "second", *still) == 0
    assert "they are not calibrated" in capsys.readouterr().err
    of = (centroids(tmp_path / name, tmp_path / f"{name}_hf") for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(*of, strict=True))
    config = json.loads((tmp_path / "second_hf" / "config.json").read_text())
    assert config["teacher"] == str(teacher)  # what the first stage began with


@pytest.mark.slow  # torchrun
def test_two_ranks_are_one(teacher, tmp_path):
    started = f"--checkpoint.initial_weights={teacher}"
    found = []
    for processes in (1, 2):
        output = tmp_path / f"of_{processes}"
        done = training.launch(output, started, *SLOTS, processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"calibrated 2 mixers on {STEPS * 8 * 64:,} keys" in done.stdout + done.stderr
        found.append(centroids(output, tmp_path / f"hf_{processes}"))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_outputs_are_fitted_before_the_first_step(teacher, tmp_path, monkeypatch, capsys):
    """Of the layers that are new: in a chain the others stay as they were trained."""
    fitted, of_titan = [], MixerAttention.fitted

    def fit(self, sample):
        fitted.append((self.config.layer, sample))
        return of_titan(self, sample)

    monkeypatch.setattr(MixerAttention, "fitted", fit)
    line = ('--mixer.name="mamba2"', "--mixer.options={}", *SLOTS[2:])
    first = (f"--checkpoint.initial_weights={teacher}", *line, "--mixer.layers=[0]")
    assert training.train_here(tmp_path / "first", *first) == 0
    step = tmp_path / "first" / "checkpoint" / "step-2"
    second = (f"--checkpoint.initial_weights={step}", *line, "--mixer.layers=[0, 1]")
    assert training.train_here(tmp_path / "second", *second) == 0
    assert [layer for layer, _ in fitted] == [0, 1]
    assert capsys.readouterr().err.count("calibrated 1 mixers on a batch") == 2
    folders = [tmp_path / f"{name}_hf" for name in ("first", "second")]
    for name, folder in zip(("first", "second"), folders, strict=True):
        export(tmp_path / name, folder)
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    place = "model.layers.{}.self_attn.mixer."
    for name, weight in weights[0].items():
        if name.startswith(place.format(0)):
            torch.testing.assert_close(weights[1][name], weight)
    scale = weights[1][place.format(1) + "norm_HD"]
    assert (scale - 1).abs().mean() > 0.2  # it began with 1


def test_new_layers_train_alone(teacher, tmp_path, monkeypatch, capsys):
    """All of their attention and nothing else, on all batches, towards softmax attention."""
    errors, of_module = [], calibration.train_alone

    def train(layer, texts, *, lr, **how):
        errors.append(of_module(layer, texts, lr=1e-12, **how)[1])
        values, error = of_module(layer, texts, lr=lr, **how)
        errors.append(error)
        assert len(texts) == STEPS
        return values, error

    monkeypatch.setattr(calibration, "train_alone", train)
    line = ('--mixer.name="mamba2"', "--mixer.options={}", "--cola.rank=0", "--mixer.layers=[1]")
    line += ('--objective.kind="next-token"', '--objective.trainable="attention"', *SLOTS[4:])
    line += ("--objective.calibration_epochs=12", f"--checkpoint.initial_weights={teacher}")
    assert training.train_here(tmp_path / "run", *line) == 0
    start, end = errors
    assert end < 0.5 * start
    assert f"layer 1 alone: relative error {end:.4f} in the last of 12" in capsys.readouterr().err
    export(tmp_path / "run", tmp_path / "hf")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", teacher)
    )
    for name, weight in theirs.items():
        trained = "layers.1.self_attn" in name
        assert torch.allclose(ours[name], weight, atol=1e-6) != trained, name


def test_projections_that_begin_at_random(teacher, tmp_path):
    line = ('--mixer.name="mamba2"', '--mixer.options={start = "random"}', "--cola.rank=0")
    line += ('--objective.kind="transfer"', *SLOTS[5:], "--mixer.layers=[1]")
    assert (
        training.train_here(tmp_path / "run", f"--checkpoint.initial_weights={teacher}", *line) == 0
    )
    export(tmp_path / "run", tmp_path / "hf")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", teacher)
    )
    for name, weight in theirs.items():
        drawn = "layers.1.self_attn" in name
        assert torch.equal(ours[name], weight) != drawn, name
        if drawn:
            assert ours[name].std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)


def test_a_mixer_without_a_start_of_its_own_is_refused():
    wrong = ('--mixer.name="lolcats"', "--mixer.options={}", *SLOTS[2:])
    with pytest.raises(ConfigError, match="calibration_steps = 2 needs a mixer that is calibrated"):
        load_config(training.TINY[1], wrong)
    with pytest.raises(ConfigError, match="calibration_epochs = 2 needs a mixer that is fitted"):
        load_config(training.TINY[1], (*SLOTS, "--objective.calibration_epochs=2"))
