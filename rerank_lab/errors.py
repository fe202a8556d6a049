"""The two errors that a user meets, and the exit code of each."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input: the message names the place and the remedy. Exit code 2."""


class ModelError(RuntimeError):
    """A model broke its contract (a NaN score, say): the message names the model. Exit code 1."""
