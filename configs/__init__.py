"""One TOML for every run somebody would want to reproduce."""
