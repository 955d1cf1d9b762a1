"""Checkpoints that are complete or absent: OUTPUT/checkpoint/step-N.

torchtitan's manager (DCP, asynchronous, resharding on load) with three changes. A save writes into
`step-N.saving`; when every rank has finished, the one that writes DCP's metadata adds the run's
config.toml and checksums, and renames the folder. That is part of DCP's own agreement, so a save
has succeeded on all ranks or failed on all. Deletions are renamed first too: a folder called step-N
is complete, whenever the process was killed. A failed save stops the run with what is safe and what
to do. A step is compared with its checksums before it is loaded; `checkpoint.fallback` lets an
older one take the place of a damaged one, which is renamed to step-N.damaged.

A run may start from another's weights: mixers and LoRA's factors that only the run has then begin
as they are initialized, and LoRA's factors of the other are merged into its weights.
A step folder from elsewhere cannot run code (`lowline.train.model.step_folder`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.futures import Future
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from lowline.errors import LowlineError
from lowline.files import OLD, put_in_place, write_text
from lowline.train.config.checksums import damage, digest, log_unsealed, seal
from lowline.train.config.folder import (
    damaged_error,
    is_step_folder,
    newest_intact,
    saved_steps,
)
from lowline.train.engine.errors import RunError
from lowline.train.engine.preflight import INPUTS
from lowline.train.model import step_folder
from lowline.train.model.lora import is_lora, merge_stored_lora
from lowline.train.model.step_folder import root_cause

SAVING, DELETING, DAMAGED = ".saving", ".deleting", ".damaged"

logger = logging.getLogger("lowline")


class CheckpointError(RunError, RuntimeError):
    """A checkpoint could not be written or read; the message says what is safe and what to do."""


class Checkpointer(CheckpointManager):
    """torchtitan's checkpoint manager with complete folders only.

    `wanted`, when set, makes the next `save(step)` take place whatever the schedule says. A step
    that is saved already is not saved again. `check(step)` is called before every save, on every
    rank, and raises where the state is not worth saving.
    """

    check: Callable[[int], None]
    inputs: Mapping[str, str] = {}  # digests of what the run reads, saved beside its weights

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        run_config: str = ""  # the resolved TOML, saved as config.toml in every checkpoint
        fallback: bool = False
        accept: Callable[[Path], object] | None = None
        """Raises ConfigError where an older step that is fallen back to does not fit the run."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.wanted = False
        if not self.enable:
            return
        self._run_config = config.run_config
        self._fallback, self._accept = config.fallback, config.accept
        self._newest = max(saved_steps(self.folder), default=-1)  # saved, or being saved
        if dist.get_rank() == 0 and Path(self.folder).is_dir():
            for path in Path(self.folder).iterdir():
                if path.suffix in (SAVING, DELETING, OLD):  # an earlier process was killed there
                    shutil.rmtree(path)

    def dcp_save(
        self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, **kwargs: Any
    ) -> Any:
        """Save into `checkpoint_id`; a Future in the asynchronous mode, otherwise None."""
        self._newest = int(Path(checkpoint_id).name.removeprefix("step-"))
        writer = _WholeFolderWriter(Path(checkpoint_id), self._run_config, self.inputs)
        try:
            if async_mode == AsyncMode.ASYNC:
                return dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)
            dcp.save(state_dict, storage_writer=writer)
        except (CheckpointException, OSError) as error:
            raise self._failure(error) from error
        return None

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load a checkpoint of this run, or the model of another."""
        if checkpoint_id != self.initial_load_path:
            step_folder.load(state_dict, step_folder.StepReader(checkpoint_id))
            self.states[MODEL].load_state_dict(state_dict)
            return
        ours = {name: weight for name, weight in state_dict.items() if not is_lora(name)}
        assert self.sd_adapter is not None
        self.states[MODEL].load_state_dict(load_initial(ours, checkpoint_id, self.sd_adapter))

    def failed(self) -> bool:
        """Return whether a background save has failed on this rank and nobody has been told."""
        future = self.save_future if self.enable else None
        return future is not None and future.done() and future.exception() is not None

    def raise_failure(self) -> None:
        """Raise the error of the background save, which has failed on this rank or another."""
        self.maybe_wait_for_saving()
        raise self._failure(RuntimeError("another rank could not write its part"))

    def newest_saved(self) -> str:
        """Return the newest complete checkpoint, for messages."""
        steps = saved_steps(self.folder) if self.enable else []
        return str(Path(self.folder) / f"step-{steps[-1]}") if steps else "none"

    def _load(self, step: int = -1) -> bool:
        try:
            return super()._load(step)
        except (CheckpointException, ValueError, OSError) as error:
            source, instead = str(self.initial_load_path), ""
            if self._newest >= 0:
                source = f"step-{self._newest} of {self.folder}"
                if older := [s for s in saved_steps(self.folder) if s < self._newest]:
                    instead = f". Remove it to resume from the next older one, step-{older[-1]}"
            raise CheckpointError(
                f"checkpoint {source} could not be loaded: {root_cause(error)}{instead}"
            ) from error

    def _wait_for_saving(self) -> None:
        try:
            super()._wait_for_saving()
        except (CheckpointException, OSError) as error:
            self.save_future = None
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> CheckpointError:
        free = shutil.disk_usage(_existing(Path(self.folder))).free
        if dist.get_rank() == 0:  # make room for what can still be done
            shutil.rmtree(self._create_checkpoint_id(self._newest) + SAVING, ignore_errors=True)
        newest = self.newest_saved()
        return CheckpointError(
            f"checkpoint {self._create_checkpoint_id(self._newest)} could not be saved: "
            f"{root_cause(error)}. {free / 2**20:,.1f} MiB were free there. Newest complete "
            f"checkpoint: {newest}. Free some space and give the same command again, which "
            f"{'starts from step 1' if newest == 'none' else 'resumes from it'}; or set a smaller "
            "checkpoint.keep, or put output on another disk"
        )

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self._should_save(curr_step, last_step):
            self.check(curr_step)
        return super()._save(curr_step, last_step)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        due = self.wanted or super()._should_save(curr_step, last_step)
        return due and curr_step != self._newest

    def _find_load_step(self, folder: str = "") -> int:
        try:
            found, damaged = newest_intact(
                Path(self.folder),
                lambda step: shared_damage(step) or step_folder.unreadable(step),
                fallback=self._fallback,
            )
        except LowlineError as error:
            raise CheckpointError(str(error)) from None
        if found is None:
            return -1
        if damaged:
            if self._accept is not None:
                self._accept(found)
            self._set_aside(damaged)
            self._newest = int(found.name.removeprefix("step-"))
        if dist.get_rank() == 0:
            log_unsealed(found)
        return int(found.name.removeprefix("step-"))

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged folders, so that nothing takes them for checkpoints any more."""
        dist.barrier()  # every rank has looked at them
        for path in damaged if dist.get_rank() == 0 else ():
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s is damaged; it is now %s", path, aside.name)
        dist.barrier()

    def _purge_stale_checkpoints(self) -> None:
        if self._should_purge():
            # A save in flight is not counted: `keep` complete ones stay until it is complete too.
            for step in saved_steps(self.folder)[: -self.keep_latest_k]:
                _remove(Path(self._create_checkpoint_id(step)))

    def _close(self) -> None:
        self.maybe_wait_for_saving()
        self._purge_stale_checkpoints()
        super()._close()

    def __del__(self) -> None:
        """Do nothing: `close` is called where its errors are heard."""


def load_initial(
    weights: dict[str, Any], path: str | Path, adapter: StateDictAdapter, *, no_dist: bool = False
) -> dict[str, Any]:
    """Read a model's weights, or some of them, into tensors of their shapes, and return them.

    Args:
        weights: by the training body's names; mixers that are not stored stay as they are.
        path: a run's step folder, whose adapters are merged, or a Hugging Face directory.
        adapter: knows the names of the latter.
        no_dist: only this process of its group calls.

    Raises:
        ValueError: a weight is not there.
    """
    path = str(path)
    if is_step_folder(Path(path)):
        wrong = damage(Path(path)) if no_dist else shared_damage(Path(path))
        if wrong is not None:
            raise damaged_error(Path(path), wrong)
        if no_dist or dist.get_rank() == 0:
            log_unsealed(Path(path))
        reader = step_folder.StepReader(path)
        stored = reader.read_metadata().state_dict_metadata
        step_folder.load(_present(weights, stored, path), reader, no_dist=no_dist)
        merge_stored_lora(weights, Path(path))
        return weights
    reader = adapter.get_hf_storage_reader(path)
    stored = reader.read_metadata().state_dict_metadata
    found = _present(adapter.to_hf(weights), stored, path)
    dcp.load(found, storage_reader=reader, no_dist=no_dist)
    return weights | adapter.from_hf(found)


def save_weights(
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], torch.Tensor],
    folder: Path,
    run_config: str,
) -> None:
    """Write weights as the step folder of a run that ended with them; one process, all or nothing.

    Args:
        kinds: shape and dtype of each weight, by name.
        read: returns one; each is read when it is written and not held after.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    shutil.rmtree(folder.with_name(folder.name + SAVING), ignore_errors=True)
    try:
        dcp.save(
            {n: torch.empty(shape, dtype=d, device="meta") for n, (shape, d) in kinds.items()},
            storage_writer=_WholeFolderWriter(folder, run_config, a_file_each=True),
            planner=_ReadingPlanner(read),
            no_dist=True,
        )
    except CheckpointException as error:
        raise OSError(f"{folder} could not be written: {root_cause(error)}") from error


class _ReadingPlanner(DefaultSavePlanner):
    """DCP's plan of what is saved, made of shapes alone; values are read as they are written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._read(index.fqn)


class _WholeFolderWriter(FileSystemWriter):
    """DCP's writer, which gives the folder its name when all ranks have written into it.

    Args:
        final: the folder.
        run_config: the text of its config.toml.
        inputs: what its inputs.json says; without, it has none.
        a_file_each: write a file for each tensor; DCP holds all tensors of a file until its end.
    """

    def __init__(
        self,
        final: Path,
        run_config: str,
        inputs: Mapping[str, str] | None = None,
        *,
        a_file_each: bool = False,
    ) -> None:
        temporary = final.with_name(final.name + SAVING)
        super().__init__(temporary, single_file_per_rank=not a_file_each)
        self._final, self._run_config, self._inputs = final, run_config, inputs

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Return, as a future, what DCP does and the digests of the files that this rank wrote."""
        try:
            results = super().write_data(plan, planner).value()
            names = {result.storage_data.relative_path for result in results}
            done: Future = Future()
            done.set_result((results, {name: digest(Path(self.path) / name) for name in names}))
            return done
        except Exception as error:
            # DCP sends an error to the other ranks without its causes: send the first of them.
            while (earlier := error.__cause__ or error.__context__) is not None:
                error = earlier  # type: ignore[assignment]
            raise error from None

    def finish(self, metadata: Any, results: Any) -> None:
        """Call `write` on one rank; what it raises is raised on all."""
        super().finish(metadata, [written for written, _ in results])
        temporary = Path(self.path)
        write_text(temporary / "config.toml", self._run_config)
        if self._inputs:
            write_text(temporary / INPUTS, json.dumps(dict(self._inputs), indent=1) + "\n")
        seal(temporary, {name: one for _, digests in results for name, one in digests.items()})
        put_in_place(temporary, self._final)


def shared_damage(folder: Path) -> str | None:
    """Return what `damage` does to all ranks alike; each hashes its share of the files."""
    parts = dist.get_world_size() if dist.is_initialized() else 1
    if parts == 1:
        return damage(folder)
    found: list[str | None] = [None] * parts
    dist.all_gather_object(found, damage(folder, part=dist.get_rank(), parts=parts))
    return next((one for one in found if one is not None), None)


def _present(wanted: dict[str, Any], stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what of a model is stored; only mixers, which the run may have added, can be
    missing.
    """
    if lacking := [n for n in wanted if n not in stored and ".mixer." not in n]:
        raise LowlineError(f"{where} lacks {', '.join(lacking[:5])}")
    return {name: weight for name, weight in wanted.items() if name in stored}


def _remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + DELETING)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left goes at the next start


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
