"""Losses of the stages that make a linear-attention model of a Transformer.

    transfer      Σ_t |o_t - o*_t|² / Σ_t |o*_t|²               outputs of a layer, o* softmax's
    attention     Σ_t Σ_j a*_tj log(a*_tj / a_tj)               attention weights, a* softmax's
    distillation  Σ_t τ² KL(p*_t ‖ p_t),  p = softmax(z / τ)    logits z, p* the teacher's
    top-k         the same, all but the teacher's k most likely tokens being one

The first is LoLCATs' attention transfer (arXiv 2410.10254, section 3.1) divided by the scale of
what is learned, so that layers weigh alike; the second Hedgehog's cross-entropy of weights
(2402.04347, section 4.2) less its least value, the entropy of a*; the third Hinton's (1503.02531),
summed over tokens: PyTorch's "batchmean" over sequences would multiply it by their length. The
last is at most that, and all of it where k is the vocabulary less one.

Only tokens that count are in the sums. Computed in fp32.

Shapes: B batch, T time, S tokens that are looked at, H heads, D features a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def transfer_loss(
    o_BTHD: Tensor,
    target_BTHD: Tensor,
    counted_BT: Tensor,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the relative squared error of each row's output: (B,).

    A row is a unit of its own, so that the loss of a batch does not depend on how its rows are
    distributed. A row without a token that counts has 0.

    Args:
        o_BTHD: the mixer's output.
        target_BTHD: softmax attention's.
        counted_BT: the tokens that count, bool.
        total: where other ranks have further heads: adds a tensor of each of them.
    """
    weight_BT11 = counted_BT[..., None, None].float()
    target = target_BTHD.float() * weight_BT11
    wrong_B = (o_BTHD.float() * weight_BT11 - target).square().sum((1, 2, 3))
    scale_B = target.square().sum((1, 2, 3))
    if total is not None:
        wrong_B, scale_B = total(torch.stack([wrong_B, scale_B]))
    return wrong_B / scale_B.where(scale_B > 0, 1.0)


def weight_loss(a_BTHS: Tensor, target_BTHS: Tensor, counted_BT: Tensor) -> Tensor:
    """Σ a* log(a* / a) of each row over its tokens, the mean over heads: (B,).

    Args:
        a_BTHS: the mixer's weights, all or some of the S tokens; those below 1e-8 count as that.
        target_BTHS: softmax attention's.
        counted_BT: the tokens that count, bool.
    """
    target = target_BTHS.float()
    log_a = a_BTHS.float().clamp(min=1e-8).log()
    kl_BT = (torch.special.xlogy(target, target) - target * log_a).sum(-1).mean(-1)
    return kl_BT.where(counted_BT, 0.0).sum(1)


def distillation_loss(
    logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0
) -> Tensor:
    """τ² KL(teacher ‖ student), summed over the tokens that have a label: a number.

    Args:
        logits_BTV: the student's.
        teacher_BTV: the teacher's.
        labels_BT: IGNORE_INDEX where a token does not count; nothing else of them matters.
        temperature: τ.
    """
    log_p_BTV = F.log_softmax(logits_BTV.float() / temperature, -1)
    log_q_BTV = F.log_softmax(teacher_BTV.float() / temperature, -1)
    kl_BT = F.kl_div(log_p_BTV, log_q_BTV, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl_BT.where(labels_BT != IGNORE_INDEX, 0.0).sum()


def top_k_distillation_loss(
    logits_BTV: Tensor,
    log_p_BTK: Tensor,
    ids_BTk: Tensor,
    labels_BT: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """`distillation_loss` of k tokens and the rest: a number.

    Args:
        logits_BTV: the student's.
        log_p_BTK: the teacher's log-probabilities at this temperature, K = k + 1: of k tokens, and
            of all others together. They are normalized, as they may have been rounded.
        ids_BTk: those k tokens.
        labels_BT: IGNORE_INDEX where a token does not count; nothing else of them matters.
        temperature: τ.
    """
    z_BTV = logits_BTV.float() / temperature
    others_BT1 = z_BTV.scatter(-1, ids_BTk, -torch.inf).logsumexp(-1, keepdim=True)
    log_q_BTK = F.log_softmax(torch.cat([z_BTV.gather(-1, ids_BTk), others_BT1], -1), -1)
    log_p_BTK = F.log_softmax(log_p_BTK.float(), -1)
    kl_BT = F.kl_div(log_q_BTK, log_p_BTK, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl_BT.where(labels_BT != IGNORE_INDEX, 0.0).sum()
