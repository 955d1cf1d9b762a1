"""Window attention on GPUs: Triton kernels and their launch."""
