"""What ranking leaves behind, query by query: records, which are the lines of the journal, and what all documents being new costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rerank_lab.datasets.runs import Ranked


@dataclass(frozen=True)
class QueryCandidates:
    """A query with its candidates: all that ranking it takes besides the documents' texts.

    Attributes:
        id, text: of the query.
        candidates: ids of documents, and the first stage's scores.
    """

    id: str
    text: str
    candidates: Ranked


@dataclass(frozen=True)
class Cost:
    """What ranking one query cost besides time.

    Attributes:
        phases: seconds by phase.
        flops: by formula, with every document seen before.
        flops_new: what is added where every document is new.
        truncated: documents of which some model read only a part.
        peak_rss_mb: MiB.
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
        documents: ids, best first; those that the method dropped are absent.
        scores, relevance: raw and shown scores, in that order.
        candidates: how many there were.
        seconds: that ranking took.
        cost: what else it cost; None: not known (a server's).
        by: the executor that ranked it.
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
        """One line of the journal, without its end."""
        own = {name: getattr(self, name) for name in OWN}
        cost = dict.fromkeys(COSTS) if self.cost is None else {name: getattr(self.cost, name) for name in COSTS}
        return json.dumps(own | cost | {"by": self.by})

    @classmethod
    def parse(cls, line: str) -> Record:
        """A line of the journal.

        Raises:
            ValueError: it is not one, whole and of this version.
        """
        value = json.loads(line)
        if not isinstance(value, dict) or value.keys() != {*OWN, *COSTS, "by"}:
            raise ValueError("no record")
        cost = None if value["phases"] is None else Cost(**{name: value[name] for name in COSTS})
        return cls(**{name: value[name] for name in OWN}, cost=cost, by=value["by"])


OWN = [f.name for f in fields(Record) if f.name not in ("cost", "by")]
COSTS = [f.name for f in fields(Cost)]


@dataclass
class Cold:
    """Cost of queries with every document new.

    Attributes:
        seconds, phases: one a query; phases are seconds by phase.
        documents: that were read in all.
        peak_rss_mb: MiB; None: not measured.
        measured: when, or why not.
    """

    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    documents: int = 0
    peak_rss_mb: float | None = None
    measured: str = "not measured"

    def write(self) -> bytes:
        """The file of timings."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, content: str, queries: int) -> Cold:
        """Timings of so many queries.

        Raises:
            ValueError, TypeError: they are not.
        """
        value: Any = json.loads(content)
        if not isinstance(value, dict) or value.keys() != {f.name for f in fields(cls)} or not len(value["seconds"]) == len(value["phases"]) == queries:
            raise ValueError("no timings of these queries")
        return cls(**value)


@dataclass(frozen=True)
class KernelRecords:
    """Records of the kernel check, one a query each.

    Attributes:
        definition: by plain torch in fp32.
        types: type of number → by the chosen kernels on documents in it.
    """

    definition: list[Record]
    types: dict[str, list[Record]]


@dataclass
class RowRecords:
    """All that is ranked and timed for one row of the table.

    Attributes:
        records: one a query.
        token_limit: own tokens of a document that are read; None: not known (a server's).
        cold: cost with every document new.
        exact: the same by torch in fp32, where another runtime or precision ranked; None: not ranked so.
        kernels: of the kernel check; None: not checked.
    """

    records: Sequence[Record]
    token_limit: int | None
    cold: Cold
    exact: Sequence[Record] | None = None
    kernels: KernelRecords | None = None
