"""What ranking leaves behind: a record for each query, which is a line of the journal, and the cost of ranking new documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rerank_lab.datasets.runs import Ranked


@dataclass(frozen=True)
class QueryCandidates:
    """A query with its candidates: all that ranking needs, except the documents' texts.

    Attributes:
        id, text: of the query.
        candidates: document ids with the first stage's scores.
    """

    id: str
    text: str
    candidates: Ranked


@dataclass(frozen=True)
class Cost:
    """What ranking one query cost besides time.

    Attributes:
        phases: seconds by phase.
        flops: by formula, if every document was seen before.
        flops_new: FLOPs that are added if every document is new.
        truncated: number of documents that some model read only in part.
        peak_rss_mb: peak memory in MiB.
    """

    phases: dict[str, float]
    flops: int
    flops_new: int
    truncated: int
    peak_rss_mb: float


@dataclass(frozen=True)
class Record:
    """One ranked query.

    Attributes:
        query: its id.
        documents: ids, best first, without those that the method dropped.
        scores, relevance: raw scores and relevance scores, in the order of `documents`.
        candidates: number of candidates.
        seconds: time that ranking took.
        cost: everything else that it cost; None: unknown, for a server's row.
        by: name of the executor that ranked it.
    """

    query: str
    documents: list[str]
    scores: list[float]
    relevance: list[float]
    candidates: int
    seconds: float
    cost: Cost | None
    by: str = ""

    def line(self) -> str:
        """The record as a line of the journal, without the line end."""
        own = {name: getattr(self, name) for name in OWN}
        cost = dict.fromkeys(COSTS) if self.cost is None else {name: getattr(self.cost, name) for name in COSTS}
        return json.dumps(own | cost | {"by": self.by})

    @classmethod
    def parse(cls, line: str) -> Record:
        """Reads a line of the journal.

        Raises:
            ValueError: the line is incomplete, or no record of this version.
        """
        value = json.loads(line)
        if not isinstance(value, dict) or value.keys() != {*OWN, *COSTS, "by"}:
            raise ValueError("no record")
        cost = None if value["phases"] is None else Cost(**{name: value[name] for name in COSTS})
        return cls(**{name: value[name] for name in OWN}, cost=cost, by=value["by"])


OWN = [f.name for f in fields(Record) if f.name not in ("cost", "by")]
COSTS = [f.name for f in fields(Cost)]


@dataclass
class ColdCost:
    """What ranking costs when every document is new.

    Attributes:
        seconds: for each query.
        phases: for each query, seconds by phase.
        documents: number of documents that all queries together had.
        peak_rss_mb: peak memory in MiB; None: not measured.
        measured: the time of measurement (UTC), or why nothing was measured.
    """

    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    documents: int = 0
    peak_rss_mb: float | None = None
    measured: str = "not measured"

    def write(self) -> bytes:
        """The timings as a file's content."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, content: str, queries: int) -> ColdCost:
        """Reads the timings of this many queries from a file's content.

        Raises:
            ValueError, TypeError: the content is something else.
        """
        value: Any = json.loads(content)
        if not isinstance(value, dict) or value.keys() != {f.name for f in fields(cls)} or not len(value["seconds"]) == len(value["phases"]) == queries:
            raise ValueError("no timings of these queries")
        return cls(**value)


@dataclass(frozen=True)
class KernelRecords:
    """Records of the kernel check, one for each query.

    Attributes:
        definition: by plain torch in fp32.
        by_dtype: name of a dtype → records by the chosen kernels on documents in that dtype.
    """

    definition: list[Record]
    by_dtype: dict[str, list[Record]]


@dataclass
class RowRecords:
    """Everything that was ranked and timed for one row of the table.

    Attributes:
        records: one for each query.
        token_limit: the most tokens of a document that are read; None: unknown, for a server's row.
        cold: the cost when every document is new.
        exact: records by torch in fp32, if `records` come from another runtime or precision; otherwise None.
        kernels: records of the kernel check; None: not checked.
    """

    records: Sequence[Record]
    token_limit: int | None
    cold: ColdCost
    exact: Sequence[Record] | None = None
    kernels: KernelRecords | None = None
