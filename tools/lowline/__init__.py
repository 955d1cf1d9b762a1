"""lowline: low-rank pretraining and linear attention for Llama-class language models."""

__version__ = "0.1.0"
