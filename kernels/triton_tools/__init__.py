"""Launching, defining and checking Triton kernels, also without a GPU."""
