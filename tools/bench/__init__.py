"""Benchmarks: kernels, pretraining, conversion, decoding."""
