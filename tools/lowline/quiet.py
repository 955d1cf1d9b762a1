"""What other libraries print, switched off by their own switches."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Leave a command's output to the command: no progress bars of loading, no notes of lm-eval.

    Warnings of theirs that concern the user, such as of a model's weights, are still shown.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights", "Writing model shards"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Checkpoints are read by one process without a process group, on purpose.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")
