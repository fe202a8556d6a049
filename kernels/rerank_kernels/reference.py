"""The definition of every operator in plain torch: fp32 from the first sum to the last, written to be read, not to be fast.

Packed layout, used throughout: the tokens of many texts stand one after another in a matrix (nnz × d), and text n owns
the rows offsets[n] to offsets[n + 1]. Offsets are int64 and start at 0. Arguments are those of the public operators,
which check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

# From this temperature on, subspace attention's weights are exp((s - 1) / tau): s = -1 weighs exp(-80) or more, a normal number in fp32.
UNSHIFTED_TAU = 0.025
# Below it s = 1 weighs exp(70). A sum of 2^25 such weights is 2^126, whose reciprocal is still a normal number.
TOP = 70.0
# Here s = -1 weighs exp(70 - 2 / 0.013) = exp(-83.8). Normal numbers end at 2^-126 = exp(-87.3), below which tau = 0.0127 falls.
MIN_TAU = 0.013
# fp32 matrix products of equal rows differ by a few 1e-7: a spread below this share of the values is rounding, not signal.
FLAT = 1e-6
# Largest magnitude that a quantised row is scaled to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def zscore(x: Tensor) -> Tensor:
    """(x − mean) / std over the last axis, with the population's std, and 0 where std is 0 (or no more than rounding).

    Args:
        x: scores, … × K, any float type; K may be 0. A NaN stays NaN and is left out of mean and std.

    Returns:
        fp32, the shape of x.
    """
    x = x.float()
    known = ~x.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    centred = x - x.nan_to_num(posinf=torch.inf, neginf=-torch.inf).sum(-1, keepdim=True) / count
    filled = torch.where(known, centred, 0)
    std = (filled.square().sum(-1, keepdim=True) / count).sqrt()
    largest = torch.where(known, x, 0).abs().amax(-1, keepdim=True) if x.shape[-1] else std
    flat = std <= FLAT * largest
    return torch.where(known, torch.where(flat, 0.0, centred / std.masked_fill(flat, 1.0)), x)


def dequantize(x: Tensor, scales: Tensor | None) -> Tensor:
    """Rows in fp32, each multiplied with its scale where there are scales."""
    return x.float() if scales is None else x.float() * scales[:, None]


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as int8 or float8_e4m3fn, and the scale (fp32, one a row) that gives them back; a zero row's scale is 0."""
    scales = x.float().abs().amax(-1) / LARGEST[dtype]
    scaled = x.float() / torch.where(scales == 0, 1.0, scales)[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def packed_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, heads: int, q_bias: Tensor | None = None) -> Tensor:
    """Softmax attention of each text's queries to its own keys, head by head; 0 where it has none."""
    q = q if q_bias is None else q + q_bias
    out = torch.zeros_like(q)
    for a, b, c, d in zip(q_offsets.tolist(), q_offsets[1:].tolist(), k_offsets.tolist(), k_offsets[1:].tolist()):
        if c < d:
            Q, K, V = (x.float().reshape(-1, heads, x.shape[1] // heads).transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            out[a:b] = (torch.softmax(Q @ K.mT / Q.shape[-1] ** 0.5, -1) @ V).transpose(0, 1).flatten(1).to(q.dtype)
    return out


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), the sum in fp32."""
    return gelu(x.float() + bias.float()).to(x.dtype)


def add_norm(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The layer norm of x + bias + residual, computed in fp32."""
    total = x.float() + residual.float() + (0 if bias is None else bias.float())
    return layer_norm(total, total.shape[1:], weight.float(), shift.float(), eps).to(x.dtype)


def similarity_topk(
    queries: Tensor, documents: Tensor, k: int, segments: Tensor | None = None, metric: str = "cosine", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar documents of each query; a stable sort orders ties by index, NaN counts as less than −inf."""
    queries, documents = queries.float(), dequantize(documents, scales)
    if metric == "cosine":
        queries, documents = normalize(queries, dim=-1), normalize(documents, dim=-1)
    values = torch.full((len(queries), k), -torch.inf, dtype=torch.float32, device=queries.device)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    bounds = [(0, len(documents))] * len(queries) if segments is None else list(zip(segments[:-1].tolist(), segments[1:].tolist()))
    for b, (start, end) in enumerate(bounds):
        scores = documents[start:end] @ queries[b]
        best = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
        best = torch.cat([best[~scores[best].isnan()], best[scores[best].isnan()]])[:k]
        values[b, : len(best)], indices[b, : len(best)] = scores[best], best
    return values, indices


def project_normalize(h: Tensor, V: Tensor | None) -> Tensor:
    """Vᵀh / ‖Vᵀh‖ for each row of h; V = None is the identity."""
    return normalize(h.float() if V is None else h.float() @ V.float(), dim=-1)


def pool_normalize(h: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each text's packed tokens, at unit length; zero for a text without tokens."""
    lengths = offsets.diff()
    text = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device=h.device), lengths)
    sums = torch.zeros(len(lengths), h.shape[1], dtype=torch.float32, device=h.device).index_add(0, text, h.float())
    return normalize(sums / lengths.clamp(min=1)[:, None], dim=-1)


def softmax_shift(tau: float) -> float:
    """The m in subspace attention's weights exp((s − m)/τ): 1 for τ ≥ 0.025, 1 − 70 τ below, which brings s = 1 to exp(70).

    A softmax is the same for every m. This one keeps each weight of s in [−1, 1], and the sum of up to 2²⁵ of them, among fp32's
    normal numbers, so no pass over a document has to find its maximum first.

    Args:
        tau: temperature, MIN_TAU or more; at 0 (MaxSim) there are no weights, and the answer is 1.
    """
    return 1.0 - TOP * tau if tau < UNSHIFTED_TAU else 1.0


def subspace_attention(q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None) -> Tensor:
    """A_i = Σ_j exp((s_ij − m)/τ) s_ij / Σ_j exp((s_ij − m)/τ) with s_ij = q_i · d_j and m = softmax_shift(τ); max_j s_ij at τ = 0; −1 without tokens j."""
    q_at, d_at, m = q_offsets.tolist(), d_offsets.tolist(), softmax_shift(tau)
    blocks = [torch.zeros(0, dtype=torch.float32, device=q.device)]
    for query, document in pairs.tolist():
        own = slice(d_at[document], d_at[document + 1])
        qi, dj = q[q_at[query] : q_at[query + 1]].float(), dequantize(d[own], None if scales is None else scales[own])
        if len(dj) == 0:
            blocks.append(torch.full((len(qi),), -1.0, dtype=torch.float32, device=q.device))
            continue
        s = qi @ dj.T
        blocks.append(s.max(1).values if tau == 0 else ((weight := torch.exp((s - m) / tau)) * s).sum(1) / weight.sum(1))
    return torch.cat(blocks)


def subspace_attention_backward(
    grad: Tensor, q: Tensor, q_offsets: Tensor, d: Tensor, d_offsets: Tensor, pairs: Tensor, tau: float = 0.1, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """∂A_i/∂s_ij = p_ij/Σ_j p_ij (1 + (s_ij − A_i)/τ) with p = exp((s − m)/τ) for any m; at τ = 0 it is 1 for the first j that reaches the maximum.

    Returns:
        Gradients of q and of d, fp32; zeros for quantised documents.
    """
    q_at, d_at = q_offsets.tolist(), d_offsets.tolist()
    dq, dd, start = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(d, dtype=torch.float32), 0
    for query, document in pairs.tolist():
        rows, own = slice(q_at[query], q_at[query + 1]), slice(d_at[document], d_at[document + 1])
        qi, dj = q[rows].float(), dequantize(d[own], None if scales is None else scales[own])
        g = grad[start : start + len(qi), None]
        start += len(qi)
        if len(qi) == 0 or len(dj) == 0:
            continue
        s = qi @ dj.T
        if tau == 0:
            g = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), g)
        else:
            p = torch.softmax((s - 1) / tau, 1)
            g = g * p * (1 + (s - (p * s).sum(1, keepdim=True)) / tau)
        dq[rows] += g @ dj
        if scales is None:
            dd[own] += g.T @ qi
    return dq, dd


def contrast_score(
    A: Tensor,
    a_offsets: Tensor,
    pools: Tensor,
    cosine: Tensor,
    alpha: float = 2.0,
    terms: Sequence[tuple[Tensor, float]] = (),
    gamma: float = 0.0,
    embeddings: Tensor | None = None,
) -> Tensor:
    """w = max_k A − mean_k A (uniform where flat); a = A w / Σ w; b = z(z(cosine) + alpha z(a) + Σ weight z(term)); feedback.

    A document with a NaN among its values is NaN in the result and left out of every maximum, mean and std.
    """
    out = torch.full((len(cosine),), torch.nan, dtype=torch.float32, device=cosine.device)
    for start, end in zip(pools[:-1].tolist(), pools[1:].tolist()):
        if start == end:
            continue
        block = A[int(a_offsets[start]) : int(a_offsets[end])].float().view(end - start, -1)
        columns = [cosine[start:end].float(), *(term[start:end].float() for term, _ in terms)]
        e = embeddings[start:end].float() if gamma > 0 and embeddings is not None else None
        parts = [block, torch.stack(columns, 1), *([] if e is None else [e])]
        known = ~torch.cat(parts, 1).isnan().any(1)
        if not bool(known.any()):
            continue
        block, columns = block[known], [column[known] for column in columns]
        total = zscore(columns[0])
        if block.shape[1] > 0:
            w = (block.amax(0) - block.mean(0)).clamp(min=0)
            w = w if float(w.sum()) > FLAT else torch.ones_like(w)
            total = total + alpha * zscore(block @ w / w.sum())
        for column, (_, weight) in zip(columns[1:], terms):
            total = total + weight * zscore(column)
        b = zscore(total)
        if e is not None:
            b = b + gamma * zscore(e[known] @ (torch.softmax(b / 0.3, 0) @ e[known]))
        out[start:end][known] = b
    return out
