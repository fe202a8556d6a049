"""Turns the errors of libraries that fetch collections into one sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rerank_lab.errors import UserError


def ask(name: str, call: Callable[[], Any]) -> Any:
    """Calls a library and returns its result.

    Args:
        name: of the collection, for messages.
        call: the call.

    Raises:
        UserError: the library raised any error.
    """
    try:
        return call()
    except Exception as error:  # each library raises errors of its own and of its transport
        raise _unreadable(name, error) from error


def each(name: str, records: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Iterates over records from a library. Raises as `ask`."""
    try:
        yield from records()
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return UserError(f"{name} cannot be read: " + "; ".join(f"{type(e).__name__}: {str(e).strip().split(chr(10))[0]}" for e in causes))
