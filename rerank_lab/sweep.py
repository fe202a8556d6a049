"""--sweep: the same methods under several values of one setting, over the same collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rerank_lab.candidates import Candidates
from rerank_lab.executor import Work
from rerank_lab.methods import Method, runs_cross
from rerank_lab.reranker import Reranker
from rerank_lab.settings import COMMON

Sweeps = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Point:
    """One method under one value of a setting.

    Attributes:
        setting, value: what was changed.
        method: the label of the row that it belongs to.
        records: one a query.
    """

    setting: str
    value: float
    method: str
    records: list[dict[str, Any]]


def problems(sweeps: Sweeps, methods: Mapping[str, Method]) -> list[str]:
    """What cannot be swept with these methods (label → method, those that run here)."""
    found = []
    for name, values in sweeps.items():
        varied = _having(name, methods)
        if not varied:
            found.append(f"--sweep {name}: none of the methods that run here has it ({', '.join(methods) or 'none'})")
        for value in values if name not in COMMON else ():
            try:
                for method in varied.values():
                    replace(method, **{name: value})
            except ValueError as error:
                found.append(f"--sweep {name}={value}: {error}")
    return found


def deepest(sweeps: Sweeps, top_k: int) -> int:
    """Candidates a query that all of it needs."""
    return int(max([top_k, *sweeps.get("stage1_top_k", []), *sweeps.get("top_k", [])]))


def run(
    sweeps: Sweeps, methods: Mapping[str, Method], rows: Mapping[str, Reranker], done: Mapping[str, list[dict[str, Any]]], work: Work,
    deep: Candidates, encode: Callable[[int], None],
) -> Iterator[Point]:  # fmt: skip
    """Every value of every setting, for each method that has it.

    Args:
        sweeps: setting → values.
        methods, rows, done: of the rows that run here, by label; `done` holds their records, which serve where nothing changes.
        work: what the rows ranked, and who ranks.
        deep: the same first stage as deep as `deepest` says. A stage1_top_k beyond the candidates has as many of them.
        encode: puts the vectors of all candidates, of so many tokens at most, into the cache.
    """
    for name, values in sweeps.items():
        for value in values:
            pool, encoded = work.candidates, False
            if name == "top_k" or (name == "stage1_top_k" and value > pool.about["top_k"]):
                pool = deep.cut(int(value))
            for label, method in _having(name, methods).items():
                row = rows[label]
                if name == "max_tokens_per_doc":
                    row = row.reading(int(value))
                elif name != "top_k":
                    row = row.using(replace(method, **{name: value}), cross=runs_cross(label, method))
                if row.token_limits == rows[label].token_limits and row.method == method and pool.about["hash"] == work.candidates.about["hash"]:
                    yield Point(name, value, label, done[label])
                    continue
                if name == "max_tokens_per_doc" and not encoded:
                    encode(int(value))
                    encoded = True
                yield Point(name, value, label, replace(work, candidates=pool).records(f"{label} at {name}={value}", row))


def _having(name: str, methods: Mapping[str, Method]) -> dict[str, Method]:
    return {label: method for label, method in methods.items() if name in COMMON or name in method.settings()}
