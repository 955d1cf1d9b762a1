"""Softmax attention over an exact window and a fixed number of rows: tokens kept, and means."""

from lowline.kernels.memory.decode import row_memory_step, row_memory_steps
from lowline.kernels.memory.op import MemoryState, row_memory_attention

__all__ = ["MemoryState", "row_memory_attention", "row_memory_step", "row_memory_steps"]
