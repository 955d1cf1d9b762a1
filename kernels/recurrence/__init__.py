"""The gated linear recurrence: complete sequences, one token, and speculative decoding."""

from lowline.kernels.recurrence.decode import (
    Pending,
    recurrence_advance,
    recurrence_step,
    recurrence_verify,
)
from lowline.kernels.recurrence.op import gated_linear_recurrence

__all__ = [
    "Pending",
    "gated_linear_recurrence",
    "recurrence_advance",
    "recurrence_step",
    "recurrence_verify",
]
