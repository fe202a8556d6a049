"""What `bench` times of subspace_attention: MaxSim of one query with documents of ragged length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .bench_tasks import Call, Task
from .samples import seeded, unit

TAU = 0.1  # of the soft maximum


def tasks(quick: bool, cuda: bool) -> Iterator[Ragged]:
    """In the order of the report; `quick`: small ones."""
    yield from (Ragged(d, 50 if quick else 1000) for d in (128, 384))
    if cuda and not quick:
        yield Ragged(128, 20_000)


@dataclass(frozen=True)
class Ragged(Task):
    """One query of Lq tokens and documents of 20 to 300 tokens, unit vectors of width d."""

    d: int
    documents: int = 1000
    Lq: int = 32

    ours = ("MaxSim", "soft attention")
    unlike = ("soft attention",)
    peers = ("maxsim-cpu", "fast-maxsim")
    matrix = "tokens"
    tolerance = 2e-4  # of sums over 32 tokens

    @property
    def products(self) -> int:
        return self.Lq

    def tensors(self) -> dict[str, Tensor]:
        """q, q_offsets, tokens, d_offsets, pairs as subspace_attention takes them."""
        g = seeded(self.d)
        ends = torch.randint(20, 301, (self.documents,), generator=g, dtype=torch.int64, device="cpu").cumsum(0)
        tokens, q = unit(int(ends[-1]), self.d, g), unit(self.Lq, self.d, g)
        places = torch.arange(self.documents, dtype=torch.int64, device="cpu")
        pairs, q_offsets = torch.stack([torch.zeros_like(places), places], 1), torch.tensor([0, self.Lq], dtype=torch.int64, device="cpu")
        return {"q": q, "q_offsets": q_offsets, "tokens": tokens, "d_offsets": torch.cat([ends.new_zeros(1), ends]), "pairs": pairs}

    def title(self, x: dict[str, Tensor]) -> str:
        if x["tokens"].is_cuda:
            return f"MaxSim, {self.Lq} tokens x {self.documents:,} documents, d = {self.d}, fp16"
        return f"MaxSim, {self.Lq} query tokens x {self.documents:,} documents ({len(x['tokens']):,} tokens), d = {self.d}, fp32"

    def on_cpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        full, mask = padded(x)
        owner = torch.repeat_interleave(torch.arange(self.documents, dtype=torch.int64, device="cpu"), x["d_offsets"].diff())
        return {
            **self._own(x),
            "torch packed mm, scatter_reduce": lambda: packed_maxsim(x, owner),
            "torch padded einsum": lambda: padded_maxsim(x["q"], full, mask),
        }

    def on_gpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        full, mask = padded(x)
        compiled = torch.compile(padded_maxsim)
        return {**self._own(x), "torch.compile of padded einsum": lambda: compiled(x["q"], full, mask)}

    def _own(self, x: dict[str, Tensor]) -> dict[str, Call]:
        from . import subspace_attention

        packed = x["q"], x["q_offsets"], x["tokens"], x["d_offsets"], x["pairs"]
        return {"MaxSim": lambda: subspace_attention(*packed, 0.0).view(-1, self.Lq).sum(1), "soft attention": lambda: subspace_attention(*packed, TAU)}

    def peers_on_gpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        cu_q, cu_d, longest = x["q_offsets"].int(), x["d_offsets"].int(), int(x["d_offsets"].diff().max())
        query, document = x["pairs"][:, 0].contiguous(), x["pairs"][:, 1].contiguous()

        def late_interaction() -> Any:
            score = import_module("late_interaction_kernels.score_pairs").score_pairs_packed
            return score(x["q"], x["tokens"], cu_q, cu_d, query, document, max_seqlen_q=len(x["q"]), max_seqlen_d=longest)

        def flash() -> Any:
            return import_module("flash_maxsim.flash_maxsim_varlen").flash_maxsim_packed(x["q"], x["tokens"], cu_d, longest)

        return {"late-interaction-kernels": late_interaction, "flash-maxsim": flash}

    def peer(self, name: str, module: Any, threads: int) -> Call:
        x = self.tensors()
        documents = [block.numpy() for block in x["tokens"].split_with_sizes(x["d_offsets"].diff().tolist())]
        q = x["q"].numpy()
        return lambda: module.maxsim_scores_variable(q, documents)


def padded(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Documents of one length (N × longest × d), and which of their tokens are real."""
    lengths = x["d_offsets"].diff()
    mask = torch.arange(int(lengths.max()), dtype=torch.int64, device=lengths.device) < lengths[:, None]
    full = x["tokens"].new_zeros(*mask.shape, x["tokens"].shape[1])
    full[mask] = x["tokens"]
    return full, mask


def padded_maxsim(q: Tensor, full: Tensor, mask: Tensor) -> Tensor:
    """MaxSim as it is usually written: sums over the query's tokens, one a document."""
    return torch.einsum("id,njd->nij", q, full).masked_fill(~mask[:, None], -torch.inf).amax(2).sum(1)


def packed_maxsim(x: dict[str, Tensor], owner: Tensor) -> Tensor:
    """MaxSim in packed products of 8,192 tokens and a scattered maximum; owner: each token's document."""
    best = torch.full((len(x["pairs"]), len(x["q"])), -torch.inf, dtype=torch.float32, device="cpu")
    for start in range(0, len(owner), 8192):
        part = slice(start, start + 8192)
        best.scatter_reduce_(0, owner[part, None].expand(-1, len(x["q"])), x["tokens"][part] @ x["q"].T, "amax")
    return best.sum(1)
