"""Checkpoints that are complete or absent: OUTPUT/checkpoint/step-N.

torchtitan's manager (DCP, asynchronous, resharding on load) with three changes. A save writes into
`step-N.saving` and rank 0 renames it when every rank has finished; deletions are renamed first too;
so a folder called step-N is whole, whenever the process was killed. The run's resolved config.toml
is saved inside. A save that fails stops the run at the next step, with what is safe and the mend.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager

SAVING, DELETING = ".saving", ".deleting"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says which is the newest whole one."""


def saved_steps(folder: str | Path) -> list[int]:
    """Steps of the whole checkpoints in a `checkpoint` folder, ascending."""
    folder = Path(folder)
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(m[1]) for m in found if m)


class Checkpointer(CheckpointManager):
    """torchtitan's checkpoint manager with whole folders only."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        run_config: str = ""  # the resolved TOML, saved as config.toml in every checkpoint

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._run_config = config.run_config
        self._newest: int | None = None
        if self.enable and dist.get_rank() == 0 and Path(self.folder).is_dir():
            for path in Path(self.folder).iterdir():
                if path.suffix in (SAVING, DELETING):  # an earlier process was killed there
                    shutil.rmtree(path)

    def dcp_save(self, state_dict: dict, checkpoint_id: str, async_mode: AsyncMode, **kwargs: Any) -> Any:
        """Save into a temporary folder; the rename follows when all ranks are done."""
        final = Path(checkpoint_id)
        temporary = final.with_name(final.name + SAVING)
        try:
            result = super().dcp_save(state_dict, str(temporary), async_mode, **kwargs)
        except Exception as error:
            raise self._failure(final, error) from error
        if isinstance(result, Future):
            # Chained, so that who waits for the save waits for the rename and sees its error.
            done: Future = Future()
            result.add_done_callback(lambda saved: self._finish(saved, done, temporary, final))
            return done
        self._publish(temporary, final)
        return result

    def _finish(self, saved: Future, done: Future, temporary: Path, final: Path) -> None:
        try:
            saved.result()
            self._publish(temporary, final)
            done.set_result(None)
        except BaseException as error:  # handed to whoever waits
            done.set_exception(self._failure(final, error))

    def _publish(self, temporary: Path, final: Path) -> None:
        self._newest = int(final.name.removeprefix("step-"))
        if dist.get_rank() != 0:
            return
        (temporary / "config.toml").write_text(self._run_config)
        if final.exists():
            self._remove(str(final))
        temporary.rename(final)

    def _failure(self, final: Path, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        whole = saved_steps(self.folder)
        safe = f"step-{whole[-1]} is whole; the same command goes on from it" if whole else "none yet"
        free = _free_bytes(Path(self.folder))
        return CheckpointError(
            f"{final}: not saved: {_root_cause(error)}. {free / 2**30:.2f} GiB are free there. "
            f"Newest checkpoint: {safe}. Free some space, or set checkpoint.keep lower or "
            "output to another disk"
        )

    def raise_if_failed(self) -> None:
        """Raise the error of a background save as soon as there is one."""
        if self.enable and self.save_future is not None and self.save_future.done():
            self.maybe_wait_for_saving()

    def _close(self) -> None:
        self.maybe_wait_for_saving()
        super()._close()

    def _find_load_step(self, folder: str = "") -> int:
        return max(saved_steps(folder or self.folder), default=-1)

    def _purge_stale_checkpoints(self) -> None:
        if self._should_purge():
            # A save in flight is not counted: `keep` whole ones stay until it is whole too.
            for step in saved_steps(self.folder)[: -self.keep_latest_k]:
                self._remove(self._create_checkpoint_id(step))

    def _remove(self, path: str) -> None:
        doomed = path + DELETING
        Path(path).rename(doomed)
        shutil.rmtree(doomed)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _root_cause(error: BaseException) -> str:
    """The innermost message; DCP wraps what each rank raised."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"rank {rank}: {_root_cause(inner)}"
    inner = error.__cause__ or error.__context__
    return _root_cause(inner) if inner is not None else f"{type(error).__name__}: {error}"
