"""The causal short convolution: complete sequences, one token, and speculative decoding."""

from lowline.kernels.conv.decode import causal_conv_advance, causal_conv_step, causal_conv_verify
from lowline.kernels.conv.op import causal_conv

__all__ = ["causal_conv", "causal_conv_advance", "causal_conv_step", "causal_conv_verify"]
