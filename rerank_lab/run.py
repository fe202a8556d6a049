"""A run: ranked documents a query, under the project's one total order, and its TREC file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rerank_lab.errors import UserError

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Ranked:
    """Documents of one query, best first.

    Attributes:
        documents: ids.
        scores: what they were ranked by, fp32, never rising.
    """

    documents: list[str]
    scores: np.ndarray


Run = dict[str, Ranked]


def order(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """The one total order: score descending, equal scores in input order. Positions into scores, int64.

    Raises:
        ValueError: a NaN, which has no place in any order.
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
    """Scores that say nothing but the rank, so that no tool that sorts again can reorder ties: n, n − 1, … 1."""
    return [float(len(ranked.documents) - i) for i in range(len(ranked.documents))]


def trec_lines(run: Run, tag: str) -> Iterator[str]:
    """A TREC run file with rank-derived scores, line by line."""
    for query, ranked in run.items():
        for i, (document, score) in enumerate(zip(ranked.documents, rank_scores(ranked))):
            yield f"{query} Q0 {document} {i + 1} {score:.0f} {tag}\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes under a temporary name of its own and renames it, so that the file is whole or not there; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_run(path: Path) -> Run:
    """Reads a TREC run, or a Parquet file with the columns query, document and score.

    Raises:
        UserError: as read_trec; of Parquet: unreadable, columns missing, a score that is not finite, or a repeated document.
    """
    try:
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return _read_parquet(path) if parquet else read_trec(path)


def _read_parquet(path: Path) -> Run:
    import pyarrow.parquet as pq
    from pyarrow.types import is_nested as nested

    wanted = ["query", "document", "score"]
    try:
        schema = pq.read_schema(path)
        names = schema.names
        missing = [name for name in wanted if name not in names or nested(schema.field(name).type)]
        frame = None if missing else pq.read_table(path, columns=wanted + ["method"] * ("method" in names)).to_pandas()
    except (OSError, ValueError) as error:  # pyarrow's own are of these
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
    for row in np.flatnonzero(empty.to_numpy() | ~(np.abs(scores) <= LARGEST))[:1]:
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
    """Reads a TREC run (query Q0 document rank score tag), ordered by score, then as the file has it.

    Raises:
        UserError: no such file, a malformed line or a repeated document, with file and line.
    """
    found: dict[str, dict[str, float]] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where, parts = f"{path}:{number}", line.split()
                if len(parts) != 6:
                    raise UserError(f"{where}: a TREC run line has 6 columns (query Q0 document rank score tag), not {len(parts)}")
                try:
                    score = float(parts[4])
                except ValueError:
                    raise UserError(f"{where}: the score {parts[4]!r} is no number") from None
                if not abs(score) <= LARGEST:
                    raise UserError(f"{where}: the score {parts[4]!r} is not finite in fp32")
                if parts[2] in found.setdefault(parts[0], {}):
                    raise UserError(f"{where}: document {parts[2]} stands twice for query {parts[0]}")
                found[parts[0]][parts[2]] = score
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so no TREC run") from None
    run: Run = {}
    for query, scored in found.items():
        documents, scores = list(scored), np.array(list(scored.values()), dtype=np.float32)
        ranks = order(np.array(list(scored.values())))
        run[query] = Ranked([documents[i] for i in ranks], scores[ranks])
    return run
