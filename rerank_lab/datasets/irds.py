"""Collections from ir_datasets."""

from __future__ import annotations

from collections.abc import Iterator

from rerank_lab.datasets.dataset import Collection, Judgements, record_text
from rerank_lab.datasets.remote import ask, each
from rerank_lab.errors import UserError

SPLITS = ("train", "dev", "validation", "test")


def ir_datasets_collection(name: str) -> Collection:
    """The collection that "irds:ID" means, e.g. irds:beir/scifact/train.

    Its only split is the last part of the ID if that is one of SPLITS, else "test".

    Raises:
        UserError: ir_datasets is not installed or cannot load the collection.
    """
    try:
        import ir_datasets
    except ImportError:
        raise UserError(f"irds:{name} needs ir_datasets: pip install 'rerank_lab[irds]'") from None
    data = ask(name, lambda: ir_datasets.load(name))
    last = name.rsplit("/", 1)[-1]

    def texts(records: str, identifier: str) -> Iterator[tuple[str, str, str]]:
        found = each(name, lambda: ((getattr(record, identifier), record.default_text()) for record in getattr(data, records)()))
        for i, (key, text) in enumerate(found):
            where = f"irds:{name}:{i + 1}"
            yield *record_text({"_id": key, "text": text}, where), where

    def judgements() -> Judgements:
        for i, record in enumerate(each(name, lambda: data.qrels_iter())):
            yield record.query_id, record.doc_id, record.relevance, f"irds:{name}:{i + 1}"

    return Collection(
        name.replace("/", "-"),
        lambda: texts("docs_iter", "doc_id"),
        lambda: texts("queries_iter", "query_id"),
        {last if last in SPLITS else "test": judgements} if data.has_qrels() else {},
    )
