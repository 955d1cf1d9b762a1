"""Optimizers and schedules: hand-computed rates, and torch's own optimizers as the reference."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import forked, training
from helpers.processes import FOR_HELPERS, TESTS

from lowline.train.config.optimizer import SCHEDULES, MuonConfig, OptimizerConfig
from lowline.train.engine.optim import Muon, optimizer_config, schedule_config

PEAK = 0.01


def _rates(steps: int, **schedule) -> list[float]:
    """Return the learning rate of each of a run's steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedulers = schedule_config(SCHEDULES.section(schedule["kind"])(**schedule)).build(
        optimizers=[optimizer], training_steps=steps
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    return rates


def test_every_schedule_warms_up_linearly():
    for kind in ("cosine", "linear", "wsd", "constant"):
        assert _rates(20, kind=kind, warmup_steps=4)[:5] == pytest.approx(
            [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK]
        )


def test_cosine_and_linear_decay_from_the_peak_to_a_tenth():
    # 16 steps after the warm-up, the first of them still at the peak.
    cosine = _rates(20, kind="cosine", warmup_steps=4)
    linear = _rates(20, kind="linear", warmup_steps=4)
    for step in range(4, 20):
        done = (step - 4) / 16
        assert cosine[step] == pytest.approx(PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * done))))
        assert linear[step] == pytest.approx(PEAK * (1 - 0.9 * done))


def test_the_last_step_of_the_published_recipe_is_at_a_tenth():
    assert _rates(1000, kind="cosine", warmup_steps=200)[-1] == pytest.approx(0.1 * PEAK, rel=1e-4)


def test_wsd_is_flat_then_falls_by_the_square_root():
    rates = _rates(20, kind="wsd", warmup_steps=4, decay_fraction=0.25, min_lr_fraction=0.0)
    assert rates[4:16] == pytest.approx([PEAK] * 12)
    assert rates[16:] == pytest.approx([PEAK * (1 - math.sqrt(n / 5)) for n in (1, 2, 3, 4)])


def test_constant_stays():
    assert set(_rates(20, kind="constant")) == {PEAK}


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_muon_is_torchs(shape, monkeypatch):
    """In fp32, as it computes on a CPU; torch's rounds to bf16 on every device."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_options_of_a_resumed_run_are_the_configured_ones():
    """Momenta come from the checkpoint, weight decay and betas from the configuration."""

    def build(**options):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        kind = MuonConfig if options.get("name") == "muon" else OptimizerConfig
        config = optimizer_config(kind(lr=0.1, **options))
        return model, config.build(model_parts=[model])

    model, saved = build()
    model(torch.ones(1, 4)).sum().backward()
    saved.step()
    saved.zero_grad()
    _, resumed = build(weight_decay=0.5, betas=(0.8, 0.9))
    resumed.load_state_dict(saved.state_dict())
    group = resumed.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.8, 0.9), 0.1)
    momenta = [state["exp_avg"] for state in resumed.optimizers[0].state.values()]
    assert len(momenta) == 2 and all(m.abs().sum() > 0 for m in momenta)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Three steps on two ranks with Muon and AdamW, in two microbatches each."""
    output = tmp_path_factory.mktemp("sharded") / "run"
    worker = TESTS / "workers" / "engine_on_two_ranks.py"
    line = [str(worker), *training.TINY[1:], f"--output={output}"]
    line += ["--optimizer.name=muon", "--training.local_batch_size=2", "--schedule.warmup_steps=0"]
    result = forked.run(line, env=FOR_HELPERS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_gradients_are_reduced_once_a_step(sharded):
    assert sharded["microbatches"] == 2
    units = 2 + 2  # the blocks; the embedding; the last norm with the head
    assert sharded["reduce_scatters"] == [units] * 3


def test_muon_takes_the_factors_and_adamw_the_rest(sharded):
    muon, adamw = sharded["parameters"]["Muon"], sharded["parameters"]["AdamW"]
    assert len(muon) == 2 * 7 * 2 and all(n.endswith((".A.weight", ".B.weight")) for n in muon)
    assert sorted(adamw) == sorted(
        ["tok_embeddings.weight", "norm.weight", "lm_head.weight"]
        + [f"layers.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attention", "ffn")]
    )


def test_sharded_optimizers_equal_torchs_on_whole_tensors(sharded):
    # The reference gets the gathered gradients: the update is the same arithmetic on the same
    # numbers. A fused AdamW rounds its products differently, by an ulp of a 3e-3 update, which may
    # turn the last bit of a norm's weight of 1: 1.2e-7.
    assert sharded["differences"]["Muon"] == [0.0, 0.0, 0.0]
    assert max(sharded["differences"]["AdamW"]) < 1.5e-7


def test_a_dense_model_gives_all_its_projections_to_muon():
    from lowline.train.config.load import load_config
    from lowline.train.model.build import build_model_config

    run = load_config(training.TINY[1], [*training.TINY[2:], "--cola.rank=0"])
    with torch.device("meta"):
        model = build_model_config(run).build()
    optimizers = optimizer_config(MuonConfig(lr=0.1)).build(model_parts=[model])
    (muon,) = [o for o in optimizers if isinstance(o, Muon)]
    assert len(muon.param_groups[0]["param_names"]) == 2 * 7
