"""Rows, orders and sources, on hand-made documents whose rows can be written down."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from lowline.train.data import (
    IGNORE_INDEX,
    EvaluationBatches,
    ListSource,
    SourceConfig,
    embedded,
    evaluation_rows,
    open_source,
)
from lowline.train.data.embedded import embedded_documents
from lowline.train.data.order import Order, deal, permuted
from lowline.train.data.packing import LanePacker, document_tokens
from lowline.train.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
X = IGNORE_INDEX


class Letters:
    """a=1, b=2, ...; EOS 0; BOS 99 where asked for."""

    eos_id = 0

    def __init__(self, bos_id=None):
        self.bos_id = bos_id

    def encode(self, text, *, add_bos=False, add_eos=False):
        ids = [ord(c) - ord("a") + 1 for c in text]
        return [self.bos_id] * (add_bos and self.bos_id is not None) + ids + [0] * add_eos


def rows_of(source, tokenizer, seq_len, **options):
    rows = evaluation_rows(source, tokenizer, seq_len, **options)
    return rows.input.tolist(), rows.labels.tolist(), rows.positions.tolist()


def write_jsonl(path, texts, key="text"):
    lines = [json.dumps({key: text, "id": number}) for number, text in enumerate(texts)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


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
    text = " ".join(rng.choice(words) for _ in range(30_000)) + "y" * 150_000
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


# --- sources -----------------------------------------------------------------------------------

TEXTS = ["first text", "second\nhas lines", "", "fourth: ünïcode"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "arrow"])
def test_files_of_every_kind_give_their_documents(tmp_path, kind, streaming):
    path = tmp_path / f"data.{kind}"
    table = datasets.Dataset.from_dict({"id": range(4), "body": TEXTS})
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "arrow":
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.data.schema) as out:
            out.write_table(table.data.table)
    else:
        write_jsonl(tmp_path / "data.jsonl", TEXTS, "body")
        if kind == "jsonl.gz":
            path.write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    source = open_source(
        SourceConfig(dataset="files", path=str(path), text_key="body", streaming=streaming)
    )
    assert list(source.documents()) == TEXTS
    if not streaming:
        assert [source.text(i) for i in range(len(source))] == TEXTS
    else:
        assert list(source.shard(0, 2)) == TEXTS[2:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document(tmp_path, streaming):
    (tmp_path / "b.txt").write_text("two\n\nparagraphs\n")
    (tmp_path / "a.txt").write_text("one")
    config = SourceConfig(dataset="files", path=str(tmp_path / "*.txt"), streaming=streaming)
    assert list(open_source(config).documents()) == ["one", "two\n\nparagraphs\n"]


def test_lists_globs_saved_datasets_and_null_texts(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["x", None])
    b = write_jsonl(tmp_path / "b.jsonl", ["y"])
    assert list(open_source(SourceConfig(dataset="files", path=[b, a])).documents()) == [
        "y",
        "x",
        "",
    ]
    table = datasets.Dataset.from_dict({"text": ["p", "q", "r"]}).select([2, 0])
    table.save_to_disk(tmp_path / "saved")
    saved = open_source(SourceConfig(dataset="files", path=str(tmp_path / "saved")))
    assert list(saved.documents()) == ["r", "p"]
    datasets.DatasetDict({"dev": table}).save_to_disk(tmp_path / "splits")
    splits = SourceConfig(dataset="files", path=str(tmp_path / "splits"), split="dev")
    assert list(open_source(splits).documents()) == ["r", "p"]
    with pytest.raises(ValueError, match=r"data.split = 'train': .*\['dev'\]"):
        open_source(SourceConfig(dataset="files", path=str(tmp_path / "splits")))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "web"}, "data.dataset = 'web'"),
        ({"dataset": "embedded", "path": "x"}, "remove the path"),
        ({"dataset": "embedded", "streaming": True}, "'embedded' is in memory"),
        ({"dataset": "embedded", "split": "test"}, "'train' and 'validation'"),
        ({"dataset": "embedded", "name": "en"}, "data.name = 'en' is only for"),
        ({"dataset": "files"}, "needs data.path: .*jsonl"),
        ({"dataset": "files", "path": "x", "revision": "v1"}, "data.revision = 'v1'"),
        ({"dataset": "hub"}, "needs data.path: e.g. 'allenai/c4'"),
        ({"dataset": "hub", "path": "../c4"}, "one dataset id"),
        ({"dataset": "hub", "path": ["a/b", "c/d"]}, "one dataset id"),
    ],
)
def test_impossible_source_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**options)


def refusal(error, **options):
    with pytest.raises(error) as info:
        open_source(SourceConfig(dataset="files", **options))
    return str(info.value)


def test_missing_and_unusable_files_name_the_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(FileNotFoundError, path="none.jsonl")
    assert "'none.jsonl' does not exist" in message and str(tmp_path) in message
    assert "save_to_disk" in message
    assert "no data file matches 'none/*.jsonl'" in refusal(FileNotFoundError, path="none/*.jsonl")
    Path("empty.jsonl").touch()
    assert "'empty.jsonl' is empty" in refusal(ValueError, path="empty.jsonl")
    Path("a.csv").write_text("text\nx\n")
    assert "'a.csv' is of no known kind" in refusal(ValueError, path="a.csv")
    Path("a.parquet.gz").write_text("x")
    assert "of no known kind" in refusal(ValueError, path="a.parquet.gz")
    Path("plain").mkdir()
    assert "was not written by datasets' save_to_disk" in refusal(ValueError, path="plain")
    assert "directory in a list of files" in refusal(ValueError, path=["plain", "a.csv"])
    good = write_jsonl(tmp_path / "good.jsonl", ["x"])
    Path("a.txt").write_text("x")
    assert "mixes kinds" in refusal(ValueError, path=[good, "a.txt"])
    assert "files have no splits" in refusal(ValueError, path=good, split="validation")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "cannot read broken.jsonl as json" in refusal(ValueError, path="broken.jsonl")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk("saved")
    assert "memory-mapped already" in refusal(ValueError, path="saved", streaming=True)
    assert "without splits" in refusal(ValueError, path="saved", split="dev")
    Path("blank.txt").touch()
    broken = open_source(
        SourceConfig(dataset="files", path=["good.jsonl", "broken.jsonl"], streaming=True)
    )
    with pytest.raises(ValueError, match="cannot read broken.jsonl as json: line 2"):
        list(broken.documents())
    assert rows_refused("blank.txt") == "blank.txt: no document with text to evaluate on"


def rows_refused(path):
    with pytest.raises(ValueError) as info:
        evaluation_rows(open_source(SourceConfig(dataset="files", path=path)), Letters(), 4)
    return str(info.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_or_unsuitable_column_is_named(tmp_path, streaming):
    path = write_jsonl(tmp_path / "data.jsonl", ["x"], "content")
    config = {"path": path, "streaming": streaming}

    def read(text_key):
        source = open_source(SourceConfig(dataset="files", text_key=text_key, **config))
        return list(source.documents())

    assert read("content") == ["x"]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['content', 'id'\]"):
        read("text")
    with pytest.raises(ValueError, match="column 'id' holds int64, not strings"):
        read("id")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_that_cannot_be_had_names_the_mend(tmp_path, monkeypatch, streaming):
    def unreachable(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.chdir(tmp_path)
    config = SourceConfig(dataset="hub", path="no/such", streaming=streaming)
    with pytest.raises(FileNotFoundError, match="cannot open no/such .*on the Hugging Face hub"):
        open_source(config)
    Path("no/such").mkdir(parents=True)
    with pytest.raises(ValueError, match="is also a local path"):
        open_source(config)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_opened_as_named(tmp_path, monkeypatch, streaming):
    """The hub is stood in for by a dataset of the same form on disk."""
    calls = []
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate(["xy", "z"])]

    def here(function):
        def called(path, *, name, revision, **options):
            calls.append((path, name, revision))
            return function("json", data_files={"validation": files}, **options)

        return called

    for function in (datasets.load_dataset, datasets.load_dataset_builder):
        monkeypatch.setattr(datasets, function.__name__, here(function))
    config = {"dataset": "hub", "path": "allenai/c4", "name": "en", "streaming": streaming}
    source = open_source(SourceConfig(split="validation", revision="v1", **config))
    assert list(source.documents()) == ["x", "y", "z"]
    assert getattr(source, "num_shards", None) == (2 if streaming else None)
    assert calls[0] == ("allenai/c4", "en", "v1")
    with pytest.raises(ValueError, match="cannot open allenai/c4 .*data.split"):
        open_source(SourceConfig(split="test", **config))


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


# --- embedded text and tokenizer ---------------------------------------------------------------


def test_embedded_text_is_the_same_everywhere_and_kept(tmp_path, monkeypatch):
    code = (
        "import json, sys; from lowline.train.data.embedded import embedded_documents;"
        "json.dump([embedded_documents('train'), embedded_documents('validation')], sys.stdout)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(tmp_path)}
    made = subprocess.check_output([sys.executable, "-P", "-c", code], env=env, text=True)
    splits = [embedded_documents("train"), embedded_documents("validation")]
    assert json.loads(made) == splits

    (cache,) = (tmp_path / "lowline").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_gather", lambda library: ["gathered"])
    assert embedded_documents("train") == splits[0]  # read from the cache
    cache.write_text("[broken")
    assert embedded_documents("train") == ["gathered"]
    assert json.loads(cache.read_text()) == ["gathered"]
    assert list(cache.parent.iterdir()) == [cache]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert embedded_documents("train") == ["gathered"]  # nowhere to keep it


def test_embedded_text_is_documentation_in_two_disjoint_splits():
    train, validation = embedded_documents("train"), embedded_documents("validation")
    everything = train + validation
    assert len(set(everything)) == len(everything) > 400
    assert 0.01 < len(validation) / len(everything) < 0.12
    assert sum(map(len, everything)) > 1_500_000
    assert any("json.loads(s, *, cls=None" in text for text in everything)
    assert any("lambda" in text and "expression" in text for text in everything)
    with pytest.raises(ValueError, match="split = 'test'"):
        embedded_documents("test")


def test_embedded_documents_come_from_parsing_alone(tmp_path):
    (tmp_path / "odd.py").write_text(
        '"""Odd things."""\nraise SystemExit\n'
        "if True:\n    class A:\n        'A class.'\n"
        "        async def f(self, x: int = 1): 'Runs.'\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not this."""')
    texts = embedded._gather(tmp_path)
    assert "odd\n\nOdd things.\n\nclass odd.A\nA class.\n\nodd.A.f(self, x: int=1)\nRuns." in texts
    assert not any("Not this." in text for text in texts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no library sources"):
        embedded._gather(tmp_path / "empty")


def test_the_embedded_tokenizer(tmp_path):
    tokenizer = load_tokenizer("embedded")
    assert (tokenizer.bos_id, tokenizer.decode([tokenizer.eos_id])) == (None, END_OF_TEXT)
    assert tokenizer.get_vocab_size() == len(tokenizer.hf) == 4096
    text = "def f(x):\n    return  12 + ü  # 日本\n\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == tokenizer.hf.decode(tokenizer.hf.encode(text))
    assert tokenizer.encode(text, add_bos=True, add_eos=True) == [*ids, tokenizer.eos_id]
    spelled = tokenizer.encode(f"a {END_OF_TEXT} b")
    assert tokenizer.eos_id not in spelled
    assert tokenizer.decode(spelled) == f"a {END_OF_TEXT} b"
    directory = Path(sys.modules[load_tokenizer.__module__].__file__).parent / "tokenizer"
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 300_000
    assert sum(map(len, map(tokenizer.encode, embedded_documents("validation")))) < 30_000


def test_tokenizers_survive_pickling_with_their_settings():
    import pickle

    tokenizer = load_tokenizer("embedded")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(f"a{END_OF_TEXT}") == tokenizer.encode(f"a{END_OF_TEXT}")


def test_a_trained_tokenizer_is_loaded_by_everyone(tmp_path):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    save_tokenizer(train_tokenizer(["some text, some words"] * 9, 270), tmp_path)
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        ours = load_tokenizer(name)
        assert ours.decode(ours.encode("some words!")) == "some words!"
    theirs = HuggingFaceTokenizer(tokenizer_path=str(tmp_path))
    assert theirs.encode("some text", add_eos=True) == ours.encode("some text", add_eos=True)
    with pytest.raises(ValueError, match="vocab_size = 200"):
        train_tokenizer(["x"], 200)


def test_tokenizers_that_cannot_be_used_name_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="give one of these, 'embedded'"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="cannot load tokenizer"):
        load_tokenizer(str(tmp_path))
    save_tokenizer(train_tokenizer(["x"], 257), tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("eos_token", "unk_token"))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_sentinels_do_not_count_as_vocabulary(tmp_path):
    tokenizer = train_tokenizer(["x"], 257)
    tokenizer.add_special_tokens(["<extra_0>", "<extra_1>"])
    save_tokenizer(tokenizer, tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert (len(ours.hf), ours.get_vocab_size()) == (259, 257)
    assert max(ours.encode("<extra_1>")) < 257
