"""One process of a training run, from its start to its exit code."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from lowline.train.config import RunConfig
from lowline.train.device import prepare
from lowline.train.load_config import to_toml


def train(run: RunConfig) -> int:
    """Train as `run` says; the exit code is 0, or 1 with the reason on standard error."""
    _single_process_defaults()
    prepare()
    from lowline.train.checkpoint import CheckpointError
    from lowline.train.trainer import trainer_config

    _set_up_logging(run)
    trainer = None
    try:
        if os.environ["RANK"] == "0":
            _write_config(run)
        trainer = trainer_config(run, int(os.environ["WORLD_SIZE"])).build()
        trainer.train()
        trainer.close()
        return 0
    except CheckpointError as error:
        print(f"lowline.train: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _set_up_logging(run: RunConfig) -> None:
    """Ours at INFO; torchtitan, which logs to the root logger, at WARNING unless asked for."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
    first = os.environ["RANK"] == "0"
    logging.getLogger().setLevel(logging.INFO if first and run.metrics.verbose else logging.WARNING)
    logging.getLogger("lowline").setLevel(logging.INFO)


def _write_config(run: RunConfig) -> None:
    """OUTPUT/config.toml: what this run resolved to."""
    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / "config.toml.tmp"
    temporary.write_text(to_toml(run))
    temporary.replace(output / "config.toml")


def _single_process_defaults() -> None:
    """What torchrun would set, for a run started without it."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
