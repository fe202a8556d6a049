"""What libraries raise that fetch collections, in one sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rerank_lab.errors import UserError


def ask(name: str, call: Callable[[], Any]) -> Any:
    """What a call into a library gives.

    Raises:
        UserError: whatever the library raised, with the collection's name.
    """
    try:
        return call()
    except Exception as error:  # each library raises its own and its transport's errors; the user needs one sentence
        raise _unreadable(name, error) from error


def each(name: str, records: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The records that a library gives one after another; raises as `ask`."""
    try:
        yield from records()
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return UserError(f"{name} cannot be read: " + "; ".join(f"{type(e).__name__}: {str(e).strip().split(chr(10))[0]}" for e in causes))
