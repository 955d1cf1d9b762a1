"""Long documents are encoded in pieces, and get the tokens of encoding them at once."""

from __future__ import annotations

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lowline.train.data import encoding
from lowline.train.data.encoding import document_tokens
from lowline.train.data.tokenizer import load_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "and", "then", "12345", "some", "more", "words"]
WORDS += ["were", "said.", "Über", "日本語。", "(x)"]
BETWEEN = [" ", " ", " ", "\n", "  ", "\n\n", "\t", " \n ", "\u3000"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def mixed(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(BETWEEN) for _ in range(count))


def trained(kind: str) -> Tokenizer:
    bpe = kind not in ("unigram", "T5")
    tokenizer = Tokenizer(models.BPE() if bpe else models.Unigram())
    spaces = normalizers.Replace(" ", "▁")
    if kind == "Llama 2":  # one word of the whole text, so tokens may hold several spaces
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif kind == "Mistral 0.3":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind in ("Metaspace", "unigram"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    elif kind == "T5":  # takes white space together and off the ends
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    elif kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "bytes, prefixed":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "Llama 3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind.startswith(("bytes", "Llama 3")):
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer if bpe else trainers.UnigramTrainer
    options = {"vocab_size": 300, "special_tokens": ["</s>", "<unk>"], "show_progress": False}
    if not bpe:
        options["unk_token"] = "<unk>"
    tokenizer.train_from_iterator([mixed(2000, seed=1)], trainer(**options))
    return tokenizer


KINDS = (
    *("Llama 2", "Mistral 0.3", "Metaspace", "bytes", "bytes, prefixed", "Llama 3"),
    *("unigram", "T5"),
)


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_object=trained(request.param), eos_token="</s>")
    made.save_pretrained(folder)
    return load_tokenizer(str(folder))


class Counted:
    """A tokenizer that notes the longest text it was given."""

    bos_id = None

    def __init__(self, tokenizer):
        self._tokenizer, self.eos_id, self.longest = tokenizer, tokenizer.eos_id, 0

    def encode(self, text, *, add_bos, add_eos):
        self.longest = max(self.longest, len(text))
        return self._tokenizer.encode(text, add_bos=add_bos, add_eos=add_eos)


TEXTS = {
    "mixed": mixed(4000),
    "one space": " ".join(WORDS * 300),
    "lines": "\n".join(WORDS * 300),
    "no space": "".join(WORDS * 300),
    "one letter": "y" * 9_000,
    "digits": "1234567" * 1_500,
    "blank": "a" + " " * 9_000 + "b",
    "paragraphs": "said.\n\n\n" * 1_500,
    "late spaces": "y" * 7_000 + mixed(1500),
    "full-width": "日本語。すう、" * 1_500,
    "combining": "e\u0301 \u0301a " * 2_000,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("piece", [1 << 10, pytest.param(3_000, marks=pytest.mark.slow)])
def test_pieces_have_the_tokens_of_the_whole(tokenizer, monkeypatch, name, piece):
    """With small pieces, so that there are many cuts."""
    monkeypatch.setattr(encoding, "_PIECE", piece)
    monkeypatch.setattr(encoding, "_CONTEXT", 200)
    counted, text = Counted(tokenizer), TEXTS[name]
    tokens = document_tokens(text, counted).tolist()
    assert tokens == [*tokenizer.encode(text), tokenizer.eos_id]
    if name in ("mixed", "one space"):  # cuts were found, for every tokenizer
        assert counted.longest <= piece + 2 * 200


def test_real_sizes(tokenizer):
    text = mixed(18_000)
    counted = Counted(tokenizer)
    assert document_tokens(text, counted).tolist()[:-1] == tokenizer.encode(text)
    assert len(text) > 1.2 * encoding._PIECE and counted.longest <= encoding._PIECE * 1.1


def test_short_texts_are_encoded_once(tokenizer):
    calls = []

    class Once(Counted):
        def encode(self, text, **options):
            calls.append(text)
            return super().encode(text, **options)

    tokens = document_tokens("some words", Once(tokenizer)).tolist()
    assert (calls, tokens[:-1]) == (["some words"], tokenizer.encode("some words"))


def test_a_tokenizer_that_looks_far_ahead_encodes_at_once():
    """Tokens that depend on the end of the text allow no cut."""

    class Parity:
        bos_id, eos_id = None, 0

        def encode(self, text, *, add_bos=False, add_eos=False):
            return [1 + len(text) % 2] * len(text)

    text = "ab cd " * 50_000
    assert document_tokens(text, Parity()).tolist() == [1] * len(text) + [0]
