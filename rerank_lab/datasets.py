"""A retrieval collection from where people keep them: BEIR folder or zip, Hugging Face hub, ir_datasets, or bundled."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.files import Json, expanded, hidden, unpacked

BUNDLED = Path(__file__).parent / "data"
MISSING_SHOWN = 3
HIGHEST = 100_000  # trec_eval keeps an array as long as a query's highest grade, and walks it for each measure
GRADES = f"grades are whole numbers from -{HIGHEST} to {HIGHEST}"

Qrels = dict[str, dict[str, int]]
Judgements = Iterable[tuple[str, str, Any, str]]  # query id, document id, grade as it stands there, where


@dataclass(frozen=True)
class Dataset:
    """One split of a collection.

    Attributes:
        name, split: as results call them.
        corpus: document id → text (title and text joined by a space), in file order.
        queries: query id → text, the judged queries of the split alone, in file order.
        qrels: query id → document id → grade; complete, whatever corpus and queries lack.
        hash: SHA-256 over corpus, queries and qrels as loaded.
        notes: what a reader of results should know (unknown ids, overlap with another split, …).
        facts: the same as figures, for results.json.
        place: query id and document id → where their judgement stands.
    """

    name: str
    split: str
    corpus: Mapping[str, str]
    queries: dict[str, str]
    qrels: Qrels
    hash: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)
    place: Callable[[str, str], str] = field(default="judgement of query {} and document {}".format, compare=False, repr=False)


@dataclass(frozen=True)
class Source:
    """What a loader gives: streams of (id, text, where), and the judgements of every split it has."""

    name: str
    documents: Callable[[], Iterable[tuple[str, str, str]]]
    queries: Callable[[], Iterable[tuple[str, str, str]]]
    judgements: dict[str, Callable[[], Judgements]]


def bundled_names() -> list[str]:
    """Collections that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/corpus.jsonl"))


def load_dataset(spec: str, split: str = "test", corpus: Mapping[str, str] | None = None) -> Dataset:
    """Loads a collection.

    Args:
        spec: a bundled name, a BEIR folder, a BEIR .zip, "hf:NAME" or "irds:ID".
        split: which judgements, e.g. "test".
        corpus: where texts are put, empty, with __setitem__ (corpus.Corpus); None: in memory.

    Raises:
        UserError: not found, malformed (file and line are named), empty, or without this split.
    """
    source = _source(expanded(spec))
    if split not in source.judgements:
        raise UserError(f"{spec}: no split {split!r}; it has {', '.join(sorted(source.judgements)) or 'no judgements at all'}")
    digest = hashlib.sha256()
    corpus = _collect(source.documents(), "document", digest, corpus)
    if not corpus:
        raise UserError(f"{spec}: the corpus is empty")
    digest.update(b"\n")
    judgements = source.judgements[split]
    qrels = _qrels(judgements())
    all_queries = _collect(source.queries(), "query", None)
    queries = {q: text for q, text in all_queries.items() if q in qrels}
    for q, text in queries.items():
        digest.update(f"{q}\0{text}\0".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(qrels, sort_keys=True).encode())
    if not queries:
        raise UserError(f"{spec}: no query of split {split!r} has both a text and a judgement")
    notes, facts = _check(split, corpus, all_queries, qrels, {s: load for s, load in source.judgements.items() if s != split})

    def place(query: str, document: str) -> str:
        return next(where for q, d, _, where in judgements() if (q, d) == (query, document))

    return Dataset(source.name, split, corpus, queries, qrels, digest.hexdigest(), notes, facts, place)


def _source(spec: str) -> Source:
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "hf":
        from rerank_lab.remote_datasets import hub_source

        return hub_source(rest)
    if colon and scheme == "irds":
        from rerank_lab.remote_datasets import ir_datasets_source

        return ir_datasets_source(rest)
    path = Path(spec)
    if path.is_dir():
        return _folder_source(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _zip_source(path)
    if path.is_file():
        raise UserError(f"{spec}: a file, but no zip archive; a BEIR collection is a folder or a .zip of one")
    if spec in bundled_names():
        return _folder_source(BUNDLED / spec)
    raise UserError(f"dataset {spec!r} is no folder, no .zip and not bundled ({', '.join(bundled_names())}); elsewhere: hf:NAME, irds:ID")


def _folder_source(folder: Path) -> Source:
    missing = [n for n in ("corpus.jsonl", "queries.jsonl", "qrels") if not (folder / n).exists() and not (folder / f"{n}.gz").exists()]
    if missing:
        raise UserError(f"{folder}: not in BEIR's layout, {', '.join(missing)} missing")
    places = [folder / name for name in ("corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz")]
    places += [Path(place) / name for place, _, names in os.walk(folder / "qrels", followlinks=True) for name in names]
    return _beir_source(folder.resolve().name, {p.relative_to(folder).as_posix(): p for p in places if p.is_file()}, lambda p: p.open("rb"), str)


def _zip_source(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise UserError(f"{path}: not a whole zip archive: {error or type(error).__name__}") from error
    names = {name.replace("\\", "/"): name for name in archive.namelist()}  # some programs of Windows write its separator
    found = {match[1] for name in names if (match := re.fullmatch(r"(.*/|)corpus\.jsonl(\.gz)?", name)) and not hidden(name.removeprefix(match[1]))}
    roots = {root for root in found if not hidden(root)} or found
    if len(roots) != 1:
        raise UserError(f"{path}: needs exactly one corpus.jsonl inside, found {len(roots)}")
    root = roots.pop()
    members = {name.removeprefix(root): own for name, own in names.items() if name.startswith(root)}
    return _beir_source(path.stem, members, archive.open, lambda n: f"{path}!{n}")


def _beir_source(name: str, files: dict[str, Any], open_file: Callable[[Any], Any], label: Callable[[Any], str]) -> Source:
    files = {relative: file for relative, file in files.items() if not hidden(relative)}

    def lines(relative: str) -> Iterator[tuple[str, str]]:
        if relative not in files and f"{relative}.gz" in files:
            relative = f"{relative}.gz"
        if relative not in files:
            raise UserError(f"{name}: {relative} is missing")
        try:
            with open_file(files[relative]) as file:
                for number, raw in enumerate(unpacked(file, label(files[relative])), 1):
                    where = f"{label(files[relative])}:{number}"
                    try:
                        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
                    if line.strip():
                        yield where, line
        except UserError:
            raise
        except Exception as error:  # of a damaged archive zipfile and each of its decoders raise their own
            raise UserError(f"{label(files[relative])} cannot be read: {error or type(error).__name__}") from error

    def texts(relative: str) -> Iterator[tuple[str, str, str]]:
        for where, line in lines(relative):
            yield *_record(line, where), where

    def judgements(path: str) -> Judgements:
        return _read_judgements(lines(path))

    splits = dict.fromkeys(path.removesuffix(".gz") for path in sorted(files) if re.fullmatch(r"qrels/.+\.tsv(\.gz)?", path, re.DOTALL))
    return Source(
        name,
        lambda: texts("corpus.jsonl"),
        lambda: texts("queries.jsonl"),
        {path.removeprefix("qrels/").removesuffix(".tsv"): partial(judgements, path) for path in splits},
    )


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one object") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return record_text(value, where)


def record_text(value: dict[str, Any], where: str) -> tuple[str, str]:
    """(id, text) of a BEIR or MTEB record; a title stands before the text, joined by a space."""
    identifier = next((value[key] for key in ("_id", "id") if key in value), None)
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or str(identifier).strip() == "":
        raise UserError(f"{where}: no _id (a string)")
    identifier = check_id(str(identifier), where)
    text, title = value.get("text"), value.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{where}: text (a string) is missing" if text is None else f"{where}: text and title must be strings")
    if not valid_text(title + text + identifier):
        raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff alone), which is no text")
    return identifier, f"{title} {text}".strip() if title else text


def check_id(identifier: str, where: str) -> str:
    """The id itself; white space and control characters cannot stand in a TREC run file.

    Raises:
        UserError: it holds some.
    """
    if not identifier.isprintable() or " " in identifier:
        raise UserError(f"{where}: the id {identifier!r} holds white space or control characters, which TREC run files cannot carry")
    return identifier


def valid_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; half of a surrogate pair, which JSON can smuggle in, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_judgements(lines: Iterable[tuple[str, str]]) -> Judgements:
    for i, (where, line) in enumerate(lines):
        text = line.rstrip("\r\n")
        try:  # quotes as BEIR's own loader takes them
            parts = next(csv.reader([text], delimiter="\t", strict=True)) if '"' in text else text.split("\t")
        except csv.Error:
            parts = []
        if i == 0 and len(parts) >= 3 and (parts[-1].strip()[:1].isalpha() or not any(character.isdecimal() for character in parts[-1])):
            continue  # names of columns
        if len(parts) == 4:  # TREC's second column
            parts = [parts[0], parts[2], parts[3]]
        if len(parts) != 3 or not parts[0].strip() or not parts[1].strip() or _grade(parts[2]) is None:
            raise UserError(f"{where}: needs query-id, corpus-id and a whole-number score, separated by tabs: {line.strip()[:80]!r}")
        yield parts[0].strip(), parts[1].strip(), parts[2], where


def _qrels(judgements: Judgements) -> Qrels:
    """Judgements by query; a repeated pair must repeat its grade."""
    qrels: Qrels = {}
    for query, document, value, where in judgements:
        check_id(query, where), check_id(document, where)
        grade = _grade(value)
        if grade is None or abs(grade) > HIGHEST:
            raise UserError(f"{where}: the score {value!r} is {'no whole number' if grade is None else 'too large'}; {GRADES}")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UserError(f"{where}: query {query} and document {document} are judged twice, {qrels[query][document]} and {grade}")
    return qrels


def _grade(value: Any) -> int | None:
    """2 of 2, 2.0, "2", "2.0" and "2e0"; None of what is no whole number."""
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if len(text) <= 40 and re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", text) else None
    if isinstance(value, Integral):
        return int(value)
    return int(number) if isinstance(value, Real) and (number := float(value)).is_integer() else None


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
