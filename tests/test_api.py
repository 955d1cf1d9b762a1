"""The Python API: public names, and what a researcher does with them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from helpers import forked, training
from helpers.models import architecture, error, scrambled, tokens
from helpers.runs import make_run
from torch import nn
from transformers import AutoModelForCausalLM

import lowline
from lowline.cola.low_rank import LowRankLinear
from lowline.linearize import Mixer, register_mixer
from lowline.linearize.mixers import MIXERS
from lowline.linearize.mixers.options import OPTIONS
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.errors import RunError
from lowline.train.engine.run import _heard

NAMES = (
    *("LowRankLinear", "to_cola", "convert", "save", "Mixer", "register_mixer"),
    *("train", "load_config", "evaluate", "inspect_rank", "LowlineError"),
)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_lowline_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import lowline; dir(lowline)\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    new = set(python(code).split())
    assert "lowline" in new and not new & {"torch", "transformers", "numpy", "pydantic", "typing"}


def test_names_are_offered_and_documented():
    assert set(NAMES) <= set(dir(lowline))
    for name in NAMES:
        assert callable(getattr(lowline, name)), name
        assert name in (lowline.__doc__ or ""), name
    with pytest.raises(AttributeError, match="'lowline' has no attribute 'trian'"):
        lowline.trian  # noqa: B018


def test_functions_are_not_hidden_by_modules_of_their_name():
    """Whatever has been imported before; a name may then be a module that can be called."""
    code = """
import lowline.linearize.convert, lowline.train.config.load, lowline.cola.replace
from lowline.linearize import convert, save, Mixer, register_mixer
from lowline.cola import LowRankLinear, to_cola
from lowline.train import load_config, train
for function in (convert, train, lowline.convert, lowline.train):
    try:
        function()
    except TypeError as error:
        print("missing" in str(error))
    try:
        function("nowhere.toml", **({"mixer": "t2r"} if "convert" in repr(function) else {}))
    except lowline.LowlineError as error:
        print("nowhere" in str(error))
"""
    done = forked.run(["-c", code.replace('"nowhere.toml"', '"/nowhere.toml"')])
    assert (done.stdout.split(), done.returncode) == (["True"] * 8, 0), done.stderr


# ---------------------------------------------------------------------------------- low-rank layers


def test_a_new_layer_has_the_published_beginning():
    torch.manual_seed(0)
    layer = LowRankLinear(300, 500, 64, activation="gelu", bias=True)
    assert (layer.in_features, layer.rank, layer.out_features) == (300, 64, 500)
    expected = 64**-0.25 * 800**-0.25
    for factor in (layer.A, layer.B):
        assert factor.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not factor.bias.any()
    assert LowRankLinear(3, 4, 2, dtype=torch.bfloat16).B.weight.dtype == torch.bfloat16
    assert not any("bias" in name for name in LowRankLinear(3, 4, 2).state_dict())
    with pytest.raises(lowline.LowlineError, match="rank = 0"):
        LowRankLinear(3, 4, 0)


def test_to_cola_replaces_the_seven_projections():
    model = AutoModelForCausalLM.from_config(architecture("llama, biases, yarn"))
    dense = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert lowline.to_cola(model, rank=0.25) is model
    made = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert len(made) == 7 * 3 == dense - 1  # the output layer stays
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in made.items()}
    assert ranks["q_proj"] == 16 and ranks["k_proj"] == 8 and ranks["up_proj"] == 16
    assert made["model.layers.0.self_attn.q_proj"].A.bias is not None
    assert made["model.layers.0.mlp.up_proj"].A.bias is None
    model(tokens(), labels=tokens()).loss.backward()
    assert all(layer.A.weight.grad.abs().max() > 0 for layer in made.values())
    one = lowline.to_cola(AutoModelForCausalLM.from_config(architecture("llama")), rank={"q": 5})
    assert {n for n, m in one.named_modules() if isinstance(m, LowRankLinear)} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(3)
    }


def test_to_cola_by_a_rule():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    lowline.to_cola(model, rank=3, activation="relu", where=lambda name, layer: name == "0")
    assert isinstance(model[0], LowRankLinear) and model[0].activation == "relu"
    assert type(model[2]) is nn.Linear and model(torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(lowline.LowlineError, match="no linear layer of Sequential"):
        lowline.to_cola(nn.Sequential(nn.Linear(2, 2)), rank=1)
    with pytest.raises(lowline.LowlineError, match="rank names .'x'."):
        lowline.to_cola(model, rank={"x": 1})


# ----------------------------------------------------------------------------- a mixer of one's own


@dataclass(frozen=True, kw_only=True)
class DecayOptions:
    rate: float = 0.5


class Decay(Mixer):
    """o_t = rate · o_(t-1) + v_t, for each head of keys and values."""

    def __init__(self, shape, options):
        super().__init__(shape)
        self.rate = options.rate
        self.gain = nn.Parameter(torch.ones(shape.n_heads, 1))

    def forward(self, q_BTHD, k_BTGD, v_BTGD, *, rope, x_BTE, state=None, cu_seqlens=None):
        bounds = [0, v_BTGD.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        out, states = [], []
        for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            now = torch.zeros_like(v_BTGD[:, 0])
            if state is not None:
                now = state if cu_seqlens is None else state[n : n + 1]
            for t in range(start, end):
                now = self.rate * now + v_BTGD[:, t]
                out.append(now)
            states.append(now)
        o_BTHD = torch.stack(out, 1).repeat_interleave(self.shape.queries_per_kv_head, 2)
        return o_BTHD * self.gain, torch.cat(states)


def test_a_mixer_of_ones_own_converts_generates_saves_and_loads(tmp_path, monkeypatch):
    for table in (MIXERS, OPTIONS):  # "decay" is in neither, now and after the test
        monkeypatch.setitem(table, "decay", None)
        monkeypatch.delitem(table, "decay")
    assert register_mixer("decay", DecayOptions)(Decay) is Decay
    config = architecture("llama")
    teacher = scrambled(AutoModelForCausalLM.from_config(config))
    model = lowline.convert(teacher, mixer="decay", layers="0, 2", options={"rate": 0.25})
    assert model.config.mixers[2] == {"name": "decay", "rate": 0.25}
    ids = tokens(2, 9)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 14)
    folder = lowline.save(model, load_tokenizer("embedded").hf, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert error(loaded(ids).logits, model(ids).logits) == 0
    assert json.loads((folder / "config.json").read_text())["mixers"][1] == {"name": "softmax"}
    monkeypatch.delitem(MIXERS, "decay")
    with pytest.raises(ValueError, match="mixer = 'decay' is not known"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_cannot_be_registered_is_refused():
    for name in ("lolcats", "softmax"):
        with pytest.raises(lowline.LowlineError, match=f"'{name}' is taken"):
            register_mixer(name, DecayOptions)(Decay)

    @dataclass(frozen=True)
    class NoDefault:
        rate: float

    with pytest.raises(lowline.LowlineError, match="give rate a default"):
        register_mixer("decay2", NoDefault)(Decay)
    with pytest.raises(lowline.LowlineError, match="is not a dataclass"):
        register_mixer("decay2", dict)(Decay)
    assert "decay2" not in MIXERS


# ----------------------------------------------------------------------------------------- training


TINY, ARGUMENTS = training.TINY[1], training.TINY[2:]


def test_train_returns_what_the_run_came_to(tmp_path):
    changes = ["--training.steps=4", f"--output={tmp_path / 'run'}"]
    config = lowline.load_config("demo_cola", [*ARGUMENTS, *changes])
    root, lines = logging.getLogger(), logging.getLogger("lowline")
    import datasets  # noqa: F401  (a filter of warnings comes with its first import)

    def logging_state():
        return root.level, list(root.handlers), lines.level, list(lines.handlers), warnings.filters

    before = [list(part) if isinstance(part, list) else part for part in logging_state()]
    with training.one_process():
        result = lowline.train(config)
    assert list(logging_state()) == before  # a notebook's or program's own
    assert result.steps == 4 and result.output == tmp_path / "run" and not result.stopped_by
    assert result.checkpoint == tmp_path / "run" / "checkpoint" / "step-4"
    assert len(result.losses) == 4 and all(2 < loss < 10 for loss in result.losses)
    assert result.losses == training.losses(tmp_path / "run")[:4]  # held-out ones follow
    assert any("eval_loss" in record for record in result.metrics)
    with pytest.raises(TypeError, match="training.*dataclasses.replace"):
        lowline.train(config, training={"steps": 5})


def test_train_is_heard_where_nobody_configured_logging(capsys, monkeypatch):
    """As in a notebook; and only while it trains."""
    root, lines = logging.getLogger(), logging.getLogger("lowline")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(lines, "handlers", [])
    monkeypatch.setattr(lines, "level", logging.NOTSET)
    run = make_run()
    for inside in (True, False):
        with _heard(run) if inside else nullcontext():
            lines.info("step 1")
            logging.getLogger("other").info("not ours")
        printed = capsys.readouterr().err
        assert re.fullmatch(r"\d\d:\d\d:\d\d  step 1\n" if inside else "", printed)
    assert (root.handlers, lines.handlers, lines.level) == ([], [], logging.NOTSET)


def test_train_raises(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(lowline.train.config.load.to_toml(lowline.load_config(TINY, ARGUMENTS)))
    with training.one_process():
        with pytest.raises(lowline.LowlineError, match="optimizer.lr = -1"):
            lowline.train(file, optimizer={"lr": -1.0}, output=tmp_path / "a")
        with pytest.raises(RunError, match="training diverged"):
            lowline.train(file, optimizer={"lr": 1e30}, output=str(tmp_path / "b"))
    assert not torch.distributed.is_initialized()
