"""Examples: the queries that gained and lost most against the baseline, the documents that moved, and what each query token found (best)."""

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
from rerank_lab.report.blocks import Block, Cell, Details, Paragraph, Quoted, Table
from rerank_lab.report.load import ResultsFolder
from rerank_lab.reranker import Reranker

LENGTH = 160  # characters of a document that are quoted
RELEVANT = 3  # relevant documents that are shown for a query


@dataclass(frozen=True)
class ExampleSource:
    """Where examples come from.

    Attributes:
        dataset: the collection; None: examples show only ids.
        reranker: the bi-encoder that ranked; None: examples show no token alignments.
        quote: whether texts may be shown.
        count: how many queries to show that gained, and how many that lost.
    """

    dataset: Dataset | None
    reranker: Reranker | None
    quote: bool
    count: int


@dataclass(frozen=True)
class ModelOptions:
    """The options of the configuration that the bi-encoder is loaded by."""

    model: str
    max_tokens_per_doc: int
    subspace: str | None
    runtime: str
    precision: str
    device: str
    query_prompt: str | None = None
    document_prompt: str | None = None
    truncate_dim: int | None = None


def loaded_model(one: ResultsFolder, cache: str | None) -> Reranker:
    """Loads the bi-encoder that ranked.

    Raises:
        UserError: it cannot be loaded here, or the model of that name gives other vectors today.
    """
    models = one.result.models
    if models.get("model") is None:
        raise UserError("no bi-encoder ran")
    try:
        given = decode(ModelOptions, one.result.config.options, "config")
    except DecodeError as problem:
        raise UserError(f"the model is not to be loaded: {problem}") from None
    reranker = Reranker(
        given.model, "maxsim", max_tokens_per_doc=given.max_tokens_per_doc, subspace=given.subspace, cache_dir=cache,
        runtime=given.runtime, precision=given.precision, device=given.device,
        query_prompt=given.query_prompt, document_prompt=given.document_prompt, truncate_dim=given.truncate_dim,
    )  # fmt: skip
    if reranker.fingerprints()["model_vectors"] != models.get("model_vectors"):
        raise UserError(f"the {given.model} of today gives other vectors than the one that ranked")
    return reranker


def examples(one: ResultsFolder, source: ExampleSource, shown: str, progress: Callable[[Sequence[str], str], Sequence[str]]) -> list[Block]:
    """One block for each row that a reader can open: the queries that gained and lost.

    Args:
        one: the evaluation.
        source: collection and model.
        shown: label of the row whose block is open at first.
        progress: wraps queries in a progress bar with a title.
    """
    if one.scores is None:
        return [Paragraph([f"Which documents moved is not known: {one.folder.name} has no scores.parquet that can be read."])]
    if len(one.rows) == 1:
        return [Paragraph(["One method ran; there is nothing to compare it with."])]
    return [_method(one, source, label, progress, label == shown) for label, row in one.rows.items() if row.vs]


def _method(one: ResultsFolder, source: ExampleSource, label: str, progress: Callable[[Sequence[str], str], Sequence[str]], shown: bool) -> Block:
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
            blocks.append(Paragraph([f"No query {title}."]))
        if shows:
            blocks += [_alignment(one, source, label, q, ranks, f"{title}, {one.primary} {change[q]:+.3f}") for q in progress(queries, f"align {label}")]
    return Details(f"{label} against {one.baseline}", blocks, open=shown)


def _ranks(scores: pd.DataFrame, label: str, queries: Sequence[str]) -> pd.DataFrame:
    own = scores[(scores["method"] == label) & scores["query"].isin(queries)]
    return own.assign(grade=own["grade"].fillna(0)).set_index(["query", "document"])[["rank", "grade"]]


def _table(one: ResultsFolder, source: ExampleSource, label: str, queries: Sequence[str], ranks: dict[str, pd.DataFrame], caption: str) -> Table:
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


def _relevant(source: ExampleSource, q: str, ranks: dict[str, pd.DataFrame], baseline: str, label: str) -> tuple[list[str], int]:
    """The relevant documents, best rank first, at most RELEVANT; and how many more there are."""
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
    """Whether a row has token alignments: it runs best, and here."""
    return not row.system.remote and row.system.base == Best.name


def _alignment(one: ResultsFolder, source: ExampleSource, label: str, q: str, ranks: dict[str, pd.DataFrame], what: str) -> Block:
    """A table of query tokens: the weight of each, and what it found in the best relevant document and in the baseline's first document."""
    assert source.dataset is not None and source.reranker is not None and source.reranker.encoder is not None
    method = one.rows[label].system.method
    assert isinstance(method, Best)
    tau = one.rows[label].setting("tau")
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
        kept = pool.stage1(method.stage1_top_k)[1]
        if not len(read.tokens):
            return Paragraph([Quoted(q), " has no tokens."])
        A = pool.attention(read, pool.vectors(kept, detail=Detail.TOKENS), tau).view(len(kept), len(read.tokens)).cpu()
        weight = A.amax(0) - A.mean(0)
        weight = weight / weight.sum() if float(weight.sum()) else torch.full_like(weight, 1 / len(weight))
        places = torch.tensor([pool_ids.index(d) for d in shown], dtype=torch.int64, device="cpu")
        documents = pool.vectors(places, detail=Detail.TOKENS)
        found = pool.attention(read, documents, tau).view(len(shown), len(read.tokens)).cpu()
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
    """The text's own tokens as strings."""
    (tokens,) = encoder.tokenize([text], kind, limit)
    return encoder.words(tokens)[:count]
