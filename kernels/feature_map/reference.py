"""Hedgehog as its formula reads; see `lowline.kernels.feature_map.op`."""

from __future__ import annotations

import torch

from lowline.kernels.feature_map.op import FLOOR


def hedgehog(x_BTHD: torch.Tensor, W_HDF: torch.Tensor) -> torch.Tensor:
    """See `lowline.kernels.feature_map.hedgehog`, which checks and documents."""
    kind = torch.promote_types(x_BTHD.dtype, torch.float32)
    u = (x_BTHD.to(kind)[..., None, :] @ W_HDF.to(kind))[..., 0, :]
    features = torch.cat([torch.softmax(u, -1), torch.softmax(-u, -1)], -1)
    return features.clamp(min=FLOOR).to(x_BTHD.dtype)
