"""Linear maps of the low-rank bottleneck."""

from lowline.kernels.low_rank.grouped import grouped_linear

__all__ = ["grouped_linear"]
