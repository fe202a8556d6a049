"""Compares two servers' answers to one request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rerank_lab.datasets.runs import LARGEST_SCORE
from rerank_lab.measures.stats import agreement

# Kinds of differences, in the order in which they are reported.
DIFFERENCE_KINDS = ("order", "score", "status", "shape", "set", "value", "no answer")
VALUE_LENGTH, LINE_LENGTH = 160, 1000  # the most characters of a value and of a line
Difference = tuple[str, str]  # one of DIFFERENCE_KINDS, and a line about it
RankedItems = dict[int, tuple[float, dict[str, Any]]]  # index → score, and the other keys of the item; in the answer's order


@dataclass(frozen=True)
class Answer:
    """A server's answer to a request.

    Attributes:
        status: HTTP status; None: no answer came.
        body: its JSON, or its text if it is not JSON; the reason if no answer came.
        seconds: until it came, including the waiting after 429 and 503.
    """

    status: int | None
    body: Any
    seconds: float


def compare(a: Answer, b: Answer, tolerance: float) -> tuple[list[Difference], dict[str, float | None]]:
    """Compares two answers.

    Args:
        a, b: the answers.
        tolerance: absolute difference up to which two scores are the same.

    Returns:
        the differences, as text that is safe to print, and stats.agreement of the rankings (empty if one has no ranking).
    """
    found, agreed = _compare(a, b, tolerance)
    return [(kind, _plain(text, LINE_LENGTH)) for kind, text in found], agreed


def _compare(a: Answer, b: Answer, tolerance: float) -> tuple[list[Difference], dict[str, float | None]]:
    if a.status is None or b.status is None:
        return [("no answer", "; ".join(f"{name}: {x.body}" for name, x in (("A", a), ("B", b)) if x.status is None))], {}
    if a.status != b.status:
        return [("status", f"A {a.status}{_detail(a)}, B {b.status}{_detail(b)}")], {}
    if a.status != 200:
        left, right = shape(a.body), shape(b.body)
        return [("shape", f"of the {a.status}: A {_short(left)}, B {_short(right)}")] if left != right else [], {}
    first, second = ranking(a.body), ranking(b.body)
    if isinstance(first, str) or isinstance(second, str):
        return [("shape", ", ".join(f"{name} holds {x if isinstance(x, str) else 'a ranking'}" for name, x in (("A", first), ("B", second))))], {}
    scores, others = ({i: score for i, (score, _) in x.items()} for x in (first, second))
    # Values of other top-level keys (ids, usage) may differ; only their presence is compared.
    tops = [{k: v if k == "meta" else None for k, v in x.body.items()} if isinstance(x.body, dict) else {} for x in (a, b)]
    return [*_rankings(scores, others, tolerance), *_items(first, second), *_values("", *tops)], agreement(scores, others)


def ranking(body: Any) -> RankedItems | str:
    """The ranking in any route's answer, or a text that says why there is none.

    The list is the body itself (text-embeddings-inference), or it is under `results` (v3, Cohere, Jina) or `data` (Voyage).
    """
    items = body if isinstance(body, list) else body.get("results", body.get("data")) if isinstance(body, dict) else None
    if not isinstance(items, list):
        return "no ranking"
    found: RankedItems = {}
    for place, item in enumerate(items):
        own = dict(item) if isinstance(item, dict) else {}
        index, score = own.pop("index", None), own.pop("relevance_score", None) if "relevance_score" in own else own.pop("score", None)
        if type(index) is not int:
            return f"a ranking without an index at rank {place + 1}"
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= LARGEST_SCORE:
            return f"a ranking without a finite score at rank {place + 1}"
        if index in found:
            return f"a ranking with index {index} twice"
        found[index] = float(score), own
    return found


def shape(value: Any) -> Any:
    """The shape of JSON without its values: types by key. A list becomes the distinct shapes of its items."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in sorted(value.items())}
    if isinstance(value, list):
        return [json.loads(s) for s in sorted({json.dumps(shape(v)) for v in value})]
    names = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _rankings(a: dict[int, float], b: dict[int, float], tolerance: float) -> Iterator[tuple[str, str]]:
    for name, one, other in (("A", a, b), ("B", b, a)):
        if alone := [i for i in one if i not in other]:
            yield "set", f"only {name} ranks {_some(alone)}"
    left, right = [i for i in a if i in b], [i for i in b if i in a]
    if left != right:
        rank = next(n for n, (i, j) in enumerate(zip(left, right)) if i != j)
        i, j = left[rank], right[rank]
        near = " (scores within the tolerance)" if max(abs(a[i] - a[j]), abs(b[i] - b[j])) <= tolerance else ""
        common = " of those that both rank" if len(a) + len(b) > 2 * len(left) else ""
        yield "order", f"first at rank {rank + 1}{common}: A has index {i} ({a[i]:.6g}), B has index {j} ({b[j]:.6g}){near}"
    if beyond := [i for i in left if abs(a[i] - b[i]) > tolerance]:
        worst = max(beyond, key=lambda i: abs(a[i] - b[i]))
        yield "score", f"{len(beyond)} of {len(left)} beyond {tolerance:g}, most at index {worst}: A {a[worst]:.6g}, B {b[worst]:.6g}"


def _items(a: RankedItems, b: RankedItems) -> Iterator[tuple[str, str]]:
    """Differences in the other keys of items, such as documents; their values are not repeated."""
    keys = [{k for _, own in x.values() for k in own} for x in (a, b)]
    yield from _alone("results[].", *keys)
    for k in sorted(keys[0] & keys[1]):
        if differ := [i for i in a if i in b and a[i][1].get(k) != b[i][1].get(k)]:
            yield "value", f"results[].{k} differs at {_some(differ)}"


def _values(place: str, a: Any, b: Any) -> Iterator[tuple[str, str]]:
    """Keys that only one of them has, and values that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        yield from _alone(place, set(a), set(b))
        for k in sorted(a.keys() & b.keys()):
            yield from _values(f"{place}{k}.", a[k], b[k])
    elif a != b:
        yield "value", f"{place.rstrip('.')}: A {_short(a)}, B {_short(b)}"


def _alone(place: str, a: set[str], b: set[str]) -> Iterator[tuple[str, str]]:
    for name, keys in (("A", a - b), ("B", b - a)):
        if keys:
            yield "shape", f"only {name} has {', '.join(f'{place}{k}' for k in sorted(keys))}"


def _some(indices: Sequence[int]) -> str:
    return f"{'index' if len(indices) == 1 else 'indices'} {', '.join(map(str, indices[:5]))}{f' and {len(indices) - 5} more' if len(indices) > 5 else ''}"


def _detail(answer: Answer) -> str:
    """The message of an error, shortened."""
    return "" if answer.status == 200 else f" ({_short(answer.body.get('detail', answer.body) if isinstance(answer.body, dict) else answer.body)})"


def _short(value: Any) -> str:
    return _plain(json.dumps(value, ensure_ascii=False), VALUE_LENGTH)


def _plain(text: str, most: int) -> str:
    """Replaces control characters and halves of surrogate pairs by spaces, and cuts to `most` characters."""
    text = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"
