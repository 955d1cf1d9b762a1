"""RULER's prompts and their score."""

from __future__ import annotations

from typing import Any

import pytest

from lowline.linearize.evaluation import ruler
from lowline.linearize.evaluation.measure import encode, quiet
from lowline.linearize.evaluation.report import _columns
from lowline.linearize.evaluation.ruler import KINDS, NOISE, Ruler
from lowline.train.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("embedded").hf
PROSE = "A list is mutable. A tuple is not! Can a set be sorted? No: it has no order.\n" * 60


def measure(**how: Any) -> Ruler:
    settings: dict[str, Any] = dict(lengths=(500, 600), samples=2, seed=0, batch_tokens=600)
    settings |= dict(tokenizer=TOKENIZER, haystack=encode(TOKENIZER, PROSE))
    return Ruler(**settings | how)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_their_length_and_hide_the_answers(kind):
    score = measure()
    ids, answers = score.prompt(kind, 500, 0)
    said = TOKENIZER.decode(ids)
    assert len(ids) == 500 and len(answers) == {"multivalue": 4, "variables": 5}.get(kind, 1)
    asked = said.rindex("\nQuestion")
    for answer in answers:
        times = said.count(answer)
        # each variable but the last is named where it is passed on, too
        assert times == (1 if kind != "variables" or answer == answers[-1] else 2)
        assert said.index(answer) < asked
    facts = said[:asked].count(" is: ") if kind != "variables" else said.count(" = ")
    assert facts == {"multikey": 4, "multivalue": 4, "variables": 5}.get(kind, 1)
    assert (NOISE in said) == KINDS[kind][0] and ("tuple" in said) != KINDS[kind][0]
    if kind == "variables":
        names = [x.split(" = ")[0].split()[-1] for x in said[:asked].split(".") if " = " in x]
        assert names == answers  # in the order of the assignments
    assert score.prompt(kind, 500, 0) == (ids, answers) != score.prompt(kind, 500, 1)
    assert measure(seed=1).prompt(kind, 500, 0)[1] != answers


def test_the_score_is_the_share_of_the_answers(monkeypatch):
    """A model that gives the first answer of every prompt, and of the first prompt all."""
    score, seen = measure(lengths=(500,)), []

    def said(model, tokenizer, prompts, new):
        texts = []
        for ids in prompts:
            (kind,) = [k for k in KINDS for n in range(2) if score.prompt(k, 500, n)[0] == ids]
            answers = score.prompt(kind, 500, seen.count(kind))[1]
            assert new >= len(encode(tokenizer, ", ".join(answers)))
            texts.append(", ".join(answers if not seen.count(kind) else answers[:1]))
            seen.append(kind)
        return texts

    monkeypatch.setattr(ruler, "continued", said)
    advanced = []
    cells = score(None, advanced.append)
    assert [(c["kind"], c["length"], c["asked"]) for c in cells] == [(k, 500, 2) for k in KINDS]
    found = {c["kind"]: c["found"] for c in cells}
    assert found == dict.fromkeys(KINDS, 2.0) | {"multivalue": 1.25, "variables": 1.2}
    assert sum(advanced) == score.tokens == 6 * 2 * 500
    columns = {title: cell(cells) for title, cell in _columns(score, 64)}
    assert columns["ruler\n@500"] == f"{100 * (8 + 1.25 + 1.2) / 12:.1f} %"
    assert columns["ruler\nmultivalue"] == "62.5 %"


def test_a_model_that_says_nothing_finds_nothing(monkeypatch):
    monkeypatch.setattr(ruler, "continued", lambda model, tokenizer, prompts, new: [""] * 1)
    assert {cell["found"] for cell in measure()(None, quiet)} == {0}


def test_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match="lengths: 50 tokens are too few for a prompt of niah-1"):
        measure(lengths=(600, 50))
    with pytest.raises(ValueError, match="the text has 5 tokens, a prompt needs"):
        measure(haystack=[1] * 5)
