"""A run's model: torchtitan's Llama with low-rank projections, mixers and LoRA."""
