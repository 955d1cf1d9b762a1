"""The configuration of a run: typed sections, loading, stages of a conversion."""
