"""Attention transfer: every mixer towards softmax attention of the same weights.

    Σ_rows n_row/N · mean over layers of |o - o*|² / |o*|²        (LoLCATs, stage 1)
    and of w · the divergence of attention weights                (Hedgehog)

with n_row the labels of a row (`lowline.linearize.losses` has the formulas). o* is softmax
attention of the run's own weights and enters the next layer; only the mixers have a backward
pass, and the output projection is left out. A block's run sums its layers' parts of the mean over
all layers, so that losses and gradients of all blocks make up those of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lowline.train.config.fields import NonNegativeNumber
from lowline.train.config.objective import ObjectiveSection
from lowline.train.objectives.next_token import Batch, Objective

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from torchtitan.components.loss import BaseLoss
    from torchtitan.trainer import Trainer

    from lowline.train.config.run import RunConfig

SHORT = 1024  # tokens of a sequence whose attention weights may be written out


@dataclass(frozen=True, kw_only=True)
class TransferSection(ObjectiveSection):
    """[objective] kind = "transfer": each mixer's output towards softmax attention's."""

    kind: Literal["transfer"] = "transfer"
    """What the run minimizes."""
    attention_weight: NonNegativeNumber = 0.0
    """How much the divergence of attention weights counts beside outputs; for short sequences."""
    mixers_only = True
    blockwise = True
    logit_tensors = 0  # there is no head

    def __post_init__(self) -> None:
        if self.trainable not in (None, "mixers"):
            raise ValueError(
                f'trainable = "{self.trainable}" with kind = "transfer", in which nothing but '
                "mixers can train; leave it out"
            )

    def check(self, run: RunConfig) -> None:
        """Raise ValueError where another key of the run does not fit a transfer."""
        if not run.mixer_layers():
            raise ValueError(
                'objective.kind = "transfer" without a mixer in any layer; set [mixer] name '
                "and layers"
            )
        if run.activation_checkpoint != "none":
            raise ValueError(
                f'activation_checkpoint = "{run.activation_checkpoint}" with objective.kind = '
                '"transfer", in which no block has a backward pass; set it to "none"'
            )
        if self.attention_weight and not run.mixer_options().is_average:
            assert run.mixer is not None
            raise ValueError(
                f"objective.attention_weight = {self.attention_weight} with mixer "
                f"{run.mixer.name!r}, whose output is not an average of values: it has no "
                "attention weights; set it to 0"
            )
        if self.attention_weight and run.parallelism.tensor_parallel > 1:
            raise ValueError(
                f"objective.attention_weight = {self.attention_weight} with "
                f"parallelism.tensor_parallel = {run.parallelism.tensor_parallel}: attention "
                "weights are compared on one rank; set the former to 0 or the latter to 1"
            )
        if self.attention_weight and run.training.seq_len > SHORT:
            raise ValueError(
                f"objective.attention_weight = {self.attention_weight} with "
                f"training.seq_len = {run.training.seq_len}: weights are as many as the "
                f"sequence's length squared, so at most {SHORT}; set either lower"
            )

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        return TransferObjective(
            trainer.loss_fn,
            sorted(run.mixer_layers()),
            self.attention_weight,
            of=len(run.mixer_layers(whole=True)),
        )


class TransferObjective(Objective):
    """Every mixer towards softmax attention of the same weights.

    Args:
        layers: the K that have a mixer.
        attention_weight: w.
        of: over how many layers the mean is; default: K.
    """

    def __init__(
        self,
        loss_fn: BaseLoss,
        layers: list[int],
        attention_weight: float = 0.0,
        of: int | None = None,
    ) -> None:
        super().__init__(loss_fn)
        self.layers, self.attention_weight = layers, attention_weight
        self.of = of or len(layers)
        self._of_step: torch.Tensor | float = 0.0

    def begin_step(self, step: int) -> None:
        self._of_step = 0.0

    def loss(self, model: nn.Module, batch: Batch, valid_tokens: torch.Tensor) -> torch.Tensor:
        """See `Objective.loss`."""
        loss_K = self._summed(model, batch, learns=True) / valid_tokens
        self._of_step = self._of_step + loss_K.detach()
        return loss_K.sum() / self.of

    def held_out(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """See `Objective.held_out`."""
        loss_K = self._summed(model, batch, learns=False)
        student = super().held_out(model, batch)
        return student | {"transfer_loss": loss_K.sum() / self.of}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return each layer's loss."""
        assert not isinstance(self._of_step, float)
        losses = zip(self.layers, self._of_step, strict=True)
        return {f"transfer/layer_{layer}": loss for layer, loss in losses}

    def _summed(self, model: nn.Module, batch: Batch, *, learns: bool) -> torch.Tensor:
        """Return Σ_rows n_row · the row's loss, of each of K converted layers."""
        import torch
        from torchtitan.components.loss import IGNORE_INDEX

        from lowline.linearize.titan import Transfer

        counted_BL = batch.labels != IGNORE_INDEX
        transfer = Transfer(counted_BL, learns, self.attention_weight)
        with torch.no_grad():
            model(batch.inputs, **batch.extra, transfer=transfer)
        return torch.stack(transfer.losses) @ counted_BL.sum(1).float()
