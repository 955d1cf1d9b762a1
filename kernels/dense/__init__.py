"""Linear maps of a few tokens on a CPU: weights in int8, and a decoder block's in one call."""

from lowline.kernels.dense.op import dequantize_int8, int8_linear, quantize_int8
from lowline.kernels.dense.token import is_one_token, rotate_token

__all__ = ["dequantize_int8", "int8_linear", "is_one_token", "quantize_int8", "rotate_token"]
