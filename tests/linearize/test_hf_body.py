"""One function of the tokens, however they come: whole, in pieces, padded, packed, cached."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from helpers.models import (
    ARCHITECTURES,
    SHAPE,
    converted,
    error,
    small_options,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.body.hf import FAMILIES, LinearizedAttention
from lowline.linearize.body.packing import Packing
from lowline.linearize.mixers import MIXERS, build_mixer

TOLERANCE = 1e-5
T = 16
LENGTHS = (16, 11, 5)
HYBRID = "0, 2"
ANY = "lolcats"


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of several lengths and their mask; "mixed" has padding left, right and within."""
    ids, time = tokens(len(LENGTHS), T), torch.arange(T)
    rows = {
        "left": [time >= T - n for n in LENGTHS],
        "right": [time < n for n in LENGTHS],
        "mixed": [time >= 0, (time >= 3) & (time < 12), time % 3 == 1],
    }
    mask = torch.stack(rows[side])
    return ids.masked_fill(~mask, 0), mask.long()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **how) -> torch.Tensor:
    return model(ids, **{"use_cache": False} | how).logits


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: torch.Tensor, bounds: list[int], mask=None):
    """The logits of a sequence that comes in pieces, cut at `bounds`."""
    cache, pieces = LinearizedCache(model.config), []
    for start, end in zip([0, *bounds], [*bounds, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache)
        assert out.past_key_values is cache and cache.get_seq_length() == end
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def check_invariants(model: PreTrainedModel) -> None:
    ids = tokens(2, T)
    whole = logits(model, ids)
    rows = torch.cat([logits(model, row[None]) for row in ids])
    assert error(rows, whole) <= TOLERANCE
    for bounds in ([1], [5, 6, 11], list(range(9, T))):
        assert error(in_pieces(model, ids, bounds), whole) <= TOLERANCE, bounds
    # transformers' own windows count padding between tokens
    windows = model.config.converted_layers() != [0, 1, 2] and model.config.to_dict().get(
        "sliding_window"
    )
    for side in ("left", "right") if windows else ("left", "right", "mixed"):
        ids, mask = padded(side)
        rows = [row[None, keep] for row, keep in zip(ids, mask.bool(), strict=True)]
        alone = torch.cat([logits(model, row)[0] for row in rows])
        for got in (
            logits(model, ids, attention_mask=mask),
            in_pieces(model, ids, [1, 4, 12, 13], mask),
        ):
            assert error(got[mask.bool()], alone) <= TOLERANCE, side
    ids = tokens(1, T)
    documents = torch.tensor([0, 7, 8, T])
    positions = torch.cat([torch.arange(n) for n in documents.diff()])[None]
    alone = torch.cat([logits(model, part) for part in ids.split(documents.diff().tolist(), 1)], 1)
    for how in (
        {"position_ids": positions},
        {"position_ids": positions, "use_cache": None},
        {"cu_seq_lens_q": documents},
        {"cu_seq_lens_q": documents, "position_ids": positions},
    ):
        assert error(logits(model, ids, **how), alone) <= TOLERANCE, how
    twice = logits(model, ids.repeat(2, 1), position_ids=positions)
    assert error(twice, alone.repeat(2, 1, 1)) <= TOLERANCE


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_invariants_of_every_mixer(mixer):
    check_invariants(converted(mixer, "1", "qwen3, head_dim 24"))


@pytest.mark.parametrize(  # those whose attention differs; `slow` has them all
    "name",
    ["llama, biases, yarn", "mistral, window", "qwen2, windows above", "cola, QK-norm, mixed"],
)
def test_invariants_of_architectures(name):
    check_invariants(converted(ANY, "all", name))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["all", HYBRID])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_invariants_of_all_together(mixer, name, layers):
    check_invariants(converted(mixer, layers, name))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_mixers_and_norms_and_positions_are_felt(mixer):
    """Each of them changes the result: nothing is dropped on the way."""
    model = converted(mixer, "all", "qwen3, head_dim 24")
    ids = tokens(2, T)
    before = logits(model, ids)
    attention = model.model.layers[0].self_attn
    for change in (attention.q_norm, attention.k_norm):
        saved = change.weight.detach().clone()
        with torch.no_grad():
            change.weight[::2] *= 2
        assert error(logits(model, ids), before) > 1e-3
        change.weight.data = saved
    assert torch.equal(logits(model, ids), before)
    other_order = ids[:, [*reversed(range(T - 1)), T - 1]]
    assert error(logits(model, other_order)[:, -1], before[:, -1]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_attention_is_zero_at_padding(side):
    model, seen = converted(ANY, HYBRID, "llama, biases, yarn"), []
    for module in model.modules():
        if isinstance(module, LinearizedAttention):
            module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    ids, mask = padded(side)
    logits(model, ids, attention_mask=mask)
    assert len(seen) == 2
    for out in seen:
        assert not out[mask == 0].any() and (out[mask == 1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_autocast(mixer):
    """Of fp32 weights: what linear layers give is rounded, and what mixers hand to kernels."""
    model, ids = converted(mixer).train(), tokens(2, T)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, use_cache=False).logits
        step = in_pieces(model, ids, [T - 1])
    rounded.float().square().sum().backward()
    for ours in (rounded, step):  # a token near two centres may change its slot
        assert (ours.float() - exact).norm() < 0.05 * exact.norm()
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.endswith("centroids")}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())


@pytest.mark.parametrize("mixer", ["gated_deltanet", "lolcats", "t2r"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_get_the_type_of_autocast(mixer, dtype, monkeypatch):
    """q, k and v, so that they run on tensor cores; gates and the carried state stay fp32."""
    from lowline.linearize.mixers import branches, lolcats

    calls = []

    def seen(op, *tensors, **options):
        o, state = op(*tensors, **options)
        calls.append((tensors, state))
        return o, state

    for module, name in ((branches, "gated_linear_recurrence"), (lolcats, "attend")):
        monkeypatch.setattr(module, name, functools.partial(seen, getattr(module, name)))
    model, ids = converted(mixer), tokens(2, T)
    with torch.autocast("cpu", dtype), torch.no_grad():
        model(ids, use_cache=False)
    assert calls
    for tensors, state in calls:
        assert {x.dtype for x in tensors[:3]} == {dtype}
        assert {x.dtype for x in tensors[3:] if x is not None} <= (
            {dtype} if mixer == "lolcats" else {torch.float32}
        )
        assert (state if isinstance(state, torch.Tensor) else state.S).dtype == torch.float32


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_state_made_in_inference_mode_goes_on_outside(mixer):
    model, ids = converted(mixer), tokens(2, T)
    cache = LinearizedCache(model.config)
    with torch.inference_mode():
        model(ids[:, : T - 3], past_key_values=cache)
    with torch.no_grad():
        rest = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(T - 3, T)]
    assert error(torch.cat(rest, 1), logits(model, ids)[:, T - 3 :]) < TOLERANCE


def test_packing_moves_as_accelerate_moves_it():
    """Which moves what has `.to`; a layer's arguments come from another device."""
    packing = Packing.of_padding(padded("mixed")[1].bool()).to("meta", non_blocking=True)
    assert packing.places is not None and packing.shape == (len(LENGTHS), T)
    assert packing.cu_seqlens.device.type == packing.places.device.type == "meta"


def test_gradients_of_a_padded_batch_are_those_of_its_rows():
    model = converted(ANY, HYBRID)
    ids, mask = padded("left")

    def gradients(*batches):
        model.zero_grad()
        for ids, mask in batches:
            out = model(ids, attention_mask=mask, use_cache=False).logits
            (out.log_softmax(-1)[..., 0] * mask).sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    together = gradients((ids, mask))
    rows = [(row[None, -n:], torch.ones(1, n)) for row, n in zip(ids, LENGTHS, strict=True)]
    alone = gradients(*rows)
    for name, gradient in together.items():
        difference = (gradient - alone[name]).abs().max()
        assert difference <= 1e-4 * alone[name].abs().max(), name
        assert gradient.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient():
    model = converted(ANY, HYBRID).train()
    ids, mask = padded("left")

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, plain, gradients()))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_mask_of_tokens_by_tokens_without_a_softmax_layer():
    length = 130  # more than a token has numbers anywhere
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.long)
    mask[:, :5] = 0
    packed = torch.cat([torch.arange(50), torch.arange(80)])[None]
    for layers, matrices in (("all", False), (HYBRID, True)):
        model = converted("sink_window", layers)
        for how in ({"attention_mask": mask}, {"position_ids": packed}):
            with Largest() as largest:
                logits(model, ids, **how)
            assert (largest.numel >= length * length) == matrices


def test_softmax_layers_take_every_attention_implementation():
    model = converted(ANY, HYBRID)
    ids, mask = padded("left")
    sdpa = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert error(out.logits[mask.bool()], sdpa[mask.bool()]) <= TOLERANCE
    assert [tuple(a.shape) for a in out.attentions] == [(3, 4, T, T)]  # the softmax layer's
    assert len(out.hidden_states) == 4


# ------------------------------------------------------------------------------------ the config


def test_config_keeps_every_option_and_comes_back(tmp_path):
    options = small_options(ANY)
    mixers = [{"name": "softmax"}, *[{"name": ANY, **options}] * 2]
    config = FAMILIES["qwen2"].config(**SHAPE, mixers=mixers)
    assert config.model_type == "linearized_qwen2" and config.converted_layers() == [1, 2]
    assert set(config.mixers[1]) > set(options)  # defaults are written out
    config.save_pretrained(tmp_path)
    back = AutoConfig.from_pretrained(tmp_path)
    assert type(back) is type(config) and back.to_json_string() == config.to_json_string()
    assert type(pickle.loads(pickle.dumps(config))) is type(config)  # for worker processes


@pytest.mark.parametrize(
    "mixers, words",
    [
        ([{"name": ANY}], "mixers has 1 entries, the model 3 layers"),
        ([{"name": "softmin"}] * 3, "softmin"),
        ([{"name": ANY, "windowsill": 3}] * 3, "windowsill"),
        ([{"name": "softmax", "window": 3}] * 3, "softmax"),
    ],
)
def test_impossible_mixers_are_refused(mixers, words):
    with pytest.raises(ValueError, match=words):
        FAMILIES["llama"].config(**SHAPE, mixers=mixers)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_model_from_a_config_begins_as_the_mixers_constructors_leave_it(mixer):
    options = small_options(mixer)
    config = FAMILIES["llama"].config(**SHAPE, mixers=[{"name": mixer, **options}] * 3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is FAMILIES["llama"].causal_lm
    ours = model.model.layers[2].self_attn.mixer
    new = build_mixer(mixer, options, config.head_shape(2))
    for (name, weight), value in zip(ours.named_parameters(), new.parameters(), strict=True):
        assert weight.norm().item() == pytest.approx(value.norm().item(), rel=0.5), name
        assert weight.mean().item() == pytest.approx(value.mean().item(), rel=0.5, abs=0.1), name
    for (name, buffer), value in zip(ours.named_buffers(), new.buffers(), strict=True):
        assert torch.equal(buffer, value), name
    std = model.model.layers[2].self_attn.q_proj.weight.std().item()
    assert std == pytest.approx(0.02, rel=0.1)


# -------------------------------------------------------------------------------------- refusals


def test_what_a_converted_model_does_not_take_is_refused():
    model = converted(ANY, HYBRID)
    ids = tokens(2, 6)

    def refused(words, ids=ids, **how):
        with pytest.raises(ValueError, match=words):
            model(ids, **how)

    refused("DynamicCache.*LinearizedCache", past_key_values=DynamicCache())
    refused(r"\(2, 1, 6, 6\).*\(2, 6\)", attention_mask=torch.ones(2, 1, 6, 6))
    refused(r"\(2, 5\).*\(2, 6\)", attention_mask=torch.ones(2, 5))
    bounds = torch.tensor([0, 2, 6])
    refused("a batch of one, this one is 2", cu_seq_lens_q=bounds)
    refused("not both", cu_seq_lens_q=bounds, attention_mask=torch.ones(2, 6))
    cache = LinearizedCache(model.config)
    refused("cannot be continued", ids[:1], cu_seq_lens_q=bounds, past_key_values=cache)
    again = torch.tensor([[0, 1, 2, 0, 1, 2]])
    refused("cannot be continued", ids, position_ids=again, past_key_values=cache)
