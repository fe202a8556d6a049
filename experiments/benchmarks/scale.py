"""python experiments/benchmarks/scale.py --work DIR --dataset SCIFACT: what 10^8 documents and 10^6 queries take

Writes reports/scale.md. Small figures are measured, seconds a document and bytes a key
among them (scale_measure.py, one section a process); a few functions make times, bytes
and memory of them (scale_model.py); runs of up to 10^4 encoded and --largest made
documents check these; then they are read off for --documents and --queries. About a
quarter of an hour. What was measured is kept in --work: an interrupted run goes on, and
a second one only writes the report again. A million made documents need 20 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import bench_scale
import scale_measure
from rerank_lab.cli import count, path_of, positive
from rerank_lab.datasets import load_dataset
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.eval.settings import parser as eval_options
from rerank_lab.files import write_atomically
from rerank_lab.models.base import Detail
from rerank_lab.models.exported import choose
from scale_measure import CHECK_TOKENS, LIMITS, MADE_TOKENS, RAY_TOKENS, RUNTIME, TINY
from scale_model import (
    METHODS,
    TOP_K,
    Figures,
    JsonObject,
    Line,
    ScaleCase,
    ScaleSettings,
    bottleneck,
    checks,
    driver_bytes,
    figures,
    files,
    holds,
    network,
    of,
    pair_bytes,
    store_bytes,
    strain,
    times,
    worker_bytes,
)  # fmt: skip

DRIVER = {
    "load": "a document: read, written to the shared folder, its id and digest kept", "plan": "a distinct candidate: its place in what is encoded",
    "queries": "a query: text, judgement", "candidates": f"a query: {TOP_K} candidates from a TREC run", "candidates, Parquet": "the same from Parquet",
    "calls": "a query: what travels", "records": "a query and method: record, line of the journal", "summary": "a query and method: measures, tests, files",
}  # fmt: skip
OUT = Path(__file__).resolve().parents[2] / "reports" / "scale.md"
WORKERS, SHOWN = (1, 8, 64), ("fp32", "bf16")
NEED = 20e9  # bytes of disk for a million made documents and all other files
FORMULAS = """\
d documents, q queries of 100 candidates, w workers, n = min(w, workers a node), F = ⌈d / chunk⌉ shards of S bytes (chunk: 512, of states 64)
T = F (1 − (1 − 1/F)^(100 q / w))     shards that one worker meets, its candidates anywhere
O = touched files of texts a call of 16 queries / 16, likewise, of P that hold 16,384 texts or 32 MiB each
M = min(32,768, max(T, F / w))        shards mapped at once, a setting; to map one again costs no reading and is left out

driver           d (load + plan) + q (queries + candidates + calls + records + summary)
start            2 processes + F · open a file + d · open a document
encode           d (fixed + tokens · a token) / w
listing          max(1, min(F, 100) / w) · F / 2 · list a file                  once a hundredth of --cache-gb, which holds all
rank             q (fixed + 100 · a pair) / w
texts            q · 100 · a text / w + min(P, q · O / w) · open texts
checksums        T · S · check a byte                                           a shard new to a process is read whole
network, encode  d (a text + its vectors) · n / w / bandwidth
network, rank    n (T · S + (100 q / w − T) · a pair's bytes + 100 q / w · a text) / bandwidth       memory keeps none of it
a worker         process + F · open a file + d · open a document + M · a mapped shard                bytes
driver's memory  d · load + q (queries + candidates + records) + max(d · plan, q · summary)  bytes"""
ANSWER = """\
1. **Time**, fp32, from texts to results: `fast` {fast_1} on 1 worker and {fast_64} on 64, `best` {best_1} and {best_64}, `standard` {standard_1} and {standard_64}, if memory and disk allow (extrapolated). Scoring is the least of it: {scoring} of `best` on 64 (extrapolated).
2. **The first limit is memory.** Each worker holds the key of every document, {worker} with its models, and {on_a_node} workers of a node {node} (extrapolated). {node_gb} GB (assumed) would do for {node_documents} documents (extrapolated). The driver takes {driver} (extrapolated).
3. **Then disk.** `fast` keeps {pooled} of vectors, `best` {vectors}, the others {states} (extrapolated).
4. **Then reading.** A shard that is new to a process is read whole for its checksum: 64 workers read {read} for `best`, whose vectors are {vectors} (extrapolated).
5. **As far as it was checked**, runs took {least:.2f} to {most:.2f} times what the model says, those of more than a second {least_long:.2f} to {most_long:.2f} times (measured)."""
REMEDIES = """\
- *Files.* {shards} shards with states (extrapolated). A process keeps 32,768 of them mapped (a setting), of {maps} that the system lets it (measured). Larger chunks would make fewer.
- *Key index.* Fewer and larger workers share one (`--resources CPU=8`; how well threads use cores is not measured here). Or split the collection: a run and a cache for each part. Sorted on disk and mapped by all, the bare keys would be {keys} a node (extrapolated).
- *Driver.* It holds the candidates and records of all queries, and resamples all at the end. Nobody has judged {queries} queries (assumed): evaluate a sample, for intervals narrow with the root of its size.
- *Checksums and network.* Were each shard read by one worker alone, `standard` would read {states} and not {standard_read} (extrapolated): let one worker have the queries whose candidates lie together. The cure would be a checksum a block, or one check a node.
- *Disk.* `--max-tokens-per-doc 128` makes states {states_128} instead of {states} (extrapolated). `--cache-gb` must hold all: its default of {cache_gb:g} GB (a setting) drops vectors past {cache_documents} documents with tokens (extrapolated).
- *bf16.* Reranking gains what the table says. `eval --precision bf16` encodes and ranks in fp32 too, to say what changed: its cost is the sum of both rows."""
TIMES = """\
Of one worker; *bytes* of all workers over the network, *network* the time of the busiest node, at {link} (assumed); *all* their sum and a worker's start, as if nothing overlapped. Workers of a node share its network and each reads its shards for itself, so that 8 on one node wait longer than 1."""
CHECKED = """\
Encoded at {tokens} tokens a document at most, made with {made} random token vectors each, so that it takes minutes (settings); wall time of encoding was {least:.1f} to {most:.1f} times its CPU time (measured). Where pages had left memory, the disk's read-ahead made a pair read {cold} documents (measured); the model counts what a pair wants."""
ON_RAY = """\
On Ray, `eval --executor ray --address local --methods standard`, documents of {tokens} tokens at most (settings), 1 worker encoded for {one} s, 2 for {two} s (measured, CPU time, each from its start); the whole command took {wall_1:.0f} and {wall_2:.0f} s of wall time (measured). So work is divided; how wall time falls with workers two cores cannot show that driver, Ray and others used too, and nothing here shows many workers, many nodes or a folder over a network."""
ASSUMED = """\
- {link}; the shared folder is as fast as all nodes together; opening a file takes as long as on the disk here, a network's latency left out (assumed).
- Documents and queries are like {dataset}'s; every document is some query's candidate, and candidates fall on documents at random (assumed). A worker's memory keeps no page of them (assumed).
- Workers wait neither for each other nor for the driver, and none dies (assumed). One method is ranked; the kernel check, cold queries and sweeps rank again (assumed left out)."""


def duration(seconds: float) -> str:
    """A time in the unit that people would use, with two or three digits."""
    unit, name = next(((u, n) for u, n in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * u), (1, "s"))
    return f"{seconds / unit:,.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.2g} {name}"


def size(amount: float) -> str:
    """A number of bytes in the unit that people would use, with two or three digits."""
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if amount >= u), (1.0, "B"))
    return f"{amount / unit:,.0f} {name}" if amount >= 10 * unit else f"{amount / unit:.2g} {name}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---" if n == 0 else "---:" for n in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def millis(line: Line, units: float) -> str:
    return f"{1000 * line.at(units):.3g} = {1000 * line.fixed:.2g} + {units:.0f} × {1000 * line.slope:.2g}"


def digits(number: float) -> str:
    """A number rounded to three digits."""
    return f"{float(f'{number:.3g}'):,g}"


def whole(number: float) -> str:
    """A number rounded to two digits; from a million on, with the word."""
    rounded = float(f"{number:.2g}")
    return f"{rounded / 1e6:g} million" if rounded >= 1e6 else f"{rounded:,.0f}"


def read_off(f: Figures, case: ScaleCase) -> str:
    """The table of times, by method, precision and number of workers."""
    rows = []
    for method, precision, workers in product(METHODS, (p for p in SHOWN if p in f.actor), WORKERS):
        own = replace(case, method=method, precision=precision, workers=workers)
        taken = times(f, own)
        shown = [duration(taken[part]) for part in ("encode", "listing", "rank", "texts", "checksums")]
        sent = [size(sum(network(f, own))), duration(taken["network, encode"] + taken["network, rank"])]
        rows.append([f"{method}, {precision}", workers, *shown, *sent, *map(duration, (taken["driver"], sum(taken.values()))), bottleneck(f, own)[1]])
    return table(["", "workers", "encode", "listing", "rank", "texts", "checksums", "bytes", "network", "driver", "all", "slowest part"], rows)


def needs(f: Figures, case: ScaleCase) -> str:
    """The table of disk and memory. They are the same for all precisions, and for all methods that cache the same detail."""
    rows = []
    for detail, workers in product(Detail, WORKERS):
        methods = [method for method, wanted in METHODS.items() if wanted is detail]
        own = replace(case, method=methods[0], workers=workers)
        held, d = worker_bytes(f, own), own.documents
        taken = [
            *map(size, (store_bytes(f, d, detail), d * f.text_bytes, driver_bytes(f, own), held, own.on_a_node * held)),
            whole(strain(f, own)["files mapped"] * f.maps),
        ]
        rows.append([", ".join(methods), workers, f"{files(d, detail):,}", *taken, bottleneck(f, own)[0]])
    return table(["", "workers", "shards", "vectors", "texts", "driver", "a worker", "a node's workers", "files mapped", "does not fit, worst first"], rows)


def facts(f: Figures, case: ScaleCase, found: JsonObject, about: JsonObject) -> JsonObject:
    """Name → text, for the placeholders in the report's prose."""

    def at(method: str, workers: int) -> ScaleCase:
        return replace(case, method=method, workers=workers)

    best, standard, d = at("best", 64), at("standard", 64), case.documents
    totals = {f"{method}_{w}": duration(sum(times(f, at(method, w)).values())) for method in ("fast", "best", "standard") for w in (1, 64)}
    ratios = [was / said for _, said, was, _ in checks(f, found)]
    long = [was / said for _, said, was, unit in checks(f, found) if unit == "s" and was > 1] or ratios
    cache_gb = float(eval_options().get_default("cache_gb"))
    return about | totals | {
        "scoring": duration(times(f, best)["rank"]), "maps": f"{f.maps:,}", "worker": size(worker_bytes(f, best)),
        "on_a_node": best.on_a_node, "node": size(best.on_a_node * worker_bytes(f, best)), "node_gb": f"{case.node_gb:g}",
        "node_documents": whole(holds(f, best, "memory of a node")), "driver": size(driver_bytes(f, best)), "read": size(network(f, best)[1]), "vectors": size(store_bytes(f, d, Detail.TOKENS)),
        "least": min(ratios), "most": max(ratios), "least_long": min(long), "most_long": max(long), "pooled": size(store_bytes(f, d, Detail.POOLED)), "shards": f"{files(d, Detail.STATES):,}", "keys": size(16 * d), "queries": f"{case.queries:,}",
        "states": size(store_bytes(f, d, Detail.STATES)), "standard_read": size(network(f, standard)[1]), "states_128": size(d * f.vectors[Detail.STATES].at(min(128, f.tokens))),
        "cache_gb": cache_gb, "cache_documents": whole(cache_gb * 1e9 / f.vectors[Detail.TOKENS].at(f.tokens)),
        "link": f"{case.gbits:g} Gbit/s and {case.node_gb:g} GB a node, {case.workers_a_node} workers on each",
    }  # fmt: skip


def measured_tables(f: Figures, found: JsonObject) -> str:
    known = [precision for precision in f.encode if precision in f.rank]
    sizes = {detail: f"{size(line.at(f.tokens))} = {line.fixed:,.0f} + {f.tokens:.0f} × {line.slope:,.0f}" for detail, line in f.vectors.items()}
    encode = [[detail.name, *(millis(f.encode[p][detail], f.tokens) for p in known), sizes[detail]] for detail in Detail]
    rank = [[method, *(millis(f.rank[p][method], TOP_K) for p in known), size(pair_bytes(f, method))] for method in METHODS]
    driver = [[text, digits(1e6 * found["driver"][step][0]), *(f"{value:,.0f}" for value in found["driver"][step][1:])] for step, text in DRIVER.items()]
    actors = [[f"{p}, {m}", f"{c.seconds:.1f}", f"{c.stays / 1e6:,.0f}", f"{c.peak / 1e6:,.0f}"] for p, rows in f.actor.items() for m, c in rows.items()]
    seconds, held = f.open_seconds, f.open_bytes
    others = [
        ["own tokens of a document that the model reads, mean", f"{f.tokens:.0f}"], ["a text in the shared folder", size(f.text_bytes)],
        ["reading a candidate's text; opening a file of texts", f"{1e6 * f.text_seconds:.2g} µs; {1e6 * f.text_open:.0f} µs"],
        ["opening the cache: a shard; a key", f"{1e6 * seconds.fixed:.0f} µs, {held.fixed:,.0f} bytes; {1e6 * seconds.slope:.2g} µs, {held.slope:.0f} bytes"],
        ["listing its folder: a file", f"{1e6 * f.list_seconds:.0f} µs"], ["a shard that is new: checksum and mapping", f"{1e9 * f.check_seconds:.2g} s a GB"],
        ["a shard that is mapped", f"{f.map_bytes:,.0f} bytes"], ["a line of the journal", size(f.journal_bytes)],
    ]  # fmt: skip
    return "\n\n".join([
        "Encoding a document, ms, and its bytes in the cache: a fixed part and one for each token. int8 is that of `--runtime onnx`.", table(["", *known, "bytes"], encode),
        "Ranking a query, ms: a fixed part and one for each candidate, seen before and in memory; and the bytes of vectors that a pair reads.",
        table(["", *known, "bytes a pair"], rank), "The driver alone.", table(["", "µs", "bytes that stay", "at the peak"], driver),
        "A worker's process: s to its models, MB of its own then, MB at the peak of a first answer over 32 new documents.",
        table(["", "s", "MB", "peak MB"], actors), "The rest.", table(["", ""], others),
    ])  # fmt: skip


def checked(f: Figures, found: JsonObject) -> str:
    def shown(value: float, unit: str) -> str:
        return f"{value:.3g} s" if unit == "s" else f"{value / 1e6:,.0f} MB" if value >= 1e8 else f"{value / 1e6:.3g} MB"

    rows = [[what, shown(said, unit), shown(was, unit), f"{was / said:.2f}"] for what, said, was, unit in checks(f, found)]
    wall = [run["wall"] / run["seconds"] for run in of(found, "encoded").values()]
    cold = ", ".join(f"{size(run['cold_bytes'])} of {run['documents']:,}" for run in of(found, "made").values())
    parts = [table(["", "predicted (extrapolated)", "measured", "measured / predicted (measured)"], rows)]
    parts.append(CHECKED.format(tokens=CHECK_TOKENS, made=MADE_TOKENS, least=min(wall), most=max(wall), cold=cold))
    if len(runs := of(found, "ray")) > 1:
        one, two = (" and ".join(f"{seconds:.0f}" for seconds in run["encoders"]) for run in runs.values())
        parts.append(ON_RAY.format(one=one, two=two, tokens=RAY_TOKENS, wall_1=runs["1"]["wall"], wall_2=runs["2"]["wall"]))
    return "\n\n".join(parts)


def report(found: JsonObject, case: ScaleCase, about: JsonObject) -> str:
    """The report. Every heading, column or sentence with a number says whether it is measured, extrapolated or assumed."""
    f = figures(found)
    said = facts(f, case, found, about)
    command = f"python experiments/benchmarks/scale.py --work DIR --dataset path/to/{about['dataset']}"
    made = f"Made by `{command}`, measured at commit {about['commit']} on {about['cpu']}, torch {about['torch']}, kernels {about['kernels']}; no GPU."
    kinds = "Every number is *measured* there, *extrapolated* from such by the formulas below, or *assumed*: heading, column or sentence says which."
    unit = "Seconds are CPU seconds of one core, to which each process was bound, for the machine was shared and a core is what a worker has."
    parts = [
        f"# At scale: {case.documents:,} documents, {case.queries:,} queries", f"{made} {kinds} {unit}", "## In short", ANSWER.format(**said),
        "## Time (extrapolated)", TIMES.format(**said),
        read_off(f, case), "## Disk, memory, limits (extrapolated)",
        f"Fits: {case.node_gb:g} GB for the workers of a node, as much for the driver (assumed), {f.maps:,} files mapped by a process (measured).",
        needs(f, case), "## What to do about it", REMEDIES.format(**said), "## Checked against runs", checked(f, found), "## Figures (measured)", measured_tables(f, found),
        "## Formulas (extrapolated)", f"```\n{FORMULAS}\n```", "## Assumptions (assumed)", ASSUMED.format(**said),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def precisions() -> list[str]:
    """The precisions that can be measured: those of this processor, and int8 if its packages are installed."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        flags = set()
    found = ["fp32", *(["bf16"] if flags & {"avx512_bf16", "amx_bf16"} else [])]
    try:
        choose(RUNTIME["int8"], "int8")
        found.append("int8")
    except UserError:
        pass
    return found


def sections(s: ScaleSettings) -> list[str]:
    """All sections in order. The words of a section are the name of its function and its arguments."""
    known = precisions()
    quickest = "bf16" if "bf16" in known else "fp32"
    sizes = [10**power for power in range(4, 9) if 10**power < s.largest] + [s.largest]
    found = [
        "texts", *(f"encode {p}" for p in known), *(f"rank {p}" for p in known),
        *(f"actor {p} {method}" for p in known if p != "int8" for method in ("best", "standard")), "collect", "driver",
        *(f"{what} {files} {each}" for files, each in ((s.size(files, 4), each) for files, each in TINY) for what in ("tiny", "index")),
        *(f"{what} {size}" for size in (bench_scale.SHARD, *(s.size(size, 2 * bench_scale.SHARD) for size in sizes)) for what in ("make", "made")),
        *(f"encoded {s.size(size)} {quickest} TOKENS" for size in (1000, 3000, 10_000)), f"encoded {s.size(1000)} fp32 STATES",
        *([f"ray {workers}" for workers in (1, 2)] if importlib.util.find_spec("ray") else []),
    ]  # fmt: skip
    return list(dict.fromkeys(found))  # small sizes can be equal


def found_by(s: ScaleSettings, section: str) -> JsonObject:
    """Measures one section in a process of its own.

    Raises:
        UserError: the process failed.
    """
    given = [sys.executable, scale_measure.__file__, section, json.dumps(asdict(s))]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"the section {section!r} ended with {done.returncode}; the same command goes on there")
    found: JsonObject = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(options: argparse.Namespace) -> tuple[JsonObject, JsonObject]:
    """Measures all sections that --work does not have yet. Returns the results of all sections, and facts about machine and data."""
    options.work.mkdir(parents=True, exist_ok=True)
    data = load_dataset(options.dataset)
    s = ScaleSettings(
        str(options.work.resolve()), str(Path(options.dataset).resolve() if Path(options.dataset).exists() else options.dataset), options.largest, options.quick
    )
    facts: dict[str, Any] = vars(describe(torch.device("cpu")))
    depends = (
        {k: v for k, v in facts.items() if k not in ("commit", "threads")}
        | asdict(s)
        | {"work": "", "dataset": data.hash, "limits": LIMITS, "checked": [CHECK_TOKENS, RAY_TOKENS, MADE_TOKENS]}
    )
    path = options.work / f"figures-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    kept: JsonObject = json.loads(path.read_text()) if path.is_file() else {}
    wanted = sections(s)
    left = [section for section in wanted if section not in kept]
    need = NEED * max(0.1, options.largest / 1e6)
    if left and (free := shutil.disk_usage(options.work).free) < need:
        raise UserError(f"{options.work} has {free / 1e9:.1f} GB free and {need / 1e9:.0f} GB are needed: another --work, or fewer made documents (--largest)")
    for section in (bar := tqdm(left, disable=None)):
        bar.set_description(section)
        kept[section] = {"commit": facts["commit"], "found": found_by(s, section)}
        write_atomically(path, json.dumps(kept))
    commits = ", ".join(dict.fromkeys(str(kept[section]["commit"]) for section in wanted))
    about = {"dataset": data.name, "commit": commits, "cpu": facts["cpu"], "torch": facts["packages"]["torch"], "kernels": facts["kernels"]}
    return {section: kept[section]["found"] for section in wanted}, about


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python experiments/benchmarks/scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=path_of, required=True, metavar="DIR", help="where vectors and figures are kept; yours to delete")
    p.add_argument("--dataset", default="numpydoc", help="texts and queries: bundled name or BEIR folder (default: numpydoc)")
    p.add_argument("--out", type=path_of, default=OUT, metavar="FILE", help="(default: reports/scale.md)")
    p.add_argument("--documents", type=count, default=10**8, metavar="N", help="read off for so many (default: 10^8)")
    p.add_argument("--queries", type=count, default=10**6, metavar="N", help=f"of {TOP_K} candidates each (default: 10^6)")
    p.add_argument("--gbits", type=positive, default=10.0, metavar="N", help="network of a node, assumed (default: 10)")
    p.add_argument("--workers-a-node", type=count, default=8, metavar="N", help="assumed (default: 8)")
    p.add_argument("--node-gb", type=positive, default=256.0, metavar="N", help="memory of a node, assumed (default: 256)")
    p.add_argument("--largest", type=count, default=10**6, metavar="N", help="made documents; 8 GB of disk a million (default: 10^6)")
    p.add_argument("--quick", action="store_true", help="a 25th of each size: whether it runs, not how fast")
    p.add_argument("--fresh", action="store_true", help="measure anew what was measured before")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        found, about = measured(options)
        case = ScaleCase(options.documents, options.queries, 64, "best", "fp32", options.workers_a_node, options.gbits, options.node_gb)
        write_atomically(options.out, report(found, case, about))
    except UserError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
