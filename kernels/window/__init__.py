"""Exact attention in a sliding window and linear attention before it, with one denominator."""

from lowline.kernels.window.decode import (
    WindowPending,
    window_linear_advance,
    window_linear_step,
    window_linear_verify,
)
from lowline.kernels.window.op import window_linear_attention
from lowline.kernels.window.state import WindowState, empty_window_state

__all__ = [
    "WindowPending",
    "WindowState",
    "empty_window_state",
    "window_linear_advance",
    "window_linear_attention",
    "window_linear_step",
    "window_linear_verify",
]
