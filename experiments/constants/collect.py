"""python experiments/constants/collect.py --model MODEL --collection COLLECTION --split train --cache DIR --out FILE.npz

Everything that a study of `best`'s constants needs of one model on one collection: for
each query its dense top 100, their cosines, lengths and grades, and the matrices A of
step 2 (docs/methods.md) under several projections of the token vectors and several
temperatures. study.py makes tables of these files; nothing is encoded again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_kernels import similarity_topk
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.cli import path_of
from rerank_lab.datasets.load import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.methods.spread import spread_of
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder, load
from rerank_lab.models.registry import Placement, Source

TOP = 100
TEXTS = 64  # queries, and documents, of numpydoc on which the standard deviation of similarities is measured
FITTED = 20_000  # token vectors that projections are fitted on
FIXED = (0.1, 0.05, 0.025)
DIVISORS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
FEW = (1.5, 2.0, 3.0)  # of every projection but the first


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def evenly(items: list[str], count: int) -> list[str]:
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True)
class Projection:
    """A map of unit token vectors, brought to unit length again.

    Attributes:
        mean: subtracted first (d).
        removed: directions that are taken out next (d × k, orthonormal).
        kept: V, the subspace that is kept (d × r, orthonormal).
    """

    mean: Tensor | None = None
    removed: Tensor | None = None
    kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self.mean
        if self.removed is not None:
            x = x - (x @ self.removed) @ self.removed.T
        return unit(x if self.kept is None else x @ self.kept)


def projections(shipped: Tensor | None, tokens: Tensor) -> dict[str, Projection]:
    """Projections by name, fitted on unit token vectors (n × d)."""
    mean = tokens.mean(0)
    raw, centred = (torch.linalg.eigh(x.T @ x).eigenvectors.flip(1) for x in (tokens, tokens - mean))
    found = {
        "I": Projection(),
        "128": Projection(kept=raw[:, :128]),
        "3..130": Projection(kept=raw[:, 2:130]),
        "mean": Projection(mean),
        "mean, 2": Projection(mean, centred[:, :2]),
        "without 2": Projection(removed=raw[:, :2]),
    }
    return found if shipped is None else found | {"V": Projection(kept=shipped.float())}


def soft(s: Tensor, ends: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """A (K × Lq), and tau ln mean exp(s / tau) (K × Lq), of similarities s (nnz × Lq) of K documents."""
    top = s.max()
    weight = torch.exp((s - top) / tau)
    total, weighted = torch.segment_reduce(weight, "sum", offsets=ends), torch.segment_reduce(weight * s, "sum", offsets=ends)
    count = ends.diff()[:, None].clamp(min=1)
    empty = ends.diff() == 0
    A, L = weighted / total.clamp(min=1e-38), top + tau * torch.log(total.clamp(min=1e-38) / count)
    A[empty], L[empty] = -1.0, -1.0
    return A, L


def keep(found: dict[str, list[np.ndarray]], name: str, value: Any) -> None:
    found.setdefault(name, []).append(np.asarray(value, dtype=np.float32))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--precision", default="fp32")
    p.add_argument("--collection", required=True)
    p.add_argument("--split", default="train")
    p.add_argument("--queries", type=int, default=400, help="at most, drawn by seed 0 (default: 400)")
    p.add_argument("--cache", type=path_of, required=True)
    p.add_argument("--out", type=path_of, required=True)
    options = p.parse_args()
    try:
        data = load_dataset(options.collection, options.split)
        if len(data.corpus) < TOP:
            raise UserError(f"{options.collection} has {len(data.corpus)} documents; {TOP} are needed")
        model = load(Source(options.model, "bi-encoder"), Placement("cpu", precision=options.precision))
        study(model, data, options)
    except (UserError, OSError) as error:
        print(f"collect: error: {error}", file=sys.stderr)
        return 2
    return 0


def study(model: BiEncoder, data: Any, options: argparse.Namespace) -> None:
    started = time.time()
    numpydoc = load_dataset("numpydoc", "train")
    shipped, model.subspace = model.subspace, None
    named_queries = model.encode(evenly(list(numpydoc.queries.values()), TEXTS), kind="query").tokens.float()
    named_documents = model.encode(evenly(list(numpydoc.corpus.values()), TEXTS)).tokens.float()
    cache = VectorCache(model.key(), options.cache, disk_bytes=64 << 30)
    ids = list(data.corpus)
    keys = ensure(model, cache, [data.corpus[i] for i in ids], max_tokens=512, detail=Detail.TOKENS, keep=False)
    print(f"{options.out.name}: {len(ids)} documents, {time.time() - started:.0f} s", flush=True)
    rng = random.Random(0)
    general = evenly(list(numpydoc.corpus.values()), 150)
    sample = torch.cat([named_documents, model.encode(general).tokens.float()])
    own = cache.gather([keys[i] for i in rng.sample(range(len(keys)), min(300, len(keys)))], Detail.TOKENS).tokens.float()
    fitted = torch.cat([part[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[: FITTED // 2]] for part in (sample, own)])
    ways = projections(shipped, fitted)
    sigmas = {name: float((way(named_queries) @ way(named_documents).T).std()) for name, way in ways.items()}
    model.subspace = shipped
    spread = spread_of(model).value  # of the model's own projection
    model.subspace = None
    queries = [q for q in data.queries if any(g > 0 for g in data.qrels[q].values())]
    queries = sorted(rng.sample(queries, min(options.queries, len(queries))))
    pooled = cache.gather(keys, Detail.POOLED).pooled
    asked = model.encode([data.queries[q] for q in queries], kind="query")
    values, index = similarity_topk(asked.pooled, pooled, TOP, metric=model.similarity)
    found: dict[str, list[np.ndarray]] = {}
    for i, query in enumerate(queries):
        order = index[i].tolist()
        documents = cache.gather([keys[j] for j in order], Detail.TOKENS)
        q, d, ends = asked.row(i).tokens.float(), documents.tokens.float(), documents.offsets
        grades = data.qrels[query]
        put = partial(keep, found)
        put("grade", [max(0, grades.get(ids[j], 0)) for j in order])
        put("ideal", sorted((g for g in grades.values() if g > 0), reverse=True)[:10] + [0] * (10 - min(10, sum(g > 0 for g in grades.values()))))
        put("cos", values[i])
        put("length", ends.diff())
        put("place", order)
        for name, way in ways.items():
            s = way(d) @ way(q).T
            top = torch.segment_reduce(s, "max", offsets=ends)
            top[ends.diff() == 0] = -1.0
            put(f"{name}|max", top)
            for divisor in DIVISORS if name in ("I", "V") else FEW:
                A, L = soft(s, ends, sigmas[name] / divisor)
                put(f"{name}|σ/{divisor:g}", A)
                if divisor in (2.0, 3.0) and name in ("I", "V"):
                    put(f"{name}|lme σ/{divisor:g}", L)
            for tau in FIXED if name in ("I", "V") else ():
                put(f"{name}|{tau:g}", soft(s, ends, tau)[0])
    arrays: dict[str, Any] = {name: np.concatenate([part.ravel() for part in parts]) for name, parts in found.items()}
    lengths = np.array([len(asked.row(i).tokens) for i in range(len(queries))])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"model": options.model, "precision": options.precision, "collection": data.name, "split": data.split, "hash": data.hash, "sigma": sigmas, "spread": spread,
             "documents": len(ids), "queries": queries, "key": model.key()}  # fmt: skip
    np.savez(options.out, lengths=lengths, facts=json.dumps(facts), **arrays)
    print(f"{options.out.name}: {len(queries)} queries, σ {sigmas['I']:.4f}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
