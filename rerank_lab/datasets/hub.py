"""Collections of the Hugging Face hub, or in a folder that its `datasets` reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rerank_lab.datasets.dataset import Judgements, Source, record_text
from rerank_lab.datasets.remote import ask
from rerank_lab.errors import UserError


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

    return Source(name.rsplit("/", 1)[-1], lambda: rows("corpus"), lambda: rows("queries"), {s: partial(judgements, s) for s in splits})
