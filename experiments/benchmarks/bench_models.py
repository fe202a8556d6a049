"""python experiments/benchmarks/bench_models.py --dataset SCIFACT: models beside the libraries in use

encode   the bi-encoder over --documents texts, beside SentenceTransformer.encode
pairs    a classifier on the same backbone over --pairs pairs, beside
         CrossEncoder.predict; its head is untrained, since speed is the subject
         (both rows: ours in fp32, and as --also says)
late     a late-interaction model on the same backbone over --documents texts, beside
         MultiVectorEncoder.encode_document; its projection is untrained
seen     fast and best over 100 candidates: documents new, then seen before, beside
         one forward of the query
one-way  standard under minilm-cross, documents new and seen, beside predict
causal   a causal reranker of Qwen3's kind and of a tiny shape over the candidates of
         one query, beside CrossEncoder.predict; causal-0.6b, only if it is named, has
         the shape of Qwen3-Reranker-0.6B, in bf16. Both have random weights
tokens   ranking 100 candidates whose token vectors are given, for 50 queries one
         after the other, beside pylate's rerank and the scorer of rerankers'
         ColBERT (MaxSim, fp32; all of them sort)

The same texts, threads and weights, the peer with its defaults. Medians of --rounds
after one of warm-up, the contenders in turn within a round; MB is the peak of a process
that does one of them alone. Times of one run on a shared machine: read the ratios.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

import causal_rows
import late_rows
from rerank_kernels import subspace_attention
from rerank_lab.cli import count
from rerank_lab.datasets import load_dataset
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.first_stage.lexical import BM25
from rerank_lab.models.base import Detail, Inputs
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.registry import locate
from rerank_lab.models.runtimes import PRECISIONS, RUNTIMES
from rerank_lab.reranker import Reranker
from rerank_lab.timing import peak_memory_mb

MODEL = "all-MiniLM-L6-v2"
QUERIES, CANDIDATES, QUERY_TOKENS, TOKENS, R = 50, 100, 32, 180, 128  # sizes of the row `tokens`
SLOW = ("causal-0.6b",)  # rows that run only if they are named
FEW = 2  # number of pools in rows whose documents are new each time
Action = Callable[[], Any]


def classifier(folder: Path, limit: int) -> Path:
    """Writes a sequence classifier with one label and the default bi-encoder's weights. Its head is untrained, since only speed matters."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    source = locate(MODEL, "bi-encoder")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    return folder


class BenchInputs:
    """What the contenders work on. Each part is made when it is first used."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        dataset = load_dataset(options.dataset)
        self.name, self.texts, self.queries = dataset.name, list(dataset.corpus.values())[: options.documents], list(dataset.queries.values())

    @cached_property
    def pools(self) -> list[tuple[str, list[str]]]:
        """Queries with up to 100 documents each, --pairs pairs in all. BM25 chooses the documents, so that no contender's process has a model of ours."""
        size = min(CANDIDATES, len(self.texts), self.options.pairs)
        chosen = [self.queries[n % len(self.queries)] for n in range(max(1, self.options.pairs // size))]
        index = BM25(self.texts)
        return [(query, [self.texts[i] for i in np.argsort(-index.scores(query), kind="stable")[:size]]) for query in chosen]

    @cached_property
    def checkpoint(self) -> str:
        return str(self.folder) if (self.folder / "config.json").is_file() else str(classifier(self.folder, self.options.tokens))

    def reranker(self, row: str) -> tuple[Path, str, list[str]]:
        """The causal reranker of a row, and a query with its candidates, cut to --tokens tokens."""
        folder, (query, pool) = self.folder.parent / row, self.pools[0]
        if not folder.exists():
            causal_rows.reranker(folder, row)
        return folder, query, causal_rows.cut(folder, pool, self.options.tokens)

    @cached_property
    def late(self) -> str:
        folder = self.folder.with_name("late")
        return str(folder if folder.is_dir() else late_rows.colbert(folder, self.options.tokens))

    @cached_property
    def token_vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed unit token vectors of all queries and of all their candidates, and the candidates' offsets. Candidates differ in length."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(TOKENS // 2, TOKENS + 1, (QUERIES * CANDIDATES,), generator=generator)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        q, d = (torch.randn(rows, R, generator=generator) for rows in (QUERIES * QUERY_TOKENS, int(offsets[-1])))
        return q.div_(q.norm(dim=1, keepdim=True)), d.div_(d.norm(dim=1, keepdim=True)), offsets

    @property
    def lists(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The same vectors in the peers' form: one tensor for each query and for each candidate. They are views."""
        q, d, offsets = self.token_vectors
        flat = [d[a:b] for a, b in pairwise(offsets.tolist())]
        return list(q.view(QUERIES, QUERY_TOKENS, R)), [flat[n : n + CANDIDATES] for n in range(0, len(flat), CANDIDATES)]


def runtime_and_precision(way: str) -> dict[str, Any]:
    """Runtime and precision, from [RUNTIME:]PRECISION."""
    runtime, _, precision = way.rpartition(":")
    return {"runtime": runtime or "auto", "precision": precision}


def encode_peer(s: BenchInputs) -> Action:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate(MODEL, "bi-encoder")), device="cpu")
    model.max_seq_length = s.options.tokens
    return lambda: model.encode(s.texts, show_progress_bar=False, convert_to_tensor=True)


def encode_ours(s: BenchInputs, way: str) -> Action:
    model = load_bi_encoder(MODEL, device="cpu", **runtime_and_precision(way))
    assert isinstance(model, BiEncoder)
    return lambda: model.encode(s.texts, max_tokens=s.options.tokens - model.specials, detail=Detail.POOLED).pooled


def late_peer(s: BenchInputs) -> Action:
    return late_rows.peer(s.late, s.texts)


def late_ours(s: BenchInputs, way: str) -> Action:
    return late_rows.ours(s.late, s.texts, s.options.tokens, **runtime_and_precision(way))


def pairs_peer(s: BenchInputs, pools: int | None = None) -> Action:
    from sentence_transformers import CrossEncoder as Peer

    model, pairs = Peer(s.checkpoint, device="cpu"), [(query, text) for query, pool in s.pools[:pools] for text in pool]
    return lambda: model.predict(pairs, show_progress_bar=False, activation_fn=torch.nn.Identity(), convert_to_tensor=True)


def pairs_ours(s: BenchInputs, way: str) -> Action:
    model = load_cross_encoder(s.checkpoint, device="cpu", **runtime_and_precision(way))
    assert isinstance(model, CrossEncoder)
    return lambda: torch.cat([model.score(query, pool)[0] for query, pool in s.pools])


def pools_ours(s: BenchInputs, method: str, *, new: bool) -> Action:
    cross = "minilm-cross" if method == "standard" else None
    ready = Reranker(MODEL, method, cross, device="cpu")
    for query, pool in s.pools[:FEW]:
        ready.score(query, pool)

    def work() -> None:
        for query, pool in s.pools[:FEW]:
            (ready.without_cache() if new else ready).score(query, pool)

    return work


def causal_peer(s: BenchInputs, row: str, precision: str) -> Action:
    return causal_rows.peer(*s.reranker(row), precision)


def causal_ours(s: BenchInputs, row: str, precision: str) -> Action:
    return causal_rows.ours(*s.reranker(row), precision)


def tokens_pylate(s: BenchInputs) -> Action:
    from pylate.rank import rerank

    queries, documents = s.lists
    ids: list[list[int | str]] = [list(range(CANDIDATES)) for _ in queries]
    one_by_one = [([own], [q], [d]) for own, q, d in zip(ids, queries, documents)]
    return lambda: torch.tensor([[row["score"] for row in rerank(*given)[0]] for given in one_by_one])


def tokens_rerankers(s: BenchInputs) -> Action:
    from rerankers.models.colbert_ranker import _colbert_score

    queries, documents = s.lists
    padded = [torch.stack([pad(d, (0, 0, 0, TOKENS - len(d))) for d in row]) for row in documents]
    masks = [torch.stack([torch.arange(TOKENS) < len(d) for d in row]).long() for row in documents]
    own = torch.ones(1, QUERY_TOKENS, dtype=torch.int64)
    return lambda: torch.cat([_colbert_score(q[None], d, own, m).sort(descending=True).values for q, d, m in zip(queries, padded, masks)]) * QUERY_TOKENS


def tokens_ours(s: BenchInputs) -> Action:
    q, d, offsets = s.token_vectors
    pairs = torch.stack([torch.zeros(CANDIDATES, dtype=torch.int64), torch.arange(CANDIDATES)], 1)
    q_offsets, one_by_one = torch.tensor([0, QUERY_TOKENS]), []
    for n in range(QUERIES):
        own = offsets[n * CANDIDATES : (n + 1) * CANDIDATES + 1]
        one_by_one.append((q[n * QUERY_TOKENS : (n + 1) * QUERY_TOKENS], q_offsets, d[own[0] : own[-1]], own - own[0], pairs))
    return lambda: torch.stack([subspace_attention(*given, 0.0).view(CANDIDATES, QUERY_TOKENS).sum(1).sort(descending=True).values for given in one_by_one])


def contenders(also: Sequence[str]) -> dict[str, dict[str, Callable[[BenchInputs], Action]]]:
    """Row → contender → a function that builds it. The others of a row are compared with its first contender."""
    ways = ("fp32", *also)
    return {
        "encode": {"SentenceTransformer.encode": encode_peer, **{f"ours, {way}": partial(encode_ours, way=way) for way in ways}},
        "pairs": {"CrossEncoder.predict": pairs_peer, **{f"ours, {way}": partial(pairs_ours, way=way) for way in ways}},
        "late": {"MultiVectorEncoder": late_peer, **{f"ours, {way}": partial(late_ours, way=way) for way in ways}},
        "seen": {
            "fast, documents new": lambda s: pools_ours(s, "fast", new=True),
            "fast, seen": lambda s: pools_ours(s, "fast", new=False),
            "best, documents new": lambda s: pools_ours(s, "best", new=True),
            "best, seen": lambda s: pools_ours(s, "best", new=False),
        },
        "one-way": {
            "CrossEncoder.predict": lambda s: pairs_peer(s, FEW),
            "minilm-cross, documents new": lambda s: pools_ours(s, "standard", new=True),
            "minilm-cross, seen": lambda s: pools_ours(s, "standard", new=False),
        },
        "causal": {
            "CrossEncoder.predict": partial(causal_peer, row="causal", precision="fp32"),
            **{f"ours, {way}": partial(causal_ours, row="causal", precision=way) for way in ways if way in ("fp32", "bf16")},
        },
        "causal-0.6b": {
            "CrossEncoder.predict in bf16": partial(causal_peer, row="causal-0.6b", precision="bf16"),
            "ours, bf16": partial(causal_ours, row="causal-0.6b", precision="bf16"),
        },
        "tokens": {"pylate.rank.rerank": tokens_pylate, "rerankers' ColBERT scorer": tokens_rerankers, "ours, MaxSim": tokens_ours},
    }


def gemm_rate() -> float:
    """GFLOP/s of fp32 matrix products with shapes of the forward pass."""
    a, b, taken = torch.randn(1024, 384), torch.randn(384, 1536), []
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - start)
    return 2 * 1024 * 384 * 1536 / median(taken[10:]) / 1e9


def flops(s: BenchInputs, row: str) -> float:
    """FLOPs of a row's work in fp32, by the models' own formulas; NaN if the row is not one forward pass."""
    if row == "encode":
        model = load_bi_encoder(MODEL, device="cpu")
        texts = model.tokenize(s.texts, "document", s.options.tokens - model.specials)
        return float(model.flops(torch.tensor([len(t) - model.specials for t in texts]), Detail.POOLED))
    if row == "late":
        return late_rows.flops(s.late, s.texts, s.options.tokens)
    if row == "pairs":
        cross = load_cross_encoder(s.checkpoint, device="cpu")
        assert isinstance(cross, CrossEncoder)
        return float(sum(cross.flops(cross.work(Inputs(query, pool, 512))) for query, pool in s.pools))
    if row in causal_rows.SHAPES:
        return causal_rows.flops(*s.reranker(row))
    return float("nan")


def largest_difference(row: str, found: Any, wanted: Any) -> str:
    """The largest difference between two results: 1 minus the cosine for vectors, otherwise the difference of scores."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return "-"
    gap = 1 - (found.float() * wanted.float()).sum(1) if row in ("encode", "late") else found.float() - wanted.float()
    return f"{float(gap.abs().max()):.0e}"


def measure(s: BenchInputs, row: str, bar: tqdm[Any]) -> list[str]:
    """Measures all contenders of a row. Returns its lines of the table."""
    works: dict[str, Action] = {}
    lines = []
    for name, build in contenders(s.options.also)[row].items():
        try:
            works[name] = build(s)
        except ImportError as error:
            lines.append(f"{name}: left out, not installed: pip install {error.name}")
    taken: dict[str, list[float]] = {name: [] for name in works}
    results, rates = {}, []
    for turn in range(s.options.rounds + 1):
        rates.append(gemm_rate())
        for name, work in works.items():
            start = time.perf_counter()
            results[name] = work()
            if turn:
                taken[name].append(time.perf_counter() - start)
            bar.update()
    peer, work_flops, rate = next(iter(works)), flops(s, row), median(rates)
    for name, times in taken.items():
        seconds, ours = median(times), name.startswith("ours")
        share = "-" if np.isnan(work_flops) or not ours else f"{work_flops / seconds / 1e9 / rate:.2f}"
        ratio = median(taken[peer]) / seconds
        lines.append(f"{row:<12}{name:<29}{ratio:>8.2f}{largest_difference(row, results[name], results[peer]):>9}{share:>8}{peak(s.options, row, name):>8}")
    return lines + (forwards(s) if row == "seen" else [])


def forwards(s: BenchInputs) -> list[str]:
    """Lines that compare the time of a request with one forward pass of its query."""
    model, lines = load_bi_encoder(MODEL, device="cpu"), []
    for method in ("fast", "best"):
        ready, both = Reranker(model, method, device="cpu"), []
        pools = [(s.queries[n % len(s.queries)], s.pools[n % len(s.pools)][1]) for n in range(3 * QUERIES)]
        for turn, (query, pool) in enumerate([*s.pools, *pools]):
            start = time.perf_counter()
            ready.score(query, pool)
            middle = time.perf_counter()
            model.encode_queries(model.tokenize([query], "query", model.limit), detail=Detail.TOKENS if method == "best" else Detail.POOLED)
            if turn >= len(s.pools):
                both.append((middle - start, time.perf_counter() - middle))
        whole, forward = np.array(both).T
        ratios = [np.percentile(whole, p) / np.median(forward) for p in (50, 95)]
        lines.append(
            f"        {method}, seen: p50 {ratios[0]:.2f}, p95 {ratios[1]:.2f} x the median forward of its query (whose own p95 is {np.percentile(forward, 95) / np.median(forward):.2f})"
        )
    return lines


def peak(options: argparse.Namespace, row: str, name: str) -> str:
    """Peak memory, in MB, of a process that does only this contender's work, once."""
    flags = {flag: getattr(options, flag) for flag in ("dataset", "documents", "pairs", "tokens")} | {"threads": torch.get_num_threads()}
    given = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    done = subprocess.run([sys.executable, __file__, *given, "--also", *options.also, "--peak", row, name], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "-"


def run(options: argparse.Namespace) -> str:
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        s = BenchInputs(options, Path(folder) / "classifier")
        if options.peak:
            row, name = options.peak
            contenders(options.also)[row][name](s)()
            return f"{peak_memory_mb():.0f}"
        machine, rows = describe(torch.device("cpu")), options.only or [row for row in contenders(options.also) if row not in SLOW]
        lines = [
            f"{len(s.texts)} documents of {s.name}, {sum(len(pool) for _, pool in s.pools)} pairs, {options.tokens} tokens at most; medians of {options.rounds};",
            f"{machine.threads} threads of {machine.cpu}, torch {machine.packages['torch']}",
            "",
            f"{'row':<12}{'':<29}{'x first':>8}{'apart':>9}{'GEMM':>8}{'MB':>8}",
        ]
        total = sum(len(contenders(options.also)[row]) for row in rows) * (options.rounds + 1)
        with tqdm(total=total, desc="rounds", disable=None) as bar:
            for row in rows:
                lines += measure(s, row, bar)
    return "\n".join([*lines, "", "GEMM: FLOPs a second over those of fp32 matrix products in the same run."])


def _way(value: str) -> str:
    runtime, _, precision = value.rpartition(":")
    if precision not in PRECISIONS or runtime not in ("", *RUNTIMES):
        raise argparse.ArgumentTypeError(f"{value!r} is no [RUNTIME:]PRECISION of {', '.join(RUNTIMES)} and {', '.join(PRECISIONS)}")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python experiments/benchmarks/bench_models.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="numpydoc", help="bundled name or BEIR folder (default: numpydoc)")
    p.add_argument("--documents", type=count, default=512, metavar="N", help="texts, and what pools are drawn from (default: 512)")
    p.add_argument("--pairs", type=count, default=2000, metavar="N", help="of query and document (default: 2000)")
    p.add_argument("--tokens", type=count, default=256, metavar="N", help="of a text or a pair at most, special ones counted (default: 256)")
    p.add_argument("--also", nargs="*", type=_way, default=["bf16"], metavar="WAY", help="[RUNTIME:]PRECISION, as in onnx:int8, beside fp32 (default: bf16)")
    p.add_argument("--rounds", type=count, default=5, metavar="N", help="(default: 5)")
    p.add_argument("--only", nargs="+", choices=list(contenders(())), metavar="ROW", help="some of: " + ", ".join(contenders(())))
    p.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    return p


def main() -> int:
    try:
        print(run(parser().parse_args()))
    except UserError as error:
        print(f"bench_models: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
