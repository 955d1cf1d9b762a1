"""Distillation: the student's logits towards a teacher's.

    Σ_t [τ² KL(teacher ‖ student) + w · -log p(x_{t+1})] / N

With a logit cache the teacher's top-k tokens are kept on disk (`logit_cache`), and the teacher is
built once a batch's logits are not found there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lowline.train.config.fields import NOTHING, Positive
from lowline.train.config.tables import ConfigError
from lowline.train.objectives.next_token import Objective
from lowline.train.objectives.teacher import TeacherObjective, TeacherSection, build_teacher

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.trainer import Trainer

    from lowline.train.config.run import RunConfig
    from lowline.train.objectives.logit_cache import LogitCache


@dataclass(frozen=True, kw_only=True)
class DistillSection(TeacherSection):
    """[objective] kind = "distill": the KL divergence of the student from a teacher."""

    kind: Literal["distill"] = "distill"
    """What the run minimizes."""
    logit_cache: Annotated[str | None, NOTHING] = None
    """A folder that keeps the teacher's top_k logits of each token; the full vocabulary, computed
    by the teacher in every step, without."""
    top_k: Positive = 256
    """The most probable tokens that the cache keeps of each position; all others count as one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        default = {f.name: f.default for f in fields(self)}["top_k"]
        if self.logit_cache is None and self.top_k != default:
            raise ValueError(f"top_k = {self.top_k} without a logit_cache; name its folder")

    def divergence(
        self, logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float
    ) -> Tensor:
        """Return τ² KL(teacher ‖ student), summed over tokens with a label."""
        from lowline.linearize.losses import distillation_loss

        return distillation_loss(logits_BTV, teacher_BTV, labels_BT, temperature)

    def check_files(self, run: RunConfig) -> None:
        """Raise ConfigError, ValueError or OSError where teacher or cache cannot be used."""
        super().check_files(run)
        if self.logit_cache is None:
            return
        from lowline.train.objectives.logit_cache import check_cache

        if self.top_k >= run.model.vocab_size:
            raise ConfigError(
                f"objective.top_k = {self.top_k} of a vocabulary of {run.model.vocab_size}; set it "
                "below, or leave out logit_cache"
            )
        check_cache(run)

    def disk_bytes(self, run: RunConfig) -> int:
        """Return what the kept logits take at most, held-out ones included, but for headers."""
        if self.logit_cache is None:
            return 0
        tokens = run.training.steps * run.training.global_batch_size * run.training.seq_len
        if run.evaluation.enable:
            tokens += run.evaluation.max_tokens
        return tokens * (6 * self.top_k + 2)

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        if self.logit_cache is None:
            return super().build(run, trainer)
        from lowline.train.objectives.logit_cache import LogitCache

        folder, teacher = Path(self.logit_cache), Path(str(self.teacher))
        return CachedObjective(
            trainer.loss_fn,
            partial(build_teacher, run, trainer),
            LogitCache(folder, teacher, self.top_k, self.temperature),
        )


class CachedObjective(TeacherObjective):
    """The logits towards a teacher's top-k tokens, which are kept on disk.

    Args:
        build: makes the teacher, on all ranks at once, when a batch's logits are not found.
        cache: where they are kept.
    """

    def __init__(
        self, loss_fn: ChunkedLossWrapper, build: Callable[[], nn.Module], cache: LogitCache
    ) -> None:
        super().__init__(loss_fn, build)
        self.cache = cache

    def _wanted(self, inputs_BL: Tensor, extra: dict[str, Any]) -> dict[str, Tensor]:
        import torch
        import torch.distributed as dist

        from lowline.train.objectives.logit_cache import top_k_of

        cache, positions_BL = self.cache, extra.get("positions")
        found = cache.read(inputs_BL, positions_BL)
        missing = torch.tensor(float(found is None), device=inputs_BL.device)
        if dist.get_world_size() > 1:  # the teacher's parameters may lie on all ranks
            dist.all_reduce(missing)
        if missing:
            with torch.no_grad():
                hidden_BLD = self.teacher(inputs_BL, **extra)
            new = top_k_of(
                hidden_BLD,
                self.teacher.lm_head,  # type: ignore[arg-type]
                cache.k,
                cache.temperature,
                self.loss_fn.num_chunks,  # type: ignore[attr-defined]
            )
            if found is None:
                cache.write(inputs_BL, positions_BL, new)
                found = new
        assert found is not None
        return dict(zip(("log_p", "ids"), found, strict=True))
