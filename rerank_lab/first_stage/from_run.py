"""Candidates from the run file of another system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rerank_lab.datasets.runs import Ranked, Run, read_run
from rerank_lab.errors import UserError
from rerank_lab.files import Json, file_hash
from rerank_lab.first_stage.base import Context


class RunStage:
    """Reads a run file, and keeps its judged queries and the documents that the collection has.

    Raises:
        UserError: the file cannot be read, or is a pipe.
    """

    def __init__(self, context: Context, argument: str):
        self.dataset, self.path, self.notes = context.dataset, Path(argument), list[str]()
        self.digest = file_hash(self.path)

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search. Equal scores keep the order of the file.

        Raises:
            UserError: as read_run, or nothing in the file belongs to this collection.
        """
        given, corpus = read_run(self.path, self.dataset.split), self.dataset.corpus
        unknown_queries = [q for q in given if q not in self.dataset.qrels]
        unknown = sum(d not in corpus for q, r in given.items() if q in queries for d in r.documents)
        if unknown_queries:
            self.notes.append(f"{self.path}: {len(unknown_queries)} queries have no judgement in this split ({', '.join(unknown_queries[:3])} …); left out")
        if unknown:
            self.notes.append(f"{self.path}: {unknown} candidates are not in the corpus; left out")
        ties, run = list[int](), Run()
        for q in (q for q in queries if q in given):
            known = np.array([i for i, d in enumerate(given[q].documents) if d in corpus], dtype=np.int64)
            equal = np.diff(given[q].scores[known]) == 0
            ties.append(int((np.append(equal, False) | np.insert(equal, 0, False))[:k].sum()))  # also ties across the cut at k
            run[q] = Ranked([given[q].documents[i] for i in known[:k]], given[q].scores[known[:k]])
        if any(ties):
            self.notes.append(
                f"{self.path}: {sum(ties)} candidates of {np.count_nonzero(ties)} queries have another's score in fp32, in which trec_eval compares; "
                "it sorts such by id, and here the full score decides, then the place in the file, so that its figures for this file may differ"
            )
        if not any(r.documents for r in run.values()):
            raise UserError(f"{self.path}: none of its queries and documents belong to {self.dataset.name} ({self.dataset.split})")
        return run

    def about(self) -> dict[str, Json]:
        """As FirstStage.about."""
        return {"file": self.path.name, "file_sha256": self.digest}
