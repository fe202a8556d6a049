"""The spread of a model's token similarities: the unit in which `best` measures its temperature.

It belongs to the model. It is measured once, on a text that is named here, and never on texts of a request: scores do not depend on
what was ranked before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rerank_kernels import exactly
from rerank_lab.cache.places import VECTORS
from rerank_lab.cache.shards import ABOUT, SPREADS
from rerank_lab.cache.store import Store
from rerank_lab.datasets.beir import BUNDLED
from rerank_lab.datasets.load import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.files import DecodeError, decode, encode, read_versioned
from rerank_lab.models.base import Detail, Encoder, Origin, Tokens

log = logging.getLogger(__name__)
SHIPPED = BUNDLED / "spreads" / "spreads.json"
SCHEMA = 1  # rises with the definition of a spread too, so that older figures are left alone
COLLECTION, SPLIT, TEXTS = "numpydoc", "train", 64  # the text: so many queries of the split, each with a document that is relevant to it
SHIPPED_AGAIN = "install the package again, or make the file by experiments/training/measure_spread.py"
DIGITS = 2  # of a spread: what a text of this size gives it. Machines and precisions mostly agree on them; near a boundary they may round differently
SLOW = 5.0  # seconds of measuring after which a person is told how long it may take


@dataclass(frozen=True)
class Spread:
    """How far a model's token similarities spread.

    Attributes:
        value: how far a query token's best match in a relevant document stands above the document's average: the mean of
            max_j s_ij − mean_j s_ij, s_ij = x_i · x_j, over all tokens i of the text's queries, each with the tokens j of its own
            document; rounded to DIGITS significant digits.
        text: the text's name, and the beginning of its SHA-256.
        query_tokens, document_tokens: how many tokens of the text have vectors.
        source: where the figure is from: "shipped", "cache" or "measured".
    """

    value: float
    text: str
    query_tokens: int
    document_tokens: int
    source: str = field(default="measured", compare=False)

    def __str__(self) -> str:
        return f"{self.value:g}, of {self.query_tokens:,} query tokens and {self.document_tokens:,} document tokens of {self.text}"

    def write(self) -> str:
        """As JSON for results, without where it is from: that changes, and the figure does not."""
        return json.dumps({name: value for name, value in encode(self).items() if name != "source"})

    @classmethod
    def read(cls, text: str) -> Spread:
        """What `write` has written.

        Raises:
            ValueError: it is something else.
        """
        return decode(cls, json.loads(text))


@dataclass(frozen=True)
class Entry:
    """A spread as it is kept.

    Attributes:
        model: what the model was called.
        arithmetic: precision, runtime and device that measured it, for people.
        origin, spread: of what model, and what it is.
    """

    model: str
    arithmetic: str
    origin: Origin
    spread: Spread

    def fits(self, origin: Origin, text: str, counts: tuple[int, int] | None = None) -> bool:
        """Whether it is of this model and this text, and can be a difference of cosines.

        Args:
            origin: of the model.
            text: the text's name.
            counts: how many tokens of queries and documents the model makes of the text. Another tokenizer beside the same weights shows in
                them. None: that is not known.
        """
        own = self.spread
        return self.origin == origin and own.text == text and 0 <= own.value <= 2 and counts in (None, (own.query_tokens, own.document_tokens))


@dataclass(frozen=True)
class Text:
    """The text that spreads are measured on.

    Attributes:
        name: as Spread.text.
        queries, documents: TEXTS of each; query i and document i belong together.
    """

    name: str
    queries: Sequence[str]
    documents: Sequence[str]


@cache
def measured_text() -> Text:
    """TEXTS train queries of the bundled collection, every n-th in file order, each with the most relevant document that its judgements name."""
    found = load_dataset(str(BUNDLED / COLLECTION), SPLIT)
    chosen = [*found.queries][:: len(found.queries) // TEXTS][:TEXTS]
    judged = [found.qrels[query] for query in chosen]
    queries, documents = [found.queries[query] for query in chosen], [found.corpus[max(grades, key=grades.__getitem__)] for grades in judged]
    digest = hashlib.sha256(json.dumps([queries, documents]).encode()).hexdigest()
    return Text(f"{COLLECTION} {digest[:12]}", queries, documents)


def spread_of(encoder: Encoder, store: Store | None = None, known: Sequence[Entry] | None = None) -> Spread:
    """A model's spread: shipped, from the cache, or measured now and put into the cache.

    Args:
        encoder: the model. Its weights, its subspace and its prompts decide the figure.
        store: the cache's folder of this model's vectors; None: nothing is kept. A folder that cannot be written is no error.
        known: figures that are taken as they are; None: those that the package ships.

    Raises:
        ModelError: the model gave a NaN or an infinite value.
    """
    text, origin = measured_text(), encoder.origin()
    queries = encoder.tokenize(text.queries, "query", encoder.limit)
    documents = encoder.tokenize(text.documents, "document", encoder.limit)
    counts = _count(queries), _count(documents)
    for found in shipped() if known is None else known:
        if found.fits(origin, text.name, counts):
            return replace(found.spread, source="shipped")
    name = file_name(origin.query_prompt, text.name)
    if store is not None and (kept := _kept(store, name, origin, text.name, counts)) is not None:
        return replace(kept.spread, source="cache")
    spread = Spread(measure(encoder, queries, documents), text.name, *counts)
    if store is not None:
        _keep(store, name, entry(encoder, spread), encoder)
    return spread


def entry(encoder: Encoder, spread: Spread) -> Entry:
    """A spread with what it is of."""
    return Entry(encoder.name, f"{encoder.precision}, {encoder.runtime}, {encoder.device.type}", encoder.origin(), spread)


@cache
def shipped() -> tuple[Entry, ...]:
    """The spreads that the package ships."""
    return tuple(read_entries(SHIPPED))


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file as the package ships one.

    Raises:
        UserError: it is damaged, or of another schema.
    """
    try:
        return decode(_File, read_versioned(path, SCHEMA, SHIPPED_AGAIN)).entries
    except DecodeError as problem:
        raise UserError(f"{path}: {problem}; {SHIPPED_AGAIN}") from None


def with_entry(entries: Sequence[Entry], new: Entry) -> str:
    """The text of a file as the package ships one, with one more entry, which takes the place of one of the same origin."""
    others = [one for one in entries if one.origin != new.origin]
    every = sorted([*others, new], key=lambda one: (one.model, one.origin.query_prompt, one.origin.document_prompt))
    return json.dumps({"schema": SCHEMA, "entries": [_plain(one) for one in every]}, indent=1, ensure_ascii=False) + "\n"


def known(origin: Origin, cache: str | None, precision: str = "fp32") -> Spread | None:
    """A model's spread as far as it is known without its weights: shipped, or measured before. None: it is not.

    Args:
        origin: of the model.
        cache: the cache's folder or URL; None: there is none. Behind a URL nothing is looked for.
        precision: of the transformer; a figure that was measured in it comes before those of others.
    """
    text = measured_text().name
    every = [replace(one, spread=replace(one.spread, source="shipped")) for one in shipped()]
    store = None if cache is None else Store(cache).child(VECTORS)
    if store is not None and not store.remote:
        for path in sorted(store.folder.glob(f"*/{SPREADS}"), reverse=True):
            with suppress(OSError, ValueError):
                found = _read(path)
                every.append(replace(found, spread=replace(found.spread, source=f"measured before in {found.arithmetic}")))
    every.sort(key=lambda one: (one.spread.source != "shipped", not one.arithmetic.startswith(precision)))
    return next((one.spread for one in every if one.fits(origin, text)), None)


@exactly(tensors=True)
def measure(encoder: Encoder, queries: Sequence[Tokens], documents: Sequence[Tokens]) -> float:
    """The spread over N queries, query i with document i, to DIGITS significant digits.

    Raises:
        ModelError: the model gave a NaN or an infinite value.
    """
    start, count, done, told = time.perf_counter(), len(queries) + len(documents), 0, False
    log.info("model %r: its token similarities are measured, once: as much work as %d documents", encoder.name, count)

    def progress(texts: int) -> None:
        nonlocal done, told
        done += texts
        seconds = time.perf_counter() - start
        if seconds > SLOW and not told:
            told = True
            log.warning("model %r: its token similarities are measured, once; about %.0f seconds", encoder.name, seconds * count / done)

    with torch.inference_mode():
        read = [one.vectors.tokens.cpu() for one in encoder.encode_queries(queries, detail=Detail.TOKENS)]
        progress(len(queries))
        vectors = encoder.encode_tokens(documents, detail=Detail.TOKENS, progress=progress)
        value = mean_reach(read, [vectors.row(i).tokens.cpu() for i in range(len(documents))])
    log.info("model %r: spread %.3g, measured in %.1f seconds", encoder.name, value, time.perf_counter() - start)
    return float(f"{value:.{DIGITS}g}")


def mean_reach(queries: Sequence[Tensor], documents: Sequence[Tensor]) -> float:
    """The mean of max_j s_ij − mean_j s_ij over all rows i of N queries (Lq × r each), j the rows of the query's own document, in fp64; 0 without any."""
    total, count = 0.0, 0
    for query, document in zip(queries, documents, strict=True):
        if len(query) and len(document):
            s = query.double() @ document.double().T
            total, count = total + float((s.amax(1) - s.mean(1)).sum()), count + len(s)
    return total / max(1, count)


def file_name(query_prompt: str, text: str) -> str:
    """The file of a spread beside its model's vectors. The folder's name, the vectors' key, says everything else that decides the figure."""
    return SPREADS.replace("*", hashlib.sha256(f"{SCHEMA}\0{query_prompt}\0{text}".encode()).hexdigest()[:16])


@dataclass(frozen=True)
class _File:
    """The shipped file."""

    entries: list[Entry]


def _plain(one: Entry) -> object:
    value = encode(one)
    del value["spread"]["source"]
    return value


def _count(texts: Sequence[Tokens]) -> int:
    return sum(len(text) - int(text.special.sum()) for text in texts)


def _read(path: Path) -> Entry:
    return decode(Entry, json.loads(path.read_text(encoding="utf-8")))


def _kept(store: Store, name: str, origin: Origin, text: str, counts: tuple[int, int]) -> Entry | None:
    """The cache's entry; None: there is none that reads back and fits. A file that does not is deleted."""
    try:
        path = store.fetch(name)
        found = _read(path)
        if not found.fits(origin, text, counts):
            raise DecodeError("of another model or tokenizer")
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("vector cache: %s/%s cannot be read (%s); measured again", store.shown, name, error.strerror)
        return None
    except ValueError:
        log.warning("vector cache: %s/%s does not read back as this model's; deleted and measured again", store.shown, name)
        with suppress(OSError):
            store.remove(name)
        return None
    with suppress(OSError):
        os.utime(path)  # it was used
    return found


def _keep(store: Store, name: str, new: Entry, encoder: Encoder) -> None:
    try:
        store.write_once(ABOUT, json.dumps(dict(encoder.about()), indent=1).encode())
        store.write(name, json.dumps(_plain(new), indent=1).encode())
    except OSError as error:
        log.warning("vector cache: %s cannot be written (%s); the model's token similarities are measured again next time", store.shown, error.strerror)
