"""Functions only: each op with its reference and its fast forms, one signature."""
