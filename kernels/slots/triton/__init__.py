"""Window-and-slots attention on GPUs: the Triton kernel of one token."""
