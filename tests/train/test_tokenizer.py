"""The embedded text, the embedded tokenizer, and tokenizers that are trained or loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowline.train.data import embedded
from lowline.train.data.embedded import embedded_documents
from lowline.train.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)


def in_another_process(folder: Path, code: str) -> list:
    """Return what code prints as JSON, where strings hash otherwise and no text is kept yet."""
    env = {**os.environ, "PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(folder)}
    code = f"import json, sys; from lowline.train.data import embedded; {code}"
    return json.loads(subprocess.check_output([sys.executable, "-P", "-c", code], env=env))


def test_text_is_gathered_alike_in_every_process(tmp_path):
    library = Path(json.__file__).parents[1] / "asyncio"
    code = "from pathlib import Path; print(json.dumps(embedded._gather(Path(%r))))"
    texts = in_another_process(tmp_path, code % str(library))
    assert texts == embedded._gather(library) and any("asyncio" in text for text in texts)


@pytest.mark.slow
def test_embedded_text_is_the_same_everywhere(tmp_path):
    code = "print(json.dumps([embedded.embedded_documents(s) for s in ('train', 'validation')]))"
    splits = [embedded_documents("train"), embedded_documents("validation")]
    assert in_another_process(tmp_path, code) == splits


def test_embedded_text_is_kept(tmp_path, monkeypatch):
    texts = [f"text {number}" for number in range(100)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_gather", lambda library: texts)
    splits = [embedded_documents("train"), embedded_documents("validation")]
    assert sorted(sum(splits, [])) == sorted(texts) and len(splits[0]) > len(splits[1]) > 0

    (cache,) = (tmp_path / "lowline").iterdir()
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
