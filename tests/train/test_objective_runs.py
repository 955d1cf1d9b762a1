"""Runs of transfer, distillation and LoRA: what they learn, resumption, ranks, export."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import training
from helpers.objectives import TRANSFER, batch, body_of, started, tiny_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowline.tools.commands.export import export
from lowline.train.config.run import LoraConfig, OptimizerConfig
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.metrics import read_metrics
from lowline.train.engine.optim import optimizer_config
from lowline.train.model.build import build_model_config
from lowline.train.model.lora import is_lora

LONGER = ("--training.steps=20", "--checkpoint.every=8", "--checkpoint.keep=9",
          "--evaluation.every=10")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return training.save_teacher(tmp_path_factory.mktemp("teacher") / "dense")


# ------------------------------------------------------------------------------------------ runs


def of_layer(output: Path, layer: int) -> list[float]:
    name = f"transfer/layer_{layer}"
    return [r[name] for r in read_metrics(output) if name in r]


@pytest.fixture(scope="module")
def transferred(teacher, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("transferred") / "run"
    assert training.train_here(output, *started(teacher, *TRANSFER, *LONGER)) == 0
    return output


def test_a_transfer_lowers_every_layers_loss(transferred):
    for layer in (0, 1):
        losses = of_layer(transferred, layer)
        assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]
    records = read_metrics(transferred)
    held_out = [r["eval_transfer_loss"] for r in records if "eval_transfer_loss" in r]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert all(math.isfinite(r["eval_loss"]) for r in records if "eval_loss" in r)
    assert not any("perplexity" in r for r in records)
    losses = [r["loss"] for r in records if "loss" in r]
    layers = zip(of_layer(transferred, 0), of_layer(transferred, 1), strict=True)
    assert losses == pytest.approx([(one + other) / 2 for one, other in layers], rel=1e-5)


def test_a_killed_transfer_goes_on_bit_for_bit(teacher, transferred, tmp_path):
    training.cut(transferred, tmp_path / "run", 8)
    assert training.train_here(tmp_path / "run", *started(teacher, *TRANSFER, *LONGER)) == 0
    assert training.curve(tmp_path / "run") == training.curve(transferred)
    assert of_layer(tmp_path / "run", 1) == of_layer(transferred, 1)


def test_untouched_weights_leave_a_transfer_as_they_came(teacher, transferred, tmp_path):
    from lowline.train.hf.export import export

    exported = export(transferred, tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (teacher, exported))
    assert before.keys() < after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "linearized_llama" and config["teacher"] == str(teacher)
    assert [m["name"] for m in config["mixers"]] == ["lolcats"] * 2
    mixing = after["model.layers.0.self_attn.mixer.mixing_H"]
    assert not torch.allclose(mixing, torch.full_like(mixing, math.log(0.1 / 0.9)), atol=1e-3)


def final(output: Path, name: str) -> float:
    return [r[name] for r in read_metrics(output) if name in r][-1]


def test_a_distillation_comes_closer_to_its_teacher_and_goes_on(teacher, tmp_path):
    """From random weights; window dropout and all survive a kill."""
    arguments = training.distilled(
        *(teacher, "--objective.window_dropout=0.5", "--evaluation.every=4"),
        *("--training.global_batch_size=4", "--evaluation.max_tokens=768"),
    )[1:]
    assert training.train_here(tmp_path / "whole", *arguments) == 0
    kl = [r["eval_kl"] for r in read_metrics(tmp_path / "whole") if "eval_kl" in r]
    assert len(kl) == 3 and kl[0] > kl[1] > kl[2]
    training.cut(tmp_path / "whole", tmp_path / "run", 8)
    assert training.train_here(tmp_path / "run", *arguments) == 0
    assert training.curve(tmp_path / "run") == training.curve(tmp_path / "whole")


def test_a_stage_starts_from_the_step_folder_of_another(teacher, transferred, tmp_path):
    step = transferred / "checkpoint" / "step-20"
    arguments = (*training.distilled(teacher)[1:], f"--checkpoint.initial_weights={step}")
    still = ("--optimizer.lr=1e-12", "--optimizer.weight_decay=0", "--training.steps=2")
    assert training.train_here(tmp_path / "run", *arguments, *still) == 0
    assert final(tmp_path / "run", "eval_loss") == pytest.approx(
        final(transferred, "eval_loss"), rel=1e-6
    )


def test_a_step_without_labels(teacher, tmp_path):
    """The text ends with a row of one token, the end of its document: nothing is learnt of it."""
    tokenizer, text = load_tokenizer("embedded"), "a list of " * 200
    while len(tokenizer.encode(text, add_eos=True)) % 64 != 1:
        text += "x"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    arguments = started(
        teacher,
        *(*TRANSFER, "--data.dataset=files", f"--data.path={tmp_path / 'text.jsonl'}"),
        *("--data.epochs=1", "--training.global_batch_size=1", "--training.steps=50"),
        *("--evaluation.enable=false", "--metrics.log_every=100"),
    )
    assert training.train_here(tmp_path / "run", *arguments) == 0
    export(tmp_path / "run", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("kind", "measure"), [("distill", "kl"), ("reverse-distill", "reverse_kl")]
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, tmp_path, kind, measure):
    still = ("--optimizer.lr=1e-12", "--optimizer.weight_decay=0", "--training.steps=2")
    arguments = training.distilled(
        teacher, '--mixer.layers="none"', f"--objective.kind={kind}", *still
    )
    assert training.train_here(tmp_path / "run", *arguments) == 0
    first = next(r for r in read_metrics(tmp_path / "run") if "loss" in r)
    assert abs(first["loss"]) < 1e-6 and first["grad_norm"] < 1e-4
    assert abs(final(tmp_path / "run", f"eval_{measure}")) < 1e-5
    assert final(tmp_path / "run", "eval_loss") > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transfer", "distill"])
def test_two_ranks_are_one(teacher, tmp_path, kind):
    """FSDP over gloo, two microbatches a rank; the teacher and the mixers are sharded, too."""
    arguments = (
        started(teacher, *TRANSFER) if kind == "transfer" else training.distilled(teacher)[1:]
    )
    arguments += ("--training.steps=6",)
    result = training.launch(
        tmp_path / "two", *arguments, "--training.local_batch_size=2", processes=2
    )
    assert result.returncode == 0, result.stderr
    assert training.train_here(tmp_path / "one", *arguments) == 0
    one, two = (training.losses(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-5)
    for name in ("transfer/layer_0", "transfer/layer_1", "eval_transfer_loss", "eval_kl"):
        of_both = [
            [r[name] for r in read_metrics(tmp_path / run) if name in r] for run in ("one", "two")
        ]
        assert of_both[1] == pytest.approx(of_both[0], rel=1e-4)
        assert bool(of_both[0]) == (("transfer" in name) == (kind == "transfer"))


# ------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("projections", [["q", "v"], ["k", "o", "gate", "up", "down"]])
def test_lora_merged_is_lora_beside(projections, tmp_path):
    """The layer's own formula, and what trains; k apart from v although torchtitan joins them."""
    run = tiny_run(lora=LoraConfig(rank=3, alpha=6.0, projections=projections))
    body = body_of(run)
    adapted = {name for name, _ in body.named_parameters() if is_lora(name)}
    assert len(adapted) == 2 * 2 * len(projections)
    trains = {name for name, p in body.named_parameters() if p.requires_grad}
    assert trains == adapted | {name for name in body.state_dict() if ".mixer." in name}
    plain = body_of(replace(run, lora=None))
    weights = body.state_dict()
    for name in [n for n in adapted if n.endswith(".lora_a.weight")]:
        base = name.removesuffix(".lora_a.weight")
        B = weights[f"{base}.lora_b.weight"]
        assert B.abs().max() > 0
        weights[f"{base}.weight"] = weights[f"{base}.weight"] + 2.0 * B @ weights[name]
    plain.load_state_dict({n: w for n, w in weights.items() if not is_lora(n)})
    ids, _, positions = batch()
    torch.testing.assert_close(
        plain(ids, positions=positions), body(ids, positions=positions), rtol=1e-4, atol=1e-5
    )
    fresh = build_model_config(run).build()
    fresh.init_states()
    unchanged = {n: w for n, w in fresh.state_dict().items() if ".lora_b." in n}
    assert unchanged and not any(w.any() for w in unchanged.values())


@pytest.fixture(scope="module")
def adapted(teacher, tmp_path_factory) -> Path:
    """A recovery stage with LoRA."""
    output = tmp_path_factory.mktemp("adapted") / "run"
    lora = ("--lora.rank=4", '--lora.projections=["q", "v"]', "--optimizer.mixer_lr=1e-2")
    arguments = training.distilled(teacher, *lora, "--training.steps=8")
    assert training.train_here(output, *arguments, "--optimizer.lr=1e-2") == 0
    return output


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory) -> dict[str, Path]:
    """That stage's last step, with LoRA's factors merged and apart."""
    folder = tmp_path_factory.mktemp("exported")
    export(adapted, folder / "merged")
    export(adapted, folder / "apart", adapter=True)
    return {name: folder / name for name in ("merged", "apart")}


def test_lora_is_exported_merged_and_apart(teacher, exported):
    """What it adapts + the adapter = the merged export, in PEFT's names and by PEFT's formula."""
    merged, base = (load_file(exported[n] / "model.safetensors") for n in ("merged", "apart"))
    folder = exported["apart"] / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(exported["apart"])
    assert (config["r"], config["lora_alpha"]) == (4, 16.0)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["bias"] == "none"
    names = {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")}
    assert factors.keys() == {f"base_model.model.{n}.lora_{x}.weight" for n in names for x in "AB"}
    for name in names:
        A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert A.shape == (4, 64) and B.shape == (64, 4) and B.abs().max() > 1e-3
        wanted = base[f"{name}.weight"] + 4.0 * B @ A
        torch.testing.assert_close(merged[f"{name}.weight"], wanted)
    others = [n for n in base if n.removesuffix(".weight") not in names]
    assert merged.keys() == base.keys() and any(".mixer." in n for n in others)
    assert all(torch.equal(merged[n], base[n]) for n in others)
    initial = load_file(teacher / "model.safetensors")
    assert all(torch.equal(base[n], initial[n]) for n in initial)


def test_peft_loads_what_is_exported(exported):
    import peft

    merged = load_file(exported["merged"] / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(exported["apart"])
    loaded = peft.PeftModel.from_pretrained(base, exported["apart"] / "adapter")
    for name, weight in loaded.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, merged[name])


def test_a_stage_merges_the_adapters_it_starts_from(teacher, adapted, tmp_path):
    """With adapters of its own and without: the held-out loss is where it was."""
    step = adapted / "checkpoint" / "step-8"
    still = ("--optimizer.lr=1e-12", "--optimizer.weight_decay=0", "--training.steps=2")
    for name, lora in (("without", ()), ("with", ("--lora.rank=2",))):
        arguments = (
            *training.distilled(teacher)[1:],
            f"--checkpoint.initial_weights={step}",
            *lora,
        )
        assert training.train_here(tmp_path / name, *arguments, *still) == 0
        assert final(tmp_path / name, "eval_loss") == pytest.approx(
            final(adapted, "eval_loss"), rel=1e-6
        )


def test_mixers_have_their_own_learning_rate():
    c = OptimizerConfig(lr=1e-3, mixer_lr=1e-2)
    body = body_of(tiny_run(optimizer=c))
    (adamw,) = optimizer_config(c).build(model_parts=[body])
    rates = {name: g["lr"] for g in adamw.param_groups for name in g["param_names"]}
    assert rates.keys() == dict(body.named_parameters()).keys()
    assert all(rate == (1e-2 if ".mixer." in name else 1e-3) for name, rate in rates.items())


def test_what_cannot_be_known_without_looking(teacher, transferred, tmp_path, capsys):
    """A teacher that is not there or speaks other tokens; another mixer than before."""
    folder = tmp_path / "elsewhere"
    for arguments, words in (
        (
            training.distilled(folder)[1:],
            f"objective.teacher = '{folder}' is no Hugging Face directory",
        ),
        (
            (*training.distilled(teacher)[1:], "--model.vocab_size=4097"),
            "has vocab_size = 4096, the run's model 4097",
        ),
        (
            (*started(transferred / "checkpoint" / "step-20", *TRANSFER), "--mixer.options={}"),
            "layer 0 has the mixer",
        ),
    ):
        assert training.train_here(tmp_path / "run", *arguments) == 2
        assert words in capsys.readouterr().err
    assert training.train_here(transferred, *TRANSFER, '--mixer.name="hedgehog"',
                               "--mixer.options={}") == 2  # fmt: skip
    assert "was written with mixer = MixerConfig(name='lolcats'" in capsys.readouterr().err
