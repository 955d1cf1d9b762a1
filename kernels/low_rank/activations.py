"""The activations of a bottleneck and their derivatives, by the names of a configuration.

The names are those of `lowline.cola.low_rank.ACTIVATIONS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "relu", "identity")


def check_activation(op: str, name: str, argument: str = "activation") -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: {argument} = {name!r}; choose from {', '.join(ACTIVATIONS)}")


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """σ(z); z itself for the identity."""
    if name == "silu":
        return F.silu(z)
    if name == "gelu":
        return F.gelu(z)
    return F.relu(z) if name == "relu" else z


def activate_backward(name: str, grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """grad ⊙ σ'(z); `grad` itself for the identity."""
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    return torch.ops.aten.threshold_backward(grad, z, 0) if name == "relu" else grad
