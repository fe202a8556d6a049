"""Runs: ranked documents for each query, the project's one total order, and reading and writing run files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from gzip import GzipFile
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from rerank_lab.errors import UserError
from rerank_lab.files import opened

LARGEST_SCORE = float(np.finfo(np.float32).max)
BOM, MTEB = b"\xef\xbb\xbf", "mteb_model_meta"


@dataclass(frozen=True)
class Ranked:
    """The n ranked documents of one query, best first.

    Attributes:
        documents: n ids.
        scores: n scores, fp32, never rising.
    """

    documents: list[str]
    scores: np.ndarray


Run = dict[str, Ranked]  # query id → its documents


def order(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """The project's one total order: score descending, equal scores in input order.

    Returns:
        positions into `scores`, int64, best first.

    Raises:
        ValueError: a score is NaN.
    """
    values = np.asarray(scores)
    if np.isnan(values).any():
        raise ValueError("a NaN score cannot be ranked")
    return np.argsort(-values, kind="stable")


def tie_rate(run: Run) -> float:
    """Share of ranked documents whose score equals the score of the one before them."""
    ties = sum(int((r.scores[1:] == r.scores[:-1]).sum()) for r in run.values())
    return ties / max(1, sum(len(r.documents) for r in run.values()))


def rank_scores(ranked: Ranked) -> list[float]:
    """Scores n, n − 1, … 1 in place of n real ones. Tools that sort by score cannot reorder ties then."""
    return [float(len(ranked.documents) - i) for i in range(len(ranked.documents))]


def trec_lines(run: Run, tag: str) -> Iterator[str]:
    """The lines of a TREC run file. Scores are those of `rank_scores`; `tag` is the last column."""
    for query, ranked in run.items():
        for i, (document, score) in enumerate(zip(ranked.documents, rank_scores(ranked))):
            yield f"{query} Q0 {document} {i + 1} {score:.0f} {tag}\n"


def read_run(path: Path, split: str = "test") -> Run:
    """Reads a run file, gzipped or not. The format is recognised by the content.

    Formats: TREC; Parquet with the columns query, document and score; JSON {query: {document: score}}, as ranx writes it;
    MTEB's predictions. A query's documents are ordered by score, equal scores in the order of the file.

    Args:
        path: the file.
        split: which split of MTEB's predictions.

    Raises:
        UserError: the file is missing, unreadable or of another format; a score is not finite; a document is repeated.
    """
    with opened(path) as file:
        start = file.peek(64).removeprefix(BOM).lstrip()
        if start.startswith(b"PAR1"):
            return _read_parquet(path, file)
        return _read_json(path, file, split) if start[:1] in (b"{", b"[") else _read_lines(path, file)


def _read_json(path: Path, file: BufferedReader, split: str) -> Run:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"{path}: {max(keys, key=keys.count)!r} stands twice in one object")
        return found

    try:
        value = json.load(TextIOWrapper(file, encoding="utf-8-sig"), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: neither JSON ({error}) nor a TREC run") from None
    if isinstance(value, dict) and (value.pop(MTEB, None) is not None or any(isinstance(v, dict) for v in _values(_values(_values([value]))))):
        if len(value) != 1:
            raise UserError(f"{path}: MTEB's predictions of {len(value)} subsets ({', '.join(value)}); keep those of one")
        splits = next(iter(value.values()))
        if not isinstance(splits, dict) or split not in splits:
            raise UserError(f"{path}: MTEB's predictions of {', '.join(splits) if isinstance(splits, dict) else 'no split'}, and not of the split {split!r}")
        value = splits[split]
    if not isinstance(value, dict) or not all(isinstance(scored, dict) for scored in value.values()):
        raise UserError(f"{path}: a run in JSON is {{query: {{document: score}}}}, or what MTEB writes as predictions of retrieval")
    for query, scored in value.items():
        for document, score in scored.items():
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= LARGEST_SCORE:
                raise UserError(f"{path}: query {query}, document {document}: the score {str(score)[:40]!r} is no number that is finite in fp32")
    return _ranked(value)


def _values(level: Iterable[Any]) -> Iterator[Any]:
    return (inner for outer in level if isinstance(outer, dict) for inner in outer.values())


def _ranked(found: Mapping[str, Mapping[str, float]]) -> Run:
    """A run of query → document → score: each query's documents in the one total order."""
    run: Run = {}
    for query, scored in found.items():
        documents, scores = list(scored), np.array(list(scored.values()), dtype=np.float64)
        ranks = order(scores)
        run[query] = Ranked([documents[i] for i in ranks], scores[ranks].astype(np.float32))
    return run


def _read_parquet(path: Path, file: BufferedReader) -> Run:
    import pyarrow.parquet as pq
    from pyarrow.types import is_nested as nested

    place = BytesIO(file.read()) if isinstance(file, GzipFile) else path
    wanted = ["query", "document", "score"]
    try:
        schema = pq.read_schema(place)
        names = schema.names
        missing = [name for name in wanted if name not in names or nested(schema.field(name).type)]
        frame = (
            None if missing else pq.read_table(place, columns=wanted + ["method"] * ("method" in names)).to_pandas(ignore_metadata=True)
        )  # pandas metadata could turn columns into an index
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise UserError(f"{path}: no Parquet file that can be read ({str(error).partition(chr(10))[0]})") from None
    if frame is None:
        raise UserError(f"{path}: needs the columns query, document and score, a value each, and has {', '.join(names)}")
    if "method" in frame and frame["method"].nunique() > 1:
        raise UserError(f"{path}: holds rankings of several methods ({', '.join(map(str, frame['method'].unique()[:3]))} …); write one method's rows alone")
    try:
        scores = frame["score"].to_numpy(dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: the column score holds no numbers") from None
    empty = frame["query"].isna() | frame["document"].isna()
    for row in np.flatnonzero(empty.to_numpy() | ~(np.abs(scores) <= LARGEST_SCORE))[:1]:
        raise UserError(f"{path}: row {row + 1} has {'no query or document' if empty.iloc[row] else f'a score that is not finite in fp32, {scores[row]}'}")
    queries, documents = frame["query"].astype(str), frame["document"].astype(str).to_numpy()
    run: Run = {}
    for query, rows in queries.groupby(queries, sort=False).indices.items():
        own = documents[rows]
        if len(set(own)) < len(own):
            raise UserError(f"{path}: document {next(d for d in own if (own == d).sum() > 1)} stands twice for query {query}")
        ranks = order(scores[rows])
        run[str(query)] = Ranked([str(own[i]) for i in ranks], scores[rows][ranks].astype(np.float32))
    return run


def read_trec(path: Path) -> Run:
    """Reads a TREC run (query Q0 document rank score tag). A query's documents are ordered by score, equal scores in the order of the file.

    Raises:
        UserError: the file is missing, a line is malformed or a document is repeated; the message names file and line.
    """
    with opened(path) as file:
        return _read_lines(path, file)


def _read_lines(path: Path, file: BufferedReader) -> Run:
    found: dict[str, dict[str, float]] = {}
    try:
        for number, line in enumerate(TextIOWrapper(file, encoding="utf-8-sig"), 1):
            if not line.strip():
                continue
            where, parts = f"{path}:{number}", line.split()
            if len(parts) != 6:
                raise UserError(f"{where}: a TREC run line has 6 columns (query Q0 document rank score tag), not {len(parts)}")
            try:
                score = float(parts[4])
            except ValueError:
                raise UserError(f"{where}: the score {parts[4]!r} is no number") from None
            if not abs(score) <= LARGEST_SCORE:
                raise UserError(f"{where}: the score {parts[4]!r} is not finite in fp32")
            if parts[2] in found.setdefault(parts[0], {}):
                raise UserError(f"{where}: document {parts[2]} stands twice for query {parts[0]}")
            found[parts[0]][parts[2]] = score
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so no TREC run") from None
    return _ranked(found)
