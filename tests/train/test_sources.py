"""Sources of documents: files of every kind, saved datasets, the hub, and what is refused."""

import gzip
from pathlib import Path

import datasets
import pytest
from helpers.documents import Letters, write_jsonl

from lowline.train.data import SourceConfig, evaluation_rows, open_source

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
