"""python experiments/bench_models.py: models beside the libraries in use

Pairs a second of `standard` under the one-way cross-encoder and of
sentence_transformers.CrossEncoder.predict, its defaults, on a classifier of the
same backbone: each query of --dataset with its nearest documents. Medians of
five rounds after one of warm-up, the contenders in turn within a round. Times
of one run on a shared machine: read the ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from rerank_kernels import similarity_topk
from rerank_lab.datasets import load_dataset
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.models import locate
from rerank_lab.models.bi_encoder import Detail
from rerank_lab.reranker import Reranker

ROUNDS = 5


def classifier(folder: Path, limit: int) -> Path:
    """A sequence classifier with one label on the default bi-encoder's weights, its head untrained: speed is the subject."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    source = locate("all-MiniLM-L6-v2", "bi-encoder")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    return folder


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python experiments/bench_models.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="numpydoc", help="bundled name or BEIR folder (default: numpydoc)")
    p.add_argument("--queries", type=int, default=2, metavar="N", help="queries a round (default: 2)")
    p.add_argument("--candidates", type=int, default=100, metavar="N", help="documents a query (default: 100)")
    p.add_argument("--limit", type=int, default=256, metavar="TOKENS", help="of a pair in predict (default: 256)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    return p


def run(options: argparse.Namespace) -> str:
    from sentence_transformers import CrossEncoder

    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = load_dataset(options.dataset)
    queries = list(dataset.queries.values())[: options.queries]
    ours = Reranker("all-MiniLM-L6-v2", "standard", "minilm-cross", device="cpu")
    texts = list(dataset.corpus.values())
    nearest = similarity_topk(ours.pooled(queries, kind="query"), ours.pooled(texts), min(options.candidates, len(texts)))[1].tolist()
    pools = [(query, [texts[i] for i in row]) for query, row in zip(queries, nearest)]
    pairs = [(query, text) for query, pool in pools for text in pool]
    with tempfile.TemporaryDirectory() as folder:
        peer = CrossEncoder(str(classifier(Path(folder), options.limit)), device="cpu")

    def predict() -> None:
        peer.predict(pairs, show_progress_bar=False)

    def cached() -> None:
        for query, pool in pools:
            ours.score(query, pool)

    def new() -> None:
        for query, pool in pools:
            ours.without_cache().score(query, pool)

    contenders: dict[str, Callable[[], None]] = {"CrossEncoder.predict": predict, "standard, documents new": new, "standard, documents cached": cached}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in tqdm(range(ROUNDS + 1), desc="rounds", disable=None):
        for name, work in contenders.items():
            taken = timed(work)
            if turn:
                seconds[name].append(taken)
    assert ours.encoder is not None
    tokens = int(ours.encoder.encode([text for _, text in pairs], detail=Detail.POOLED).lengths.clamp(max=ours.encoder.limit).sum())
    facts, base = describe(torch.device("cpu")), median(seconds["CrossEncoder.predict"])
    lines = [
        f"{len(queries)} queries x {len(pairs) // len(queries)} documents of {dataset.name}, {tokens / len(pairs):.0f} tokens a document,",
        f"fp32, {facts['threads']} threads of {facts['cpu']}, torch {facts['packages']['torch']}",
        "",
        f"{'':<28}{'pairs/s':>10}{'x predict':>12}{'fastest to slowest round':>28}",
    ]
    for name, times in seconds.items():
        rates = [len(pairs) / t for t in times]
        lines.append(f"{name:<28}{median(rates):>10.1f}{base / median(times):>11.2f} {f'{max(rates):.1f} to {min(rates):.1f}':>28}")
    return "\n".join(lines)


def main() -> int:
    options = parser().parse_args()
    if min(options.queries, options.candidates, options.limit) < 1:
        parser().error("--queries, --candidates and --limit must be at least 1")
    try:
        print(run(options))
    except UserError as error:
        print(f"bench_models: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
