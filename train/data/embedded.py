"""English text that every CPython carries: its language reference and its library's docstrings.

Two parts, each document from one of them:

- `pydoc_data.topics`: what `help("keyword")` prints, one document a topic;
- the standard library's source files, parsed and not imported: one document a module: the
  module's docstring, then `qualified.name(arguments)` and the docstring of every public or
  private class and function that has one.

It is small, and the same wherever the same Python is. With CPython 3.11.7 on Linux,

    python -m lowline.train.data.embedded

prints 2.36 M characters in 558 documents (0.687 M tokens of the embedded tokenizer) for train and
0.08 M characters in 26 documents (0.024 M tokens) for validation. Parsing takes about 5 s, so the
text is kept as JSON in the user's cache directory ($XDG_CACHE_HOME or ~/.cache, then lowline/), by
Python version and place.

Left out: docstrings of modules written in C (reading them means importing), tests, the turtle
demos and IDLE.
"""

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lowline.errors import LowlineError
from lowline.files import write_text

_SKIPPED = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_VALIDATION_EVERY = 20
_FORMAT = 1  # raise when the documents of one Python change


def embedded_documents(split: str = "train") -> list[str]:
    """Return the documents of a split, "train" or "validation" (about one in twenty, by their
    hash).

    The same list, in the same order, in every process of one Python installation. Raises
    LowlineError for another split, or if this Python has no library sources.
    """
    if split not in ("train", "validation"):
        raise LowlineError(f"split = {split!r}: must be 'train' or 'validation'")
    held_out = split == "validation"
    return [text for text in _all_documents() if _is_held_out(text) == held_out]


def _is_held_out(text: str) -> bool:
    return int.from_bytes(_digest(text)[:8], "little") % _VALIDATION_EVERY == 0


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _all_documents() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    cache = _cache_file(library)
    try:
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if isinstance(cached, list) and cached and all(isinstance(d, str) for d in cached):
            return cached
    except (OSError, ValueError):
        pass  # not there yet, or not readable: made again below
    documents = _gather(library)
    _write(cache, documents)
    return documents


def _gather(library: Path) -> list[str]:
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    files = [
        path
        for path in sorted(library.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(library).parts[:-1])
    ]
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        texts.append("\n\n".join(_docstrings(tree, _module_name(path.relative_to(library)))))
    if not files:
        raise LowlineError(
            f"this Python has no library sources in {library} (a zipped or stripped "
            "installation): use data.dataset = 'files' or 'hub' instead of 'embedded'"
        )
    # Characters that UTF-8 cannot hold (lone surrogates in examples) would break tokenizers.
    texts = [text.encode("utf-8", "replace").decode("utf-8").strip() for text in texts]
    return list(dict.fromkeys(text for text in texts if text))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield the module's docstring under its name, then those of its classes and functions."""
    text = ast.get_docstring(tree)
    if text:
        yield f"{module}\n\n{text}"
    yield from _members(tree, module)


def _members(parent: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                title = f"class {name}" if isinstance(node, ast.ClassDef) else name
                arguments = "" if isinstance(node, ast.ClassDef) else f"({_arguments(node)})"
                yield f"{title}{arguments}\n{text}"
            yield from _members(node, name)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _members(node, prefix)


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ast.unparse(function.args)


def _cache_file(library: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    version = ".".join(map(str, sys.version_info[:3]))
    place = hashlib.sha256(f"{sys.version}\n{library}".encode()).hexdigest()[:12]
    return Path(base) / "lowline" / f"embedded-v{_FORMAT}-{version}-{place}.json"


def _write(path: Path, documents: list[str]) -> None:
    """Write the cache at once or not at all; a home that cannot be written needs none."""
    try:
        write_text(path, json.dumps(documents))
    except OSError:
        return


def _main() -> None:
    from lowline.train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    for split in ("train", "validation"):
        documents = embedded_documents(split)
        characters = sum(map(len, documents))
        tokens = sum(len(tokenizer.encode(text)) for text in documents)
        print(
            f"{split}: {len(documents)} documents, {characters / 1e6:.2f} M characters, "
            f"{tokens / 1e6:.3f} M tokens"
        )


if __name__ == "__main__":
    _main()
