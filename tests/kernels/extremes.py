"""Documents at both ends of what fp32 can weigh at a small temperature, and their soft maxima and gradients in fp64, whose softmax needs no fixed shift."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rerank_kernels import MIN_TAU

TAUS = [MIN_TAU, 0.02, 0.0249, 0.025]
REPEATS = 2**18  # of a document of four tokens, which makes 2²⁰


def unit(rows: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


@cache
def query() -> Tensor:
    return unit(5, 3)


@cache
def documents() -> tuple[Tensor, ...]:
    """Opposite to the first query token, equal to it, one token, both ends among others, all tokens near the query's."""
    q, first = query(), query()[:1]
    near = normalize(q + 0.02 * unit(5, 5), dim=-1)
    return -first.repeat(3, 1), first.repeat(3, 1), first, torch.cat([q, -q, near, unit(40, 4)]), near.repeat(20, 1)


@cache
def fours() -> tuple[Tensor, ...]:
    """Four tokens each: opposite to the first query token, equal to it, mixed. A document that is repeated keeps its soft maximum."""
    q, first = query(), query()[:1]
    return -first.repeat(4, 1), first.repeat(4, 1), normalize(torch.cat([first, -first, first + 0.1 * q[1:2], first + q[1:2]]), dim=-1)


def packed(texts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, q_offsets, d, d_offsets and pairs of the query with every document."""
    ends, pairs = torch.tensor([0, *map(len, texts)]).cumsum(0), torch.tensor([[0, n] for n in range(len(texts))])
    return query(), torch.tensor([0, len(query())]), torch.cat(texts), ends, pairs


@cache
def exact(texts: tuple[Tensor, ...], tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, and the gradients of q and d where A's is 1, all in fp64."""
    q, d = query().double().requires_grad_(), [x.double().requires_grad_() for x in texts]
    scores = [q @ x.T for x in d]
    A = torch.cat([(torch.softmax(s / tau, 1) * s).sum(1) for s in scores])
    dq, *dd = torch.autograd.grad(A.sum(), [q, *d])
    return A.detach(), dq, torch.cat(dd)
