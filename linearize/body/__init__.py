"""The Hugging Face model of a linearized checkpoint: attention, cache, packing."""
