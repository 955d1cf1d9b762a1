"""The selective scan of Mamba (arXiv 2312.00752, equation 2 and algorithm 2).

    h_t = e^{δ_t A} ⊙ h_{t-1} + δ_t x_t B_tᵀ,   y_t = (h_t C_t + D ⊙ x_t) ⊙ silu(z_t)

h is D x N: each channel has N states that decay at their own rates, so the decay is no product of
a row and a column and the recurrence has no form in GEMMs. δ_t is `dt`, or softplus(dt + bias).

B and C are those of all channels, or of groups of neighbouring channels each its own. Left out:
complex A. (Mamba2 is `lowline.kernels.recurrence` with a scalar gate.)

Shapes: B batch, T time, D channels, N states per channel, S sequences (B, or those of
`cu_seqlens`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lowline.kernels.backends import Backend, choose, type_reason
from lowline.kernels.packs import check_pack

NAME = "selective_scan"


class Call(NamedTuple):
    """The arguments of every backend, those with a gradient first."""

    x: torch.Tensor  # (B, T, D)
    dt: torch.Tensor  # (B, T, D)
    A: torch.Tensor  # (D, N)
    B: torch.Tensor  # (B, T, G, N); also (B, T, N) until a backend is given it
    C: torch.Tensor  # as B
    D_D: torch.Tensor | None  # (D,)
    z: torch.Tensor | None  # (B, T, D)
    bias: torch.Tensor | None  # of dt: (D,)
    state: torch.Tensor | None  # (S, D, N)
    cu: torch.Tensor | None
    softplus: bool
    keep: bool = False  # "cpu": the states that the backward pass starts from


def selective_scan(
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BTN: torch.Tensor,
    C_BTN: torch.Tensor,
    D_D: torch.Tensor | None = None,
    *,
    z_BTD: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of complete sequences and the states after them; differentiable in every
    tensor.

    Args:
        x_BTD: the input.
        dt_BTD: step sizes, ≥ 0 after bias and softplus.
        A_DN: rates, ≤ 0.
        B_BTN, C_BTN: how the input enters the states and how the states are read; (B, T, G, N)
            where each of G groups of neighbouring channels has its own.
        D_D: weight of the input in the output; none when None.
        z_BTD: gate of the output; none when None.
        dt_bias_D: added to dt.
        dt_softplus: take softplus(dt + bias) for the step size.
        initial_state: (S, D, N); zero when None.
        cu_seqlens: (S + 1,) bounds of sequences packed in a batch of one, from 0 to T.
        backend: see `lowline.kernels.backends`. "cpu" takes fp32 and bf16, and groups of multiples
            of 16 channels; "triton" fp16, too, up to 64 states, and groups of even numbers.

    x, dt, B, C and z have one type; A, D, the bias and the state may have another. Sums are fp32,
    of fp64 input fp64.

    Returns:
        y of (B, T, D) in x's type; the state of (S, D, N) in fp32 (fp64 of fp64).

    Raises:
        ValueError: shapes or types that do not fit, or a backend that does not cover the call.
    """
    tensors = (x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, dt_bias_D, initial_state)
    return run(Call(*tensors, cu_seqlens, dt_softplus), backend)


def run(call: Call, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs and the states after them, of a call that is checked here."""
    check(call)
    which = pick(call, backend)
    B, C = (t if t.dim() == 4 else t.unsqueeze(2) for t in (call.B, call.C))
    return _implementation(which)(call._replace(B=B, C=C))


def check(call: Call) -> None:
    """Raise ValueError where the arguments of `selective_scan` do not fit."""
    x, dt, A, B, C, D_D, z, bias, state, *_ = call
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"{NAME}: x is {tuple(x.shape)} of {x.dtype}; it is (batch, time, channels) of a "
            "floating type"
        )
    batch, time, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(
            f"{NAME}: A is {tuple(A.shape)}; it is (channels, states) with {channels} channels"
        )
    states = (B.shape[2], A.shape[1]) if B.dim() == 4 else (A.shape[1],)
    if len(states) == 2 and (states[0] == 0 or channels % states[0]):
        raise ValueError(
            f"{NAME}: B has {states[0]} groups; their number divides the {channels} channels"
        )
    sequences = check_pack(NAME, batch, time, call.cu)
    for name, tensor, shape in (
        ("dt", dt, (batch, time, channels)),
        ("B", B, (batch, time, *states)),
        ("C", C, (batch, time, *states)),
        ("z", z, (batch, time, channels)),
        ("D", D_D, (channels,)),
        ("dt_bias", bias, (channels,)),
        ("initial_state", state, (sequences, *A.shape)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{NAME}: {name} is {tuple(tensor.shape)}, not {shape}")
    for name, tensor in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"{NAME}: {name} is {tensor.dtype}, x is {x.dtype}; cast one to the other"
            )


def pick(call: Call, backend: str) -> str:
    """Return the backend that runs a call; ValueError where the one asked for does not cover it."""
    x, B, (channels, states) = call.x, call.B, call.A.shape
    cpu, triton = type_reason(x.dtype, "cpu"), type_reason(x.dtype, "triton")
    if states > 64:
        triton = f"A has {states} states; it takes up to 64"
    if B.dim() == 4 and B.shape[2] > 1:
        width = channels // B.shape[2]
        said = f"groups of {width} channels; it takes multiples of "
        cpu = f"{said}16" if width % 16 else cpu
        triton = f"{said}2" if width % 2 else triton
    return choose(NAME, backend, x.device, cpu=cpu, triton=triton, module="scan")


def _implementation(which: str) -> Callable[[Call], tuple[torch.Tensor, torch.Tensor]]:
    """Return the backend's function."""
    if which == "triton":
        from lowline.kernels.scan.triton_kernels import selective_scan
    elif which == "cpu":
        from lowline.kernels.scan.cpu import selective_scan
    elif which == "torch":
        from lowline.kernels.scan.torch_form import selective_scan
    else:
        from lowline.kernels.scan.reference import selective_scan
    return selective_scan
