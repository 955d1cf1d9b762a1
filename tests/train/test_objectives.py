"""Transfer, distillation, LoRA: losses, what trains, runs, resumption, ranks, export, messages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import training
from helpers.runs import build, make_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowline.linearize.losses import distillation_loss, transfer_loss
from lowline.linearize.titan import Transfer
from lowline.tools.commands.export import export
from lowline.train.config.load import ConfigError, known_keys, load_config, to_toml
from lowline.train.config.run import (
    LoraConfig,
    MixerConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.metrics import read_metrics
from lowline.train.engine.optim import optimizer_config
from lowline.train.model.build import build_model_config
from lowline.train.model.lora import is_lora
from lowline.train.objectives.distill import DistillSection
from lowline.train.objectives.losses import TeacherLoss
from lowline.train.objectives.next_token import NextTokenSection
from lowline.train.objectives.reverse_distill import ReverseDistillSection
from lowline.train.objectives.transfer import TransferObjective, TransferSection
from lowline.train.objectives.window_dropout import WindowDropout

TRANSFER = (*training.MIXER, '--objective.kind="transfer"', "--optimizer.lr=0.1")


LONGER = ("--training.steps=20", "--checkpoint.every=8", "--checkpoint.keep=9",
          "--evaluation.every=10")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return training.save_teacher(tmp_path_factory.mktemp("teacher") / "dense")


def started(teacher: Path, *arguments: str) -> tuple[str, ...]:
    return (f"--checkpoint.initial_weights={teacher}", *arguments)


def tiny_run(mixer: str | None = "lolcats", **sections) -> RunConfig:
    sections.setdefault("training", dict(steps=10, global_batch_size=2))
    if mixer is not None:
        sections.setdefault("mixer", dict(name=mixer, options={"window": 4}))
    return make_run(model=replace(training.MODEL, vocab_size=97), **sections)


def body_of(run: RunConfig, seed: int = 0) -> torch.nn.Module:
    body = build(run, seed)
    with torch.no_grad():
        for weight in body.parameters():
            if weight.ndim > 1:
                weight += torch.randn_like(weight) * weight.shape[-1] ** -0.5
    return body


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels of which some do not count, positions of packed documents."""
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, :5] = labels[1, 11:] = -100
    positions = torch.tensor([[*range(5), *range(11)], [*range(16)]])
    return ids[:, :-1], labels, positions


# ---------------------------------------------------------------------------------------- losses


def test_transfer_loss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    o, target = (torch.randn(3, 7, 2, 4, generator=generator).double() for _ in range(2))
    counted = torch.rand(3, 7, generator=generator) < 0.6
    counted[2] = False
    wanted = [
        ((o[b] - target[b])[counted[b]] ** 2).sum() / (target[b][counted[b]] ** 2).sum()
        for b in range(2)
    ]
    found = transfer_loss(o.float(), target.float(), counted)
    assert found.tolist() == pytest.approx([*map(float, wanted), 0.0], rel=1e-6)
    assert transfer_loss(target, target, counted).tolist() == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_its_formula(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator).double() for _ in range(2))
    labels = torch.tensor([[1, -100, 3, 0, 2], [-100, -100, 4, 4, -100]])
    p, q = (x.div(temperature).softmax(-1) for x in (student, teacher))
    wanted = temperature**2 * (q * (q / p).log()).sum(-1)[labels != -100].sum()
    found = distillation_loss(student.float(), teacher.float(), labels, temperature)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    assert float(distillation_loss(teacher, teacher, labels, temperature)) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_reverse_distillation_is_its_formula(temperature):
    """τ² Σ_t Σ_v p log(p / q), p the student's; and its gradient, τ p (log(p / q) - KL)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator).double() for _ in range(2))
    labels = torch.tensor([[1, -100, 3, 0, 2], [-100, -100, 4, 4, -100]])
    counted = (labels != -100)[..., None]
    p, q = (x.div(temperature).softmax(-1) for x in (student, teacher))
    ratio = (p / q).log()
    kl = (p * ratio).sum(-1, keepdim=True)
    section = ReverseDistillSection(teacher="t", temperature=temperature)
    logits = student.float().requires_grad_()
    found = section.divergence(logits, teacher.float(), labels, temperature)
    found.backward()
    found = found.detach()
    assert float(found) == pytest.approx(float(temperature**2 * (kl * counted).sum()), rel=1e-6)
    wanted = temperature * p * (ratio - kl) * counted
    torch.testing.assert_close(logits.grad.double(), wanted, rtol=1e-5, atol=1e-6)
    assert float(section.divergence(teacher, teacher, labels, temperature)) == 0
    assert found > 0 and found != distillation_loss(student, teacher, labels, temperature)


def test_transfer_objective_compares_the_mixer_with_softmax_of_the_same_layer():
    """By hand: the dense model's attention outputs, and the mixer on the dense model's q, k, v."""
    run = tiny_run(objective=TransferSection())
    student = body_of(run)
    dense = body_of(replace(run, mixer=None, objective=NextTokenSection()))
    dense.load_state_dict(student.state_dict(), strict=False)
    ids, labels, positions = batch()
    targets, inputs = [], []
    for layer in dense.layers.values():
        layer.attention.inner_attention.register_forward_hook(lambda m, a, o: targets.append(o))
        layer.attention.register_forward_hook(lambda m, a, o: inputs.append(a[0]))
    dense(ids, positions=positions)
    starts = torch.tensor([0, 5, 16, 32])
    wanted = []
    for layer, x, target in zip(student.layers.values(), inputs, targets, strict=True):
        a = layer.attention
        q, k, v = (t.flatten(0, 1)[None] for t in a.qkv_linear(x))
        rope = a.rope.cache[positions.flatten()][None].chunk(2, -1)
        o, _ = a.mixer(q, k, v, rope=rope, x_BTE=x.flatten(0, 1)[None], cu_seqlens=starts)
        error_B = transfer_loss(o.view_as(target), target, labels != -100)
        wanted.append(float(error_B.detach() @ (labels != -100).sum(1).float() / 22))
    objective = TransferObjective(None, [0, 1])
    objective.begin_step(1)
    loss = objective.loss(student, ids, labels, torch.tensor(22), {"positions": positions})
    assert (labels != -100).sum() == 22
    assert [float(n) for n in objective.numbers().values()] == pytest.approx(wanted, rel=1e-4)
    assert list(objective.numbers()) == ["transfer/layer_0", "transfer/layer_1"]
    assert float(loss.detach()) == pytest.approx(sum(wanted) / 2, rel=1e-4)
    loss.backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (".mixer." in name), name
        assert ".mixer." not in name or parameter.grad.abs().max() > 0, name


def test_rows_and_microbatches_add_up():
    run = tiny_run(objective=TransferSection())
    student, (ids, labels, positions) = body_of(run), batch()
    objective = TransferObjective(None, [0, 1])
    parts = [slice(0, 2)], [slice(0, 1), slice(1, 2)]
    losses = []
    for rows in parts:
        student.zero_grad()
        objective.begin_step(1)
        of_rows = [
            objective.loss(
                student, ids[r], labels[r], torch.tensor(22), {"positions": positions[r]}
            )
            for r in rows
        ]
        sum(of_rows).backward()
        gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        losses.append((float(sum(of_rows)), gradients))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    for one, other in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunks", [1, 4])
def test_distill_loss_in_chunks_is_that_of_all_logits(chunks):
    student, teacher = body_of(tiny_run()), body_of(tiny_run(None), seed=3)
    ids, labels, positions = batch()
    run = tiny_run(objective=DistillSection(teacher="t", temperature=2.0, next_token_weight=0.3))
    logits, wanted = student(ids, positions=positions), teacher(ids, positions=positions).detach()
    loss = distillation_loss(logits, wanted, labels, 2.0) / 22
    loss = loss + 0.3 * F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / 1
    loss.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    fn = replace(run.objective.loss_config(run, 2), num_chunks=chunks).build()
    fn.set_lm_head(student.lm_head)
    fn.loss_fn.teacher_head = teacher.lm_head
    student._skip_lm_head = teacher._skip_lm_head = True
    hidden, of_teacher = (m(ids, positions=positions) for m in (student, teacher))
    found, _ = fn(hidden, labels, torch.tensor(22), teacher=of_teacher.detach())
    found.backward()
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_logits_at_once_are_bounded():
    run = tiny_run(objective=DistillSection(teacher="t"))
    wide = replace(
        run,
        model=replace(training.MODEL, vocab_size=49152),
        training=TrainingConfig(steps=1, seq_len=1024, global_batch_size=8),
    )
    assert run.objective.loss_config(run, 2).num_chunks == 1
    assert wide.objective.loss_config(wide, 8).num_chunks == 32  # 8 x 32 tokens x 49152 logits
    assert isinstance(wide.objective.loss_config(wide, 8).loss_fn, TeacherLoss.Config)


@pytest.mark.parametrize("mixer", ["hedgehog", "lolcats"])
def test_attention_weights_are_those_of_the_formula(mixer):
    """One-hot values bring them out; in a batch of packed documents, with fewer K/V heads."""
    model = replace(training.MODEL, vocab_size=97, n_heads=4, n_kv_heads=2)
    options = {"window": 4} if mixer == "lolcats" else {}
    run = replace(tiny_run(mixer=None), model=model, mixer=MixerConfig(name=mixer, options=options))
    body, (ids, labels, positions) = body_of(run), batch()
    attention, counted = body.layers["0"].attention, labels != -100
    seen = []
    attention.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    transfers = [Transfer(counted, True, weight) for weight in (0.0, 1.0)]
    for transfer in transfers:
        with torch.no_grad():
            body(ids, positions=positions, transfer=transfer)
    found = transfers[1].losses[0] - transfers[0].losses[0]
    q, k, _ = attention.qkv_linear(seen[0])
    q, k = attention.rope(q, k, positions)
    k = k.repeat_interleave(2, 2)
    document = (positions == 0).cumsum(1)
    allowed = document[:, :, None] == document[:, None, :]
    allowed &= torch.ones(16, 16, dtype=torch.bool).tril()
    s_BNTS = torch.einsum("btnh,bsnh->bnts", q, k) / 4
    softmax = s_BNTS.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    a = attention.mixer
    features = [torch.einsum("btnh,nhf->btnf", x, w) for x, w in ((q, a.map_q), (k, a.map_k))]
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in features)
    weights = torch.einsum("btnf,bsnf->bnts", phi_q, phi_k) * allowed[:, None]
    if mixer == "lolcats":
        age = torch.arange(16)[:, None] - torch.arange(16)
        inside = allowed & (age < 4)
        s = s_BNTS.masked_fill(~inside[:, None], -math.inf)
        gamma = a.mixing_H.sigmoid()[:, None, None]
        weights = torch.where(inside[:, None], gamma * (s - s.amax(-1, True)).exp(), weights)
    weights = weights / weights.sum(-1, keepdim=True)
    kl = softmax * (softmax.clamp(min=1e-30) / weights.clamp(min=1e-30)).log()
    wanted = (kl.sum(-1).mean(1) * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert found.min() > 0
    found.sum().backward()
    assert a.map_q.grad.abs().max() > 0


# ---------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("trainable", ["all", "mixers", "attention"])
def test_what_trains(trainable):
    body = body_of(tiny_run(objective=NextTokenSection(trainable=trainable)))
    ids, labels, positions = batch()
    F.cross_entropy(body(ids, positions=positions).flatten(0, 1), labels.flatten()).backward()
    for name, parameter in body.named_parameters():
        wanted = (
            trainable == "all"
            or ".mixer." in name
            or (trainable == "attention" and (".qkv_linear." in name or ".wo." in name))
        )
        assert parameter.requires_grad == wanted == (parameter.grad is not None), name


def test_window_dropout_falls_to_nought_and_depends_on_seed_and_step():
    run = tiny_run(objective=NextTokenSection(window_dropout=0.8, window_dropout_until=0.5))
    many = replace(run, model=replace(run.model, n_layers=64))
    body = build_model_config(many).build()
    dropout = WindowDropout(body, run.objective, steps=40, seed=0)
    assert [dropout.probability(s) for s in (1, 11, 21, 40)] == pytest.approx([0.8, 0.4, 0, 0])

    def dropped(step: int, seed: int = 0) -> list[bool]:
        WindowDropout(body, run.objective, steps=40, seed=seed).draw(step)
        return [layer.attention.mixer.drop_window for layer in body.layers.values()]

    assert dropped(3) == dropped(3) != dropped(3, seed=1)
    assert dropped(3) != dropped(4) and not any(dropped(21))
    assert 0.5 < sum(map(sum, (dropped(1, seed) for seed in range(20)))) / 1280 / 0.8 < 1.5


def test_a_dropped_window_is_not_looked_at():
    body = body_of(tiny_run()).train()
    ids, _, positions = batch()
    whole = body(ids, positions=positions)
    for layer in body.layers.values():
        layer.attention.mixer.drop_window = True
    assert not torch.allclose(body(ids, positions=positions), whole)
    torch.testing.assert_close(body.eval()(ids, positions=positions), whole)


# ------------------------------------------------------------------------------------------ runs


def of_layer(output: Path, layer: int) -> list[float]:
    name = f"transfer/layer_{layer}"
    return [r[name] for r in read_metrics(output) if name in r]


@pytest.fixture(scope="module")
def transferred(teacher, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("transferred") / "run"
    arguments = (
        "--training.steps=20",
        "--checkpoint.every=8",
        "--evaluation.every=10",
        "--checkpoint.keep=9",
    )
    assert training.train_here(output, *started(teacher, *TRANSFER, *arguments)) == 0
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
    arguments = (
        "--training.steps=20",
        "--checkpoint.every=8",
        "--evaluation.every=10",
        "--checkpoint.keep=9",
    )
    training.cut(transferred, tmp_path / "run", 8)
    assert training.train_here(tmp_path / "run", *started(teacher, *TRANSFER, *arguments)) == 0
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
        teacher, "--objective.window_dropout=0.5", "--evaluation.every=4"
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


# ------------------------------------------------------------------------- files and the registry

SAVED = """
kind = "{kind}"
temperature = {temperature}
next_token_weight = 0.0
top_k = 256
attention_weight = 0.0
window_dropout = 0.0
window_dropout_until = 0.5
calibration_steps = 0
{more}
"""


@pytest.mark.parametrize(
    ("kind", "temperature", "more"),
    [("next-token", 1.0, ""), ("transfer", 1.0, ""), ("distill", 2.0, 'teacher = "t"')],
)
def test_a_file_saved_before_objectives_had_keys_of_their_own(kind, temperature, more, tmp_path):
    """It lists the keys of all objectives; those of others hold their defaults."""
    run = tiny_run(activation_checkpoint="none")
    tables = to_toml(run).replace("format = 1\n", "").split("[objective]")
    rest = tables[1][tables[1].index("\n[") :]
    objective = SAVED.format(kind=kind, temperature=temperature, more=more)
    path = tmp_path / "config.toml"
    path.write_text(f"{tables[0]}[objective]\n{objective}{rest}")
    section = load_config(path).objective
    assert section.kind == kind and getattr(section, "temperature", 1.0) == temperature
    assert to_toml(load_config(path)).count("attention_weight") == (kind == "transfer")
    path.write_text(path.read_text().replace("top_k = 256", "top_k = 8"))
    with pytest.raises(ConfigError, match="top_k = 8"):
        load_config(path)


def test_sections_need_no_torch_and_have_keys_of_their_own():
    code = (
        "import sys\n"
        "from lowline.train.config.objective import KIND, OBJECTIVES\n"
        "for kind in OBJECTIVES: assert KIND.section(kind).kind == kind\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    keys = known_keys()
    assert keys["objective.attention_weight"] == "number >= 0 (kind transfer)"
    assert "(kind distill, reverse-distill)" in keys["objective.temperature"]
    assert "(kind" not in keys["objective.window_dropout"]


# -------------------------------------------------------------------------------------- messages

BAD = {
    '--mixer.name="lolcat"': "[mixer]: mixer = 'lolcat' is not known; .* did you mean 'lolcats'",
    "--mixer.options={windw = 4}": "[mixer]: mixer 'lolcats' has no option 'windw'; .* 'window'",
    "--mixer.options={window = -1}": "[mixer]: mixer 'lolcats': window = -1",
    '--mixer.layers="1-9"': "[mixer]: layers = '1-9' names [2, 3, 4, 5, 6, 7, 8, 9]",
    '--objective.kind="distill"': 'objective: kind = "distill" without a teacher',
    "--objective.temperature=2": (
        'objective.temperature = 2: unknown key with kind = "next-token"; "distill" and '
        '"reverse-distill" have it'
    ),
    '--objective.kind="transfer" --objective.attention_wieght=1': (
        'unknown key with kind = "transfer". Did you mean objective.attention_weight?'
    ),
    '--objective.kind="distil"': "objective.kind = 'distil': Input should be 'next-token', "
    "'transfer', 'distill' or 'reverse-distill'. Did you mean 'distill'?",
    '--lora.projections=["qkv"]': "lora.projections = 'qkv': Input should be 'q', 'k'",
    "--lora.projections=[]": "projections = []: name at least one",
    "--lora.rank=4 --cola.rank={q = 8}": "lora.projections names 'q', which is low-rank here",
    '--lora.rank=4 --objective.trainable="all"': 'objective.trainable = "all" beside [lora]',
    '--objective.kind="transfer" --lora.rank=4': '[lora] with objective.kind = "transfer"',
    "--compile=true": "compile = true with [mixer]",
    '--objective.kind="transfer" --activation_checkpoint="full"': (
        'activation_checkpoint = "full" with objective.kind'
    ),
    '--objective.kind="transfer" --objective.attention_weight=1 --mixer.name="gated_deltanet"': (
        "mixer 'gated_deltanet', whose output is no average"
    ),
    '--objective.kind="transfer" --objective.attention_weight=1 --training.seq_len=2048': (
        "with training.seq_len = 2048"
    ),
    '--objective.kind="transfer" --mixer.layers="none"': "without a mixer in any layer",
    '--objective.kind="transfer" --mixer.name="liger_gla"': "mixer 'liger_gla' has none",
    '--mixer.name="hedgehog" --mixer.options={} --objective.window_dropout=0.5': "window_dropout",
    '--optimizer.mixer_lr=1 --mixer.name="liger_gla"': "optimizer.mixer_lr = 1.0 without a mixer",
    '--parallelism.tensor_parallel=2 --mixer.name="kda" --mixer.options={conv=4}': (
        "parallelism.tensor_parallel = 2 with mixer"
    ),
    "--model.qkv_bias=true --model.qk_norm=true": "qkv_bias = true with qk_norm = true",
    "--model.qkv_bias=true --cola.rank=8": "model.qkv_bias = true with cola.rank",
    "--checkpoint.enable=false --checkpoint.initial_weights=x": "with enable = false",
}


@pytest.mark.parametrize("arguments", BAD)
def test_impossible_combinations_are_refused(arguments):
    import re

    given = re.split(r" (?=--)", arguments)
    base = [a for a in training.MIXER if not any(a.split("=")[0] == g.split("=")[0] for g in given)]
    wanted = ".*".join(re.escape(part) for part in BAD[arguments].split(".*"))
    with pytest.raises(ConfigError, match=wanted):
        load_config(training.TINY[1], [*training.TINY[2:], *base, *given])


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
