"""The training engine: TOML to torchtitan's Trainer."""
