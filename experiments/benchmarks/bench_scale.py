"""python experiments/benchmarks/bench_scale.py --work DIR: search and reranking over a corpus that does not fit in memory

Vectors are made, not encoded: --documents texts of 50 tokens at r = 128 in fp16 and
a pooled vector of 384, written as the shards that the vector cache knows, 14.4 GB for
a million; what is there already from an earlier run is used again. Then, over the first
10^3, 10^4, ... of them:

search   the 100 nearest of all by pooled vector, block by block from the map
scan     the 100 best of all by subspace attention with a query of 32 tokens
rerank   100 documents drawn from all, by subspace attention

Medians of --rounds after one of warm-up. anon MB is what the process itself holds at
its peak (the index of keys among it), mapped pages, which the system takes back when it
needs them, left out.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from rerank_kernels import similarity_topk, subspace_attention
from rerank_lab.cache.vectors import VectorCache, text_key
from rerank_lab.cli import count, path_of
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.first_stage.dense import merge_topk
from rerank_lab.models.base import Detail, Vectors

TOKENS, R, D, QUERY, K, TAU = 50, 128, 384, 32, 100, 0.1
SHARD, BLOCK = 4096, 4096  # documents in a file, and in a block that is read at once
BYTES = TOKENS * R * 2 + D * 4 + 32
CACHE_KEY = "scale-1"
Nearest = tuple[Tensor, Tensor]


def key(number: int) -> bytes:
    return text_key(f"document {number}", TOKENS)


def made(start: int, stop: int) -> Vectors:
    """Vectors of the documents from start to stop: random unit vectors, the same in every run."""
    generator = torch.Generator().manual_seed(start)
    size = stop - start
    tokens = normalize(torch.randn(size * TOKENS, R, generator=generator), dim=-1).half()
    pooled = normalize(torch.randn(size, D, generator=generator), dim=-1)
    lengths = torch.full((size,), TOKENS, dtype=torch.int64)
    return Vectors(pooled, lengths, torch.arange(size + 1) * TOKENS, tokens, torch.zeros(0, 0, dtype=torch.float16))


def filled(folder: Path, documents: int) -> VectorCache:
    """A cache with this many documents. Missing ones are made."""
    about = {"model": "made vectors", "arithmetic": "none", "token_dimensions": str(R)}
    cache = VectorCache(CACHE_KEY, folder, disk_bytes=1 << 60, about=about)
    starts = [start for start in range(0, documents, SHARD) if not cache.has(key(min(start + SHARD, documents) - 1), Detail.TOKENS)]
    need = len(starts) * SHARD * BYTES
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise UserError(
            f"--documents {documents:,} take {need / 1e9:.1f} GB more and {folder} has {free / 1e9:.1f} GB free: fewer documents, or another --work"
        )
    for start in tqdm(starts, desc="making vectors", disable=None):
        stop = min(start + SHARD, documents)
        cache.add([key(n) for n in range(start, stop)], made(start, stop), Detail.TOKENS)
    return cache


def blocks(cache: VectorCache, keys: list[bytes], detail: Detail) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(keys), BLOCK):
        yield start, cache.gather(keys[start : start + BLOCK], detail)


def best(parts: Iterator[Nearest]) -> Nearest:
    """The K best of values and places that come in blocks; each block is 1 × n."""
    found = torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64)
    for part in parts:
        found = merge_topk(found, part, K)
    return found


def search(cache: VectorCache, keys: list[bytes], query: Vectors) -> Nearest:
    def parts() -> Iterator[Nearest]:
        for start, block in blocks(cache, keys, Detail.POOLED):
            values, places = similarity_topk(query.pooled, block.pooled, min(K, len(block.pooled)))
            yield values, places + start

    return best(parts())


def scan(cache: VectorCache, keys: list[bytes], query: Vectors) -> Nearest:
    return best(attended(query, block, start) for start, block in blocks(cache, keys, Detail.TOKENS))


def rerank(cache: VectorCache, keys: list[bytes], query: Vectors) -> Nearest:
    chosen = random.Random(0).sample(keys, min(K, len(keys)))
    return best(iter([attended(query, cache.gather(chosen, Detail.TOKENS), 0)]))


def attended(query: Vectors, documents: Vectors, start: int) -> Nearest:
    """Scores the documents: the mean of the subspace attention over the query's tokens. Returns scores, and places that count from `start`."""
    size = len(documents.pooled)
    places = torch.arange(size)
    scores = subspace_attention(query.tokens, query.offsets, documents.tokens, documents.offsets, torch.stack([torch.zeros_like(places), places], 1), TAU)
    return scores.view(size, -1).mean(1)[None], places[None] + start


@contextmanager
def watched() -> Iterator[list[float]]:
    """Gives the peak of the process's own memory in MB, sampled every hundredth of a second. It includes what the process held before."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max(peak[0], *(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon")))
            if done.wait(0.01):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


WORKLOADS: dict[str, Callable[[VectorCache, list[bytes], Vectors], Nearest]] = {"search": search, "scan": scan, "rerank": rerank}


def measure(options: argparse.Namespace) -> tuple[list[int], dict[str, list[float]], list[float]]:
    """Measures all workloads. Returns the numbers of documents, and for each number the seconds of each workload and the peak memory."""
    cache = filled(options.work, options.documents)
    generator = torch.Generator().manual_seed(2**31)
    tokens, pooled = (normalize(torch.randn(rows, columns, generator=generator), dim=-1) for rows, columns in ((QUERY, R), (1, D)))
    nothing = torch.zeros(0, 0, dtype=torch.float16)
    query = Vectors(pooled, torch.tensor([QUERY]), torch.tensor([0, QUERY]), tokens.half(), nothing)
    sizes = [10**power for power in range(3, 9) if 10**power < options.documents] + [options.documents]
    seconds: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    peaks, keys = [], [key(n) for n in range(options.documents)]
    for size in tqdm(sizes, desc="sizes", disable=None):
        if not all(cache.has(own, Detail.TOKENS) for own in keys[:size:SHARD]):
            raise UserError(f"{options.work}: a shard did not read back and was deleted; the same command makes it again")
        with watched() as peak:
            for name, work in WORKLOADS.items():
                taken = []
                for _ in range(options.rounds + 1):
                    start = time.perf_counter()
                    work(cache, keys[:size], query)
                    taken.append(time.perf_counter() - start)
                seconds[name].append(median(taken[1:]))
        peaks.append(peak[0])
    return sizes, seconds, peaks


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log documents, from 10^4 documents on, where the fixed cost of a call no longer matters."""
    points = [(size, second) for size, second in zip(sizes, seconds) if size >= 10_000] or list(zip(sizes, seconds))
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan


def report(options: argparse.Namespace) -> str:
    sizes, seconds, peaks = measure(options)
    machine = describe(torch.device("cpu"))
    lines = [
        f"{TOKENS} tokens a document, r = {R}, fp16, mapped from disk; {machine.threads} threads of",
        f"{machine.cpu}, torch {machine.packages['torch']}, kernels {machine.kernels}",
        "",
        f"{'documents':>10}{'GB':>8}{'search ms':>12}{'scan ms':>12}{'rerank ms':>12}{'anon MB':>10}",
    ]
    for n, size in enumerate(sizes):
        times = "".join(f"{1000 * seconds[name][n]:>12,.1f}" for name in WORKLOADS)
        lines.append(f"{size:>10,}{size * BYTES / 1e9:>8.2f}{times}{peaks[n]:>10,.0f}")
    lines += ["", "slope of log time over log documents, from 10^4 on (1: linear, 0: constant):"]
    lines.append(", ".join(f"{name} {slope(sizes, seconds[name]):.2f}" for name in WORKLOADS))
    if options.plot:
        plot(options.plot, sizes, seconds)
        lines += ["", f"plot: {options.plot}"]
    return "\n".join(lines)


def plot(path: Path, sizes: list[int], seconds: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, times), (marker, line) in zip(seconds.items(), (("o", "-"), ("s", "--"), ("^", ":"))):
        axes.loglog(sizes, [1000 * t for t in times], marker=marker, linestyle=line, color="black", label=f"{name}, slope {slope(sizes, times):.2f}")
    axes.set_xlabel("documents")
    axes.set_ylabel("ms a query")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python experiments/benchmarks/bench_scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=path_of, required=True, metavar="DIR", help="where the vectors are kept; yours to delete")
    p.add_argument("--documents", type=count, default=1_000_000, metavar="N", help="(default: 1,000,000)")
    p.add_argument("--rounds", type=count, default=3, metavar="N", help="timed, after one of warm-up (default: 3)")
    p.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--plot", type=path_of, metavar="FILE", help="time over documents as .svg or .png")
    return p


def main() -> int:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        print(report(options))
    except UserError as error:
        print(f"bench_scale: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench_scale: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
