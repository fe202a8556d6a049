"""Candidates by BM25 over all documents."""

from __future__ import annotations

from collections.abc import Mapping

from rerank_lab.datasets.runs import Ranked, Run, order
from rerank_lab.files import Json
from rerank_lab.first_stage.base import Context
from rerank_lab.first_stage.lexical import BM25, PARAMETERS, TOKENIZERS, WORDS


class BM25Stage:
    """Documents that share a term with the query, by BM25. Equal scores are in corpus order."""

    def __init__(self, context: Context, argument: str):
        self.context, self.notes = context, list[str]()
        self.count = 0
        self.tokenized = dict.fromkeys(TOKENIZERS, 0)  # tokenizer → queries

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """As FirstStage.search."""
        corpus, run, self.count = self.context.dataset.corpus, Run(), len(queries)
        ids, index = list(corpus), BM25(list(corpus.values()))
        for query, text in self.context.progress(queries.items(), "bm25"):
            self.tokenized[index.tokenizer(text)] += 1
            scores = index.scores(text)
            best = order(scores)[:k]
            best = best[scores[best] > 0]
            run[query] = Ranked([ids[i] for i in best], scores[best])
        return run

    def about(self) -> dict[str, Json]:
        """As FirstStage.about."""
        others = [f"{said} for {self.tokenized[name]} of {self.count} queries" for name, said in TOKENIZERS.items() if name != WORDS and self.tokenized[name]]
        return {"parameters": PARAMETERS | {"tokenizer": "; ".join([TOKENIZERS[WORDS], *others])}}
