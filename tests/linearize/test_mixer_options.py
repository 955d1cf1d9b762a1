"""What mixers begin with, their switches, precision, calibration, and options that are refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.mixers import CASES, DELTA, LIGER, SHAPES, SHARED, error, inputs, made, plain, run
from torch.utils._pytree import tree_leaves

from lowline.linearize.mixers import MIXERS, HeadShape, build_mixer, recorded_shares

# ------------------------------------------------------------------------- beginning and switches


def count(name: str, **options: Any) -> int:
    mixer = build_mixer(name, options, SHARED)
    return sum(weight.numel() for weight in mixer.parameters())


def test_parameter_counts():
    E, H, G, D = 40, 4, 2, 24
    assert [count(name) for name in (*LIGER, "memory", "sink_window")] == [0] * 5
    assert count("hedgehog") == 2 * H * D * D
    assert count("hedgehog", state_heads="kv", features=12) == (H + G) * D * 12
    assert count("lolcats") == 2 * H * D * D + H
    assert count("t2r", features=32) == 2 * H * (D + 1) * 32
    assert count("retention") == H * D + H and count("retention", window=0, sinks=0) == H * D
    assert count("gated_deltanet") == (E + 1) * H + H + E * H + H
    assert count("kda", state_heads="kv") == E * D + (D + 1) * G * D + G + E * G + H
    assert count("slots", slots=5) == (G * D + H) * 5
    C, R = H * D, 3  # channels, and the rank of steps: hidden_size / 16, rounded up
    assert count("mamba1") == E * C + R * (E + C) + (1 + 12 + 1 + 4 + 1) * C
    assert count("mamba2", conv=3) == E * H * D + E * H + 3 * H + 4 * (H + 2 * G) * D + H * D
    assert count("kda", conv=4) - count("kda") == 4 * (H + 2 * G) * D


@torch.no_grad()
def test_where_conversion_begins():
    """Delta rules and retention near the window and its sinks; LoLCATs' variant, too."""
    given = inputs(SHARED, 40)
    window, _ = run(plain("sink_window", sinks=4), given)
    cases = [(name, {}) for name in (*DELTA, "retention")]
    cases += [("lolcats", {"mixing": "linear", "mixing_init": 0.01}), ("kda", {"conv": 4})]
    for name, options in cases:
        o, _ = run(plain(name, sinks=4, **options), given)
        assert 1e-5 < error(o, window) < 0.1, (name, error(o, window))
    bare, _ = run(plain("kda"), given)
    with_conv, _ = run(plain("kda", conv=4), given)
    torch.testing.assert_close(with_conv, bare)  # the identity
    decay = plain("gated_deltanet").decay(given["x"]).exp()[0, 0]
    assert decay.tolist() == pytest.approx(
        (1 - decay.new_tensor([1 / 16, 1 / 64, 1 / 256, 1 / 1024])).tolist(), abs=3e-3
    )


@pytest.mark.parametrize("features", [None, 12, 16, 30])
def test_hedgehog_begins_by_passing_all_dimensions(features):
    W = build_mixer("hedgehog", {"features": features}, SHARED).map_q[0].detach()
    assert W.shape == (24, features or 24) and (W.norm(dim=1) > 0).all()
    if features in (None, 12):
        torch.testing.assert_close(W.T @ W, torch.eye(features or 24))


TWO = [case for case in CASES if (m := made(case)).has_window and m.has_linear]


@pytest.mark.parametrize("case", TWO)
def test_linear_part_switched_off(case):
    """Only the window is left, at its weight, and states go on as if nothing had happened."""
    name, mixer, given = CASES[case][0], made(case), inputs(SHARED, 19)
    window = plain("sink_window", sinks=mixer.options.sinks, backend="reference")
    with torch.no_grad():
        whole, state = run(mixer, given)
        expected, _ = run(window, given)
        if name not in ("lolcats", "slots"):
            share = 0.5 if name in LIGER else mixer.share()
            expected = (1 - share) * expected
        mixer.linear_enabled = False
        off, off_state = run(mixer, given)
        assert error(off, expected) <= 1e-6 and error(off, whole) > 1e-3
        for ours, theirs in zip(tree_leaves(off_state), tree_leaves(state), strict=True):
            assert ours is None or torch.equal(ours, theirs)
        head, state = run(mixer, given, slice(0, 12))
        tail = [run(mixer, given, slice(t, t + 1), state=state)[0] for t in range(12, 19)]
        assert error(torch.cat([head, *tail], 1), off) <= 1e-5


@pytest.mark.parametrize("case", TWO)
def test_window_dropped(case):
    """In training the linear part stands in for all tokens; elsewhere nothing changes."""
    name, options = CASES[case]
    mixer, given = made(case), inputs(SHARED, 19)
    with torch.no_grad():
        whole, state = run(mixer, given)
        mixer.drop_window = True
        assert torch.equal(run(mixer, given)[0], whole)
        mixer.train()
        dropped, _ = run(mixer, given)
        with pytest.raises(ValueError, match="complete sequences"):
            run(mixer, given, slice(0, 1), state=state)
    shared = {n: options[n] for n in ("features", "state_heads", "conv", "rotary") if n in options}
    if name == "lolcats":
        other = build_mixer("hedgehog", shared | {"backend": "reference"}, SHARED)
    elif name == "slots":
        other = build_mixer(name, dict(window=1, sinks=0, slots=4, backend="reference"), SHARED)
    else:
        other = build_mixer(name, shared | dict(window=0, sinks=0, backend="reference"), SHARED)
    other.load_state_dict({n: w for n, w in mixer.state_dict().items() if n in other.state_dict()})
    assert error(dropped, run(other, given)[0].detach()) <= 1e-5 < error(dropped, whole)
    far = {n: t.clone() for n, t in given.items()}
    far["v"][:, 0] += 1
    assert not torch.equal(run(mixer, far)[0][:, -1], dropped[:, -1])


def test_slots_are_calibrated_on_keys():
    """Centres that lie apart are found, and keys of a kind then share a slot."""
    mixer = build_mixer("slots", {"slots": 3}, SHARED)
    truth = torch.eye(3, SHARED.head_dim) * 20
    kind = torch.arange(300) % 3
    k_TGD = (truth[kind] + torch.randn(300, SHARED.head_dim))[:, None].repeat(1, 2, 1)
    found = mixer.calibrate(k_TGD)["centroids"]
    assert found.shape == mixer.centroids.shape
    for centres in found:
        nearest = torch.cdist(centres, truth).argmin(-1)
        assert sorted(nearest.tolist()) == [0, 1, 2]
        mean = torch.stack([k_TGD[kind == m, 0].mean(0) for m in nearest])
        torch.testing.assert_close(centres, mean, rtol=1e-4, atol=1e-4)
    mixer.load_state_dict({"centroids": found, "bias": mixer.bias})
    slots_TG = mixer.assign(k_TGD[None])[0]
    for head, centres in enumerate(found):
        nearest = torch.cdist(centres, truth).argmin(-1)
        assert torch.equal(nearest[slots_TG[:, head]], kind)
    with pytest.raises(ValueError, match="2 keys for 3 slots"):
        mixer.calibrate(k_TGD[:2])


def test_recorded_shares():
    given = inputs(SHARED, 19)
    mixers = torch.nn.ModuleList()
    for layer, case in enumerate(["sink_window", "hedgehog", "liger_gla", "lolcats"]):
        mixer = made(case)
        mixer.shape = HeadShape(**{**vars(SHARED), "layer": layer})
        mixers.append(mixer)
    with recorded_shares(mixers) as shares, torch.no_grad():
        for mixer in mixers:
            run(mixer, given)
        run(mixers[2], given)
        with pytest.raises(ValueError, match="complete sequences"):
            run(mixers[0], given, state=run(mixers[0], given)[1])
    assert shares[1] == [1.0] and shares[0] == [0.0] * 2
    with torch.no_grad():
        window = run(plain("sink_window", sinks=0), given)[0] / 2
        linear = run(mixers[2], given)[0] - window
    expected = linear.norm(dim=-1).sum() / (linear.norm(dim=-1).sum() + window.norm(dim=-1).sum())
    assert shares[2] == pytest.approx([expected.item()] * 2, rel=1e-4)
    assert 0 < shares[3][0] < 1 and mixers[3].linear_enabled
    run(mixers[3], given)
    assert len(shares[3]) == 1  # the hooks are gone


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case):
    shape = SHAPES["one each, 16"]
    exact, half = made(case, shape), made(case, shape, torch.bfloat16, "auto")
    half.load_state_dict(exact.state_dict())
    with torch.no_grad():
        ours, _ = run(half, inputs(shape, 19, dtype=torch.bfloat16))
        theirs, _ = run(exact, inputs(shape, 19))
        assert ours.dtype == torch.bfloat16
        # T2R's denominator may come near 0
        assert error(ours.float(), theirs) <= (0.2 if CASES[case][0] == "t2r" else 0.05)
        head, state = run(half, inputs(shape, 19, dtype=torch.bfloat16), slice(0, 18))
        tail, _ = run(half, inputs(shape, 19, dtype=torch.bfloat16), slice(18, 19), state=state)
        assert error(tail.float(), ours[:, 18:].float()) <= 0.03


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_is_documented_and_builds_on_meta(name):
    options, mixer = MIXERS[name]
    for field in fields(options):
        assert f"        {field.name}" in (options.__doc__ or ""), field.name
    with torch.device("meta"):
        built = build_mixer(name, {}, SHARED)
    assert type(built) is mixer and all(weight.is_meta for weight in built.parameters())


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_type_that_is_set(case):
    name, options = CASES[case]
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = build_mixer(name, options, SHARED)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(weight.dtype == torch.bfloat16 for weight in built.parameters())
    for name, weight in built.named_parameters():
        assert weight.requires_grad == (name not in built.fixed) and weight.is_leaf


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("lolcat", {}, "'lolcat' is not known; choose from .*did you mean 'lolcats'"),
        ("softmax", {"window": 3}, "'softmax' is not known"),
        ("lolcats", {"windw": 3}, "no option 'windw'; .*did you mean 'window'"),
        ("hedgehog", {"window": 3}, "no option 'window'; choose from features"),
        ("sink_window", {"window": 0}, "window = 0; give an integer of at least 1"),
        ("liger_gla", {"window": -1}, "at least 0"),
        ("liger_gla", {"window": 2.0}, "window = 2.0"),
        ("kda", {"window": 0}, "sinks = 4 without a window"),
        ("lolcats", {"sinks": True}, "sinks = True"),
        ("lolcats", {"mixing": "all"}, "mixing = 'all'; choose from 'window', 'both', 'linear'"),
        ("lolcats", {"mixing_init": 1.0}, "between 0 and 1"),
        ("lolcats", {"mixing_init": "0.5"}, "between 0 and 1"),
        ("retention", {"share_init": 0}, "share_init = 0"),
        ("hedgehog", {"features": 0}, "features = 0"),
        ("t2r", {"state_heads": "key"}, "'query', 'kv'"),
        ("kda", {"rotary": 1}, "True or False"),
        ("kda", {"conv": -1}, "conv = -1"),
        ("slots", {"slots": 0}, "slots = 0"),
        ("mamba1", {"states": 16}, "states = 16 with heads of 24 channels; give a divisor of 24"),
        ("mamba1", {"states": 0}, "states = 0; give an integer of at least 1"),
        ("mamba2", {"conv": 0}, "conv = 0; give an integer of at least 1"),
        ("slots", {"backend": "cpu"}, "backend = 'cpu'; choose from 'auto', 'reference', 'torch'"),
        ("memory", {"exact": 0, "merged": 0}, "give one of them a row"),
        ("memory", {"exact": -1}, "exact = -1; give an integer of at least 0"),
        ("memory", {"window": 8, "block": 9}, "block = 9 with window = 8; at most that"),
        ("memory", {"horizon": -1}, "horizon = -1; give an integer of at least 0"),
        ("memory", {"bias": float("nan")}, "bias = nan; give a number"),
        ("memory", {"budget": 64}, "budget = 64; give a text such as '64\\+192, 300; 16\\+8'"),
        ("memory", {"budget": "64, 64+; 64, 64"}, "budget: '64\\+' in layer 0; give each key"),
        ("memory", {"budget": "64, 0; 64, 64"}, "budget: a window of 0"),
        ("memory", {"budget": "64, 64; 64, 8+9"}, "block = 16 with window = 8; at most that"),
        ("memory", {"budget": "64, 64+3", "merged": 4}, "budget: 3 rows with merged = 4 of them"),
        ("liger_gsa", {"backend": "gpu"}, "'auto', 'reference'"),
    ],
)
def test_impossible_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_mixer(name, options, SHARED)
