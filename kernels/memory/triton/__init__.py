"""Window-and-rows attention on GPUs: the Triton kernel of one token."""
