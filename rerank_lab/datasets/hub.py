"""Collections from the Hugging Face hub, or from a local folder that its `datasets` library reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rerank_lab.datasets.dataset import Collection, Judgements, record_text
from rerank_lab.datasets.remote import ask
from rerank_lab.errors import UserError


def hub_collection(name: str) -> Collection:
    """The collection that "hf:NAME" means.

    Two layouts are known. BEIR's has the configurations corpus and queries, and its judgements are in the dataset NAME-qrels.
    MTEB's has corpus and queries, and a third configuration (default or qrels) with the columns query-id, corpus-id and score.

    Args:
        name: a hub name, or a local folder that `datasets` reads.

    Raises:
        UserError: the name is empty, cannot be read, or has another layout.
    """
    import datasets

    name = name.rstrip("/")
    if not name:
        raise UserError("hf: needs a name, as in hf:mteb/nfcorpus")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # `datasets` caches a local folder, and keeps returning the old copy after its files have changed.
    mode = "reuse_cache_if_exists" if Path(name).is_dir() else None
    configs = ask(name, lambda: datasets.get_dataset_config_names(name))
    lacking = {"corpus", "queries"} - set(configs)
    if lacking:
        raise UserError(f"hf:{name}: no configuration {' or '.join(sorted(lacking))}; it has {', '.join(configs)}")
    config = next((c for c in ("default", "qrels") if c in configs), None)
    judged = (name, config) if config else (f"{name}-qrels", None)
    splits = ask(judged[0], lambda: datasets.get_dataset_split_names(*judged))

    def rows(config: str) -> Iterator[tuple[str, str, str]]:
        for part, table in ask(name, lambda: datasets.load_dataset(name, config, download_mode=mode)).items():
            for i, row in enumerate(table):
                where = f"hf:{name}/{config}/{part}:{i + 1}"
                yield *record_text(row, where), where

    def judgements(split: str) -> Judgements:
        table = ask(judged[0], lambda: datasets.load_dataset(*judged, split=split, download_mode=mode))
        if not {"query-id", "corpus-id", "score"} <= set(table.column_names):
            raise UserError(f"hf:{judged[0]}: judgements need the columns query-id, corpus-id and score, not {', '.join(table.column_names)}")
        for i, row in enumerate(table):
            where = f"hf:{judged[0]}/{split}:{i + 1}"
            if row["query-id"] is None or row["corpus-id"] is None:
                raise UserError(f"{where}: the query-id or the corpus-id is missing")
            yield str(row["query-id"]), str(row["corpus-id"]), row["score"], where

    return Collection(name.rsplit("/", 1)[-1], lambda: rows("corpus"), lambda: rows("queries"), {s: partial(judgements, s) for s in splits})
