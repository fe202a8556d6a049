"""Collections that other libraries fetch: the Hugging Face hub through `datasets`, and ir_datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rerank_lab.datasets import Judgements, Source, record_text
from rerank_lab.errors import UserError

SPLITS = ("train", "dev", "validation", "test")


def hub_source(name: str) -> Source:
    """ "hf:NAME", a hub name or a local folder that `datasets` reads.

    Two layouts are known. BEIR's: configurations corpus and queries, judgements in NAME-qrels. MTEB's: corpus and queries
    beside a configuration with query-id, corpus-id and score (default or qrels), one split each.
    """
    import datasets

    name = name.rstrip("/")
    if not name:
        raise UserError("hf: needs a name, as in hf:mteb/nfcorpus")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Of a local folder whose files have changed, `datasets` would go on giving the copy in its cache.
    mode = "reuse_cache_if_exists" if Path(name).is_dir() else None
    configs = _ask(name, lambda: datasets.get_dataset_config_names(name))
    lacking = {"corpus", "queries"} - set(configs)
    if lacking:
        raise UserError(f"hf:{name}: no configuration {' or '.join(sorted(lacking))}; it has {', '.join(configs)}")
    config = next((c for c in ("default", "qrels") if c in configs), None)
    judged = (name, config) if config else (f"{name}-qrels", None)
    splits = _ask(judged[0], lambda: datasets.get_dataset_split_names(*judged))

    def rows(config: str) -> Iterator[tuple[str, str, str]]:
        for part, table in _ask(name, lambda: datasets.load_dataset(name, config, download_mode=mode)).items():
            for i, row in enumerate(table):
                where = f"hf:{name}/{config}/{part}:{i + 1}"
                yield *record_text(row, where), where

    def judgements(split: str) -> Judgements:
        table = _ask(judged[0], lambda: datasets.load_dataset(*judged, split=split, download_mode=mode))
        if not {"query-id", "corpus-id", "score"} <= set(table.column_names):
            raise UserError(f"hf:{judged[0]}: judgements need the columns query-id, corpus-id and score, not {', '.join(table.column_names)}")
        for i, row in enumerate(table):
            where = f"hf:{judged[0]}/{split}:{i + 1}"
            if row["query-id"] is None or row["corpus-id"] is None:
                raise UserError(f"{where}: the query-id or the corpus-id is missing")
            yield str(row["query-id"]), str(row["corpus-id"]), row["score"], where

    return Source(name.rsplit("/", 1)[-1], lambda: rows("corpus"), lambda: rows("queries"), {s: partial(judgements, s) for s in splits})


def ir_datasets_source(name: str) -> Source:
    """ "irds:ID", e.g. irds:beir/scifact/train: the split is the last part of the ID where that names one, else test."""
    try:
        import ir_datasets
    except ImportError:
        raise UserError(f"irds:{name} needs ir_datasets: pip install 'rerank_lab[irds]'") from None
    data = _ask(name, lambda: ir_datasets.load(name))
    last = name.rsplit("/", 1)[-1]

    def texts(records: str, identifier: str) -> Iterator[tuple[str, str, str]]:
        found = _each(name, lambda: ((getattr(record, identifier), record.default_text()) for record in getattr(data, records)()))
        for i, (key, text) in enumerate(found):
            where = f"irds:{name}:{i + 1}"
            yield *record_text({"_id": key, "text": text}, where), where

    def judgements() -> Judgements:
        for i, record in enumerate(_each(name, lambda: data.qrels_iter())):
            yield record.query_id, record.doc_id, record.relevance, f"irds:{name}:{i + 1}"

    return Source(
        name.replace("/", "-"),
        lambda: texts("docs_iter", "doc_id"),
        lambda: texts("queries_iter", "query_id"),
        {last if last in SPLITS else "test": judgements} if data.has_qrels() else {},
    )


def _ask(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # each library raises its own and its transport's errors; the user needs one sentence
        raise _unreadable(name, error) from error


def _each(name: str, records: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    try:
        yield from records()
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return UserError(f"{name} cannot be read: " + "; ".join(f"{type(e).__name__}: {str(e).strip().split(chr(10))[0]}" for e in causes))
