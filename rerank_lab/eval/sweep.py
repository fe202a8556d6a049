"""--sweep: the same methods under several values of one setting, over the same collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rerank_lab.errors import UserError
from rerank_lab.eval.records import Record
from rerank_lab.eval.settings import COMMON_SETTINGS
from rerank_lab.eval.system import System
from rerank_lab.eval.work import RankingWork
from rerank_lab.first_stage.candidates import Candidates
from rerank_lab.methods import Method, Value
from rerank_lab.reranker import Reranker

Sweeps = Mapping[str, Sequence[Value]]


@dataclass(frozen=True)
class SweepRecords:
    """The records of one row under one value of a setting.

    Attributes:
        setting, value: what was changed.
        label: of the row.
        records: one for each query.
    """

    setting: str
    value: Value
    label: str
    records: Sequence[Record]


def problems(sweeps: Sweeps, systems: Sequence[System], pools: bool) -> list[str]:
    """Lists what is wrong with the sweeps.

    Args:
        sweeps: setting → values.
        systems: those that run here.
        pools: whether the model makes vectors of whole texts.
    """
    found = []
    for name, values in sweeps.items():
        varied = _having(name, systems)
        if not varied:
            found.append(f"--sweep {name}: none of the methods that run here has it ({', '.join(system.label for system in systems) or 'none'})")
        for value in values if name not in COMMON_SETTINGS else ():
            try:
                for system in varied:
                    if why := replace(system.method, **{name: value}).refusal(pools):
                        raise UserError(f"{why}, and the model has none (late interaction)")
            except ValueError as error:
                found.append(f"--sweep {name}={value}: {error}")
    return found


def methods(sweeps: Sweeps, systems: Sequence[System]) -> list[Method]:
    """Every method that a row or a point of a sweep runs, the rows' first."""
    swept = [(name, value) for name, values in sweeps.items() if name not in COMMON_SETTINGS for value in values]
    return [*(system.method for system in systems), *(replace(system.method, **{name: value}) for name, value in swept for system in _having(name, systems))]


def deepest(sweeps: Sweeps, top_k: int) -> int:
    """How many candidates each query needs, for the rows and for all sweeps."""
    return max(int(depth) for depth in (top_k, *sweeps.get("stage1_top_k", []), *sweeps.get("top_k", [])))


def run(
    sweeps: Sweeps, systems: Sequence[System], rows: Mapping[str, Reranker], done: Mapping[str, Sequence[Record]], work: RankingWork,
    deep: Candidates, encode: Callable[[int], None],
) -> Iterator[SweepRecords]:  # fmt: skip
    """Ranks under every value of every setting, for each system whose method has the setting.

    Args:
        sweeps: setting → values.
        systems: those that run here.
        rows: label → the row's reranker.
        done: label → the row's records. They are reused if a value changes nothing.
        work: what the rows ranked.
        deep: the same first stage with as many candidates as `deepest` says. A stage1_top_k above top_k ranks that many candidates.
        encode: takes a number of tokens; puts the vectors of all candidates, cut to it, into the cache.
    """
    for name, values in sweeps.items():
        for value in values:
            pool, encoded = work.candidates, False
            if name == "top_k" or (name == "stage1_top_k" and int(value) > pool.top_k):
                pool = deep.cut(int(value))
            for system in _having(name, systems):
                label, method, row = system.label, system.method, rows[system.label]
                if name == "max_tokens_per_doc":
                    row = row.with_max_tokens(int(value))
                elif name != "top_k":
                    row = row.using(replace(method, **{name: value}), cross=system.crossed)
                if row.token_limits == rows[label].token_limits and row.method == method and pool.hash == work.candidates.hash:
                    yield SweepRecords(name, value, label, done[label])
                    continue
                if name == "max_tokens_per_doc" and not encoded:
                    encode(int(value))
                    encoded = True
                yield SweepRecords(name, value, label, replace(work, candidates=pool).records(f"{label} at {name}={value}", row))


def _having(name: str, systems: Sequence[System]) -> list[System]:
    return [system for system in systems if name in COMMON_SETTINGS or name in system.method.settings()]
