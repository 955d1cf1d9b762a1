"""Transfer, distillation, LoRA: losses by their formulas, what trains, sections, messages."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import training
from helpers.objectives import batch, body_of, tiny_run

from lowline.linearize.losses import distillation_loss, transfer_loss
from lowline.linearize.titan import Transfer
from lowline.train.config.load import ConfigError, known_keys, load_config, to_toml
from lowline.train.config.run import MixerConfig, TrainingConfig
from lowline.train.model.build import build_model_config
from lowline.train.objectives.distill import DistillSection
from lowline.train.objectives.losses import TeacherLoss
from lowline.train.objectives.next_token import Batch, NextTokenSection
from lowline.train.objectives.reverse_distill import ReverseDistillSection
from lowline.train.objectives.transfer import TransferObjective, TransferSection
from lowline.train.objectives.window_dropout import WindowDropout

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
    loss = objective.loss(student, Batch(ids, labels, {"positions": positions}), torch.tensor(22))
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
                student, Batch(ids[r], labels[r], {"positions": positions[r]}), torch.tensor(22)
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


def test_frozen_projections_stay_and_the_rest_trains():
    frozen = NextTokenSection(trainable="attention", frozen=["q", "k"])
    for objective in (frozen, replace(frozen, trainable="all")):
        run = tiny_run(objective=objective)
        body, rest = body_of(run), body_of(replace(run, objective=replace(objective, frozen=[])))
        trained = {name for name, p in body.named_parameters() if p.requires_grad}
        before = {name for name, p in rest.named_parameters() if p.requires_grad}
        assert before - trained == {
            f"layers.{layer}.attention.qkv_linear.{w}.weight"
            for layer in range(run.model.n_layers)
            for w in ("wq", "wk")
        }
        assert trained < before


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
    "'transfer', 'distill', 'reverse-distill' or 'dpo'. Did you mean 'distill'?",
    '--lora.projections=["qkv"]': "lora.projections = 'qkv': Input should be 'q', 'k'",
    "--lora.projections=[]": "projections = []: name at least one",
    "--lora.rank=4 --cola.rank={q = 8}": "lora.projections names 'q', which is low-rank here",
    '--lora.rank=4 --objective.trainable="all"': 'objective.trainable = "all" beside [lora]',
    '--objective.kind="transfer" --lora.rank=4': '[lora] with objective.kind = "transfer"',
    '--objective.frozen=["q", "up"] --objective.trainable="attention"': (
        "objective.frozen = ['q', 'up']: without it 'up' would not train either"
    ),
    '--objective.frozen=["q"] --lora.rank=4': 'objective.trainable = "mixers"; leave frozen out',
    "--compile=true": "compile = true with [mixer]",
    '--objective.kind="transfer" --activation_checkpoint="full"': (
        'activation_checkpoint = "full" with objective.kind'
    ),
    '--objective.kind="transfer" --objective.attention_weight=1 --mixer.name="gated_deltanet"': (
        "mixer 'gated_deltanet', whose output is not an average"
    ),
    '--objective.kind="transfer" --objective.attention_weight=1 --training.seq_len=2048 '
    "--evaluation.max_tokens=2048": "with training.seq_len = 2048",
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
