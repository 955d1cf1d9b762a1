"""Linear maps of the low-rank bottleneck."""

from lowline.kernels.low_rank.bottleneck import grouped_low_rank_bottleneck, low_rank_bottleneck
from lowline.kernels.low_rank.grouped import grouped_linear
from lowline.kernels.low_rank.mlp import low_rank_mlp

__all__ = [
    "grouped_linear",
    "grouped_low_rank_bottleneck",
    "low_rank_bottleneck",
    "low_rank_mlp",
]
