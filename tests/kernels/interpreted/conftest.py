"""Tests of Triton kernels: on a CUDA device, or, with TRITON_INTERPRET=1, in Triton's interpreter.

Whether a kernel is interpreted is settled when its module is imported, so the two need a process
each: `pytest -m gpu` on a machine with a GPU, and `tests/kernels/test_interpreter.py`, which runs
this folder with the variable set. Everything here bears the mark `gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.triton_interpreter import install

from lowline.kernels.backends import interpreting

FOLDER = Path(__file__).parent
if interpreting():
    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test go."""
    if interpreting():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda")
