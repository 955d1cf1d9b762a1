"""LoRA-Muon (arXiv 2606.12921): steepest descent of the product W = B·A in the spectral norm.

With momenta M_A, M_B, learning rate η, weight decay λ, and msign(UΣVᵀ) = UVᵀ,

    ΔB = -η/2 · msign(M_B S_A^(-1/2)) S_A^(-1/2),       S_A = A·Aᵀ
    ΔA = -η/2 · S_B^(-1/2) msign(S_B^(-1/2) M_A),       S_B = Bᵀ·B
    A <- s·A + ΔA/s,   B <- s·B + ΔB/s,                 s = sqrt(1 - λη)

so that ΔB·A and B·ΔA have spectral norm η/2 each, whatever the rank and the scales of A and B, and
W decays as a dense matrix would. η is the learning rate times sqrt(max(1, out/in)), as Muon's for a
dense matrix; with that it is meant to transfer across rank and width.

A Cholesky factor L·Lᵀ = S stands for the root: L⁻¹ is S^(-1/2) but for a rotation, which cancels,
msign(M L⁻ᵀ) L⁻¹ = msign(M S^(-1/2)) S^(-1/2). S gets 1e-4 of its mean eigenvalue added.

σ between A and B is passed over: W is what the layer would be without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

DAMPING = 1e-4


class LoRAMuon(torch.optim.Muon):
    """LoRA-Muon for factors named `....A.weight` and `....B.weight`, which may be sharded.

    Momenta are kept in shards. Each step gathers one pair of factors and momenta at a time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every pair of factors."""
        assert closure is None
        for group in self.param_groups:
            named = dict(zip(group["param_names"], group["params"], strict=True))
            for name, A in named.items():
                if name.endswith(".A.weight"):
                    self._update(A, named[name.removesuffix("A.weight") + "B.weight"], group)

    def _update(self, A: torch.Tensor, B: torch.Tensor, group: dict[str, Any]) -> None:
        momenta = [self._momentum(factor, group["momentum"]) for factor in (A, B)]
        A_RI, B_OR, M_A, M_B = (_gathered(t) for t in (A, B, *momenta))
        out_features, in_features = B_OR.shape[0], A_RI.shape[1]
        rate, decay = group["lr"], math.sqrt(1 - group["lr"] * group["weight_decay"])
        half = rate * spectral_scale(out_features, in_features) / 2 / decay
        L_A, L_B = _root(A_RI @ A_RI.T), _root(B_OR.T @ B_OR)
        for factor, step in (
            (A, _whitened(M_A.T, L_B, group).T),
            (B, _whitened(M_B, L_A, group)),
        ):
            if isinstance(factor, DTensor):
                mesh, placements = factor.device_mesh, factor.placements
                step = distribute_tensor(step.contiguous(), mesh, placements, src_data_rank=None)
            factor.mul_(decay).add_(step, alpha=-half)

    def _momentum(self, factor: torch.Tensor, momentum: float) -> torch.Tensor:
        assert factor.grad is not None
        state = self.state[factor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(factor.grad)
        return state["momentum_buffer"].lerp_(factor.grad, 1 - momentum)


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _root(S_RR: torch.Tensor) -> torch.Tensor:
    """Return L of L·Lᵀ = S with a little more on its diagonal."""
    mean = S_RR.diagonal().mean().clamp(min=torch.finfo(S_RR.dtype).tiny)
    identity = torch.eye(len(S_RR), dtype=S_RR.dtype, device=S_RR.device)
    return torch.linalg.cholesky(S_RR + DAMPING * mean * identity)


def _whitened(M_NR: torch.Tensor, L_RR: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return msign(M L⁻ᵀ) L⁻¹."""
    white = torch.linalg.solve_triangular(L_RR.T, M_NR, upper=True, left=False)
    sign = orthogonalized(white, group)
    return torch.linalg.solve_triangular(L_RR, sign, upper=False, left=False)


def spectral_scale(rows: int, columns: int) -> float:
    """Return what a step's spectral norm is for a learning rate of 1."""
    return math.sqrt(max(1.0, rows / columns))


def orthogonalized(m_RC: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return about UVᵀ of M = UΣVᵀ: singular values between 0.5 and 1.5, most near 1.

    In bf16, as torch.optim.Muon does it; on a CPU in fp32 (or fp64), since most CPUs multiply bf16
    matrices more slowly (20 times, without AVX-512's bf16).
    """
    a, b, c = group["ns_coefficients"]
    exact = torch.promote_types(m_RC.dtype, torch.float32)
    x = m_RC.to(exact) if m_RC.device.type == "cpu" else m_RC.bfloat16()
    x = x.T if m_RC.shape[0] > m_RC.shape[1] else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.T if m_RC.shape[0] > m_RC.shape[1] else x
    return x.to(m_RC.dtype)
