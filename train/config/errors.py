"""The error of a configuration, apart from what reads one: this module imports nothing slow."""

from __future__ import annotations

from lowline.errors import LowlineError


class ConfigError(LowlineError):
    """A configuration that cannot run; the message says where and what to do."""
