"""Positions beyond those that the teacher knows: bounded distances, exact at any split."""

from __future__ import annotations

import pytest
import torch
from helpers.mixers import SHAPES, SHARED, error, inputs
from helpers.models import architecture, converted, moved, scrambled, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowline.linearize.body import reach as bounded
from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.body.reach import Reach, known_positions, within
from lowline.linearize.convert import convert
from lowline.linearize.mixers import build_mixer
from lowline.linearize.mixers.base import apply_rope

KNOWN, TEXT = 24, 60  # positions that the teacher knows, and tokens of the text
MEMORY = dict(sinks=2, block=4, horizon=8)


def rates(head_dim: int) -> torch.Tensor:
    return 10.0 ** -torch.linspace(0, 2, head_dim // 2, dtype=torch.float64)


CASES = {
    "sink_window": ("sink_window", dict(window=7, sinks=2)),
    "window": ("sink_window", dict(window=6, sinks=0)),
    "memory": ("memory", MEMORY | dict(window=8, exact=3, merged=2)),
    "memory, budget": ("memory", MEMORY | dict(merged=1, budget="9+3, 6; 5, 8+4; 7+2, 6")),
}


@pytest.fixture(autouse=True)
def six_tokens_a_period(monkeypatch):
    monkeypatch.setattr(bounded, "PERIODS", 4)


def model(case: str) -> PreTrainedModel:
    config = architecture("llama")
    config.max_position_embeddings = KNOWN
    mixer, options = CASES[case]
    return moved(
        convert(scrambled(AutoModelForCausalLM.from_config(config)), mixer=mixer, options=options)
    )


@torch.no_grad()
def in_calls(model: PreTrainedModel, ids: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    cache = LinearizedCache(model.config)
    spans = zip(bounds, bounds[1:], strict=False)
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in spans], 1)


@torch.no_grad()
def alone(model: PreTrainedModel, ids: torch.Tensor, **how) -> torch.Tensor:
    return model(ids, **how, use_cache=False).logits


def mixed(mixer, given: dict[str, torch.Tensor], bounds=(0, TEXT)):
    """Return the output of calls, and the state after them."""
    rate = rates(given["q"].shape[-1])
    reach, state, outputs = Reach(KNOWN, rate), None, []
    angle = (reach.place(torch.arange(TEXT))[:, None] * rate).repeat(1, 2)[None]
    rope = tuple(t.to(given["q"].dtype) for t in (angle.cos(), angle.sin()))
    for a, b in zip(bounds, bounds[1:], strict=False):
        q, k, v, x, cos, sin = (t[:, a:b] for t in (*[given[n] for n in "qkvx"], *rope))
        with torch.no_grad():
            o, state = within(reach, mixer)(q, k, v, rope=(cos, sin), x_BTE=x, state=state)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def place(p: int, known: int, period: int) -> int:
    return p if p < known + period else known + (p - known) % period


def by_the_book(
    given: dict[str, torch.Tensor], window: int, sinks: int, block: int
) -> torch.Tensor:
    """Softmax over keys that are rotated to the places that the module's text names.

    Tokens leave a window in blocks, and with `block` are all remembered.
    """
    period, H, G = Reach(KNOWN, rates(2)).period, given["q"].shape[2], given["k"].shape[2]

    def rotated(x_HD: torch.Tensor, position: int) -> torch.Tensor:
        angle = (position * rates(SHARED.head_dim)).repeat(2)[None, None]
        return apply_rope(x_HD[None, None], (angle.cos(), angle.sin()))[0, 0]

    out = []
    for t in range(given["q"].shape[1]):
        here, keys, values = place(t, KNOWN, period), [], []
        oldest = t // block * block + block - window if block else t - window + 1
        for j in range(t + 1):
            leaves = (j + window) // block * block if block else 0  # where the block begins
            if j < sinks:
                stands = j
            elif j >= oldest:
                stands = here - (t - j)
            elif not block:
                continue
            elif leaves < KNOWN:
                stands = j
            else:
                ended = [
                    (x - KNOWN) // period for x in (t, leaves)
                ]  # periods, at t and when it left
                stands = j - period * min(ended[0], ended[1] + KNOWN // period - 1)
            assert here - stands < KNOWN + max(period, window)
            keys.append(rotated(given["k"][0, j], stands))
            values.append(given["v"][0, j])
        q_HD = rotated(given["q"][0, t], here)
        k_HXD, v_HXD = (torch.stack(x, 1).repeat_interleave(H // G, 0) for x in (keys, values))
        score = torch.einsum("hd,hxd->hx", q_HD, k_HXD) / SHARED.head_dim**0.5
        out.append(torch.einsum("hx,hxd->hd", score.softmax(-1), v_HXD))
    return torch.stack(out)[None]


@pytest.mark.parametrize("name, options, block", [
    ("sink_window", dict(window=7, sinks=2), 0),
    ("memory", dict(window=8, exact=100, sinks=2, block=4), 4),
])  # fmt: skip
@pytest.mark.parametrize("periods", [4, 8, 24])
def test_keys_stand_where_the_text_says(name, options, block, periods, monkeypatch):
    monkeypatch.setattr(bounded, "PERIODS", periods)
    given = inputs(SHARED, TEXT, B=1, dtype=torch.float64)
    expected = by_the_book(given, options["window"], options["sinks"], block)
    o, state = mixed(build_mixer(name, options | {"backend": "torch"}, SHARED).double(), given)
    # rows say by their counts how often they are to be rotated
    assert error(o, expected) < (1e-5 if block else 1e-12) and state.length.tolist() == [TEXT]


def test_places_are_the_positions_of_the_text_up_to_a_period_beyond_what_is_known():
    placed = Reach(24, rates(2)).place(torch.arange(60)).tolist()
    assert placed[:30] == list(range(30)) and placed[30:42] == list(range(24, 30)) * 2
    assert max(placed) == 29


@pytest.mark.parametrize("case", CASES)
def test_any_split_gives_the_same(case):
    m, ids = model(case), tokens(2, TEXT)
    whole = in_calls(m, ids, [0, TEXT])
    for bounds in ([0, 15, 23, 24, 25, 37, 51, 52, TEXT], [0, *range(20, TEXT + 1)]):
        assert error(in_calls(m, ids, bounds), whole) < 1e-5
    assert error(alone(m, ids), whole) < 1e-5  # without a cache


def test_keys_of_8_bits_are_rotated_as_any_split_has_them():
    given = inputs(SHAPES["one each, 16"], TEXT, B=1)
    mixer = build_mixer("memory", MEMORY | dict(budget="9+3, 6", cache_dtype="int8"),
                        SHAPES["one each, 16"])  # fmt: skip
    whole, state = mixed(mixer, given)
    for bounds in ([0, 15, 23, 24, 25, 37, 51, 52, TEXT], range(TEXT + 1)):
        o, other = mixed(mixer, given, bounds)
        assert error(o, whole) < 1e-5
        assert all(x.equal(y) for x, y in zip(state[0][:2], other[0][:2], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_up_to_the_known_positions_and_much_beyond(case, monkeypatch):
    m, ids = model(case), tokens(1, TEXT)
    bounded = in_calls(m, ids, [0, TEXT])
    monkeypatch.setattr(type(m.model), "reach", lambda *_: None)
    plain = in_calls(m, ids, [0, TEXT])
    assert error(bounded[:, :KNOWN], plain[:, :KNOWN]) < 1e-6
    far = error(bounded[:, KNOWN + 8 :], plain[:, KNOWN + 8 :])
    # distances in a window alone are those of the text: only the last bits of angles change
    assert far < 1e-4 if case == "window" else far > 1e-2


@pytest.mark.parametrize("case", ["sink_window", "memory, budget"])
def test_rows_of_other_lengths_are_as_each_alone(case):
    m, ids = model(case), tokens(2, TEXT)
    cut, mask = 17, torch.ones_like(ids)
    mask[1, :cut] = 0
    cache = LinearizedCache(m.config)
    with torch.no_grad():
        first = m(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache).logits
        then = m(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits
    both = torch.cat([first, then], 1)
    for row, start in ((0, 0), (1, cut)):
        of_row = in_calls(m, ids[row : row + 1, start:], [0, TEXT - start])
        assert error(both[row : row + 1, start:], of_row) < 1e-5


def test_documents_of_a_pack_are_as_each_alone():
    m = model("memory")
    a, b = tokens(1, TEXT), tokens(1, 50).flip(1)
    positions = torch.cat([torch.arange(TEXT), torch.arange(50)])[None]
    packed = alone(m, torch.cat([a, b], 1), position_ids=positions)
    assert error(packed[:, :TEXT], alone(m, a)) < 1e-5
    assert error(packed[:, TEXT:], alone(m, b)) < 1e-5


@pytest.mark.parametrize("case", ["sink_window", "memory"])
def test_drafts_are_exact_beyond_the_known_positions(case):
    m = model(case)
    ids = tokens(1, 10).repeat(1, 3)  # so that a lookup proposes, rightly or not
    how = dict(do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=None,
               pad_token_id=0, max_new_tokens=50)  # fmt: skip
    plain = m.generate(ids, **how)
    assert m.generate(ids, **how, prompt_lookup_num_tokens=4).equal(plain)
    assert error(
        alone(m, plain), in_calls(m, plain, [0, 30, *range(31, plain.shape[1] + 1)])
    ) < 1e-5  # fmt: skip


def test_only_models_that_keep_nothing_but_keys_have_bounded_positions():
    assert known_positions(model("memory").config) == KNOWN
    for mixer, layers in (("memory", "0, 2"), ("lolcats", "all"), ("slots", "all")):
        assert known_positions(converted(mixer, layers).config) is None
    config = model("sink_window").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert known_positions(config) is None
