"""The longest files begin first: one that began last would keep a single worker busy at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONGEST = (
    *("train/test_train_resume.py", "train/test_train.py", "train/test_data_distributed.py"),
    *("tools/test_linearize_command.py", "tools/test_evaluation_command.py", "test_notebooks.py"),
    *("kernels/test_aot.py", "train/test_dry_run.py", "train/test_blockwise.py"),
    *("kernels/test_interpreter.py", "train/test_objective_runs.py", "train/test_upgrade.py"),
    *("linearize/test_tensor_parallel.py", "cola/test_tensor_parallel.py", "test_packaging.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))  # stable: others stay in order
