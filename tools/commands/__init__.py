"""The commands of `lowline`, one module a task."""
