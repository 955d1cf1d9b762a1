"""Softmax attention over an exact window and a fixed number of slots for all earlier tokens."""

from lowline.kernels.slots.decode import nearest_slot_step, slot_window_step
from lowline.kernels.slots.op import SlotState, slot_window_attention

__all__ = ["SlotState", "nearest_slot_step", "slot_window_attention", "slot_window_step"]
