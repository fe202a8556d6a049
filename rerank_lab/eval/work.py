"""What a row of the table ranks, who ranks it, and what is done already."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rerank_lab.client.endpoint import Endpoint
from rerank_lab.datasets.dataset import Dataset
from rerank_lab.eval.executors.base import Executor
from rerank_lab.eval.executors.local import Local
from rerank_lab.eval.journal import Journal
from rerank_lab.eval.records import Cold, Record
from rerank_lab.eval.rows import Ranks, bar, queries_of
from rerank_lab.first_stage.candidates import Candidates


@dataclass(frozen=True)
class Work:
    """A collection with its candidates, who ranks them, and what is done already."""

    executor: Executor
    dataset: Dataset
    candidates: Candidates
    journal: Journal

    def records(self, label: str, ranks: Ranks) -> list[Record]:
        """Ranks every query that the journal lacks; all records, in the order of the candidates."""
        done = {record.query: record for record in self.journal.records(label)}
        queries = queries_of(self.dataset, self.candidates)
        left = [query for query in queries if query.id not in done]
        executor = Local() if isinstance(ranks, Endpoint) else self.executor  # a server is its own machine
        for record in bar(executor.rank(ranks, left, self.dataset.corpus), label, total=len(left)) if left else ():
            if record.query not in done:
                done[record.query] = replace(record, by=executor.name)
                self.journal.append(label, done[record.query])
        return [done[query.id] for query in queries]

    def cold(self, label: str, ranks: Ranks, count: int) -> Cold:
        """Cost of the first `count` queries with every document new."""
        about = {"dataset": self.dataset.hash, "candidates": self.candidates.hash}
        executor = Local() if isinstance(ranks, Endpoint) else self.executor
        return executor.cold(label, ranks, queries_of(self.dataset, self.candidates)[:count], self.dataset.corpus, about)
