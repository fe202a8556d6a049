"""What the first stage hands over: candidates a query, hashed, with the recall and the ceiling they set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rerank_lab.corpus import digests
from rerank_lab.datasets import Dataset
from rerank_lab.errors import UserError
from rerank_lab.files import expanded
from rerank_lab.lexical import BM25, PARAMETERS, TOKENIZERS, WORDS
from rerank_lab.run import Ranked, Run, order, read_run

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Found = tuple[torch.Tensor, torch.Tensor]  # of B queries: the values of the nearest, B × K, descending, and their places
QUERY_BATCH = 64


@dataclass(frozen=True)
class Candidates:
    """First-stage results.

    Attributes:
        run: at most top_k documents a query, best first, with the first stage's scores; queries without any are absent.
        about: the source and its parameters, the hash (SHA-256 over query ids and document ids in order) and counts.
        notes: what a reader should know.
    """

    run: Run
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def cut(self, top_k: int) -> Candidates:
        """The best top_k a query, as the same first stage would have given them."""
        if top_k >= self.about["top_k"]:
            return self
        run = {q: Ranked(r.documents[:top_k], r.scores[:top_k]) for q, r in self.run.items()}
        return Candidates(run, self.about | _facts(run, top_k), self.notes)


def make_candidates(
    source: str,
    dataset: Dataset,
    top_k: int,
    *,
    search: Callable[[list[str], list[str], int], list[Found]],
    drop_identical: bool,
    progress: Progress,
) -> Candidates:
    """Candidates for every query of a dataset.

    Args:
        source: "bm25", "dense" or "run:FILE", a run that read_run reads.
        dataset: the collection.
        top_k: candidates a query at most.
        search: document ids, texts of queries and K → the K nearest of these documents, in batches of QUERY_BATCH queries, for dense.
        drop_identical: leave out the document whose id is the query's.
        progress: wraps an iterable in a progress bar with a title.

    Raises:
        UserError: an unknown source or a run file that does not fit.
    """
    ids, notes = list(dataset.corpus), []
    kind, _, path = expanded(source).partition(":")
    queries = {q: text for q, text in dataset.queries.items() if text.strip()}
    fetch = top_k + 1 if drop_identical else top_k
    run: Run = {}
    if kind == "bm25" and not path:
        index, ways = BM25(list(dataset.corpus.values())), dict.fromkeys(TOKENIZERS, 0)
        for q, text in progress(queries.items(), "bm25"):
            ways[index.tokenizer(text)] += 1
            scores = index.scores(text)
            best = order(scores)[:fetch]
            best = best[scores[best] > 0]
            run[q] = Ranked([ids[i] for i in best], scores[best])
        others = [f"{said} for {ways[way]} of {len(queries)} queries" for way, said in TOKENIZERS.items() if way != WORDS and ways[way]]
        about: dict[str, Any] = {"source": "bm25", "parameters": PARAMETERS | {"tokenizer": "; ".join([TOKENIZERS[WORDS], *others])}}
    elif kind == "dense" and not path:
        # Each distinct text once: rounding differs by a row's place in a matrix product, and equal texts must tie.
        groups: dict[bytes | str, list[int]] = {}
        for i, text in enumerate(digests(dataset.corpus)):
            groups.setdefault(text, []).append(i)
        repeats, items = list(groups.values()), list(queries.items())
        found = search([ids[own[0]] for own in repeats], [text for _, text in items], fetch)
        for n, (values, places) in enumerate(found):
            for (q, _), row, distinct in zip(items[n * QUERY_BATCH :], values.numpy(), places.tolist()):
                ranked = sorted((-score, i) for score, d in zip(row, distinct) for i in repeats[d])[:fetch]
                run[q] = Ranked([ids[i] for _, i in ranked], np.array([-score for score, _ in ranked], dtype=np.float32))
        about = {"source": "dense"}
    elif kind == "run" and path:
        digest, given = file_hash(Path(path)), read_run(Path(path), dataset.split)
        unknown_queries = [q for q in given if q not in dataset.qrels]
        unknown = sum(d not in dataset.corpus for q, r in given.items() if q in queries for d in r.documents)
        if unknown_queries:
            notes.append(f"{path}: {len(unknown_queries)} queries have no judgement in this split ({', '.join(unknown_queries[:3])} …); left out")
        if unknown:
            notes.append(f"{path}: {unknown} candidates are not in the corpus; left out")
        ties: list[int] = []
        for q in (q for q in queries if q in given):
            known = np.array([i for i, d in enumerate(given[q].documents) if d in dataset.corpus], dtype=np.int64)
            equal = np.diff(given[q].scores[known]) == 0
            ties.append(int((np.append(equal, False) | np.insert(equal, 0, False))[:fetch].sum()))  # with those that the cut parts
            run[q] = Ranked([given[q].documents[i] for i in known[:fetch]], given[q].scores[known[:fetch]])
        if any(ties):
            notes.append(
                f"{path}: {sum(ties)} candidates of {np.count_nonzero(ties)} queries have another's score in fp32, in which trec_eval compares; "
                "it sorts such by id, and here the full score decides, then the place in the file, so that its figures for this file may differ"
            )
        if not any(r.documents for r in run.values()):
            raise UserError(f"{path}: none of its queries and documents belong to {dataset.name} ({dataset.split})")
        about = {"source": "run", "file": Path(path).name, "file_sha256": digest}
    else:
        raise UserError(f"candidates {source!r} are not known; valid: bm25, dense, run:FILE")
    if drop_identical:
        run = {q: _without(r, q, top_k) for q, r in run.items()}
    run = {q: r for q, r in run.items() if r.documents}
    without = len(dataset.qrels) - len(run)
    if without:
        notes.append(f"{without} of {len(dataset.qrels)} judged queries have no candidates: they score 0 and count")
    return Candidates(run, about | {"drop_identical_ids": drop_identical, "queries_without": without} | _facts(run, top_k), notes)


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read, or not twice: a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no file but a pipe; write the run to a file first, which results then name by its hash")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _facts(run: Run, top_k: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for q, r in run.items():
        digest.update(" ".join([q, *r.documents]).encode() + b"\n")  # no id holds either
    return {
        "top_k": top_k,
        "hash": digest.hexdigest(),
        "documents_per_query": float(np.mean([len(r.documents) for r in run.values()])) if run else 0.0,
    }


def oracle(run: Run, dataset: Dataset) -> Run:
    """The same candidates in the best order that judgements allow: the ceiling of any reranker."""
    best: Run = {}
    for q, ranked in run.items():
        grades = np.array([dataset.qrels[q].get(d, 0) for d in ranked.documents], dtype=np.float32)
        places = order(grades)
        best[q] = Ranked([ranked.documents[i] for i in places], grades[places])
    return best


def better(before: Found, later: Found, k: int) -> Found:
    """The best k of two blocks' values and places, B × … each, descending; of equal ones those of the earlier block stand first."""
    values, places = (torch.cat(pair, 1) for pair in zip(before, later))
    kept = torch.sort(values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, kept), places.gather(1, kept)


def _without(ranked: Ranked, identifier: str, top_k: int) -> Ranked:
    kept = np.array([i for i, d in enumerate(ranked.documents) if d != identifier][:top_k], dtype=np.int64)
    return Ranked([ranked.documents[i] for i in kept], ranked.scores[kept])
