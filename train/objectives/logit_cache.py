"""A teacher's top-k tokens on disk, from which a model learns again without the teacher.

Of every token the log-probabilities of the k most likely next ones are kept, and that of all others
together: 6k + 2 bytes. A file is a row of a batch, named after its tokens and their positions, so
that order, batch size and the number of ranks are free. Losses are always of what the file holds: a
run that writes it has the same as one that finds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowline.errors import LowlineError
from lowline.files import write_tensors, write_text
from lowline.fingerprint import OLD_LENGTH, fingerprint, sha256
from lowline.train.config.run import RunConfig
from lowline.train.objectives.distill import DistillSection
from lowline.train.objectives.losses import full_logits

TopK = tuple[Tensor, Tensor]
"""Log-probabilities (B, T, k + 1) in fp16, the last of all other tokens, and k ids (B, T, k)."""


class LogitCache:
    """Files of one teacher, k and temperature in a folder.

    Args:
        folder: made if it is not there.
        teacher: the teacher's directory.

    Raises:
        ValueError: the folder is another teacher's, k's or temperature's, or damaged.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, teacher: Path, k: int, temperature: float) -> None:
        self.folder, self.k, self.temperature = folder, k, temperature
        mine = {"teacher": fingerprint(teacher), "top_k": k, "temperature": temperature}
        mine["config"] = sha256(teacher / "config.json")
        manifest = folder / "manifest.json"
        if manifest.is_file():
            try:
                held = json.loads(manifest.read_text())
            except ValueError as error:
                raise LowlineError(f"{manifest} is damaged ({error}); remove {folder}") from None
            if isinstance(held, dict) and len(str(held.get("teacher"))) == OLD_LENGTH:
                old = held | {"teacher": mine["teacher"], "config": mine["config"]}
                if old == mine and held["teacher"] == fingerprint(teacher, like=held["teacher"]):
                    held = mine
                    write_text(manifest, json.dumps(mine, indent=1) + "\n")
            if held != mine:
                raise LowlineError(
                    f"objective.logit_cache = {str(folder)!r} was written with {held}, this run "
                    f"has {mine}; choose another folder, or remove this one"
                )
        else:
            write_text(manifest, json.dumps(mine, indent=1) + "\n")

    def read(self, ids_BT: Tensor, positions_BT: Tensor | None) -> TopK | None:
        """Return what is kept of a batch; None unless all of its rows are there.

        Raises:
            ValueError: a file is not what was written.
        """
        paths = self._paths(ids_BT, positions_BT)
        if not all(path.is_file() for path in paths):
            return None
        log_p, ids = zip(*map(self._read, paths), strict=True)
        return torch.stack(log_p).to(ids_BT.device), torch.stack(ids).to(ids_BT.device)

    def write(self, ids_BT: Tensor, positions_BT: Tensor | None, top_k: TopK) -> None:
        """Keep what `top_k_of` found, a file for each row.

        Raises:
            OSError: the disk is full or cannot be written; nothing is left half-written.
        """
        log_p, ids = (x.cpu() for x in top_k)
        for row, path in enumerate(self._paths(ids_BT, positions_BT)):
            tensors = {"log_p": log_p[row].clone(), "ids": ids[row].int()}
            write_tensors(path, tensors, metadata={"sha256": _digest(*tensors.values())})

    def _paths(self, ids_BT: Tensor, positions_BT: Tensor | None) -> list[Path]:
        seen = ids_BT[:, None] if positions_BT is None else torch.stack([ids_BT, positions_BT], 1)
        names = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in seen.long().cpu()]
        return [self.folder / name[:2] / f"{name[2:32]}.safetensors" for name in names]

    def _read(self, path: Path) -> TopK:
        try:
            with safe_open(path, framework="pt") as file:
                log_p, ids = file.get_tensor("log_p"), file.get_tensor("ids")
                whole = file.metadata()["sha256"] == _digest(log_p, ids)
        except (SafetensorError, KeyError, TypeError) as error:
            raise LowlineError(f"{path} is damaged ({error}); remove it") from None
        if not whole:
            raise LowlineError(f"{path} has another SHA-256 than when it was written; remove it")
        return log_p, ids.long()


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def top_k_of(
    hidden_BTD: Tensor, head: Callable[[Tensor], Tensor], k: int, temperature: float, chunks: int
) -> TopK:
    """Return the teacher's top-k tokens; logits exist for T/chunks tokens of each row at a time.

    Args:
        hidden_BTD: its last hidden states.
        head: makes logits of them.
    """
    log_p, ids = [], []
    for chunk_BCD in hidden_BTD.chunk(chunks, 1):
        logits = full_logits(head(chunk_BCD)).float() / temperature
        values, best = logits.topk(k, -1)
        others = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        log_p.append(F.log_softmax(torch.cat([values, others], -1), -1).half())
        ids.append(best)
    return torch.cat(log_p, 1), torch.cat(ids, 1)


def check_cache(run: RunConfig) -> None:
    """Raise ValueError or OSError where a run's logits cannot be kept, or are of another teacher.

    Raises:
        ValueError: also where the disk is too small for them; both numbers and the fix.
    """
    o = run.objective
    assert isinstance(o, DistillSection)
    assert o.logit_cache is not None and o.teacher is not None
    folder = Path(o.logit_cache)
    LogitCache(folder, Path(o.teacher), o.top_k, o.temperature)
    held = sum(path.stat().st_size for path in folder.glob("??/*.safetensors"))
    missing, free = max(0, o.disk_bytes(run) - held), shutil.disk_usage(folder).free
    if missing > free:
        raise LowlineError(
            f"objective.logit_cache = {str(folder)!r}: the logits take up to {missing / 1e9:,.3f} "
            f"GB more, {free / 1e9:,.3f} GB are free; set a smaller objective.top_k or "
            "evaluation.max_tokens, fewer training.steps, or a folder on a larger disk"
        )
