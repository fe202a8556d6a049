"""The cost model of experiments/benchmarks/scale.py: from a few measured figures to seconds, bytes and limits of any number of documents, queries and workers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rerank_lab.cache.vectors import CHUNK, LOOK, MAPS
from rerank_lab.datasets.corpus import PART
from rerank_lab.eval.executors.ray import QUERIES
from rerank_lab.models.base import Detail

TOP_K = 100
METHODS = {"fast": Detail.POOLED, "best": Detail.TOKENS, "standard": Detail.STATES, "optimal": Detail.STATES, "best+cross": Detail.STATES}
STEPS = ("load", "plan", "queries", "candidates", "calls", "records", "summary")  # of the driver, the first two a document

Json = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What figures depend on besides the machine.

    Attributes:
        work: where files are kept.
        dataset: as load_dataset takes it.
        largest: made documents.
        quick: a fraction of each size.
    """

    work: str
    dataset: str
    largest: int
    quick: bool

    def size(self, wanted: int, least: int = 2) -> int:
        return max(least, wanted // 25) if self.quick else wanted

    def folder(self, name: str, *, new: bool = False) -> Path:
        path = Path(self.work) / name
        if new:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        return path


class Line(NamedTuple):
    """A fixed part, and one a unit."""

    fixed: float
    slope: float

    def at(self, units: float) -> float:
        return max(0.0, self.fixed + self.slope * units)


class Cost(NamedTuple):
    """Of a step, a document or a query: seconds, bytes that stay, bytes at the peak."""

    seconds: float
    stays: float
    peak: float


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        tokens: own tokens of a document that the model reads, the mean.
        text_bytes, text_seconds: a document in the texts' files; a candidate's text read from there.
        text_open: seconds for each of these files, which every call for QUERIES queries opens anew.
        vectors: detail → bytes of a document in the cache, and of each token.
        encode: precision → detail → seconds of a document, and of each token.
        rank: precision → method → seconds of a query, and of each candidate, seen before.
        actor: precision → method → seconds and bytes of a process with the models.
        open_seconds, open_bytes: of the key index, a file and a document.
        list_seconds: the cache folder's listing, a file.
        check_seconds: a byte of a shard that is new to a process.
        map_bytes: own memory of a process for each shard that it has mapped.
        maps: files that a process can map.
        driver: step → cost a document (load, plan) or a query; of a method's queries records and summary.
        journal_bytes: a line.
        made_pair: seconds of a pair of made vectors, seen before.
    """

    tokens: float
    text_bytes: float
    text_seconds: float
    text_open: float
    vectors: dict[Detail, Line]
    encode: dict[str, dict[Detail, Line]]
    rank: dict[str, dict[str, Line]]
    actor: dict[str, dict[str, Cost]]
    open_seconds: Line
    open_bytes: Line
    list_seconds: float
    check_seconds: float
    map_bytes: float
    maps: int
    driver: dict[str, Cost]
    journal_bytes: float
    made_pair: float


@dataclass(frozen=True)
class Case:
    """What is asked for."""

    documents: int
    queries: int
    workers: int
    method: str
    precision: str
    workers_a_node: int = 8
    gbits: float = 10.0
    node_gb: float = 256.0

    @property
    def detail(self) -> Detail:
        return METHODS[self.method]

    @property
    def on_a_node(self) -> int:
        return min(self.workers, self.workers_a_node)

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.workers_a_node)


def files(documents: int, detail: Detail) -> int:
    return -(-documents // CHUNK[detail])


def store_bytes(f: Figures, documents: int, detail: Detail) -> float:
    """Vectors on disk."""
    return documents * f.vectors[detail].at(f.tokens)


def touched(among: int, draws: float) -> float:
    """Different ones among so many that so many random draws hit."""
    return float(among) if among == 1 else -among * math.expm1(draws * math.log1p(-1 / among))


def shards_touched(f: Figures, case: Case) -> float:
    """By one worker, whose candidates stand anywhere."""
    return touched(files(case.documents, case.detail), case.queries * TOP_K / case.workers)


def pair_bytes(f: Figures, method: str) -> float:
    """What a method reads of a candidate's vectors: optimal the states of every second one."""
    whole, pooled = f.vectors[METHODS[method]].at(f.tokens), f.vectors[Detail.POOLED].at(f.tokens)
    return (whole + pooled) / 2 if method == "optimal" else whole


def rank_bytes(f: Figures, case: Case) -> float:
    """Read by one worker, its memory too small to keep any: shards whole when they are new to it, then what each pair wants."""
    new, pairs = shards_touched(f, case), case.queries * TOP_K / case.workers
    shard = store_bytes(f, case.documents, case.detail) / files(case.documents, case.detail)
    return new * shard + max(0.0, pairs - new) * pair_bytes(f, case.method) + pairs * f.text_bytes


def text_opens(f: Figures, documents: int) -> float:
    """Files of texts that a query's share of a call opens."""
    return touched(text_parts(f, documents), QUERIES * TOP_K) / QUERIES


def text_parts(f: Figures, documents: int) -> int:
    """Files of so many texts."""
    return -(-documents // int(min(PART[0], PART[1] / f.text_bytes)))


def network(f: Figures, case: Case) -> tuple[float, float]:
    """Bytes between the shared folder and all nodes: texts read and vectors written, then what ranking reads."""
    return case.documents * f.text_bytes + store_bytes(f, case.documents, case.detail), case.workers * rank_bytes(f, case)


def times(f: Figures, case: Case) -> dict[str, float]:
    """Seconds of each part, as if none overlapped another; network: of the busiest node."""
    d, q, w, detail = case.documents, case.queries, case.workers, case.detail
    shards, link = files(d, detail), case.gbits * 1e9 / 8
    one, other = network(f, case)
    share = case.on_a_node / w
    line = f.rank[case.precision][case.method]
    new = shards_touched(f, case) * store_bytes(f, d, detail) / shards
    return {
        "driver": sum(f.driver[step].seconds * (d if step in STEPS[:2] else q) for step in f.driver),
        "start": 2 * _actor(f, case).seconds + shards * f.open_seconds.fixed + d * f.open_seconds.slope,
        "encode": d * f.encode[case.precision][detail].at(f.tokens) / w,
        "listing": max(1.0, min(shards, 1 / LOOK) / w) * shards / 2 * f.list_seconds,
        "rank": q * line.at(TOP_K) / w,
        "texts": q * TOP_K * f.text_seconds / w + min(text_parts(f, d), q * text_opens(f, d) / w) * f.text_open,
        "checksums": new * f.check_seconds,
        "network, encode": one * share / link,
        "network, rank": other * share / link,
    }


def mapped(f: Figures, case: Case) -> float:
    """Shards that a process has mapped at once; an encoder maps what it writes."""
    return min(MAPS, max(shards_touched(f, case), files(case.documents, case.detail) / case.workers))


def worker_bytes(f: Figures, case: Case) -> float:
    """Own memory of a process that ranks: models, key index, shards mapped."""
    shards = files(case.documents, case.detail)
    return _actor(f, case).peak + shards * f.open_bytes.fixed + case.documents * f.open_bytes.slope + mapped(f, case) * f.map_bytes


def driver_bytes(f: Figures, case: Case) -> float:
    """What stays, and the largest of what comes on top for a while."""
    d, q, cost = case.documents, case.queries, f.driver
    stays = d * cost["load"].stays + q * sum(cost[step].stays for step in ("queries", "candidates", "records"))
    return stays + max(d * cost["plan"].peak, q * cost["summary"].peak)


def strain(f: Figures, case: Case) -> dict[str, float]:
    """What is wanted over what there is: past 1 it does not fit."""
    memory = case.node_gb * 1e9
    return {
        "files mapped": mapped(f, case) / f.maps,
        "memory of a node": case.on_a_node * worker_bytes(f, case) / memory,
        "memory of the driver": driver_bytes(f, case) / memory,
    }


def holds(f: Figures, case: Case, name: str) -> int:
    """Documents up to which a limit is kept, to three digits."""
    low, high = 0.0, 15.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if strain(f, replace(case, documents=int(10**middle)))[name] <= 1 else (low, middle)
    return int(float(f"{10**low:.3g}"))


def bottleneck(f: Figures, case: Case) -> tuple[str, str]:
    """What does not fit, worst first, and the slowest part with its share of the time."""
    over = sorted(((factor, name) for name, factor in strain(f, case).items() if factor > 1), reverse=True)
    taken = times(f, case)
    name = max(taken, key=lambda part: taken[part])
    return ", ".join(f"{name} {factor:.1f} ×" for factor, name in over) or "-", f"{name} {100 * taken[name] / sum(taken.values()):.0f} %"


def _actor(f: Figures, case: Case) -> Cost:
    return f.actor[case.precision]["best" if case.detail < Detail.STATES else "standard"]


def fitted(points: Sequence[Sequence[float]], column: int = 1) -> Line:
    """Least squares; what costs more the more there is of it, so that noise makes no negative slope."""
    x, y = (np.array([point[n] for point in points]) for n in (0, column))
    slope = max(0.0, float(np.polyfit(x, y, 1)[0]))
    return Line(float(y.mean() - slope * x.mean()), slope)


def of(found: Json, kind: str) -> dict[str, Json]:
    """Sections of a kind by their arguments."""
    return {key.partition(" ")[2]: value for key, value in found.items() if key.partition(" ")[0] == kind}


def figures(found: Json) -> Figures:
    """The model's figures from what the sections gave."""
    few, many, crowd = sorted(of(found, "index").values(), key=lambda row: int(row["files"]))  # many keys in few files, few keys in many, in too many
    texts, encode, made, driver = found["texts"], of(found, "encode"), min(of(found, "made").values(), key=lambda row: int(row["documents"])), found["driver"]
    one, parts = texts["parts"]
    text_open = (parts["seconds"] - one["seconds"]) / (parts["opened"] - one["opened"])

    def opening(name: str) -> Line:
        slope = few[name] / few["documents"]
        return Line((many[name] - slope * many["documents"]) / many["files"], slope)

    def process(precision: str) -> dict[str, Cost]:
        rows = {method: found[f"actor {precision} {method}"] for method in ("best", "standard")}
        return {method: Cost(row["seconds"], 1e6 * row["own_mb"], 1e6 * row["peak_mb"]) for method, row in rows.items()}

    return Figures(
        tokens=texts["tokens"], text_bytes=one["bytes"], text_seconds=(one["seconds"] - one["opened"] * text_open) / texts["pairs"], text_open=text_open,
        vectors={detail: fitted(encode["fp32"][detail.name], 2) for detail in Detail},
        encode={precision: {detail: fitted(rows[detail.name]) for detail in Detail} for precision, rows in encode.items()},
        rank={precision: {method: fitted(points) for method, points in rows.items()} for precision, rows in of(found, "rank").items()},
        actor={precision: process(precision) for precision in encode if f"actor {precision} best" in found},
        open_seconds=opening("seconds"), open_bytes=opening("bytes"), list_seconds=crowd["list_seconds"] / crowd["files"],
        check_seconds=made["first_seconds"] / made["first_bytes"], map_bytes=many["map_bytes"] / many["files"], maps=crowd["limit"] - crowd["maps_before"],
        driver={step: Cost(*driver[step]) for step in STEPS}, journal_bytes=driver["journal_bytes"], made_pair=made["warm_seconds"] / TOP_K,
    )  # fmt: skip


def checks(f: Figures, found: Json) -> list[tuple[str, float, float, str]]:
    """What was run, as the model has it, as it was, and its unit."""
    rows: list[tuple[str, float, float, str]] = []

    def index(what: str, run: Json) -> None:
        for name, line, unit in (("seconds", f.open_seconds, "s"), ("bytes", f.open_bytes, "B")):
            rows.append((f"{what}, key index opened", run["files"] * line.fixed + run["documents"] * line.slope, run[name], unit))

    for given, run in of(found, "encoded").items():
        _, precision, name = given.split(" ")
        what, detail = f"{run['documents']:,} documents encoded, {precision}, {name}", Detail[name]
        rows.append((what, run["documents"] * f.encode[precision][detail].at(run["tokens"]), run["seconds"], "s"))
        rows.append((what, run["documents"] * f.vectors[detail].at(run["tokens"]), run["bytes"], "B"))
    for run in sorted(of(found, "made").values(), key=lambda run: int(run["documents"]))[1:]:
        what, new = f"{run['documents']:,} made documents", touched(run["files"], TOP_K) * run["file_bytes"]
        index(what, run)
        rows.append((f"{what}, shards of {TOP_K} read for the first time", new, run["first_bytes"], "B"))
        rows.append((f"{what}, the same", new * f.check_seconds, run["first_seconds"], "s"))
        rows.append((f"{what}, {TOP_K} reranked, seen before", TOP_K * f.made_pair, run["warm_seconds"], "s"))
    for workers, run in of(found, "ray").items():
        each = f.actor["fp32"]["standard"].seconds + run["documents"] * f.encode["fp32"][Detail.STATES].at(run["tokens"]) / int(workers)
        rows.append((f"{run['documents']:,} documents, STATES, on Ray: the busiest worker of {workers}", each, max(run["encoders"]), "s"))
    _, many, crowd = sorted(of(found, "index").values(), key=lambda row: int(row["files"]))
    index(f"{crowd['files']:,} shards", crowd)
    rows.append((f"{many['files']:,} shards listed", many["files"] * f.list_seconds, many["list_seconds"], "s"))
    rows.append((f"{crowd['files']:,} shards mapped until the system refuses", min(f.maps, crowd["files"]) * f.map_bytes, crowd["map_bytes"], "B"))
    return rows
