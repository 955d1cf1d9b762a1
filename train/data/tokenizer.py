"""Tokenizers: load one from anywhere, and train the small one that comes with lowline.

    python -m lowline.train.data.tokenizer --output DIR [--vocab-size 4096]

trains a byte-level BPE (any text encodes and decodes exactly) on the train split of the embedded
documents and writes a Hugging Face tokenizer directory. train/data/tokenizer/ was made by it,
under CPython 3.11. Its one special token, `<|endoftext|>`, ends every document; there is no BOS.
Words keep their leading space, digits stand alone, and runs of white space are kept together,
since the text is English around indented code.

`load_tokenizer` reads "embedded", a directory, a tokenizer.json or a hub id through
transformers' AutoTokenizer, without running any code from there.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.tokenizer import BaseTokenizer

from lowline.errors import LowlineError, MissingFileError
from lowline.files import write_text
from lowline.hub import check_source
from lowline.train.data.chat import Conversation, conversation_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


class TextTokenizer(BaseTokenizer):
    """A Hugging Face tokenizer for plain text, as torchtitan's trainer and the packer need it.

    `encode` reads its argument as text: a special token spelled out in a document becomes
    ordinary tokens and ends nothing. BOS and EOS are added where asked for, and only then.
    `hf` is the transformers tokenizer itself (chat templates, `save_pretrained`).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Built with `tokenizer_path`: what `load_tokenizer` takes."""

    def __init__(self, config: Config | None = None, *, tokenizer_path: str) -> None:
        super().__init__()
        self.hf = _load_hf(tokenizer_path)
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            raise LowlineError(
                f"tokenizer {tokenizer_path!r} ({type(self.hf).__name__}) has no tokenizer.json "
                "form: convert it to one (a transformers fast tokenizer) and give its directory"
            )
        self.bos_id: int | None = self.hf.bos_token_id
        self.eos_id: int | None = self.hf.eos_token_id
        if self.eos_id is None:
            raise LowlineError(
                f"tokenizer {tokenizer_path!r} has no end-of-text token, which separates "
                "documents: set eos_token in its tokenizer_config.json"
            )
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True  # pickling a Tokenizer drops it

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return token ids of `text`; `add_bos` does nothing for a tokenizer without a BOS."""
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_eos:
            assert self.eos_id is not None
            ids.append(self.eos_id)
        return ids

    def encode_chat(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """`lowline.train.data.chat.conversation_tokens` with this tokenizer's template."""
        return conversation_tokens(conversation, self.hf)

    def fingerprint(self) -> str:
        """Return a digest of what makes ids of text: pieces, rules, special tokens, template."""
        parts = self._plain.to_str(), self.bos_id, self.eos_id, self.hf.chat_template
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return self._plain.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def get_vocab_size(self, special: bool = False) -> int:
        """Return the smallest vocabulary a model needs for every id `encode` can return.

        Special tokens other than BOS and EOS do not count, since text never makes them: 32000 for
        t5-base, whose 100 sentinels stand above its pieces.

        Args:
            special: count them all, as a chat template may make any.
        """
        never = {
            token.content
            for index, token in self._plain.get_added_tokens_decoder().items()
            if token.special and not special and index not in (self.bos_id, self.eos_id)
        }
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        return 1 + max(index for token, index in vocabulary.items() if token not in never)


def load_tokenizer(name_or_path: str) -> TextTokenizer:
    """Return a tokenizer from "embedded", a directory, a tokenizer.json in one, or a hub id.

    Raises FileNotFoundError if there is none, ValueError if it has no end-of-text token.
    """
    return TextTokenizer(tokenizer_path=name_or_path)


def _load_hf(name_or_path: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if name_or_path == "embedded":
        with as_file(files("lowline.train.data") / "tokenizer") as directory:
            return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    path = Path(name_or_path)
    if path.name == "tokenizer.json":
        path = path.parent
    local = path.exists() or path.is_absolute() or name_or_path.startswith(".")
    if local and not path.is_dir():
        raise MissingFileError(
            f"tokenizer {name_or_path!r} is not a directory or a tokenizer.json (looked in "
            f"{Path.cwd()}); give one of these, 'embedded', or a hub id such as 't5-base'"
        )
    try:
        if not local:
            check_source(name_or_path)
        source = str(path) if local else name_or_path
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # damaged files: of any class, tokenizers' are bare Exceptions
        raise MissingFileError(
            f"cannot load tokenizer {name_or_path!r}: {error}. Give 'embedded', a directory with "
            "a tokenizer.json, or a hub id (needs the network, or the hub's cache)"
        ) from error


def train_tokenizer(documents: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Return a byte-level BPE of exactly `vocab_size` tokens, if the documents have enough
    pairs.
    """
    if vocab_size < 257:
        raise LowlineError(
            f"vocab_size = {vocab_size}: must be at least 257 (256 bytes and {END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
    """Write a directory that transformers' AutoTokenizer and torchtitan load."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000_000,
    }
    target = Path(directory)
    write_text(target / "tokenizer.json", tokenizer.to_str())
    write_text(target / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _main() -> None:
    from lowline.train.data.embedded import embedded_documents

    parser = argparse.ArgumentParser(description="Train a byte-level BPE on the embedded text.")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(embedded_documents("train"), arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.output)
    print(f"{tokenizer.get_vocab_size()} tokens written to {arguments.output}")


if __name__ == "__main__":
    _main()
