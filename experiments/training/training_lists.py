"""The training data of experiments/training/train_cross_encoder.py: pools of candidates with judgements, a teacher's scores, or both."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rerank_kernels import similarity_topk
from rerank_lab.datasets import Dataset, load_dataset
from rerank_lab.datasets.dataset import record_text
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically
from rerank_lab.first_stage.lexical import BM25
from rerank_lab.reranker import Reranker

TOP_K = 100
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Example:
    """One query with its candidates.

    Attributes:
        query: its text.
        documents: the candidates' texts, nearest first, then relevant documents that the first stage missed.
        relevant: positions of the relevant documents.
        teacher: the teacher's scores of all documents, with zero mean and unit variance.
        found: number of documents that the first stage found.
    """

    query: str
    documents: list[str]
    relevant: list[int]
    teacher: np.ndarray
    found: int


def read_corpus(folder: Path) -> dict[str, tuple[str, str]]:
    """Id → (title, title and text) of a BEIR folder's corpus."""
    path, found = folder / "corpus.jsonl", {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                identifier, text = record_text(record, f"{path}:{number}")
                found[identifier] = (str(record.get("title") or ""), text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return found


def split(dataset: Dataset, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Splits the queries into ids to train on and ids held out. The two share no query text and no relevant document."""
    groups: dict[str, str] = {}

    def root(name: str) -> str:
        while groups.setdefault(name, name) != name:
            name = groups[name]
        return name

    for q, judged in dataset.qrels.items():
        for other in (f"text {dataset.queries[q].strip().lower()}", *(f"document {d}" for d, grade in judged.items() if grade > 0)):
            groups[root(other)] = root(f"query {q}")
    parts: dict[str, list[str]] = {}
    for q in dataset.qrels:
        parts.setdefault(root(f"query {q}"), []).append(q)
    shuffled = list(parts.values())
    random.Random(seed).shuffle(shuffled)
    held: list[str] = []
    for part in shuffled:
        if len(held) + len(part) <= held_out:
            held += part
    return [q for q in dataset.qrels if q not in set(held)], held


def pseudo_queries(corpus: dict[str, tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """Queries made from a corpus, as (text, id of its document): titles of three words or more and sentences, about one for each document."""
    rng, ids = random.Random(seed), list(corpus)
    found: list[tuple[str, str]] = []
    for identifier in rng.sample(ids, min(count, len(ids))):
        title, text = corpus[identifier]
        sentences = [
            " ".join(s.split())
            for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\n+", text[len(title) :])
            if 5 <= len(s.split()) <= 40 and sum(c.isalpha() or c == " " for c in s) > 0.85 * len(s)
        ]
        if len(title.split()) >= 3 and (not sentences or rng.random() < 0.4):
            found.append((title, identifier))
        elif sentences:
            found.append((rng.choice(sentences), identifier))
    return found


def examples(
    corpus: dict[str, str], queries: Sequence[tuple[str, list[str], str | None]], teacher: Reranker | str, encoder: Reranker, work: Path, progress: Progress
) -> list[Example]:
    """Makes a pool of the nearest documents for each query, with the teacher's scores. The work folder keeps them, so they are made only once.

    Args:
        corpus: id → text.
        queries: (text, ids of relevant documents, id of a document to leave out or None).
        teacher: a reranker, or "bm25".
        encoder: gives pooled vectors.
        work: the work folder.
        progress: wraps an iterable in a progress bar with a title.
    """
    if not queries:
        return []
    ids = list(corpus)
    place = {identifier: i for i, identifier in enumerate(ids)}
    name = teacher if isinstance(teacher, str) else f"{teacher.method.name}{teacher.method.settings()}"
    digest = hashlib.sha256(json.dumps([name, encoder.fingerprints(), list(corpus.items()), queries]).encode()).hexdigest()[:16]
    path = work / f"pools-{digest}.jsonl"
    if not path.is_file():
        pooled = encoder.pooled(list(corpus.values()))
        lexical = BM25(list(corpus.values())) if isinstance(teacher, str) else None
        nearest = similarity_topk(encoder.pooled([text for text, _, _ in queries], kind="query"), pooled, min(TOP_K + 1, len(ids)))[1].tolist()
        lines = []
        for (text, relevant, source), near in progress(list(zip(queries, nearest)), "pools"):
            pool = [i for i in near if ids[i] != source][:TOP_K]
            found = len(pool)
            pool += [place[d] for d in relevant if d in place and place[d] not in pool]
            if lexical is not None:
                scores = lexical.scores(text)[pool].tolist()
            else:
                assert isinstance(teacher, Reranker)
                ranking = teacher.score(text, [corpus[ids[i]] for i in pool])
                scores = torch.full((len(pool),), float(ranking.scores.min())).index_copy_(0, torch.tensor(ranking.order), ranking.scores).tolist()
            lines.append(json.dumps([pool, scores, found]) + "\n")
        write_atomically(path, "".join(lines))
    made = []
    for (text, relevant, _), line in zip(queries, path.read_text().splitlines()):
        pool, scores, found = json.loads(line)
        values = np.array(scores)
        values = (values - values.mean()) / max(values.std(), 1e-6)
        made.append(Example(text, [corpus[ids[i]] for i in pool], [n for n, i in enumerate(pool) if ids[i] in set(relevant)], values, found))
    return made


def write_split(folder: Path, source: Path, queries: Sequence[str], dataset: Dataset) -> None:
    """Writes a BEIR folder for rerank_lab.eval whose split `dev` has only these queries."""
    write_atomically(folder / "corpus.jsonl", (source / "corpus.jsonl").read_bytes())
    write_atomically(folder / "queries.jsonl", "".join(json.dumps({"_id": q, "text": dataset.queries[q]}) + "\n" for q in queries))
    lines = "".join(f"{q}\t{d}\t{grade}\n" for q in queries for d, grade in dataset.qrels[q].items())
    write_atomically(folder / "qrels" / "dev.tsv", f"query-id\tcorpus-id\tscore\n{lines}")


def labelled(folder: Path) -> Dataset:
    """The train split of a collection, without judgements of missing documents, and without queries that have no text or no relevant document."""
    dataset = load_dataset(str(folder), "train")
    known = {q: {d: grade for d, grade in judged.items() if d in dataset.corpus} for q, judged in dataset.qrels.items()}
    kept = {q: judged for q, judged in known.items() if dataset.queries.get(q, "").strip() and max(judged.values(), default=0) > 0}
    return Dataset(dataset.name, dataset.split, dataset.corpus, dataset.queries, kept, dataset.hash, dataset.notes, dataset.facts)
