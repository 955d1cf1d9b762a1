"""Direct preference optimization: better answers become likelier than worse ones.

    L = -(1 - ε) log σ(β h) - ε log σ(-β h),
    h = [log π(y⁺|x) - log π₀(y⁺|x)] - [log π(y⁻|x) - log π₀(y⁻|x)],

the mean over pairs (Rafailov et al., arXiv 2305.18290, eq. 7; ε of conservative DPO). log π is the
sum over the last answer's tokens, its end included. The reference π₀ is the model that the run
begins with, or `teacher`. Its sums are computed before the first step for all pairs of the run
and kept in OUTPUT/reference, so that no second model is held while training.

Left out: IPO and other losses of the margin.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lowline.errors import LowlineError
from lowline.train.config.fields import DATA, PositiveNumber
from lowline.train.config.objective import ObjectiveSection
from lowline.train.objectives.next_token import Batch, Objective
from lowline.train.objectives.teacher import build_teacher, check_teacher, logit_chunks

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
    from torchtitan.trainer import Trainer

    from lowline.train.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class DpoSection(ObjectiveSection):
    """[objective] kind = "dpo": direct preference optimization on pairs of answers."""

    kind: Literal["dpo"] = "dpo"
    """What the run minimizes."""
    teacher: Annotated[str | None, DATA] = None  # type: ignore[misc]
    """The Hugging Face directory of the reference; the model that the run begins with, without."""
    beta: PositiveNumber = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The fraction of pairs that are taken to be the wrong way round."""
    pairs = True
    logit_tensors = 6

    def check_files(self, run: RunConfig) -> None:
        """Raise ConfigError or ValueError where the reference is not of the run's tokens."""
        if self.teacher is not None:
            check_teacher(run)

    def logit_chunks(self, run: RunConfig, rows: int) -> int:
        """See `ObjectiveSection.logit_chunks`."""
        return logit_chunks(run, rows)

    def loss_config(self, run: RunConfig, rows: int) -> BaseLoss.Config:
        """Return torchtitan's configuration of a weighted sum of log-probabilities."""
        from torchtitan.components.loss import ChunkedLossWrapper

        from lowline.train.objectives.losses import WeightedLogProbability

        loss = WeightedLogProbability.Config()
        return ChunkedLossWrapper.Config(num_chunks=self.logit_chunks(run, rows), loss_fn=loss)

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        import torch.distributed as dist

        reference = Reference(
            Path(run.output) / "reference",
            source=self.teacher or run.checkpoint.initial_weights,
            rank=dist.get_rank(),
        )
        return DpoObjective(trainer.loss_fn, self, reference)


class DpoObjective(Objective):
    """The loss above.

    Args:
        section: β, ε and the reference's directory.
        reference: the reference's sums.
    """

    def __init__(
        self, loss_fn: ChunkedLossWrapper, section: DpoSection, reference: Reference
    ) -> None:
        super().__init__(loss_fn)
        self.section, self.reference = section, reference
        self._numbers: dict[str, Tensor] = {}
        self._teacher: nn.Module | None = None  # while the reference's sums are computed

    def begin(self, trainer: Any) -> None:
        """Compute the reference's sums of all pairs that are not known yet, held-out ones too."""
        if trainer.step and self.section.teacher is None:
            return  # the model is not the reference any more
        import torch

        model = trainer.model_parts[0]
        run, loader = trainer.config.run, trainer.dataloader
        teacher = model if self.section.teacher is None else build_teacher(run, trainer)
        self._teacher = teacher.eval()
        place, batches = loader.state_dict(), run.training.steps * trainer._batches_per_step
        if not trainer.step:
            trainer.metrics_processor.say("log-probabilities of the reference are computed")
        with torch.no_grad():
            for inputs, labels in islice(loader, batches):
                if run.data.epochs is not None and trainer._all_exhausted():
                    break
                ids, labels, extra = trainer.post_dataloading_process(
                    {name: tensor.to(trainer.device) for name, tensor in inputs.items()},
                    labels.to(trainer.device),
                )
                with trainer.train_context():
                    self._of_reference(Answers(ids, labels, extra["positions"]), ids, extra)
            loader.load_state_dict(place)
            if run.evaluation.enable:  # not to be stopped half-way: what is missing stays so
                watch, trainer.validator.watch = trainer.validator.watch, None
                trainer.validator.means(trainer.model_parts)
                trainer.validator.watch = watch
        self._teacher = None
        model.train()

    def begin_step(self, step: int) -> None:
        self._numbers = {}

    def loss(self, model: nn.Module, batch: Batch, valid_tokens: Tensor) -> Tensor:
        """See `Objective.loss`; a pair has two labels."""
        import torch

        inputs_BL, labels_BL, extra = batch
        answers = Answers(inputs_BL, labels_BL, extra["positions"])
        reference_A = self._of_reference(answers, inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        with torch.no_grad():
            sums_A = answers.sums(self._log_p(hidden_BLD, answers.labels_BL))
        sums_A.requires_grad_()
        with torch.enable_grad():
            found = self._of_pairs(sums_A, reference_A)
            loss = 2 * found["loss"] / valid_tokens
            (weight_A,) = torch.autograd.grad(loss, sums_A)
        for name, number in found.items():
            if name != "loss":
                number = 2 * number.detach() / valid_tokens
                self._numbers[name] = self._numbers.get(name, 0.0) + number
        # Linear in log-probabilities, and so added up in chunks; its gradient is the loss's.
        same, _ = self.loss_fn(hidden_BLD, answers.labels_BL, weight=answers.spread(weight_A))
        return same + (loss - same).detach()

    def held_out(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Objective.held_out`; "loss" is this objective's."""
        inputs_BL, labels_BL, extra = batch
        answers = Answers(inputs_BL, labels_BL, extra["positions"])
        reference_A = self._of_reference(answers, inputs_BL, extra)
        if self._teacher is not None:  # only its sums are wanted
            return {"loss": reference_A.sum()}
        sums_A = answers.sums(self._log_p(model(inputs_BL, **extra), answers.labels_BL))
        return {name: 2 * number for name, number in self._of_pairs(sums_A, reference_A).items()}

    def numbers(self) -> dict[str, Tensor]:
        """Return rewards β(log π - log π₀), their margin and how often it is above 0: means."""
        return {f"dpo/{name}": number for name, number in self._numbers.items()}

    def _of_pairs(self, sums_A: Tensor, reference_A: Tensor) -> dict[str, Tensor]:
        """Return sums over pairs, whose answers follow each other, the better one first."""
        import torch.nn.functional as F

        beta, smoothing = self.section.beta, self.section.label_smoothing
        chosen_P, rejected_P = (beta * (sums_A - reference_A)).view(-1, 2).unbind(1)
        margin_P = chosen_P - rejected_P
        losses_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
        return {
            "loss": losses_P.sum(),
            "margin": margin_P.sum(),
            "accuracy": (margin_P > 0).float().sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
        }

    def _log_p(self, hidden_BLD: Tensor, labels_BL: Tensor) -> Tensor:
        """Return log π of each label, 0 where there is none; logits exist for a chunk at a time."""
        import torch

        from lowline.train.objectives.losses import full_logits, log_probabilities

        wrapper: Any = self.loss_fn
        chunks = wrapper.num_chunks
        pieces = zip(hidden_BLD.chunk(chunks, 1), labels_BL.chunk(chunks, 1), strict=True)
        log_p = [log_probabilities(full_logits(wrapper.lm_head(h)), ids) for h, ids in pieces]
        return torch.cat(log_p, 1)

    def _of_reference(self, answers: Answers, inputs_BL: Tensor, extra: dict[str, Any]) -> Tensor:
        """Return the reference's sum of each answer; compute what is missing.

        Raises:
            LowlineError: sums are missing once training has begun.
        """
        import torch
        import torch.distributed as dist

        keys = answers.keys(inputs_BL)
        missing = torch.tensor(float(not self.reference.has(keys)), device=inputs_BL.device)
        if self._teacher is None and missing:
            raise LowlineError(
                f"{self.reference.folder} lacks log-probabilities of the reference, which were "
                "computed before the first step: training.steps, the data or the number of nodes "
                "changed since. Restore them, or begin a new run (another output)"
            )
        if self._teacher is not None:
            if dist.get_world_size() > 1:  # the parameters may lie on all ranks
                dist.all_reduce(missing)
            if missing:
                hidden_BLD = self._teacher(inputs_BL, **extra)
                head, wrapper = self._teacher.lm_head, self.loss_fn
                mine, wrapper.lm_head = wrapper.lm_head, head
                self.reference.add(keys, answers.sums(self._log_p(hidden_BLD, answers.labels_BL)))
                wrapper.lm_head = mine
        return inputs_BL.new_tensor(self.reference.get(keys), dtype=torch.float32)


class Answers:
    """The answers in a batch of packed pairs, row by row.

    Args:
        labels_BL: a label where an answer begins (`lowline.train.data.packing`).
    """

    def __init__(self, inputs_BL: Tensor, labels_BL: Tensor, positions_BL: Tensor) -> None:
        from torchtitan.components.loss import IGNORE_INDEX

        self.document_BL = (positions_BL == 0).cumsum(1)  # from 1 on
        begun_BL = (labels_BL != IGNORE_INDEX).cumsum(1)  # answers so far
        answers_BL = begun_BL == self.document_BL  # in a document's answer; none in padding
        ends_BL = positions_BL.roll(-1, 1) == 0
        ends_BL[:, -1] = True
        self.labels_BL = inputs_BL.roll(-1, 1).where(answers_BL & ~ends_BL, IGNORE_INDEX)
        self.of_row_B = begun_BL[:, -1].tolist()

    def sums(self, log_p_BL: Tensor) -> Tensor:
        """Return the sum over each answer's tokens."""
        import torch

        sums_BL = torch.zeros_like(log_p_BL).scatter_add_(1, self.document_BL - 1, log_p_BL)
        return torch.cat([row[:n] for row, n in zip(sums_BL, self.of_row_B, strict=True)])

    def spread(self, of_answers_A: Tensor) -> Tensor:
        """Return each answer's number at each of its document's tokens."""
        import torch

        numbers_BL = torch.zeros(self.document_BL.shape, device=of_answers_A.device)
        for row, part in zip(numbers_BL, of_answers_A.split(self.of_row_B), strict=True):
            row[: len(part)] = part
        return numbers_BL.gather(1, self.document_BL - 1)

    def keys(self, inputs_BL: Tensor) -> list[str]:
        """Return a digest of each answer with what comes before it."""
        keys = []
        for ids, labels, documents, n in zip(
            inputs_BL.cpu(),
            self.labels_BL.cpu(),
            self.document_BL.cpu(),
            self.of_row_B,
            strict=True,
        ):
            for document in range(1, n + 1):
                mine = documents == document
                digest = hashlib.sha256(ids[mine].numpy().tobytes())
                digest.update(labels[mine].numpy().tobytes())
                keys.append(digest.hexdigest()[:32])
        return keys


class Reference:
    """Sums of a reference on disk, a line for each answer; each rank adds to a file of its own.

    Args:
        folder: made if it is not there.
        source: the reference's weights; None for those that the run is initialized with.
        rank: of this process.

    Raises:
        LowlineError: the folder is another reference's.
    """

    def __init__(self, folder: Path, *, source: str | None, rank: int) -> None:
        from lowline.files import write_text
        from lowline.fingerprint import fingerprint

        self.folder, self._file = folder, folder / f"rank-{rank}.txt"
        self._known: dict[str, float] = {}
        digest = None if source is None else fingerprint(Path(source))
        manifest = folder / "manifest.json"
        mine = json.dumps({"reference": digest}) + "\n"
        if not manifest.is_file():
            write_text(manifest, mine)
        elif manifest.read_text() != mine:
            raise LowlineError(
                f"{folder} holds log-probabilities of another reference than {source}; remove it, "
                "or give another output"
            )
        for path in folder.glob("rank-*.txt"):
            text = path.read_text()
            lines = text.splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # a kill has cut it short
                text = "".join(lines[:-1])
                if path == self._file:
                    write_text(path, text)
            self._known.update((line[:32], float(line[33:])) for line in text.splitlines())

    def has(self, keys: list[str]) -> bool:
        return all(key in self._known for key in keys)

    def get(self, keys: list[str]) -> list[float]:
        return [self._known[key] for key in keys]

    def add(self, keys: list[str], sums_A: Tensor) -> None:
        """Note the sums of answers that are not there yet."""
        pairs = zip(keys, sums_A.tolist(), strict=True)
        new = {key: number for key, number in pairs if key not in self._known}
        with self._file.open("a") as file:
            file.writelines(f"{key} {number!r}\n" for key, number in new.items())
        self._known |= new
