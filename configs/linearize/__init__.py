"""One TOML for every conversion somebody would want to reproduce."""
