"""Parameters, FLOPs and memory of a run, without running it."""
