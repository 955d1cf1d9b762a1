"""Pretrained Transformers to linear attention and hybrids: mixers, conversion, generation."""
