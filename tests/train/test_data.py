"""Rows and orders, on hand-made documents whose rows can be written down."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers.documents import Letters, write_jsonl

from lowline.train.data import (
    IGNORE_INDEX,
    EvaluationBatches,
    ListSource,
    SourceConfig,
    evaluation_rows,
    open_source,
)
from lowline.train.data.order import Order, deal, permuted
from lowline.train.data.packing import LanePacker, document_tokens
from lowline.train.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
X = IGNORE_INDEX


def rows_of(source, tokenizer, seq_len, **options):
    rows = evaluation_rows(source, tokenizer, seq_len, **options)
    return rows.input.tolist(), rows.labels.tolist(), rows.positions.tolist()


# --- packing -----------------------------------------------------------------------------------


def test_rows_written_out_by_hand():
    source = ListSource(["ab", "", "cdefgh", " \n", "i"])
    assert rows_of(source, Letters(), 4) == (
        [[1, 2, 0, 3], [4, 5, 6, 7], [8, 0, 9, 0]],
        [[2, 0, X, 4], [5, 6, 7, 8], [0, X, 0, X]],
        [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]],
    )


def test_bos_starts_every_document_and_padding_is_alone():
    assert rows_of(ListSource(["a", "bc"]), Letters(bos_id=99), 5) == (
        [[99, 1, 0, 99, 2], [3, 0, 0, 0, 0]],
        [[1, 0, X, 2, 3], [0, X, X, X, X]],
        [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]],
    )


def test_evaluation_keeps_whole_rows_up_to_max_tokens():
    source = ListSource(["abcdefghij"])
    assert len(evaluation_rows(source, Letters(), 4, max_tokens=11)) == 2
    assert len(evaluation_rows(source, Letters(), 4)) == 3
    with pytest.raises(ValueError, match="max_tokens = 3 is less than one row of seq_len = 4"):
        evaluation_rows(source, Letters(), 4, max_tokens=3)
    with pytest.raises(ValueError, match="no document with text"):
        evaluation_rows(ListSource(["", " "]), Letters(), 4)


def test_a_packer_continues_at_every_state():
    source = ListSource(["abc", "defghijklmn", "", "o", "pqrst"])
    order = Order(lanes=1, shuffle=False)

    def packer(state):
        return LanePacker(deal(source, order, {0: state[:2]}), Letters(), lane=0, state=state)

    def next_row(packer):
        row = torch.zeros(3, 4, dtype=torch.int64).numpy()
        packer.fill(*row)
        return row.tolist()

    straight = packer((0, 0, 0))
    for _ in range(20):
        again = packer(straight.state)
        rows = [next_row(straight), next_row(straight)]
        assert [next_row(again), next_row(again)] == rows
        assert again.state == straight.state


def test_long_texts_are_encoded_in_pieces_without_loss():
    tokenizer = load_tokenizer("embedded")
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma\n", "\n\n    indent", "x" * 50, "δ"]
    text = " ".join(rng.choice(words) for _ in range(10_000)) + "y" * 70_000
    tokens = document_tokens(text, tokenizer)
    assert tokenizer.decode(tokens[:-1].tolist()) == text
    assert tokens[-1] == tokenizer.eos_id


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = Letters()
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="eos_token"):
        evaluation_rows(ListSource(["a"]), tokenizer, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_evaluation_batches_hold_every_row_once(world, batch):
    rows = evaluation_rows(ListSource(["abcdefghijklmnopqrstuvwxy"]), Letters(), 2)
    seen, lengths = [], set()
    for rank in range(world):
        batches = EvaluationBatches(rows, dp_rank=rank, dp_world_size=world, batch_size=batch)
        lengths.add(len(batches))
        made = list(batches)
        assert len(made) == len(batches)
        for inputs, labels in made:
            assert inputs["input"].shape == inputs["positions"].shape == labels.shape == (batch, 2)
            seen += [
                (i, p, y)
                for i, p, y in zip(
                    inputs["input"].tolist(),
                    inputs["positions"].tolist(),
                    labels.tolist(),
                    strict=True,
                )
                if y != [X, X]
            ]
    assert len(lengths) == 1
    expected = zip(rows.input.tolist(), rows.positions.tolist(), rows.labels.tolist(), strict=True)
    assert sorted(seen) == sorted(expected)


def test_evaluation_batches_leave_the_rows_as_they_are():
    rows = evaluation_rows(ListSource(["abc"]), Letters(), 2)
    before = rows.labels.clone()
    list(EvaluationBatches(rows, dp_rank=2, dp_world_size=3, batch_size=4))
    assert torch.equal(rows.labels, before)


# --- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 4097])
def test_permutations_are_permutations(size):
    for epoch in range(3):
        assert sorted(permuted(i, size, 7, epoch) for i in range(size)) == list(range(size))


def test_shuffling_differs_by_epoch_and_seed_and_looks_random():
    def order(seed, epoch):
        return [permuted(i, 1000, seed, epoch) for i in range(1000)]

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for a in range(3):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10
    for numbers in orders:  # a uniform permutation: correlation 0 with sd 0.03, one fixed point
        assert abs(torch.corrcoef(torch.tensor([list(range(1000)), numbers]))[0, 1]) < 0.12
        assert sum(i == x for i, x in enumerate(numbers)) < 8
        assert sum(b == a + 1 for a, b in zip(numbers, numbers[1:], strict=False)) < 8


def test_a_long_order_starts_at_once():
    assert permuted(10**11, 10**12, 0, 0) != 10**11


@pytest.mark.parametrize(
    "options, message",
    [({"lanes": 0}, "global_batch_size = 0"), ({"lanes": 1, "epochs": 0}, "epochs = 0")],
)
def test_impossible_orders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Order(**options)


@pytest.mark.parametrize("shuffle", [True, False])
def test_more_lanes_than_documents_starve_nobody(shuffle):
    dealer = deal(
        ListSource(["a", "b", "c"]),
        Order(lanes=8, shuffle=shuffle),
        {i: (0, 0) for i in range(8)},
    )
    for _ in range(5):
        for lane in range(8):
            assert dealer.next_document(lane) is not None


def test_few_documents_in_a_shared_shard_starve_nobody(tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", ["a", "b"])
    stream = open_source(SourceConfig(dataset="files", path=path, streaming=True))
    dealer = deal(stream, Order(lanes=5), {lane: (0, 0) for lane in range(5)})
    found = {dealer.next_document(lane).text for _ in range(4) for lane in range(5)}
    assert found == {"a", "b"}


def test_a_lane_goes_on_with_its_first_document_at_or_after_its_cursor(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name] * 4) for name in "abc"]
    stream = open_source(SourceConfig(dataset="files", path=files, streaming=True))
    order = Order(lanes=3, shuffle=False)
    for cursor, expected in [((0, 2), (1, 0, "b")), ((1, 3), (1, 3, "b")), ((1, 4), (4, 0, "b"))]:
        assert deal(stream, order, {1: cursor}).next_document(1) == expected
    listed = deal(ListSource(list("abcd")), order, {1: (1, 2)})
    assert listed.next_document(1) == (1, 3, "d")  # places 1, 4, 7, ... of the endless order


def test_a_source_without_text_is_an_error_not_a_hang(tmp_path):
    dealer = deal(ListSource(["", " "]), Order(lanes=2), {0: (0, 0), 1: (0, 0)})
    with pytest.raises(ValueError, match="no document with text"):
        dealer.next_document(1)
    path = write_jsonl(tmp_path / "blank.jsonl", [" ", ""])
    stream = open_source(SourceConfig(dataset="files", path=path, streaming=True))
    with pytest.raises(ValueError, match="blank.jsonl.*data.text_key"):
        deal(stream, Order(lanes=1), {0: (0, 0)}).next_document(0)


def test_real_text_is_packed_whole():
    path = SHARED / "text_train.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    texts = [json.loads(line)["text"] for line in path.open()][:200]
    tokenizer = load_tokenizer("embedded")
    rows = evaluation_rows(ListSource(texts), tokenizer, 256)
    source = open_source(SourceConfig(dataset="files", path=str(path), streaming=True))
    assert [text for _, text in zip(range(200), source.documents(), strict=False)] == texts
    stream = rows.input.flatten().tolist()
    expected = [t for text in texts for t in document_tokens(text, tokenizer).tolist()]
    assert stream[: len(expected)] == expected
    assert set(stream[len(expected) :]) <= {tokenizer.eos_id}
    # Every token but the first of each document is predicted exactly once.
    assert (rows.labels != X).sum() == len(expected) - len(texts)
