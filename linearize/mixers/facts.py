"""What is known of a mixer before it is built: the base of all mixers' options."""

from __future__ import annotations

from typing import ClassVar

FACTS = (
    "learns",
    "has_window",
    "has_linear",
    "is_average",
    "calibrates",
    "fits",
    "keeps_keys",
    "splits",
)


class MixerOptions:
    """Base of the options of all mixers: what is known of a mixer before it is built.

    Attributes:
        learns: it has parameters.
        has_linear: it has a part with a state that sums over all tokens.
        is_average: the output is a mean of values, with weights of at least 0 that sum to 1.
        calibrates: `Mixer.calibrate` returns something.
        fits: `Mixer.fit` returns something.
        keeps_keys: its state holds keys after the rotary embedding, of single tokens or means of
            some, in a `WindowState`, a `MemoryState` or several; and nothing else that depends on
            positions.
        splits: its heads can lie on several ranks, each with its part of the parameters.
    """

    learns: ClassVar[bool] = True
    has_linear: ClassVar[bool] = True
    is_average: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    keeps_keys: ClassVar[bool] = False

    @property
    def splits(self) -> bool:
        """Whether a rank can have some of the heads."""
        return not getattr(self, "conv", 0)  # whose channels are those of q, then k, then v

    @property
    def has_window(self) -> bool:
        """Whether softmax attention in a sliding window is a part of it."""
        return bool(getattr(self, "window", 0))

    @property
    def softmax_tokens(self) -> int:
        """How many keys softmax reads for each query, a mean over heads."""
        return getattr(self, "window", 0) + getattr(self, "sinks", 0)

    def check_model(self, n_layers: int, n_kv_heads: int) -> None:
        """Raise ValueError for options that do not fit a model of so many layers and heads."""
