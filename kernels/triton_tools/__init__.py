"""What writing Triton kernels without a GPU takes: its interpreter, mended, and a compile check."""

from lowline.kernels.triton_tools.cases import Case

__all__ = ["Case"]
