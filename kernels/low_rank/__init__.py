"""The entries of several low-rank layers as one GEMM."""

from lowline.kernels.low_rank.grouped import grouped_linear

__all__ = ["grouped_linear"]
