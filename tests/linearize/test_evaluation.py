"""Every score against its formula, written out here in fp64 on tiny random models."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.evaluation import by_hand, reader, tokenizer
from helpers.models import VOCAB, moved, teacher, tokens
from torch import nn
from transformers import PreTrainedModel

from lowline.linearize.convert import convert
from lowline.linearize.evaluation import measure, report, stream
from lowline.linearize.evaluation.harness import HarnessTask
from lowline.linearize.evaluation.measure import beginning, encode, quiet, token_losses
from lowline.linearize.evaluation.retrieval import Retrieval, greedy
from lowline.linearize.evaluation.second_copy import SecondCopy, ordinary_tokens
from lowline.linearize.evaluation.shares import Shares, linear_switched_off
from lowline.linearize.evaluation.stream import Stream
from lowline.linearize.evaluation.text import Perplexity, Text, position_bins
from lowline.linearize.mixers import recorded_shares

MODELS = ("softmax", "lolcats")
OPTIONS = {"window": 5, "backend": "torch"}
TOLERANCE = 1e-5  # fp32 models


def model_of(name: str) -> PreTrainedModel:
    if name == "softmax":
        return teacher()
    return moved(convert(teacher(), mixer=name, layers="0, 2", options=OPTIONS))


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("begin", [[], [3]])
@pytest.mark.parametrize("name", MODELS)
def test_perplexity_is_its_formula(name, begin):
    model, ids = model_of(name), tokens(1, 45)[0].tolist()
    text, expected = Text(ids=ids, beginning=begin), {}
    for context in (2, 9, 20):
        fresh = context - len(begin)
        rows = [begin + ids[at : at + fresh] for at in range(0, 45 - fresh + 1, fresh)]
        losses = torch.tensor([by_hand(model, row) for row in rows], dtype=torch.float64)
        expected[context] = losses
    for batch_tokens in (1, 40, 1000):
        score = Perplexity(text=text, contexts=(2, 9, 20), batch_tokens=batch_tokens)
        run: list[int] = []
        for got in score(model, run.append):
            losses = expected[got["context"]]
            assert got["tokens"] == losses.numel()
            assert got["loss"] == pytest.approx(losses.mean().item(), rel=TOLERANCE)
            assert got["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=TOLERANCE)
            for part in got["by_position"]:
                mean = losses[:, part["first"] - 2 : part["last"] - 1].mean().item()
                assert part["loss"] == pytest.approx(mean, rel=TOLERANCE)
        assert sum(run) == score.tokens


@pytest.mark.parametrize("begin", [[], [3]])
@pytest.mark.parametrize("name", MODELS)
def test_a_stream_is_one_text_and_its_end_is_read_alone_too(name, begin, monkeypatch):
    monkeypatch.setattr(stream, "CALL", 7)
    model, ids, run = model_of(name), tokens(1, 45)[0].tolist(), []
    measured = Stream(text=Text(ids=ids, beginning=begin), last=10)
    score = measured(model, run.append)
    read, alone = (torch.tensor(by_hand(model, begin + x), dtype=torch.float64)
                   for x in (ids, ids[-10:]))  # fmt: skip
    assert score["end"] == pytest.approx(read[-9:].mean().item(), rel=TOLERANCE)
    assert score["alone"] == pytest.approx(alone[-9:].mean().item(), rel=TOLERANCE)
    of_token = read[-45:] if begin else torch.cat([read[:1] * math.nan, read])
    bins = [(part["first"], part["last"]) for part in score["by_position"]]
    assert bins == [(1, 5), (6, 15), (16, 25), (26, 35), (36, 45)]
    for part in score["by_position"]:
        mean = of_token[part["first"] - 1 : part["last"]].nanmean().item()
        assert part["loss"] == pytest.approx(mean, rel=TOLERANCE)
    assert sum(run) == measured.tokens == 55
    with pytest.raises(ValueError, match="the text has 45 tokens, the last 45 of which"):
        Stream(text=measured.text, last=45)


@pytest.mark.parametrize("context", [2, 3, 16, 17, 22, 23, 1000, 4096])
def test_bins_hold_every_position_once(context):
    bins = position_bins(context)
    positions = [position for first, last in bins for position in range(first, last + 1)]
    assert positions == list(range(2, context + 1))


def test_losses_do_not_depend_on_how_many_logits_are_made_at_once(monkeypatch):
    model, ids = teacher(), tokens(3, 17)
    whole = token_losses(model, ids)
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 5 * VOCAB)
    torch.testing.assert_close(token_losses(model, ids), whole)


def test_text_is_documents_with_their_ends():
    end = tokenizer().eos_token_id
    whole = encode(tokenizer(), "A list.") + [end] + encode(tokenizer(), "And a tuple.") + [end]
    documents = ["A list.", "", "And a tuple."]
    assert Text.of(documents, tokenizer(), 100).ids == whole
    assert Text.of(documents, tokenizer(), 6).ids == whole[:6]
    assert Text.of(iter(documents), tokenizer(), 1).ids == whole[:1]


def test_articles_are_the_starts_of_long_documents():
    documents = ["A list.", "A list is a list is a list.", "", "A tuple and a tuple and a set."]
    ids = [encode(tokenizer(), document) for document in documents]
    size = min(len(ids[1]), len(ids[3]))
    assert len(ids[0]) < size
    text = Text.of_articles(documents, tokenizer(), 5, size)
    assert text.rows(size).tolist() == [ids[1][:size], ids[3][:size]]
    assert Text.of_articles(documents, tokenizer(), 1, size).ids == ids[1][:size]
    with pytest.raises(ValueError, match="no document of 99 tokens"):
        Text.of_articles(documents, tokenizer(), 1, 99)


def test_the_second_half_of_a_row_has_a_column():
    model, ids = teacher(), tokens(1, 64)[0].tolist()
    score = Perplexity(
        text=Text(ids=ids, beginning=[]), contexts=(64,), batch_tokens=64, second_half=True
    )
    columns = dict(report._columns(score, 0))
    want = by_hand(model, ids)[31:]
    assert list(columns) == ["ppl\n@64", "ppl last\n32"]
    assert columns["ppl last\n32"](score(model, quiet)) == f"{math.exp(sum(want) / 32):.2f}"


def test_a_tokenizer_that_begins_texts_with_bos_begins_rows_with_it():
    from tokenizers import processors

    other = copy.deepcopy(tokenizer())
    assert beginning(other) == []
    other.add_special_tokens({"bos_token": "<|begin|>"})
    bos = other.bos_token_id
    assert beginning(other) == []  # it has one, but begins nothing with it
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
    )
    assert beginning(other) == [bos]
    assert bos not in encode(other, "a list") and bos not in ordinary_tokens(other)
    text = Text.of(["A list is a list is a list"], other, 100)
    assert text.rows(4)[:, 0].tolist() == [bos] * (len(text.ids) // 3)


@pytest.mark.parametrize(
    "contexts, words", [((46,), "45 tokens"), ((8, 1), "context = 1; at least 2")]
)
def test_impossible_contexts_are_refused(contexts, words):
    text = Text(ids=list(range(45)), beginning=[])
    with pytest.raises(ValueError, match=words):
        Perplexity(text=text, contexts=contexts, batch_tokens=100)


# --------------------------------------------------------------------------------------- copying


class Copier(nn.Module):
    """Says what followed the token when it was last seen; all tokens alike where it is new."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        nn.init.eye_(self.head.weight)
        self.device = torch.device("cpu")

    @property
    def base_model(self):
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids_BT: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.zeros(*ids_BT.shape, self.head.in_features)
        for b, row in enumerate(ids_BT.tolist()):
            for t, token in enumerate(row):
                before = [i for i in range(t) if row[i] == token]
                if before:
                    hidden[b, t, row[before[-1] + 1]] = 100.0
        return SimpleNamespace(last_hidden_state=hidden)


def copying(**how: Any) -> SecondCopy:
    settings: dict[str, Any] = dict(distances=(4, 17), length=4, samples=3, seed=0)
    settings |= dict(vocabulary=list(range(5, VOCAB)), beginning=[], batch_tokens=50)
    return SecondCopy(**settings | how)


@pytest.mark.parametrize("begin", [[], [1, 2]])
def test_second_copy_of_a_model_that_copies(begin):
    vocabulary = list(range(5, 3000))
    model, score = Copier(3000), copying(vocabulary=vocabulary, beginning=begin)
    for got in score(model, quiet):  # type: ignore[arg-type]
        assert got["second"] < 1e-6
        assert got["first"] == pytest.approx(math.log(3000), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_second_copy_is_the_loss_of_the_last_tokens(name):
    model, score = model_of(name), copying(beginning=[3])
    for got in score(model, quiet):
        rows = score.sequences(got["distance"]).tolist()
        assert all(len(row) == 1 + got["distance"] + 4 and row[0] == 3 for row in rows)
        assert all(row[1:5] == row[-4:] and min(row[1:]) >= 5 for row in rows)
        losses = torch.tensor([by_hand(model, row) for row in rows], dtype=torch.float64)
        assert got["second"] == pytest.approx(losses[:, -3:].mean().item(), rel=TOLERANCE)
        assert got["first"] == pytest.approx(losses[:, 1:4].mean().item(), rel=TOLERANCE)


def test_a_text_between_the_copies():
    model, text = Copier(3000), list(range(2000, 2950))
    score = copying(distances=(4, 30), vocabulary=list(range(5, 2000)), beginning=[1], filler=text)
    rows = score.sequences(30).tolist()
    assert [len(row) for row in rows] == [1 + 64 + 30 + 4] * 3
    for n, row in enumerate(rows):
        string = row[65:69]
        assert max(string) < 2000 and row[-4:] == string
        at = n * 90  # each sample has the next stretch of the text
        assert row[1:65] + row[69:-4] == text[at : at + 90]
    for got in score(model, quiet):  # type: ignore[arg-type]
        assert got["second"] < 1e-6 and got["first"] == pytest.approx(math.log(3000), rel=1e-6)
    assert sum(row.numel() for d in (4, 30) for row in score.sequences(d)) == score.tokens
    assert score.settings != copying().settings and "filler" not in copying().settings


def test_strings_follow_from_the_seed():
    first, again, other = (copying(seed=seed).sequences(9) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert copying(seed=0).settings != copying(seed=1).settings


def test_impossible_strings_are_refused():
    with pytest.raises(ValueError, match="distances: 3 is below 4"):
        copying(distances=(9, 3))
    with pytest.raises(ValueError, match="length = 1; a string has at least 2"):
        copying(length=1)


# ------------------------------------------------------------------------------------- retrieval

PROSE = "A list is mutable. A tuple is not! Can a set be sorted? No: it has no order.\n" * 30


def retrieval(kind: str, **how: Any) -> Retrieval:
    settings: dict[str, Any] = dict(lengths=(120, 200), depths=(0.0, 0.4, 1.0), samples=2, seed=0)
    haystack = encode(tokenizer(), PROSE)
    settings |= dict(tokenizer=tokenizer(), haystack=haystack, batch_tokens=300)
    return Retrieval(kind=kind, **settings | how)


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_prompts_have_their_length_and_hide_the_fact_at_its_depth(kind):
    score = retrieval(kind)
    for length in score.lengths:
        for depth in score.depths:
            asked = score.question(length, depth, 0)
            assert len(asked.ids) == length
            said = tokenizer().decode(asked.ids)
            fact = tokenizer().decode(asked.ids[length - asked.distance :]).strip()
            assert fact.startswith("The " if kind == "passkey" else "The secret word of")
            assert said.count(asked.answer) == (2 if kind == "passkey" else 1)
            assert asked.answer in fact and said.endswith(" is")
            if depth == 0:
                assert asked.distance == length
            before = tokenizer().decode(asked.ids[: length - asked.distance])
            if depth < 1 or kind == "passkey":
                assert not before or before.rstrip(" ")[-1] in ".!?\n"  # between sentences
        distances = [score.question(length, depth, 0).distance for depth in score.depths]
        assert distances == sorted(distances, reverse=True) and distances[-1] < 80
    assert score.question(120, 0.4, 0) == score.question(120, 0.4, 0)
    assert score.question(120, 0.4, 0) != score.question(120, 0.4, 1)


@pytest.mark.parametrize("mixer", MODELS)
def test_greedy_is_the_argmax_of_full_forwards(mixer):
    model, ids = model_of(mixer), tokens(2, 9)
    said = greedy(model, ids, 6)
    for _ in range(6):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    assert torch.equal(said, ids[:, 9:])


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_a_model_that_was_taught_the_answers_is_found_to_know_them(kind):
    """Prompts and answers learnt by heart: those it was taught are found, the others are not."""
    score = retrieval(kind, lengths=(90,), depths=(0.0, 1.0), samples=3)
    taught = [score.question(90, 1.0, sample) for sample in range(3)]
    model = copy.deepcopy(reader()).train()
    assert sum(cell["found"] for cell in score(model.eval(), quiet)) == 0
    rows = [q.ids + encode(tokenizer(), f" {q.answer}.") for q in taught]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = ids.clone()
    for row, label in zip(rows, labels, strict=True):
        label[:90] = label[len(row) :] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    cells = {cell["depth"]: cell for cell in score(model.eval(), quiet)}
    assert (cells[1.0]["found"], cells[1.0]["asked"]) == (3, 3)
    assert cells[0.0]["found"] < 3  # other keys
    assert cells[0.0]["distance"] == 90 > cells[1.0]["distance"]


@pytest.mark.parametrize(
    "kind, said, answered",
    [
        ("passkey", " 12345. Remember", True),
        ("passkey", "12345", True),
        ("passkey", " 123456", False),
        ("passkey", " 54321 or 12345", False),
        ("passkey", " not known", False),
        ("needle", ' "violin".', True),
        ("needle", " Violin", True),
        ("needle", " lantern. The violin", False),
        ("needle", " violins.", False),
    ],
)
def test_what_counts_as_an_answer(kind, said, answered):
    score = retrieval(kind)
    question = score.question(120, 0.0, 0)
    answer = "12345" if kind == "passkey" else "violin"
    known = type(question)(question.ids, answer, question.distance)
    assert score.is_answered(known, said) == answered


def test_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match="lengths: 20 tokens are too few for a passkey prompt"):
        retrieval("passkey", lengths=(200, 20))
    with pytest.raises(ValueError, match=r"depths: 1\.5 does not lie"):
        retrieval("passkey", depths=(0.0, 1.5))
    with pytest.raises(ValueError, match="the text has 5 tokens"):
        retrieval("needle", haystack=[1] * 5)


# ---------------------------------------------------------------------------------------- shares


def test_shares_are_those_that_are_recorded():
    model, ids = model_of("lolcats"), tokens(1, 60)[0].tolist()
    got = Shares(text=Text(ids=ids, beginning=[]), context=20, rows=2)(model, quiet)
    with recorded_shares(model) as shares, torch.no_grad():
        for row in torch.tensor(ids[:40]).view(2, 1, 20):
            model(row, use_cache=False)
    assert {score["layer"]: score["share"] for score in got} == {
        layer: pytest.approx(sum(values) / 2, rel=1e-6) for layer, values in shares.items()
    }
    assert set(shares) == {0, 2} and min(score["share"] for score in got) > 1e-3


def test_without_its_linear_part_a_window_and_a_linear_part_are_a_window():
    """Liger is ½ window + ½ linear: what is left is half of the window's output."""
    model = teacher()
    window = convert(model, mixer="sink_window", options=OPTIONS | {"sinks": 0})
    liger = moved(convert(model, mixer="liger_gla", options=OPTIONS))
    for layer in window.model.layers:
        layer.self_attn.o_proj.weight.data /= 2
    ids = tokens(2, 16)
    with torch.no_grad():
        before = liger(ids).logits
        with linear_switched_off(liger):
            off = liger(ids).logits
        torch.testing.assert_close(off, window(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(off, before, atol=1e-2)
        assert torch.equal(liger(ids).logits, before)


def test_a_task_without_an_accuracy_has_a_column() -> None:
    task = HarnessTask(task="t.yaml", tokenizer=None, limit=None, batch_size=1, seed=0)
    scores = {"sample_len": 3.0, "word_perplexity_stderr": 1.0, "word_perplexity": 1234.5678}
    found = dict(report._others(task, [object()], SimpleNamespace(scores=lambda *_: scores)))
    assert list(found) == ["t.yaml\nword_perplexity"]
    assert found["t.yaml\nword_perplexity"](scores) == "1,235"
    assert not list(report._others(task, [object()], SimpleNamespace(scores=lambda *_: {"acc": 1})))
