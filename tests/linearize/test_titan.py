"""Mixers in the training body: equal to transformers' body, in either kind of block, both ways."""

from __future__ import annotations

import pytest
import torch
from helpers import models
from helpers.runs import make_run
from transformers import AutoModelForCausalLM

from lowline.linearize.mixers import MIXERS
from lowline.linearize.source import hf_shapes
from lowline.train.config.run import RunConfig
from lowline.train.hf import config as hf_config
from lowline.train.model.build import build_model_config
from lowline.train.model.names import from_hf_names, to_hf_names

LENGTH = 24
POSITIONS = torch.tensor([[*range(7), 0, *range(16)], [*range(11), *range(13)]])
ARCHITECTURES = ["llama, tied, llama3", "qwen2", "qwen3, head_dim 24", "cola, QK-norm, mixed"]
OTHERS = ["llama", "cola", "mistral, head_dim 24"]


def run_of(config, **sections) -> RunConfig:
    model, cola = hf_config.config_from_hf(config)
    return make_run(
        model=model,
        cola=cola,
        mixer=hf_config.mixer_from_hf(config),
        training=dict(seq_len=LENGTH),
        **sections,
    )


def training_body(theirs) -> torch.nn.Module:
    config = build_model_config(run_of(theirs.config))
    with torch.device("meta"):
        body = config.build()
    body.to_empty(device="cpu")
    body.init_states()
    weights = {k: v for k, v in theirs.state_dict().items() if k in hf_shapes(theirs.config)}
    tied = theirs.config.tie_word_embeddings
    body.load_state_dict(from_hf_names(weights, tied=tied), strict=True)
    return body.eval()


@torch.no_grad()
def assert_equal_logits(body, theirs) -> None:
    ids = models.tokens(length=LENGTH)
    for positions in (None, POSITIONS):
        ours = body(ids, positions=positions)
        wanted = theirs(ids, position_ids=positions, use_cache=False).logits
        assert models.error(ours, wanted) <= 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_equal_logits_in_both_bodies(mixer):
    theirs = models.converted(mixer, "all but 1")
    assert_equal_logits(training_body(theirs), theirs)


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        *((name, "lolcats") for name in ARCHITECTURES),
        *(pytest.param(name, "lolcats", marks=pytest.mark.slow) for name in OTHERS),
        pytest.param("cola", "gated_deltanet", marks=pytest.mark.slow),
    ],
)
def test_every_architecture_has_equal_logits_in_both_bodies(name, mixer):
    theirs = models.converted(mixer, "0, 2", name)
    body = training_body(theirs)
    assert_equal_logits(body, theirs)
    run = run_of(theirs.config)
    back = hf_config.config_to_hf(run.model, run.cola, run.mixer, max_seq_len=256)
    again = AutoModelForCausalLM.from_config(back).eval()
    weights = to_hf_names(body.state_dict(), tied=run.model.tie_embeddings)
    missing, unexpected = again.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if run.model.tie_embeddings else [])
    assert_equal_logits(body, again)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_begin_as_their_constructors_leave_them(mixer):
    theirs = models.convert(models.teacher(), mixer=mixer, options=models.small_options(mixer))
    config = build_model_config(run_of(theirs.config))
    with torch.device("meta"):
        body = config.build()
    body.to_empty(device="cpu")
    for parameter in body.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    body.init_states()
    assert all(p.isfinite().all() for p in body.parameters())
    if mixer not in ("t2r", "kda", "slots", "mamba1", "mamba2"):  # which begin random
        wanted = {k: v for k, v in theirs.state_dict().items() if ".mixer." in k}
        found = {k: v for k, v in to_hf_names(body.state_dict(), tied=False).items() if k in wanted}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
