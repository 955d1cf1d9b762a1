"""Attention transfer in groups of layers, from hidden states on disk."""
