"""Reverse distillation: the student keeps to what its teacher finds likely.

    Σ_t [τ² KL(student ‖ teacher) + w · -log p(x_{t+1})] / N

Reverse KL punishes tokens that the student likes and the teacher does not, and so seeks a mode of
the teacher where forward KL (`distill`) covers all of them (MiniLLM, arXiv 2306.08543).

Left out: text sampled from the student, which that paper trains on; a logit cache, whose top-k
tokens do not bound what the student puts on all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lowline.train.objectives.teacher import TeacherSection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReverseDistillSection(TeacherSection):
    """[objective] kind = "reverse-distill": the KL divergence of the teacher from the student."""

    kind: Literal["reverse-distill"] = "reverse-distill"
    """What the run minimizes."""
    measure = "reverse_kl"

    def divergence(
        self, logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float
    ) -> Tensor:
        """Return τ² KL(student ‖ teacher), summed over tokens with a label.

        The gradient goes through both places in which the student's distribution stands.
        """
        import torch.nn.functional as F

        from lowline.linearize.losses import IGNORE_INDEX

        log_p_BTV = F.log_softmax(logits_BTV.float() / temperature, -1)
        log_q_BTV = F.log_softmax(teacher_BTV.float() / temperature, -1)
        kl_BT = F.kl_div(log_q_BTV, log_p_BTV, reduction="none", log_target=True).sum(-1)
        return temperature**2 * kl_BT.where(labels_BT != IGNORE_INDEX, 0.0).sum()
