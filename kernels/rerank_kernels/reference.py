"""The definition of every operator in plain torch: fp32 from the first sum to the last, written to be read, not to be fast.

Packed layout, used throughout: the tokens of many texts stand one after another in a matrix (nnz × d), and text n owns
the rows offsets[n] to offsets[n + 1]. Offsets are int64 and start at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Below this, exp((s - 1) / tau) with s = -1 underflows in fp32 and a plain sum of weights can be 0.
MIN_TAU = 0.025
# fp32 matrix products of equal rows differ by a few 1e-7: a spread below this share of the values is rounding, not signal.
FLAT = 1e-6


def zscore(x: Tensor) -> Tensor:
    """(x − mean) / std over the last axis, with the population's std, and 0 where std is 0 (or no more than rounding).

    Args:
        x: scores, … × K, any float type; K may be 0.

    Returns:
        fp32, the shape of x.
    """
    x = x.float()
    if x.shape[-1] == 0:
        return x
    centred = x - x.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    flat = std <= FLAT * x.abs().amax(-1, keepdim=True)
    return torch.where(flat, torch.zeros_like(x), centred / std.masked_fill(flat, 1.0))


def similarity_topk(queries: Tensor, documents: Tensor, k: int, segments: Tensor | None = None, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """The k most similar documents of each query.

    Args:
        queries: B × d, any float type.
        documents: N × d.
        k: results a query, at least 1.
        segments: int64 offsets (B + 1) into documents; query b sees only documents[segments[b]:segments[b + 1]].
            Without it every query sees all of them.
        metric: "cosine" (0 for a zero vector) or "dot".

    Returns:
        values (B × k, fp32, descending) and indices (B × k, int64, counted from the start of the query's segment).
        Equal values stand in ascending index. Where there are fewer than k documents: value −inf, index −1.

    Raises:
        ValueError: k < 1, an unknown metric, or shapes that do not fit.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if metric not in ("cosine", "dot"):
        raise ValueError(f"metric must be 'cosine' or 'dot', not {metric!r}")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries (B × d) and documents (N × d) do not fit: {tuple(queries.shape)} and {tuple(documents.shape)}")
    if segments is not None:
        _check_offsets("segments", segments, len(queries), len(documents))
    queries, documents = queries.float(), documents.float()
    if metric == "cosine":
        queries, documents = normalize(queries, dim=-1), normalize(documents, dim=-1)
    values = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    bounds = [(0, len(documents))] * len(queries) if segments is None else list(zip(segments[:-1].tolist(), segments[1:].tolist()))
    for b, (start, end) in enumerate(bounds):
        best, index = (documents[start:end] @ queries[b]).sort(descending=True, stable=True)
        count = min(k, end - start)
        values[b, :count], indices[b, :count] = best[:count], index[:count]
    return values, indices


def project_normalize(h: Tensor, V: Tensor | None) -> Tensor:
    """Token states on the model's subspace, at unit length: Vᵀh / ‖Vᵀh‖.

    Args:
        h: nnz × d.
        V: d × r with orthonormal columns, or None for the identity.

    Returns:
        nnz × r, fp32; a zero vector stays zero.
    """
    h = h.float()
    return normalize(h if V is None else h @ V.float(), dim=-1)


def pool_normalize(h: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each text's packed tokens, at unit length.

    Args:
        h: nnz × d.
        offsets: N + 1.

    Returns:
        N × d, fp32; zero for a text without tokens.
    """
    _check_offsets("offsets", offsets, len(offsets) - 1, len(h))
    lengths = offsets.diff()
    text = torch.repeat_interleave(torch.arange(len(lengths), device=h.device), lengths)
    sums = torch.zeros(len(lengths), h.shape[1], device=h.device).index_add_(0, text, h.float())
    return normalize(sums / lengths.clamp(min=1)[:, None], dim=-1)


def subspace_attention(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1) -> Tensor:
    """Soft maximum of each query token's similarity over a document's tokens.

    With s_ij = q_i · d_j: A_i = Σ_j exp((s_ij − 1)/τ) s_ij / Σ_j exp((s_ij − 1)/τ), which is MaxSim's max_j s_ij as τ → 0.
    Tokens are at unit length, so s ≤ 1 and the fixed shift of 1 replaces a running maximum.

    Args:
        q: packed query tokens, nnz_q × r, unit length (or zero).
        q_offsets: B + 1.
        d: packed document tokens, nnz_d × r, unit length (or zero).
        d_offsets: N + 1.
        pairs: P × 2 int64, (query, document).
        tau: temperature; 0 is MaxSim exactly.

    Returns:
        fp32 of length Σ_p Lq(p): pair after pair, one value a query token. A document without tokens scores −1 for
        every query token, a query without tokens has no values.

    Raises:
        ValueError: 0 < tau < 0.025 (exp underflows in fp32), tau < 0, or shapes that do not fit.
    """
    if tau < 0 or 0 < tau < MIN_TAU:
        raise ValueError(f"tau must be 0 (MaxSim) or at least {MIN_TAU}, not {tau}")
    if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
        raise ValueError(f"q (nnz × r) and d (nnz × r) do not fit: {tuple(q.shape)} and {tuple(d.shape)}")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be P × 2, not {tuple(pairs.shape)}")
    _check_offsets("q_offsets", q_offsets, len(q_offsets) - 1, len(q))
    _check_offsets("d_offsets", d_offsets, len(d_offsets) - 1, len(d))
    q_at, d_at = q_offsets.tolist(), d_offsets.tolist()
    blocks = []
    for query, document in pairs.tolist():
        if not (0 <= query < len(q_at) - 1 and 0 <= document < len(d_at) - 1):
            raise ValueError(f"pair ({query}, {document}) is outside of {len(q_at) - 1} queries and {len(d_at) - 1} documents")
        qi, dj = q[q_at[query] : q_at[query + 1]].float(), d[d_at[document] : d_at[document + 1]].float()
        if len(dj) == 0:
            blocks.append(torch.full((len(qi),), -1.0, device=q.device))
            continue
        s = qi @ dj.T
        blocks.append(s.amax(1) if tau == 0 else ((weight := torch.exp((s - 1) / tau)) * s).sum(1) / weight.sum(1))
    return torch.cat(blocks) if blocks else torch.zeros(0, device=q.device)


def contrast_score(
    A: Tensor,
    a_offsets: Tensor,
    pools: Tensor,
    cosine: Tensor,
    *,
    alpha: float = 2.0,
    terms: Sequence[tuple[Tensor, float]] = (),
    gamma: float = 0.0,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Final scores from token similarities: query-token contrast over the pool, weighted mean, sum of z-scores, feedback.

    For each pool of K pairs, all of one query of Lq tokens:
        w_i = max_k A_ik − mean_k A_ik, uniform where they sum to 0
        a_k = Σ_i w_i A_ik / Σ_i w_i
        b   = z(z(cosine) + alpha z(a) + Σ weight z(term))
        out = b + gamma z(e_k · f),  f = Σ_k softmax(b / 0.3)_k e_k       (gamma > 0 only)

    Args:
        A: Σ_p Lq(p) values, pair after pair, as subspace_attention returns them.
        a_offsets: P + 1, where each pair's values stand in A.
        pools: B + 1 offsets into the P pairs; the pairs of one pool share their query.
        cosine: P, the first stage's similarity.
        alpha: weight of the token term.
        terms: further (scores of length P, weight).
        gamma: weight of the feedback term.
        embeddings: P × d pooled document vectors, needed where gamma > 0.

    Returns:
        P, fp32. A query without tokens is scored by the other terms alone.

    Raises:
        ValueError: gamma > 0 without embeddings, a pool whose pairs differ in Lq, or shapes that do not fit.
    """
    if gamma > 0 and embeddings is None:
        raise ValueError("gamma > 0 needs the documents' embeddings")
    _check_offsets("a_offsets", a_offsets, len(cosine), len(A))
    _check_offsets("pools", pools, len(pools) - 1, len(cosine))
    out = torch.zeros(len(cosine), device=cosine.device)
    for start, end in zip(pools[:-1].tolist(), pools[1:].tolist()):
        if start == end:
            continue
        lengths = a_offsets[start : end + 1].diff()
        if not bool((lengths == lengths[0]).all()):
            raise ValueError(f"the pairs {start} to {end} of one pool belong to queries of different lengths")
        total = zscore(cosine[start:end])
        if lengths[0] > 0:
            block = A[int(a_offsets[start]) : int(a_offsets[end])].float().view(end - start, -1)
            w = (block.amax(0) - block.mean(0)).clamp(min=0)
            w = w if float(w.sum()) > FLAT else torch.ones_like(w)
            total = total + alpha * zscore(block @ w / w.sum())
        for term, weight in terms:
            total = total + weight * zscore(term[start:end])
        b = zscore(total)
        if gamma > 0 and embeddings is not None:
            e = embeddings[start:end].float()
            b = b + gamma * zscore(e @ (torch.softmax(b / 0.3, 0) @ e))
        out[start:end] = b
    return out


def _check_offsets(name: str, offsets: Tensor, count: int, rows: int) -> None:
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) != count + 1:
        raise ValueError(f"{name} must be int64 of length {count + 1}, not {offsets.dtype} of shape {tuple(offsets.shape)}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to {rows}, the number of rows")
