"""Which queries gained and lost most against the baseline, which documents moved, and what each query token of best found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from rerank_lab.datasets.dataset import Dataset
from rerank_lab.errors import UserError
from rerank_lab.eval.results import Row
from rerank_lab.files import DecodeError, decode
from rerank_lab.methods import Pool
from rerank_lab.methods.best import Best
from rerank_lab.models.base import Detail, Encoder
from rerank_lab.report.blocks import Block, Cell, Details, Quoted, Table, Text
from rerank_lab.report.load import Loaded
from rerank_lab.reranker import Reranker

LENGTH = 160  # characters quoted of a document
RELEVANT = 3  # relevant documents shown of a query


@dataclass(frozen=True)
class Source:
    """What examples are taken from.

    Attributes:
        dataset: the collection; None: neither texts nor alignments, ids alone.
        reranker: the bi-encoder that ranked; None: no alignments.
        quote: whether texts may be shown.
        count: queries shown each way.
    """

    dataset: Dataset | None
    reranker: Reranker | None
    quote: bool
    count: int


@dataclass(frozen=True)
class ModelOptions:
    """What the configuration says of the bi-encoder."""

    model: str
    max_tokens_per_doc: int
    subspace: str | None
    runtime: str
    precision: str
    device: str


def loaded_model(one: Loaded, cache: str | None) -> Reranker:
    """The bi-encoder that ranked, as the results name it.

    Raises:
        UserError: it is not to be had here, or another one answers to its name.
    """
    models = one.result.models
    if models.get("model") is None:
        raise UserError("no bi-encoder ran")
    try:
        given = decode(ModelOptions, one.result.config.options, "config")
    except DecodeError as problem:
        raise UserError(f"the model is not to be loaded: {problem}") from None
    reranker = Reranker(
        given.model, "best", max_tokens_per_doc=given.max_tokens_per_doc, subspace=given.subspace, cache_dir=cache,
        runtime=given.runtime, precision=given.precision, device=given.device,
    )  # fmt: skip
    if reranker.fingerprints()["model_vectors"] != models.get("model_vectors"):
        raise UserError(f"the {given.model} of today gives other vectors than the one that ranked")
    return reranker


def examples(one: Loaded, source: Source, shown: str, progress: Callable[[Sequence[str], str], Sequence[str]]) -> list[Block]:
    """A part to open for each method: what gained and what lost.

    Args:
        one: the evaluation.
        source: collection and model.
        shown: the method whose part stands open.
        progress: wraps the queries that alignments are made of.
    """
    if one.scores is None:
        return [Text([f"Which documents moved is not known: {one.folder.name} has no scores.parquet that can be read."])]
    if len(one.rows) == 1:
        return [Text(["One method ran; there is nothing to compare it with."])]
    return [_method(one, source, label, progress, label == shown) for label, row in one.rows.items() if row.vs]


def _method(one: Loaded, source: Source, label: str, progress: Callable[[Sequence[str], str], Sequence[str]], shown: bool) -> Block:
    change = (one.measure(label) - one.measure(one.baseline)).sort_values(kind="stable")
    gained = [q for q in change.index[::-1] if change[q] > 0][: source.count]
    lost = [q for q in change.index if change[q] < 0][: source.count]
    assert one.scores is not None
    ranks = {name: _ranks(one.scores, name, [*gained, *lost]) for name in (one.baseline, label)}
    blocks: list[Block] = []
    shows = source.quote and source.dataset is not None and source.reranker is not None and aligned(one.rows[label])
    for title, queries in (("gained", gained), ("lost", lost)):
        if queries:
            blocks.append(_table(one, source, label, queries, ranks, f"The {len(queries)} that {title} most"))
        else:
            blocks.append(Text([f"No query {title}."]))
        if shows:
            blocks += [_alignment(one, source, label, q, ranks, f"{title}, {one.primary} {change[q]:+.3f}") for q in progress(queries, f"align {label}")]
    return Details(f"{label} against {one.baseline}", blocks, open=shown)


def _ranks(scores: pd.DataFrame, label: str, queries: Sequence[str]) -> pd.DataFrame:
    own = scores[(scores["method"] == label) & scores["query"].isin(queries)]
    return own.assign(grade=own["grade"].fillna(0)).set_index(["query", "document"])[["rank", "grade"]]


def _table(one: Loaded, source: Source, label: str, queries: Sequence[str], ranks: dict[str, pd.DataFrame], caption: str) -> Table:
    measure, rows = one.primary, []
    before, after = one.measure(one.baseline), one.measure(label)
    for q in queries:
        relevant, more = _relevant(source, q, ranks, one.baseline, label)
        moved = "; ".join(f"{d}: {_place(ranks[one.baseline], q, d)} → {_place(ranks[label], q, d)}" for d in relevant)
        moved += f"; and {more} more" if more > 0 else ""
        cells = [Cell(q, quoted=True), Cell(f"{before[q]:.3f} → {after[q]:.3f}", float(after[q] - before[q])), Cell(moved, quoted=True)]
        if source.dataset is not None and source.quote:
            cells[0] = Cell(source.dataset.queries.get(q, ""), quoted=True)
            cells.append(Cell(_cut(source.dataset.corpus.get(relevant[0], "")) if relevant else "", quoted=True))
        rows.append(cells)
    texts = ["its best placed relevant document"] if source.dataset is not None and source.quote else []
    return Table(["query", measure, "relevant documents: rank before → after", *texts], rows, caption, kind="examples texts" if texts else "examples")


def _relevant(source: Source, q: str, ranks: dict[str, pd.DataFrame], baseline: str, label: str) -> tuple[list[str], int]:
    """Relevant documents, best placed first, and how many more there are."""
    known = {d for frame in ranks.values() if q in frame.index.get_level_values(0) for d, row in frame.loc[q].iterrows() if row["grade"] > 0}
    if source.dataset is not None:
        known |= {d for d, grade in source.dataset.qrels[q].items() if grade > 0}
    order = sorted(known, key=lambda d: (_rank(ranks[label], q, d), _rank(ranks[baseline], q, d), d))
    return order[:RELEVANT], len(order) - RELEVANT


def _rank(frame: pd.DataFrame, q: str, document: str) -> float:
    return float(frame.loc[(q, document), "rank"]) if (q, document) in frame.index else np.inf


def _place(frame: pd.DataFrame, q: str, document: str) -> str:
    rank = _rank(frame, q, document)
    return "not ranked" if rank == np.inf else f"{rank:.0f}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LENGTH else text[: LENGTH - 1].rsplit(" ", 1)[0] + " …"


def aligned(row: Row) -> bool:
    """Whether a row ranks by what the query's tokens find, here."""
    return not row.system.remote and row.system.base == Best.name


def _alignment(one: Loaded, source: Source, label: str, q: str, ranks: dict[str, pd.DataFrame], what: str) -> Block:
    """Query token by query token: its weight, and what it found in the document that moved up and in the baseline's first."""
    assert source.dataset is not None and source.reranker is not None and source.reranker.encoder is not None
    method = one.rows[label].system.method
    assert isinstance(method, Best)
    assert one.scores is not None
    seen = one.scores[one.scores["query"] == q].drop_duplicates("document").sort_values("first_stage", ascending=False, kind="stable")
    pool_ids = [*seen["document"]]
    relevant = [d for d in _relevant(source, q, ranks, one.baseline, label)[0] if d in pool_ids]
    first = ranks[one.baseline].loc[q]["rank"].idxmin() if q in ranks[one.baseline].index else pool_ids[0]
    shown = list(dict.fromkeys([*relevant[:1], first, *relevant[1:2]]))[:2]
    query = source.dataset.queries[q]
    with torch.inference_mode():
        pool = source.reranker.pool(Pool, query, [source.dataset.corpus[d] for d in pool_ids])
        read = pool.query_vectors(detail=Detail.TOKENS)
        kept = pool.nearest(read, pool.vectors(detail=Detail.POOLED), method.stage1_top_k)[1]
        if not len(read.tokens):
            return Text([Quoted(q), " has no tokens."])
        A = pool.attention(read, pool.vectors(kept, detail=Detail.TOKENS), method.tau).view(len(kept), len(read.tokens)).cpu()
        weight = A.amax(0) - A.mean(0)
        weight = weight / weight.sum() if float(weight.sum()) else torch.full_like(weight, 1 / len(weight))
        places = torch.tensor([pool_ids.index(d) for d in shown], dtype=torch.int64, device="cpu")
        documents = pool.vectors(places, detail=Detail.TOKENS)
        found = pool.attention(read, documents, method.tau).view(len(shown), len(read.tokens)).cpu()
    encoder, columns = source.reranker.encoder, []
    for n, d in enumerate(shown):
        vectors = documents.row(n)
        words = _words(encoder, source.dataset.corpus[d], "document", len(vectors.tokens), source.reranker.max_tokens)
        nearest = (read.tokens.float() @ vectors.tokens.float().T).argmax(1).tolist() if words else []
        columns.append([words[j] for j in nearest])
    tokens = _words(encoder, query, "query", len(read.tokens), encoder.limit)
    low, high = float(found.min()), float(found.max())
    rows = []
    for i, token in enumerate(tokens):
        cells = [Cell(token, quoted=True), Cell(f"{weight[i]:.2f}", float(weight[i]), float(weight[i] / weight.max()))]
        for n, column in enumerate(columns):
            value = float(found[n, i])
            cells.append(Cell(f"{column[i] if column else 'no tokens'} {value:.2f}", value, (value - low) / max(high - low, 1e-9), quoted=True))
        rows.append(cells)
    moved = (f"{d}{' (relevant)' if d in relevant else ''}, {_place(ranks[one.baseline], q, d)} → {_place(ranks[label], q, d)}" for d in shown)
    head = ["query token", "weight", *map(Quoted, moved)]
    return Details(f"{_cut(query)} ({what})", [Table(head, rows, kind="alignment")])


def _words(encoder: Encoder, text: str, kind: str, count: int, limit: int) -> list[str]:
    """The text's own tokens as they are written."""
    (tokens,) = encoder.tokenize([text], kind, limit)
    return encoder.words(tokens)[:count]
