"""[data] and [evaluation.data]: where documents come from, and in which order they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowline.errors import LowlineError
from lowline.train.config.fields import NonNegative, Positive, Strict

ACCEPTED = (
    "data.path takes a file, a glob such as 'data/*.jsonl', a list of these, or a directory "
    "written by datasets' save_to_disk; files may be .jsonl, .json, .ndjson, .txt (each also "
    "compressed: .gz, .bz2, .xz, .zst), .parquet or .arrow"
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which documents to read; `lowline.train.data.sources` reads them.

    `path` is needed by "files" and "hub" only. `name` is the hub dataset's configuration ("en").
    `split` is "train" or "validation" for "embedded", any of the dataset's for "hub" and for a
    saved `DatasetDict`. `text_key` names the column of text. For conversations, `messages_key`
    names a column of lists of {"role", "content"}, or `prompt_key` and `response_key` two columns
    of text. `revision` pins a hub dataset to a branch, tag or commit.
    """

    __pydantic_config__ = Strict
    dataset: str = "embedded"
    path: str | tuple[str, ...] = ()
    name: str | None = None
    split: str = "train"
    text_key: str = "text"
    messages_key: str | None = None
    prompt_key: str | None = None
    response_key: str | None = None
    streaming: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dataset not in ("embedded", "files", "hub"):
            raise LowlineError(
                f"data.dataset = {self.dataset!r}: must be 'embedded' (Python's own "
                "documentation), 'files' (data.path) or 'hub' (data.path is the dataset's id)"
            )
        if isinstance(self.path, list):  # TOML has lists only
            object.__setattr__(self, "path", tuple(self.path))
        if (self.prompt_key is None) != (self.response_key is None):
            raise LowlineError(
                f"data.prompt_key = {self.prompt_key!r}, data.response_key = "
                f"{self.response_key!r}: give both, or neither"
            )
        if self.messages_key is not None and self.prompt_key is not None:
            raise LowlineError(
                f"data.messages_key = {self.messages_key!r} and data.prompt_key = "
                f"{self.prompt_key!r}: a row is read as one conversation: keep one of them"
            )
        if self.dataset == "embedded" and (self.messages_key or self.prompt_key):
            raise LowlineError(
                "data.dataset = 'embedded' holds no conversations: remove data.messages_key and "
                "data.prompt_key, or set data.dataset to 'files' or 'hub'"
            )
        for key in ("name", "revision"):
            if self.dataset != "hub" and getattr(self, key) is not None:
                raise LowlineError(
                    f"data.{key} = {getattr(self, key)!r} is only for data.dataset = 'hub'; "
                    f"remove it for {self.dataset!r}"
                )
        if self.dataset == "embedded":
            if self.path:
                raise LowlineError(
                    f"data.path = {self.path!r} with data.dataset = 'embedded': remove the "
                    "path, or set data.dataset to 'files' or 'hub'"
                )
            if self.streaming:
                raise LowlineError("data.streaming = true: 'embedded' is in memory; remove it")
            if self.split not in ("train", "validation"):
                raise LowlineError(
                    f"data.split = {self.split!r}: 'embedded' has 'train' and 'validation'"
                )
        elif not self.path:
            raise LowlineError(
                f"data.dataset = {self.dataset!r} needs data.path"
                + (": e.g. 'allenai/c4'" if self.dataset == "hub" else f": {ACCEPTED}")
            )
        if self.dataset == "hub" and not (
            isinstance(self.path, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", self.path)
        ):
            raise LowlineError(
                f"data.path = {self.path!r}: with data.dataset = 'hub' it must be one "
                "dataset id, such as 'allenai/c4'"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """[data]: where documents come from (`SourceConfig`), and in which order they are read."""

    __pydantic_config__ = Strict
    shuffle: bool = True
    epochs: Positive | None = None  # default: repeat for as long as the run lasts
    # Processes a rank, or the next smaller number that divides its sequences; 0: rows are made when
    # they are needed.
    num_workers: NonNegative = 0
