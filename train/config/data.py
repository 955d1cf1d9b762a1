"""[data] and [evaluation.data]: where documents come from, and in which order they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lowline.errors import LowlineError
from lowline.train.config.fields import DATA, NOTHING, RUN, Name, NonNegative, Positive, Strict

ACCEPTED = (
    "data.path takes a file, a glob such as 'data/*.jsonl', a list of these, or a directory "
    "written by datasets' save_to_disk; files may be .jsonl, .json, .ndjson, .txt (each also "
    "compressed: .gz, .bz2, .xz, .zst), .parquet or .arrow"
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which documents to read; `lowline.train.data.sources` reads them."""

    __pydantic_config__ = Strict
    decides = DATA
    dataset: str = "embedded"
    """Where documents come from: "embedded" (Python's documentation), "files", or "hub"."""
    path: str | tuple[str, ...] = ()
    """A file, a glob, a list of these or a saved dataset's directory; on the hub a dataset's id."""
    name: Name | None = None
    """The configuration of a dataset on the hub, such as "en"."""
    split: Name = "train"
    """The part that is read: "train" or "validation" of the embedded text, any of a dataset's."""
    text_key: Name = "text"
    """The column that holds the text of a document."""
    messages_key: Name | None = None
    """The column that holds conversations, lists of {role, content}, in place of plain text."""
    prompt_key: Name | None = None
    """The column that holds what the user says, for conversations of one exchange."""
    response_key: Name | None = None
    """The column that holds what the model answers, beside `prompt_key`."""
    chosen_key: Name | None = None
    """The column of the better answer of a pair: text beside `prompt_key`, or messages."""
    rejected_key: Name | None = None
    """The column of the worse answer, in the form of `chosen_key`."""
    streaming: bool = False
    """Whether documents are read as they come, without an index on disk."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Whether a row that cannot be read is an "error", or left out and counted ("skip")."""
    revision: Name | None = None
    """The branch, tag or commit of a dataset on the hub; its newest state without."""

    def __post_init__(self) -> None:
        if self.dataset not in ("embedded", "files", "hub"):
            raise LowlineError(
                f"data.dataset = {self.dataset!r}: must be 'embedded' (Python's own "
                "documentation), 'files' (data.path) or 'hub' (data.path is the dataset's id)"
            )
        if isinstance(self.path, list):  # TOML has lists only
            object.__setattr__(self, "path", tuple(self.path))
        pairs = self.chosen_key is not None
        if pairs != (self.rejected_key is not None):
            raise LowlineError(
                f"data.chosen_key = {self.chosen_key!r}, data.rejected_key = "
                f"{self.rejected_key!r}: give both, or neither"
            )
        if pairs and (self.response_key is not None or self.messages_key is not None):
            raise LowlineError(
                f"data.chosen_key = {self.chosen_key!r} beside data.response_key or "
                "data.messages_key: a row is read as one pair; keep data.prompt_key at most"
            )
        if not pairs and (self.prompt_key is None) != (self.response_key is None):
            raise LowlineError(
                f"data.prompt_key = {self.prompt_key!r}, data.response_key = "
                f"{self.response_key!r}: give both, or neither"
            )
        if self.messages_key is not None and self.prompt_key is not None:
            raise LowlineError(
                f"data.messages_key = {self.messages_key!r} and data.prompt_key = "
                f"{self.prompt_key!r}: a row is read as one conversation: keep one of them"
            )
        if self.dataset == "embedded" and self.chats:
            raise LowlineError(
                "data.dataset = 'embedded' holds no conversations: remove data.messages_key, "
                "data.prompt_key and data.chosen_key, or set data.dataset to 'files' or 'hub'"
            )
        for key, default in (("text_key", "text"), ("on_bad_row", "error")):
            if self.dataset == "embedded" and getattr(self, key) != default:
                raise LowlineError(
                    f"data.{key} = {getattr(self, key)!r} with data.dataset = 'embedded', which "
                    "has no rows of files: remove it, or set data.dataset to 'files' or 'hub'"
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

    @property
    def chats(self) -> bool:
        """Return whether rows are conversations, single or in pairs."""
        return any((self.messages_key, self.prompt_key, self.chosen_key))


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """[data]: where documents come from, and in which order they are read."""

    __pydantic_config__ = Strict
    shuffle: bool = True
    """Whether documents are read in a random order."""
    epochs: Annotated[Positive | None, RUN] = None
    """How often the documents are read; for as long as the run lasts without."""
    num_workers: Annotated[NonNegative, Field(le=1024), NOTHING] = 0
    """Processes of each rank that prepare rows; 0 prepares them when they are needed."""
