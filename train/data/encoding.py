"""Text to tokens, long documents in pieces, with the very tokens of encoding them at once.

A file of 100 MB encoded at once needs gigabytes for what the tokenizer notes beside each token, so
text is encoded in pieces of about 64k characters. A tokenizer may put a space before each piece
(Llama 2, Mistral), strip its ends, or have a token that crosses the cut. So a piece is encoded
behind a context, the last characters of the piece before it, whose tokens are then taken away:

    encode(context + piece) = encode(context) + tokens of the piece.

That is checked at every cut. It must hold for the tokens that are used, and the last ones of
encode(context) must be those that the piece before ended in. Then no token crosses the cut. For
BPE this is exact: whether a merge crosses it depends on the token before it and the token after it
alone, as no merge crossed their other ends, and these two stand in encode(context + piece). For
unigram models and pre-tokenizers it holds as paths that share a boundary on both sides of the cut
are equally good between them. Where no cut passes, a piece grows until one does,
up to the rest of the document.
"""

import re
from collections.abc import Iterator
from typing import Protocol

import numpy as np

_PIECE = 1 << 16  # characters encoded at a time
_CONTEXT = 1 << 11  # characters before a cut, and after it, that a cut is tried with
_TRIES = 16  # cuts of either sort, good or anywhere, that are tried for a piece of one length
# White space after a word, or what follows a full-width mark, in text without spaces.
_CUT = re.compile(r"(?<=\S)\s|(?<=[。！？；，、])\S")


class TextEncoder(Protocol):
    """What encoding text needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]: ...


class _UncertainError(Exception):
    """The rest of a text does not go on behind its context as the cut before it promised."""


def document_tokens(text: str, tokenizer: TextEncoder) -> np.ndarray:
    """Return [BOS if there is one] + tokens + [EOS], int64 [n]."""
    assert tokenizer.eos_id is not None
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    try:
        pieces = list(_pieces(text, tokenizer))
    except _UncertainError:
        pieces = [np.array(_encode(text, tokenizer), dtype=np.int64)]
    ends = (np.array(ids, dtype=np.int64) for ids in (begin, [tokenizer.eos_id]))
    return np.concatenate([next(ends), *pieces, next(ends)])


def _pieces(text: str, tokenizer: TextEncoder) -> Iterator[np.ndarray]:
    """Yield the tokens of a text, piece by piece."""
    start = 0
    while start < len(text):
        context = text[max(start - _CONTEXT, 0) : start]
        before = _encode(context, tokenizer) if context else []
        start, tokens = _piece(text, start, context, before, tokenizer)
        yield np.array(tokens, dtype=np.int64)


def _piece(
    text: str, start: int, context: str, before: list[int], tokenizer: TextEncoder
) -> tuple[int, list[int]]:
    """Return where the piece from `start` ends, and its tokens."""
    length = _PIECE
    while len(text) - start > length:
        for end in _cuts(text, start, start + length):
            if not _divides(text, end, tokenizer):
                continue
            tokens = _encode(context + text[start:end], tokenizer)
            if tokens[: len(before)] == before and _ends_alike(text, end, tokens, tokenizer):
                return end, tokens[len(before) :]
        length *= 2
    tokens = _encode(context + text[start:], tokenizer)
    if tokens[: len(before)] != before:
        raise _UncertainError
    return len(text), tokens[len(before) :]


def _cuts(text: str, start: int, end: int) -> list[int]:
    """Return places to try in the later half of a piece, the last first; good ones come first."""
    low = max(start + (end - start) // 2, end - _PIECE // 2)
    found = [match.start() for match in _CUT.finditer(text, low, end)]
    anywhere = range(end - 1, max(low, end - 1 - _TRIES), -1)
    return [*found[: -_TRIES - 1 : -1], *anywhere]


def _divides(text: str, end: int, tokenizer: TextEncoder) -> bool:
    """Tell whether no token crosses `end`, seen with what stands around it."""
    left = _encode(text[max(end - _CONTEXT, 0) : end], tokenizer)
    both = _encode(text[max(end - _CONTEXT, 0) : end + _CONTEXT], tokenizer)
    return both[: len(left)] == left


def _ends_alike(text: str, end: int, tokens: list[int], tokenizer: TextEncoder) -> bool:
    """Tell whether tokens up to `end` end in those that the context of the next piece has."""
    context = _encode(text[max(end - _CONTEXT, 0) : end], tokenizer)
    half = (len(context) + 1) // 2
    return tokens[-half:] == context[-half:]


def _encode(text: str, tokenizer: TextEncoder) -> list[int]:
    return tokenizer.encode(text, add_bos=False, add_eos=False)
