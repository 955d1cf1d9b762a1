"""Where a run's batches come from: its own documents, or what a caller has made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torchtitan.components.dataloader import BaseDataLoader

from lowline.train.config.run import RunConfig
from lowline.train.data import lane_config, open_source


class BatchLoader(Protocol):
    """What the trainer asks of a data loader.

    `exhausted` is true once finite data has ended: rows without labels follow.
    """

    exhausted: bool

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield (inputs, labels) of microbatches, from where the loader stands."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand there; takes effect at the next `iter()`."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A source of batches.

    Args:
        check: raises ConfigError, ValueError or OSError where a run cannot be fed.
        loader: returns the configuration of a run's data loader.
    """

    check: Callable[[RunConfig], object]
    loader: Callable[[RunConfig], BaseDataLoader.Config]


DOCUMENTS = Inputs(check=lambda run: open_source(run.data), loader=lane_config)
"""The documents of [data], packed into rows of tokens."""
