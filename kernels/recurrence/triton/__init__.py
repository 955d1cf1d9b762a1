"""The gated linear recurrence on GPUs: Triton kernels and their launch."""
