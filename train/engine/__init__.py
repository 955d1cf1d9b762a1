"""The training engine: trainer, checkpoints, evaluation, metrics, optimizer, signals."""
