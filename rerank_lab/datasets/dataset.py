"""The dataclasses of a collection (documents, queries, judgements), and the checks on its records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.files import Json, valid_text

HIGHEST_GRADE = 100_000  # trec_eval allocates an array as long as a query's highest grade, and scans it for each measure
GRADES = f"grades are whole numbers from -{HIGHEST_GRADE} to {HIGHEST_GRADE}"

Qrels = dict[str, dict[str, int]]
Judgements = Iterable[tuple[str, str, Any, str]]  # query id, document id, grade as the file has it, file and line


@dataclass(frozen=True)
class Dataset:
    """One split of a collection.

    Attributes:
        name, split: as results call them.
        corpus: document id → text (title and text joined by a space), in file order.
        queries: query id → text, only of the split's judged queries, in file order.
        qrels: query id → document id → grade. All judgements, also of ids that corpus or queries lack.
        hash: SHA-256 over corpus, queries and qrels as loaded.
        notes: what a reader of results should know (unknown ids, overlap with another split, …).
        facts: the same as numbers, for results.json.
        place: query id and document id → file and line of their judgement, for messages.
    """

    name: str
    split: str
    corpus: Mapping[str, str]
    queries: dict[str, str]
    qrels: Qrels
    hash: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)
    place: Callable[[str, str], str] = field(default="judgement of query {} and document {}".format, compare=False, repr=False)


@dataclass(frozen=True)
class Collection:
    """A collection as its loader reads it, before one split of it becomes a Dataset.

    Attributes:
        name: as results call it.
        documents, queries: call → stream of (id, text, file and line).
        judgements: split → call → stream of its judgements.
    """

    name: str
    documents: Callable[[], Iterable[tuple[str, str, str]]]
    queries: Callable[[], Iterable[tuple[str, str, str]]]
    judgements: dict[str, Callable[[], Judgements]]


def record_text(value: dict[str, Any], where: str) -> tuple[str, str]:
    """(id, text) of a BEIR or MTEB record. A title is put before the text, joined by a space.

    Args:
        value: the record.
        where: file and line, for messages.

    Raises:
        UserError: the id or the text is missing or of the wrong type, or holds half of a surrogate pair.
    """
    identifier = next((value[key] for key in ("_id", "id") if key in value), None)
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or str(identifier).strip() == "":
        raise UserError(f"{where}: no _id (a string)")
    identifier = check_id(str(identifier), where)
    text, title = value.get("text"), value.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{where}: text (a string) is missing" if text is None else f"{where}: text and title must be strings")
    if not valid_text(title + text + identifier):
        raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff alone), which is no text")
    return identifier, f"{title} {text}".strip() if title else text


def check_id(identifier: str, where: str) -> str:
    """Returns the id if a TREC run file can hold it.

    Raises:
        UserError: the id holds white space or control characters.
    """
    if not identifier.isprintable() or " " in identifier:
        raise UserError(f"{where}: the id {identifier!r} holds white space or control characters, which TREC run files cannot carry")
    return identifier


def grade_of(value: Any) -> int | None:
    """A grade as an int: 2 for 2, 2.0, "2", "2.0" and "2e0". None if the value is no whole number."""
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if len(text) <= 40 and re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", text) else None
    if isinstance(value, Integral):
        return int(value)
    return int(number) if isinstance(value, Real) and (number := float(value)).is_integer() else None
