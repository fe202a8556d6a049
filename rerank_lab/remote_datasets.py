"""Collections that other libraries fetch: the Hugging Face hub through `datasets`, and ir_datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rerank_lab.datasets import Qrels, Source, add_judgement, record_text
from rerank_lab.errors import UserError


def hub_source(name: str) -> Source:
    """ "hf:NAME", a hub name or a local folder that `datasets` reads.

    Two layouts are known. BEIR's: configurations corpus and queries, judgements in NAME-qrels. MTEB's: corpus and queries
    beside a configuration with query-id, corpus-id and score (default or qrels), one split each.
    """
    import datasets

    configs = _ask(name, lambda: datasets.get_dataset_config_names(name))
    lacking = {"corpus", "queries"} - set(configs)
    if lacking:
        raise UserError(f"hf:{name}: no configuration {' or '.join(sorted(lacking))}; it has {', '.join(configs)}")
    config = next((c for c in ("default", "qrels") if c in configs), None)
    judged = (name, config) if config else (f"{name}-qrels", None)
    splits = _ask(judged[0], lambda: datasets.get_dataset_split_names(*judged))

    def rows(config: str) -> Iterator[tuple[str, str, str]]:
        for part, table in _ask(name, lambda: datasets.load_dataset(name, config)).items():
            for i, row in enumerate(table):
                where = f"hf:{name}/{config}/{part}:{i + 1}"
                yield *record_text(row, where), where

    def qrels(split: str) -> Qrels:
        table = _ask(judged[0], lambda: datasets.load_dataset(*judged, split=split))
        if not {"query-id", "corpus-id", "score"} <= set(table.column_names):
            raise UserError(f"hf:{judged[0]}: judgements need the columns query-id, corpus-id and score, not {', '.join(table.column_names)}")
        found: Qrels = {}
        for i, row in enumerate(table):
            where = f"hf:{judged[0]}/{split}:{i + 1}"
            if row["score"] is None or int(row["score"]) != row["score"]:
                raise UserError(f"{where}: the score {row['score']!r} is no whole number")
            add_judgement(found, str(row["query-id"]), str(row["corpus-id"]), int(row["score"]), where)
        return found

    return Source(name.rstrip("/").rsplit("/", 1)[-1], lambda: rows("corpus"), lambda: rows("queries"), {s: partial(qrels, s) for s in splits})


def ir_datasets_source(name: str) -> Source:
    """ "irds:ID", e.g. irds:beir/scifact/test: the split is the last part of the ID."""
    try:
        import ir_datasets
    except ImportError:
        raise UserError(f"irds:{name} needs ir_datasets: pip install ir_datasets") from None
    data = _ask(name, lambda: ir_datasets.load(name))
    split = name.rsplit("/", 1)[-1]

    def texts(records: Callable[[], Any], identifier: str) -> Iterator[tuple[str, str, str]]:
        for i, record in enumerate(_ask(name, records)):
            text = record.default_text()
            where = f"irds:{name}:{i + 1}"
            yield *record_text({"_id": getattr(record, identifier), "text": text}, where), where

    def qrels() -> Qrels:
        found: Qrels = {}
        for record in _ask(name, data.qrels_iter):
            add_judgement(found, record.query_id, record.doc_id, int(record.relevance), f"irds:{name}")
        return found

    return Source(
        name.replace("/", "-"),
        lambda: texts(data.docs_iter, "doc_id"),
        lambda: texts(data.queries_iter, "query_id"),
        {split: qrels} | ({"test": qrels} if split != "test" else {}),
    )


def _ask(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # each library raises its own and its transport's errors; the user needs one sentence
        raise UserError(f"{name} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
