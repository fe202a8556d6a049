"""The cost model of experiments/benchmarks/scale.py.

It computes seconds, bytes and limits for any number of documents, queries and workers from a few measured figures.
"""

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
STEPS = (
    "load",
    "plan",
    "queries",
    "candidates",
    "calls",
    "records",
    "summary",
)  # of the driver; the cost of the first two is for a document, of others for a query

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class ScaleSettings:
    """What the figures depend on besides the machine.

    Attributes:
        work: folder for all files.
        dataset: as for load_dataset.
        largest: the largest number of made documents.
        quick: whether only a fraction of each size is measured.
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
    """A cost with a fixed part and a part for each unit."""

    fixed: float
    slope: float

    def at(self, units: float) -> float:
        return max(0.0, self.fixed + self.slope * units)


class StepCost(NamedTuple):
    """The cost of a step for one document or query: seconds, bytes that stay, bytes at the peak."""

    seconds: float
    stays: float
    peak: float


@dataclass(frozen=True)
class Figures:
    """The measured figures.

    Attributes:
        tokens: mean number of a document's own tokens that the model reads.
        text_bytes: bytes of a document in the files of texts.
        text_seconds: for reading a candidate's text.
        text_open: seconds for opening a file of texts. Every call for QUERIES queries opens its files anew.
        vectors: detail → bytes of a document in the cache: fixed, and for each token.
        encode: precision → detail → seconds for encoding a document: fixed, and for each token.
        rank: precision → method → seconds for ranking a query: fixed, and for each candidate; documents were seen before.
        actor: precision → method → seconds and bytes of a process with the models.
        open_seconds, open_bytes: for opening the key index: for a file, and for a document.
        list_seconds: for listing a file of the cache folder.
        check_seconds: for a byte of a shard that is new to a process.
        map_bytes: the process's own memory for a mapped shard.
        maps: number of files that a process can map.
        driver: step → cost for a document (load, plan) or a query; records and summary are for one method.
        journal_bytes: bytes of a line.
        made_pair: seconds for a pair of made vectors that were seen before.
    """

    tokens: float
    text_bytes: float
    text_seconds: float
    text_open: float
    vectors: dict[Detail, Line]
    encode: dict[str, dict[Detail, Line]]
    rank: dict[str, dict[str, Line]]
    actor: dict[str, dict[str, StepCost]]
    open_seconds: Line
    open_bytes: Line
    list_seconds: float
    check_seconds: float
    map_bytes: float
    maps: int
    driver: dict[str, StepCost]
    journal_bytes: float
    made_pair: float


@dataclass(frozen=True)
class ScaleCase:
    """A size that the model is asked about.

    Attributes:
        documents, queries, workers: their numbers.
        method, precision: of the ranking.
        workers_a_node: the most workers of a node.
        gbits: bandwidth of a node's network, Gbit/s.
        node_gb: memory of a node, GB.
    """

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
    """Bytes of the vectors on disk."""
    return documents * f.vectors[detail].at(f.tokens)


def touched(among: int, draws: float) -> float:
    """Expected number of different items that `draws` random draws hit, out of `among`."""
    return float(among) if among == 1 else -among * math.expm1(draws * math.log1p(-1 / among))


def shards_touched(f: Figures, case: ScaleCase) -> float:
    """Number of shards that one worker reads, if its candidates are anywhere."""
    return touched(files(case.documents, case.detail), case.queries * TOP_K / case.workers)


def pair_bytes(f: Figures, method: str) -> float:
    """Bytes that a method reads of a candidate's vectors. optimal reads the states of every second candidate."""
    whole, pooled = f.vectors[METHODS[method]].at(f.tokens), f.vectors[Detail.POOLED].at(f.tokens)
    return (whole + pooled) / 2 if method == "optimal" else whole


def rank_bytes(f: Figures, case: ScaleCase) -> float:
    """Bytes that one worker reads if its memory keeps none of them: shards that are new to it as a whole, then the vectors of each pair."""
    new, pairs = shards_touched(f, case), case.queries * TOP_K / case.workers
    shard = store_bytes(f, case.documents, case.detail) / files(case.documents, case.detail)
    return new * shard + max(0.0, pairs - new) * pair_bytes(f, case.method) + pairs * f.text_bytes


def text_opens(f: Figures, documents: int) -> float:
    """Number of files of texts that a call opens, divided by its queries."""
    return touched(text_parts(f, documents), QUERIES * TOP_K) / QUERIES


def text_parts(f: Figures, documents: int) -> int:
    """Number of files that hold this many texts."""
    return -(-documents // int(min(PART[0], PART[1] / f.text_bytes)))


def network(f: Figures, case: ScaleCase) -> tuple[float, float]:
    """Bytes between the shared folder and all nodes: for encoding (texts read, vectors written), and for ranking."""
    return case.documents * f.text_bytes + store_bytes(f, case.documents, case.detail), case.workers * rank_bytes(f, case)


def times(f: Figures, case: ScaleCase) -> dict[str, float]:
    """Seconds of each part, if parts do not overlap. The network's are of the busiest node."""
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


def mapped(f: Figures, case: ScaleCase) -> float:
    """Number of shards that a process has mapped at once. A process that encodes maps what it writes."""
    return min(MAPS, max(shards_touched(f, case), files(case.documents, case.detail) / case.workers))


def worker_bytes(f: Figures, case: ScaleCase) -> float:
    """Own memory, in bytes, of a process that ranks: models, key index, mapped shards."""
    shards = files(case.documents, case.detail)
    return _actor(f, case).peak + shards * f.open_bytes.fixed + case.documents * f.open_bytes.slope + mapped(f, case) * f.map_bytes


def driver_bytes(f: Figures, case: ScaleCase) -> float:
    """Memory of the driver in bytes: what stays, and the largest temporary part."""
    d, q, cost = case.documents, case.queries, f.driver
    stays = d * cost["load"].stays + q * sum(cost[step].stays for step in ("queries", "candidates", "records"))
    return stays + max(d * cost["plan"].peak, q * cost["summary"].peak)


def strain(f: Figures, case: ScaleCase) -> dict[str, float]:
    """Resource → needed amount divided by available amount. Above 1 it does not fit."""
    memory = case.node_gb * 1e9
    return {
        "files mapped": mapped(f, case) / f.maps,
        "memory of a node": case.on_a_node * worker_bytes(f, case) / memory,
        "memory of the driver": driver_bytes(f, case) / memory,
    }


def holds(f: Figures, case: ScaleCase, name: str) -> int:
    """The largest number of documents that fits a resource, to three digits."""
    low, high = 0.0, 15.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if strain(f, replace(case, documents=int(10**middle)))[name] <= 1 else (low, middle)
    return int(float(f"{10**low:.3g}"))


def bottleneck(f: Figures, case: ScaleCase) -> tuple[str, str]:
    """The resources that do not fit, worst first, and the slowest part with its share of the time; as text."""
    over = sorted(((factor, name) for name, factor in strain(f, case).items() if factor > 1), reverse=True)
    taken = times(f, case)
    name = max(taken, key=lambda part: taken[part])
    return ", ".join(f"{name} {factor:.1f} ×" for factor, name in over) or "-", f"{name} {100 * taken[name] / sum(taken.values()):.0f} %"


def _actor(f: Figures, case: ScaleCase) -> StepCost:
    return f.actor[case.precision]["best" if case.detail < Detail.STATES else "standard"]


def fitted(points: Sequence[Sequence[float]], column: int = 1) -> Line:
    """Fits a line by least squares. More units never cost less, so noise cannot make the slope negative."""
    x, y = (np.array([point[n] for point in points]) for n in (0, column))
    slope = max(0.0, float(np.polyfit(x, y, 1)[0]))
    return Line(float(y.mean() - slope * x.mean()), slope)


def of(found: JsonObject, kind: str) -> dict[str, JsonObject]:
    """The results of all sections of a kind, by their arguments."""
    return {key.partition(" ")[2]: value for key, value in found.items() if key.partition(" ")[0] == kind}


def figures(found: JsonObject) -> Figures:
    """The model's figures, from the results of the sections."""
    few, many, crowd = sorted(of(found, "index").values(), key=lambda row: int(row["files"]))  # many keys in few files; few keys in many; too many files
    texts, encode, made, driver = found["texts"], of(found, "encode"), min(of(found, "made").values(), key=lambda row: int(row["documents"])), found["driver"]
    one, parts = texts["parts"]
    text_open = (parts["seconds"] - one["seconds"]) / (parts["opened"] - one["opened"])

    def opening(name: str) -> Line:
        slope = few[name] / few["documents"]
        return Line((many[name] - slope * many["documents"]) / many["files"], slope)

    def process(precision: str) -> dict[str, StepCost]:
        rows = {method: found[f"actor {precision} {method}"] for method in ("best", "standard")}
        return {method: StepCost(row["seconds"], 1e6 * row["own_mb"], 1e6 * row["peak_mb"]) for method, row in rows.items()}

    return Figures(
        tokens=texts["tokens"], text_bytes=one["bytes"], text_seconds=(one["seconds"] - one["opened"] * text_open) / texts["pairs"], text_open=text_open,
        vectors={detail: fitted(encode["fp32"][detail.name], 2) for detail in Detail},
        encode={precision: {detail: fitted(rows[detail.name]) for detail in Detail} for precision, rows in encode.items()},
        rank={precision: {method: fitted(points) for method, points in rows.items()} for precision, rows in of(found, "rank").items()},
        actor={precision: process(precision) for precision in encode if f"actor {precision} best" in found},
        open_seconds=opening("seconds"), open_bytes=opening("bytes"), list_seconds=crowd["list_seconds"] / crowd["files"],
        check_seconds=made["first_seconds"] / made["first_bytes"], map_bytes=many["map_bytes"] / many["files"], maps=crowd["limit"] - crowd["maps_before"],
        driver={step: StepCost(*driver[step]) for step in STEPS}, journal_bytes=driver["journal_bytes"], made_pair=made["warm_seconds"] / TOP_K,
    )  # fmt: skip


def checks(f: Figures, found: JsonObject) -> list[tuple[str, float, float, str]]:
    """For each run that checks the model: its name, the model's figure, the measured one, and their unit."""
    rows: list[tuple[str, float, float, str]] = []

    def index(what: str, run: JsonObject) -> None:
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
