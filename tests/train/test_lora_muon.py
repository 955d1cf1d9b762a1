"""LoRA-Muon against its formula in fp64, and what it promises: bounded steps of B·A."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import training
from helpers.processes import FOR_HELPERS, TESTS

from lowline.train.config.load import load_config
from lowline.train.config.optimizer import LoraMuonConfig
from lowline.train.engine.lora_muon import DAMPING, LoRAMuon
from lowline.train.engine.optim import Muon, optimizer_config
from lowline.train.model.build import build_model_config

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


def pair(out: int, rank: int, into: int, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*s, generator=generator).double() for s in ((rank, into), (out, rank)))
    return [torch.nn.Parameter(A * scale), torch.nn.Parameter(B / scale)]


def optimizer_of(factors: list[torch.nn.Parameter]) -> LoRAMuon:
    group = {"params": factors, "param_names": ["layers.0.wq.A.weight", "layers.0.wq.B.weight"]}
    return LoRAMuon([group], **OPTIONS)


def set_gradients(factors: list[torch.nn.Parameter], G: torch.Tensor) -> None:
    """Give A and B the gradients of <G, B·A>."""
    A, B = (factor.detach() for factor in factors)
    factors[0].grad, factors[1].grad = B.T @ G, G @ A.T


def inverse_root(S: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(S + DAMPING * S.diagonal().mean() * torch.eye(len(S)))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def msign(X: torch.Tensor) -> torch.Tensor:
    """Muon's polynomial, on the singular values."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    s = s / X.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


@pytest.mark.parametrize("out, rank, into", [(12, 4, 7), (5, 4, 16), (6, 6, 6)])
def test_steps_are_the_formula(out: int, rank: int, into: int) -> None:
    factors = pair(out, rank, into)
    A, B = (factor.detach().clone() for factor in factors)
    M_A, M_B = torch.zeros_like(A), torch.zeros_like(B)
    optimizer = optimizer_of(factors)
    s = math.sqrt(1 - 0.1 * 0.05)
    rate = 0.05 * math.sqrt(max(1, out / into)) / 2
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        G = torch.randn(out, into, generator=generator).double()
        set_gradients(factors, G)
        optimizer.step()
        M_A, M_B = 0.9 * M_A + 0.1 * (B.T @ G), 0.9 * M_B + 0.1 * (G @ A.T)
        R_A, R_B = inverse_root(A @ A.T), inverse_root(B.T @ B)
        A, B = (
            s * A - rate * R_B @ msign(R_B @ M_A) / s,
            s * B - rate * msign(M_B @ R_A) @ R_A / s,
        )
        torch.testing.assert_close(factors[0].detach(), A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(factors[1].detach(), B, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 8, 24])
def test_a_step_of_the_product_is_bounded_and_knows_no_scale(rank: int) -> None:
    """The spectral norm is about the learning rate at every rank; c·A and B/c move W alike."""
    G = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).double()
    moved = []
    for scale in (1.0, 10.0):
        factors = pair(32, rank, 32, scale)
        before = (factors[1] @ factors[0]).detach()
        optimizer = optimizer_of(factors)
        optimizer.param_groups[0].update(weight_decay=0.0, lr=1e-3)
        set_gradients(factors, G)
        optimizer.step()
        moved.append((factors[1] @ factors[0]).detach() - before)
    norm = torch.linalg.matrix_norm(moved[0], 2).item()
    assert 0.6e-3 < norm < 1.3e-3  # msign's singular values lie between 0.5 and 1.3
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-7)


def test_factors_go_to_lora_muon_and_dense_matrices_to_muon() -> None:
    run = load_config(training.TINY[1], [*training.TINY[2:], "--cola.rank={q = 8, up = 8}"])
    with torch.device("meta"):
        model = build_model_config(run).build()
    optimizers = optimizer_config(LoraMuonConfig(lr=0.1, muon_lr=0.2)).build(model_parts=[model])
    groups = {type(o).__name__: o.param_groups[0] for o in optimizers}
    assert list(groups) == ["LoRAMuon", "Muon", "AdamW"]
    assert [len(g["param_names"]) for g in groups.values()] == [2 * 2 * 2, 2 * 5, 2 * 2 + 3]
    assert [g["lr"] for g in groups.values()] == [0.2, 0.2, 0.1]


def test_dense_matrices_step_by_the_spectral_norm() -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 10))
    weight.grad = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1e-3, weight_decay=0.0, adjust_lr_fn="original").step()
    norm = torch.linalg.matrix_norm(weight.detach(), 2).item()
    assert 0.6e-3 < norm / math.sqrt(40 / 10) < 1.3e-3


@pytest.mark.slow
def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    worker = TESTS / "workers" / "engine_on_two_ranks.py"
    line = [sys.executable, "-P", str(worker), *training.TINY[1:], f"--output={tmp_path / 'run'}"]
    line += ["--optimizer.name=lora-muon", "--schedule.warmup_steps=0"]
    result = subprocess.run(line, env=FOR_HELPERS, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["differences"]["LoRAMuon"] == [0.0, 0.0, 0.0]
