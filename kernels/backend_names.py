"""The names of the backends (`lowline.kernels.backends`), importable without torch."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "reference", "torch", "cpu", "triton"]
BACKENDS = ("auto", "reference", "torch", "cpu", "triton")
