"""The measurements of experiments/benchmarks/scale.py, one section for each process: python experiments/benchmarks/scale_measure.py SECTION SETTINGS

The process of a section is bound to one core, and its seconds are CPU seconds of that core. So they do not depend on others that share
the machine, and a core is what limits a worker. Runs that check the model also have `wall`, their wall time. Prints JSON.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

import bench_scale
from rerank_lab.cache import shards
from rerank_lab.cache.places import VECTORS
from rerank_lab.cache.store import Store
from rerank_lab.cache.vectors import VectorCache, text_key
from rerank_lab.datasets import corpus as corpora
from rerank_lab.datasets import load_dataset
from rerank_lab.datasets.corpus import Corpus
from rerank_lab.datasets.runs import Ranked
from rerank_lab.environment import Environment, describe
from rerank_lab.eval.executors.ray import QUERIES
from rerank_lab.eval.executors.worker import chosen
from rerank_lab.eval.journal import Journal
from rerank_lab.eval.records import ColdCost, Cost, QueryCandidates, Record, RowRecords
from rerank_lab.eval.results import Config
from rerank_lab.eval.rows import queries_of, rank
from rerank_lab.eval.settings import MEASURES
from rerank_lab.eval.summary import Evaluation, summarize
from rerank_lab.eval.system import System
from rerank_lab.first_stage.candidates import Candidates, make_candidates
from rerank_lab.methods import make_method
from rerank_lab.models.base import Detail, Vectors
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.reranker import Reranker
from rerank_lab.timing import peak_memory_mb
from scale_model import METHODS, TOP_K, JsonObject, ScaleSettings

MODEL, CROSS = "all-MiniLM-L6-v2", "minilm-cross"
RUNTIME = {"int8": "onnx"}  # with torch.compile, int8 would compile for minutes first
LIMITS = (64, 128, 512)  # tokens kept of a document; the model's own limit is below the last one
CHECK_TOKENS, RAY_TOKENS, MADE_TOKENS = 64, 128, 24
TINY = ((16, 8192), (2000, 2), (66_000, 2))  # number of files, documents in each: for the cost of a document, of a file, and of too many files
bench_scale.TOKENS = MADE_TOKENS  # a million of its 50 would take 14 GB


def spent(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and wall seconds of a piece of work."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def varied(s: ScaleSettings, count: int) -> list[str]:
    """Distinct texts of the collection. When it has no more, they repeat with a number in front."""
    base = list(load_dataset(s.dataset).corpus.values())
    return [base[n] if n < len(base) else f"{n} {base[n % len(base)]}" for n in range(count)]


def models(precision: str) -> dict[str, Any]:
    place: dict[str, Any] = {"device": "cpu", "runtime": RUNTIME.get(precision, "auto"), "precision": precision}
    encoder = load_bi_encoder(MODEL, **place)
    return {"model": encoder, "model_cross": load_cross_encoder(CROSS, encoder=encoder, **place)}


def told(file: str, name: str) -> int:
    """A number that the system reports about this process in /proc."""
    return next(int(line.split()[1]) for line in Path("/proc/self", file).read_text().splitlines() if line.startswith(name))


def own_bytes() -> int:
    """Bytes of the process's own memory, without mapped files."""
    return 1024 * told("status", "RssAnon")


def opened(key: str, folder: Path) -> tuple[VectorCache, float, int]:
    """Opens a cache. Returns it, the seconds of opening it once its pages are in memory, and the bytes that it takes."""
    before = own_bytes()
    cache = VectorCache(key, folder, disk_bytes=1 << 60)
    held = own_bytes() - before
    return cache, median(spent(lambda: VectorCache(key, folder, disk_bytes=1 << 60))[0] for _ in range(3)), held


def stored(folder: Path) -> int:
    """Bytes of all safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def evicted(folder: Path) -> None:
    """Drops the cached pages of a folder's files, so that the next reading comes from the disk."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def texts(s: ScaleSettings) -> JsonObject:
    """Tokens and bytes of a document, and the time that a worker needs for the texts of candidates. Each call opens the files anew."""
    own, encoder, found = varied(s, s.size(5000, 200)), load_bi_encoder(MODEL, device="cpu"), dict[str, Any]()
    lengths = np.array([len(tokens) - encoder.specials for tokens in encoder.tokenize(own, "document", encoder.limit)])
    for each in (corpora.PART[0], 10):
        corpora.PART = each, corpora.PART[1]
        place, drawn = s.folder("texts", new=True), random.Random(0)
        corpus = Corpus(Store(place))
        for n, text in enumerate(own):
            corpus[f"{n:09d}"] = text
        kept, taken = pickle.dumps(corpus.texts), []
        for _ in range(6):
            lists = [QueryCandidates(str(n), "", Ranked(drawn.sample(corpus.ids, TOP_K), np.zeros(TOP_K))) for n in range(QUERIES)]
            placed = [(query, corpus.positions(query.candidates.documents)) for query in lists]
            count = len({position // each for _, positions in placed for position in positions.tolist()})
            taken.append([count, spent(partial(chosen, pickle.loads(kept), placed))[0]])
        found[f"{each}"] = {"opened": median(row[0] for row in taken[1:]), "seconds": median(row[1] for row in taken[1:]), "bytes": stored(place) / len(own)}
    return {"tokens": float(lengths.mean()), "pairs": QUERIES * TOP_K, "parts": list(found.values())}


def encode(s: ScaleSettings, precision: str) -> JsonObject:
    """detail → [mean tokens, seconds, bytes] of a document; one row for each of three chunks of texts and each token limit."""
    size, loaded, found = s.size(24, 8), models(precision), {detail.name: list[Any]() for detail in Detail}
    own, encoder = varied(s, 3 * size), loaded["model"]
    for start, limit, detail in [(0, LIMITS[0], Detail.STATES), *product(range(0, 3 * size, size), LIMITS, Detail)]:  # the first warms up
        part, place = own[start : start + size], s.folder("encode", new=True)
        ready = Reranker(**loaded, method="standard", cache_dir=place, max_tokens_per_doc=limit)
        seconds = spent(partial(ready.encode, part, detail=detail))[0]
        tokens = sum(len(t) - encoder.specials for t in encoder.tokenize(part, "document", limit))
        found[detail.name].append([value / size for value in (tokens, seconds, stored(place))])
    del found[Detail.STATES.name][0]
    return found


def rank_seconds(s: ScaleSettings, precision: str) -> JsonObject:
    """method → [number of candidates, median seconds of a query]; the documents were seen before and are mapped from disk."""
    own, loaded = varied(s, s.size(150, TOP_K)), models(precision)
    corpus, queries, place = {str(n): text for n, text in enumerate(own)}, list(load_dataset(s.dataset).queries.values()), s.folder("rank", new=True)
    Reranker(**loaded, method="standard", cache_dir=place).encode(own, detail=Detail.STATES)
    first = Reranker(**loaded, method="standard", cache_dir=place)
    found: JsonObject = {method: [] for method in METHODS}
    for method, size in product(METHODS, (25, TOP_K)):
        settings = {"stage1_top_k": size // 2} if method == "optimal" else {}
        ready, drawn = first.using(make_method(method.partition("+")[0], **settings), cross=method != "best"), random.Random(0)
        rows = [QueryCandidates(str(n), queries[n], Ranked(drawn.sample(list(corpus), size), np.zeros(size))) for n in range(s.size(12, 4))]
        records = rank(ready, rows, corpus, 2)
        found[method].append([size, median([spent(partial(next, records))[0] for _ in rows][1:])])
    return found


def actor(s: ScaleSettings, precision: str, method: str) -> JsonObject:
    """A process with the models: seconds and memory after loading them, and the memory peak after a first answer."""
    if importlib.util.find_spec("ray"):
        import ray  # noqa: F401, as a worker has it
    ready = Reranker(MODEL, method, device="cpu", precision=precision)
    found = {"seconds": time.process_time(), "own_mb": own_bytes() / 1e6}  # counted from the start of the process
    ready.score("a query", varied(s, 32))
    return found | {"peak_mb": peak_memory_mb() * 1.048576}


def beir(folder: Path, documents: dict[str, str], queries: dict[str, str]) -> None:
    """Writes a collection in which each query has one judged document."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in texts.items()))
    judged = zip(queries, cycle(documents))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in judged))


def collect(s: ScaleSettings) -> JsonObject:
    """Writes the files that `driver` reads. It is a section of its own, so that its memory is not the driver's."""
    size, asks = s.size(100_000, 4000), s.size(2500, 100)
    place, drawn, base = s.folder("driver", new=True), random.Random(0), list(load_dataset(s.dataset).queries.values())
    documents = {f"doc-{n:09d}": text for n, text in enumerate(varied(s, size))}
    queries = {f"q{n:07d}": f"{n} {base[n % len(base)]}" for n in range(asks)}
    for name, part in (("documents", size), ("few", size // 5)):
        beir(place / name, dict(islice(documents.items(), part)), dict(islice(queries.items(), 1)))
    beir(place / "queries", dict(islice(documents.items(), 100)), queries)
    rows = [(q, d, TOP_K - k) for q in queries for k, d in enumerate(drawn.sample(list(documents), TOP_K))]
    (place / "run.trec").write_text("".join(f"{q} Q0 {d} {TOP_K + 1 - score} {score} x\n" for q, d, score in rows))
    pd.DataFrame(rows, columns=["query", "document", "score"]).to_parquet(place / "run.parquet")
    return {}


def driver(s: ScaleSettings) -> JsonObject:
    """Step → [seconds, bytes that stay, bytes at the peak], for one document or one query, for each step that only the driver does."""
    import pyarrow.parquet  # noqa: F401, before memory is measured

    place, found, kept = s.folder("driver"), dict[str, Any](), list[Any]()

    def step(name: str, units: int, work: Callable[[], Any]) -> Any:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier steps have freed would hide what this step takes
        before = own_bytes()
        with bench_scale.watched() as peak:
            start = time.process_time()
            kept.append(work())
            seconds = time.process_time() - start
        held = max(0, own_bytes() - before)
        found[name] = [seconds / units, held / units, max(held, 1_024_000 * peak[0] - before) / units]
        return kept[-1]

    def loaded(name: str) -> Any:
        return load_dataset(str(place / name), corpus=Corpus(Store(s.folder(f"driver/store-{name}", new=True)))).corpus

    def candidates_of(name: str) -> Candidates:
        return make_candidates(f"run:{place / name}", data, TOP_K, search=lambda *asked: [], drop_identical=False, progress=lambda rows, title: rows)

    few, corpus = (step(name, 1, partial(loaded, name)) for name in ("few", "documents"))
    more = len(corpus) - len(few)  # the difference counts, since a corpus holds texts until they fill a file
    seconds, stays, _ = ((after - before) / more for before, after in zip(found.pop("few"), found.pop("documents")))
    found["load"] = [seconds, stays, stays]
    asks = sum(1 for _ in (place / "queries/queries.jsonl").open())
    data = replace(step("queries", asks, lambda: load_dataset(str(place / "queries"))), corpus=corpus)
    step("candidates, Parquet", asks, lambda: candidates_of("run.parquet"))
    kept.pop()
    candidates = step("candidates", asks, lambda: candidates_of("run.trec"))

    def plan() -> Any:  # as eval._encode_candidates and RayExecutor._plan do
        return corpus.distinct(corpus.positions(list({d: None for ranked in candidates.run.values() for d in ranked.documents})))

    distinct = len(step("plan", 1, plan))
    found["plan"] = [value / distinct for value in found["plan"]]
    queries = queries_of(data, candidates)
    step("calls", asks, lambda: [(q, corpus.positions(q.candidates.documents)) for q in queries])
    journal = Journal(s.folder("driver/out", new=True), resume=False, overwrite=True)
    journal.begin({})

    def records() -> list[Record]:  # as they come from workers
        gathered: list[Record] = []
        for start in range(0, asks, QUERIES):
            gathered += pickle.loads(pickle.dumps([record(q) for q in queries[start : start + QUERIES]]))
        for one in gathered:
            journal.append("fast", one)
        return gathered

    ranked = step("records", asks, records)
    systems = {name: System.parse(name) for name in ("fast", "best")}
    options = {"measures": list(MEASURES), "baseline": "fast", "seed": 0, "dataset": data.name, "split": data.split, "methods": list(systems)}
    environment, models = Environment(**vars(describe(torch.device("cpu"))), vector_cache="disk"), {"model": MODEL, "model_cross": None}

    def summary(size: int) -> Any:
        some = replace(data, qrels=dict(islice(data.qrels.items(), size)))
        few = dict(islice(candidates.run.items(), size))
        own = {name: RowRecords(ranked[:size], 254, ColdCost()) for name in systems}
        return summarize(Evaluation(environment, Config.of(options), models, some, replace(candidates, run=few), systems), own)

    summary(20)  # loads what it needs
    step("summary", 2 * asks, lambda: summary(asks))
    return found | {"journal_bytes": (journal.partial / "fast.jsonl").stat().st_size / asks}


def record(query: QueryCandidates) -> Record:
    """A record as ranking one query leaves it."""
    size, numbers = len(query.candidates.documents), np.random.default_rng(0).standard_normal(len(query.candidates.documents))
    phases = {"encode": 0.0123456789, "tokenise": 0.0012345678, "score": 0.0123456789, "rank": 0.001234567}
    cost = Cost(phases, flops=10**9, flops_new=10**12, truncated=40, peak_rss_mb=1234.5678)
    return Record(query.id, query.candidates.documents[::-1], numbers.astype(np.float32).tolist(), numbers.tolist(), size, 0.0123456789, cost, "ray")


def tiny(s: ScaleSettings, files: str, each: str) -> JsonObject:
    """Writes shards that have little besides keys."""
    place, size = s.folder(f"tiny-{files}-{each}/vectors/tiny", new=True), int(each)
    empty = torch.zeros(size, 0, dtype=torch.float16)
    vectors = Vectors(torch.zeros(size, 1), torch.ones(size, dtype=torch.int64), torch.arange(size + 1), empty, empty)
    for n in range(int(files)):
        shards.write(place, [text_key(f"{n} {i}", 1) for i in range(size)], vectors, Detail.TOKENS)
    return {}


def index(s: ScaleSettings, files: str, each: str) -> JsonObject:
    """The cost of opening this many shards, of listing their folder, and of mapping them all."""
    size, place = int(files), s.folder(f"tiny-{files}-{each}")
    cache, seconds, held = opened("tiny", place)
    listed = [spent(partial(shards.shards, place / VECTORS / "tiny"))[0] for _ in range(3)]
    before, maps = own_bytes(), Path("/proc/self/maps").read_text().count("\n")
    mapped = next((n for n in range(size) if not cache.has(text_key(f"{n} 0", 1), Detail.TOKENS)), size)
    grown = own_bytes() - before
    del cache  # a process at its limit can hardly allocate
    return {
        "files": size, "documents": size * int(each), "seconds": seconds, "bytes": held, "list_seconds": median(listed), "mapped": mapped,
        "map_bytes": grown, "limit": int(Path("/proc/sys/vm/max_map_count").read_text()), "maps_before": maps,
    }  # fmt: skip


def make(s: ScaleSettings, documents: str) -> JsonObject:
    """Writes the vectors that `made` reads."""
    bench_scale.filled(s.folder(f"made-{documents}"), int(documents))
    return {}


def made(s: ScaleSettings, documents: str) -> JsonObject:
    """The cost of opening made vectors and of reranking 100 of them: with shards that are new to the process, seen before, and dropped from memory."""
    count, place, first = int(documents), s.folder(f"made-{documents}"), list[float]()
    cache, seconds, held = opened(bench_scale.CACHE_KEY, place)
    drawn = [bench_scale.key(n) for n in random.Random(0).sample(range(count), TOP_K)]
    for _ in range(4):
        cache, read = VectorCache(bench_scale.CACHE_KEY, place, disk_bytes=1 << 60), told("io", "rchar")
        evicted(place)
        first.append(spent(lambda: all(cache.has(key, Detail.TOKENS) for key in drawn))[0])  # noqa: B023
        read = told("io", "rchar") - read
    evicted(place)
    query, cold = bench_scale.made(2**31, 2**31 + 2), told("io", "read_bytes")
    query = replace(query.row(0), tokens=query.tokens[: bench_scale.QUERY], offsets=torch.tensor([0, bench_scale.QUERY]))

    def again() -> Any:
        return bench_scale.attended(query, cache.gather(drawn, Detail.TOKENS), 0)

    again()
    cold = told("io", "read_bytes") - cold
    warm = median([spent(again)[0] for _ in range(8)][1:])
    files = len(list(place.rglob("*.safetensors")))
    return {
        "documents": count, "files": files, "file_bytes": stored(place) / files, "seconds": seconds, "bytes": held,
        "first_seconds": median(first[1:]), "first_bytes": read, "warm_seconds": warm, "cold_bytes": cold / TOP_K,
    }  # fmt: skip


def encoded(s: ScaleSettings, documents: str, precision: str, detail: str) -> JsonObject:
    """A run that checks the model: encodes this many documents into an empty cache."""
    count, place, loaded = int(documents), s.folder("encoded", new=True), models(precision)
    ready = Reranker(**loaded, method="standard", cache_dir=place, cache_bytes=1 << 60, max_tokens_per_doc=CHECK_TOKENS)
    own, encoder = varied(s, count), loaded["model"]
    tokens = sum(len(t) - encoder.specials for t in encoder.tokenize(own, "document", CHECK_TOKENS))
    ready.without_cache().encode(own[:4], detail=Detail[detail])  # warms up
    cpu, wall = spent(lambda: ready.encode(own, detail=Detail[detail]))
    return {"documents": count, "tokens": tokens / count, "seconds": cpu, "wall": wall, "bytes": stored(place)}


def ray(s: ScaleSettings, workers: str) -> JsonObject:
    """The whole command over new documents: its wall time, and the CPU seconds of each worker that encodes states (their chunks are small)."""
    size, folder, data, spends = s.size(1000, 100), s.folder(f"ray-{workers}", new=True), load_dataset(s.dataset), dict[int, float]()
    beir(folder / "data", dict(islice(data.corpus.items(), size)), dict(islice(data.queries.items(), QUERIES)))
    command = [sys.executable, "-m", "rerank_lab.eval", "--dataset", str(folder / "data"), "--methods", "standard", "--max-tokens-per-doc", str(RAY_TOKENS)]
    command += ["--cold-queries", "0", "--no-kernel-check", "--cache", str(folder / "cache"), "--out", str(folder / "out")]
    command += ["--executor", "ray", "--address", "local", "--workers", workers, "--resources", "CPU=1"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            spends |= encoders(child.pid)
            time.sleep(0.1)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    found = [shards.read(path) for path in (folder / "cache" / VECTORS).rglob("*.safetensors")]
    tokens = sum(int(vectors.offsets[-1]) for vectors in found if vectors is not None)
    return {"documents": size, "tokens": tokens / size, "wall": time.perf_counter() - start, "encoders": sorted(spends.values())}


def encoders(parent: int) -> dict[int, float]:
    """Process id → CPU seconds, of Ray Data's encoding processes below a parent."""
    rows: dict[int, tuple[str, int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has just ended
            head, _, tail = path.read_text().rpartition(")")
            told, (number, _, name) = tail.split(), head.partition(" (")
            rows[int(number)] = name, int(told[1]), (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")

    def below(number: int) -> bool:
        while number in rows and number != parent:
            number = rows[number][1]
        return number == parent

    return {number: seconds for number, (name, _, seconds) in rows.items() if name.startswith("ray::MapWorker") and below(number)}


SECTIONS: dict[str, Callable[..., JsonObject]] = {
    "texts": texts, "encode": encode, "rank": rank_seconds, "actor": actor, "collect": collect, "driver": driver, "tiny": tiny, "index": index, "make": make, "made": made,
    "encoded": encoded, "ray": ray,
}  # fmt: skip


def main() -> None:
    name, *arguments = sys.argv[1].split()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # warnings about shards that `index` cannot map, and about quantisation
    if name != "ray" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(SECTIONS[name](ScaleSettings(**json.loads(sys.argv[2])), *arguments)))


if __name__ == "__main__":
    main()
