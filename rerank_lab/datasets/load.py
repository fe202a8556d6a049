"""Loads a collection by its name: from a BEIR folder or zip, the Hugging Face hub, ir_datasets, or the package."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rerank_lab.datasets.beir import BUNDLED, bundled_names, folder_collection, zip_collection
from rerank_lab.datasets.dataset import GRADES, HIGHEST_GRADE, Collection, Dataset, Judgements, Qrels, check_id, grade_of
from rerank_lab.errors import UserError
from rerank_lab.files import Json, expanded

MISSING_SHOWN = 3


def load_dataset(spec: str, split: str = "test", corpus: Mapping[str, str] | None = None) -> Dataset:
    """Loads one split of a collection.

    Args:
        spec: a bundled name, a BEIR folder, a BEIR .zip, "hf:NAME" or "irds:ID".
        split: which judgements, e.g. "test".
        corpus: an empty mapping with __setitem__ (corpus.Corpus) that the documents are put into; None: a dict.

    Raises:
        UserError: the collection is not found, malformed (the message names file and line), empty, or lacks this split.
    """
    collection = _collection(expanded(spec))
    if split not in collection.judgements:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(sorted(collection.judgements)) or 'no judgements at all'}")
    digest = hashlib.sha256()
    corpus = _collect(collection.documents(), "document", digest, corpus)
    if not corpus:
        raise UserError(f"{spec}: the corpus is empty")
    digest.update(b"\n")
    judgements = collection.judgements[split]
    qrels = _qrels(judgements())
    all_queries = _collect(collection.queries(), "query", None)
    queries = {q: text for q, text in all_queries.items() if q in qrels}
    for q, text in queries.items():
        digest.update(f"{q}\0{text}\0".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(qrels, sort_keys=True).encode())
    if not queries:
        raise UserError(f"{spec}: no query of split {split!r} has both a text and a judgement")
    notes, facts = _check(split, corpus, all_queries, qrels, {s: load for s, load in collection.judgements.items() if s != split})

    def place(query: str, document: str) -> str:
        return next(where for q, d, _, where in judgements() if (q, d) == (query, document))

    return Dataset(collection.name, split, corpus, queries, qrels, digest.hexdigest(), notes, facts, place)


def _collection(spec: str) -> Collection:
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "hf":
        from rerank_lab.datasets.hub import hub_collection

        return hub_collection(rest)
    if colon and scheme == "irds":
        from rerank_lab.datasets.irds import ir_datasets_collection

        return ir_datasets_collection(rest)
    path = Path(spec)
    if path.is_dir():
        return folder_collection(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return zip_collection(path)
    if path.is_file():
        raise UserError(f"{spec}: a file, but no zip archive; a BEIR collection is a folder or a .zip of one")
    if spec in bundled_names():
        return folder_collection(BUNDLED / spec)
    raise UserError(f"dataset {spec!r} is no folder, no .zip and not bundled ({', '.join(bundled_names())}); elsewhere: hf:NAME, irds:ID")


def _qrels(judgements: Judgements) -> Qrels:
    """Judgements by query. A pair that is judged twice must have the same grade both times."""
    qrels: Qrels = {}
    for query, document, value, where in judgements:
        check_id(query, where), check_id(document, where)
        grade = grade_of(value)
        if grade is None or abs(grade) > HIGHEST_GRADE:
            raise UserError(f"{where}: the score {value!r} is {'no whole number' if grade is None else 'too large'}; {GRADES}")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UserError(f"{where}: query {query} and document {document} are judged twice, {qrels[query][document]} and {grade}")
    return qrels


def _collect(records: Iterable[tuple[str, str, str]], kind: str, digest: Any, found: Any = None) -> Any:
    found = {} if found is None else found
    for identifier, text, where in records:
        if identifier in found:
            raise UserError(f"{where}: {kind} id {identifier!r} stands here a second time")
        found[identifier] = text
        if digest is not None:
            digest.update(f"{identifier}\0{text}\0".encode("utf-8", "surrogatepass"))
    return found


def _check(
    split: str, corpus: Mapping[str, str], queries: dict[str, str], qrels: Qrels, others: dict[str, Callable[[], Judgements]]
) -> tuple[list[str], dict[str, Json]]:
    notes: list[str] = []
    unknown = [f"{q}/{d}" for q, judged in qrels.items() for d in judged if d not in corpus]
    if unknown:
        notes.append(
            f"{len(unknown)} judgements name documents that the corpus lacks ({', '.join(unknown[:MISSING_SHOWN])} …); they count in the ideal ranking"
        )
    silent = [q for q in qrels if q not in queries]
    if silent:
        notes.append(f"{len(silent)} judged queries have no text ({', '.join(silent[:MISSING_SHOWN])} …) and get no candidates and score 0")
    blank = [q for q in qrels if q in queries and not queries[q].strip()]
    if blank:
        notes.append(f"{len(blank)} judged queries are blank ({', '.join(blank[:MISSING_SHOWN])} …): they get no candidates and score 0")
    same = sorted(q for q in qrels if q in corpus and q in queries)
    relevant = {d for judged in qrels.values() for d, grade in judged.items() if grade > 0}
    overlap: dict[str, Json] = {}
    for other, load in others.items():
        try:
            known = _qrels(load())
        except UserError as error:
            notes.append(f"split {other} cannot be compared with {split}: {error}")
            continue
        shared = relevant & {d for judged in known.values() for d, grade in judged.items() if grade > 0}
        texts = {queries[q] for q in qrels if q in queries} & {queries[q] for q in known if q in queries}
        if shared or texts:
            overlap[other] = {"relevant_documents": len(shared), "query_texts": len(texts)}
            notes.append(
                f"{len(shared)} of {len(relevant)} documents relevant in {split} are relevant in {other} too, "
                f"and {len(texts)} query texts stand in both: mind it with a model trained on {other}"
            )
    facts: dict[str, Json] = {
        "documents": len(corpus), "queries": sum(q in queries for q in qrels), "judgements": sum(map(len, qrels.values())),
        "unknown_judged_documents": len(unknown), "judged_queries_without_text": len(silent), "ids_both_query_and_document": len(same), "overlap": overlap,
    }  # fmt: skip
    return notes, facts
