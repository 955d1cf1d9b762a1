"""Commands in processes of their own: their environment, and torchrun on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
FOR_HELPERS = {**ENVIRONMENT, "PYTHONPATH": str(TESTS)}  # for scripts that import `helpers`


def torchrun(*arguments: str, processes: int) -> list[str]:
    """Return the command line that starts a script (or `-m`, a module) in several processes."""
    launcher = ("torch.distributed.run", f"--nproc_per_node={processes}")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    return [sys.executable, "-P", "-m", *launcher, *meeting, *arguments]


def train_line(*arguments: str, processes: int = 1) -> list[str]:
    """Return the command line of `lowline.train`, of several processes under torchrun."""
    line = ("-m", "lowline.train", *arguments)
    return torchrun(*line, processes=processes) if processes > 1 else [sys.executable, "-P", *line]
