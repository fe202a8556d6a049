"""The ranking that a row of the table needs, without the queries that are done already."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rerank_lab.client.endpoint import Endpoint
from rerank_lab.datasets.dataset import Dataset
from rerank_lab.eval.executors.base import Executor
from rerank_lab.eval.executors.local import LocalExecutor
from rerank_lab.eval.journal import Journal
from rerank_lab.eval.records import ColdCost, Record
from rerank_lab.eval.rows import Ranker, bar, queries_of
from rerank_lab.first_stage.candidates import Candidates


@dataclass(frozen=True)
class RankingWork:
    """What is to be ranked for each row.

    Attributes:
        executor: does the work, here or on a cluster.
        dataset, candidates: what is ranked.
        journal: has the records that are done already.
    """

    executor: Executor
    dataset: Dataset
    candidates: Candidates
    journal: Journal

    def records(self, label: str, ranker: Ranker) -> list[Record]:
        """Ranks every query of a row that the journal lacks. Returns all records of the row, in the order of the candidates."""
        done = {record.query: record for record in self.journal.records(label)}
        queries = queries_of(self.dataset, self.candidates)
        left = [query for query in queries if query.id not in done]
        executor = LocalExecutor() if isinstance(ranker, Endpoint) else self.executor  # a server is its own machine
        for record in bar(executor.rank(ranker, left, self.dataset.corpus), label, total=len(left)) if left else ():
            if record.query not in done:
                done[record.query] = replace(record, by=executor.name)
                self.journal.append(label, done[record.query])
        return [done[query.id] for query in queries]

    def cold(self, label: str, ranker: Ranker, count: int) -> ColdCost:
        """The cost of the row's first `count` queries when every document is new."""
        about = {"dataset": self.dataset.hash, "candidates": self.candidates.hash}
        executor = LocalExecutor() if isinstance(ranker, Endpoint) else self.executor
        return executor.cold(label, ranker, queries_of(self.dataset, self.candidates)[:count], self.dataset.corpus, about)
