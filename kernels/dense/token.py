"""What C++ does for a single token where torch takes several operators."""

from __future__ import annotations

import torch

from lowline.kernels.backends import choose


def is_one_token(x_BTHD: torch.Tensor, *others: torch.Tensor, module: str = "dense") -> bool:
    """Return whether C++ covers these tensors: of one token, fp32, on a CPU, without gradients."""
    if x_BTHD.shape[:2] != (1, 1) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x_BTHD, *others))
    return plain and choose("one token", "auto", x_BTHD.device, module=module) == "cpu"


def rotate_token(x_11HD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the rotary embedding, halves split, of one token; cos and sin are (1, 1, D)."""
    from lowline.kernels.cpu import load

    y_11HD = torch.empty_like(x_11HD)
    load("dense").rotate(x_11HD.contiguous(), cos.contiguous(), sin.contiguous(), y_11HD)
    return y_11HD
