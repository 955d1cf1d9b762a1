"""Failures of a run that are reported in a sentence, without a traceback."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot go on; raised on every rank, with what is safe and what to do."""
