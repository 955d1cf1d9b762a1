"""Feature maps of linear attention."""

from lowline.kernels.feature_map.op import hedgehog

__all__ = ["hedgehog"]
