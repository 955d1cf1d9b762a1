"""`lowline context save`: a model reads a text, and what it then holds is a file.

    lowline context save converted/ book.txt book.safetensors
    lowline generate converted/ "The moral of the story:" --context book.safetensors

The text goes through the model in pieces, so that memory does not grow with it where every layer
has a mixer; softmax layers keep their keys and values, in the file, too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lowline.command_line import DType
from lowline.errors import LowlineError
from lowline.hub import check_source

PIECE = 512  # tokens of a text that go through a model at once


def context_save(model: str, text: str, output: Path, *, dtype: DType = "float32") -> Path:
    """Let a model read a text, and save what it holds then, for `lowline generate --context`.

    Args:
        model: A Hugging Face directory (exported, converted or neither), a hub id or a GGUF file.
        text: A UTF-8 file, or - for standard input.
        output: The safetensors file to write; a context that was saved there before is replaced.
        dtype: The type that is computed in; `lowline generate` is given the same.

    Returns:
        The file.

    Raises:
        ValueError: no such model or text, an empty text, or another kind of file at `output`.
    """
    check_source(model)
    content = _read(text)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from lowline.linearize.body.cache import LinearizedCache, state_bytes
    from lowline.linearize.body.context_file import check_target
    from lowline.linearize.evaluation.measure import beginning, encode
    from lowline.linearize.source import load_teacher, load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    ids = beginning(tokenizer) + (read := encode(tokenizer, content))
    if not read:
        raise LowlineError(f"{text} has no tokens; give a text to read")
    network: Any = load_teacher(model, dtype=getattr(torch, dtype)).eval()
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    cache, start = LinearizedCache(network.config), time.monotonic()
    check_target(output)  # before what may be hours of reading
    ids_1T = torch.tensor([ids])
    with torch.no_grad(), Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("reading", total=len(ids))
        for piece in ids_1T.split(PIECE, 1):
            network.base_model(piece.to(network.device), past_key_values=cache, use_cache=True)
            progress.advance(shown, piece.shape[1])
    cache.save(output, token_ids=ids_1T)
    print(
        f"{output}: {len(ids)} tokens in {time.monotonic() - start:.1f} s, "
        f"{state_bytes(cache) / 1e6:.2f} MB"
    )
    return output


def _read(text: str) -> str:
    from lowline.train.data.lines import read_text

    if text != "-":
        return read_text(text)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise LowlineError(f"standard input is not UTF-8 ({error.reason})") from None


def read_context(path: Path) -> Any:
    """Return the cache in a file of `context_save`.

    Raises:
        ValueError: no such file, another kind of file, a damaged one, or one without its tokens.
    """
    from lowline.linearize.body.cache import LinearizedCache

    cache = LinearizedCache.load(path)
    if cache.token_ids is None or len(cache.token_ids) != 1:
        raise LowlineError(
            f"{path} was saved without token_ids of one text, which generation needs; write it "
            "with `lowline context save` or cache.save(path, token_ids=ids)"
        )
    return cache


def after_context(cache: Any, prompt_1T: Any, tokenizer: Any) -> Any:
    """Return the tokens that were read with those of a prompt after them, but for its BOS."""
    import torch

    from lowline.linearize.evaluation.measure import beginning

    begin = beginning(tokenizer)
    if begin and prompt_1T[0, : len(begin)].tolist() == begin:
        prompt_1T = prompt_1T[:, len(begin) :]
    return torch.cat([cache.token_ids.to(prompt_1T.device), prompt_1T], 1)
