"""A Hugging Face sequence-classification checkpoint as a cross-encoder: one logit a (query, document) pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from rerank_kernels import exactly
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Encoder, Inputs, Needs, Tokens, Work
from rerank_lab.models.bi_encoder import fingerprint
from rerank_lab.models.checkpoint import read_checkpoint
from rerank_lab.models.exported import choose, network
from rerank_lab.models.families import CROSS
from rerank_lab.models.forward import TokenBatch, backend, batches, encoder_flops, encodings, limit_of, load_checkpoint, padding
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import Padded
from rerank_lab.models.registry import Place, locate, pick_device


@dataclass(frozen=True, eq=False)
class Pair(Work):
    """A query with one document, as the model reads them."""

    tokens: Tokens


class CrossEncoder:
    """Scores pairs in one forward each; equal to sentence_transformers.CrossEncoder's logits, with the prompt and the limit that the folder names.

    Args:
        folder: the checkpoint, with exactly one label.
        name: what messages and results call it.
        device: torch device.
        runtime, precision: as models.runtimes.choose takes them; the head stays fp32 where torch runs a BERT.

    Raises:
        UserError: no such checkpoint, a runtime that cannot be had, no trained classification head in it, or more than one label.
    """

    needs: Needs | None = None
    shares = True

    def __init__(self, folder: Path, name: str, *, device: torch.device | str = "cpu", runtime: str = "auto", precision: str = "fp32"):
        from transformers import AutoModelForSequenceClassification

        self.name, self.device = name, torch.device(device)
        self.checkpoint = found = read_checkpoint(folder, name, CROSS)
        model, tokenizer = load_checkpoint(AutoModelForSequenceClassification, found.root, name)
        if model.config.num_labels != 1:
            raise UserError(f"model {name!r} has {model.config.num_labels} labels; a cross-encoder for reranking has one")
        self.model = model.to(self.device)
        self.config: Any = model.config
        self.specials: int = tokenizer.num_special_tokens_to_add(True)
        self.limit: int = limit_of(found, model, tokenizer, self.specials)
        if getattr(self.config, "pad_token_id", None) is None:
            raise UserError(
                f"model {name!r} names no padding token, by which it finds the end of a text; set pad_token in {found.root / 'tokenizer_config.json'}"
            )
        self.runtime, self.precision = choose(runtime, precision), precision
        self.network = network(model, runtime=self.runtime, precision=precision, head=True, **padding(model, tokenizer)._asdict())
        self.tokenizer, self.truncation_side = backend(tokenizer, lower=found.lower), str(tokenizer.truncation_side)
        # One of two minds: truncation is a tokenizer's state, and threads share it.
        self.pairing = Tokenizer.from_str(self.tokenizer.to_str())
        self.pairing.enable_truncation(self.limit, strategy="longest_first", direction=self.truncation_side)
        self.fingerprint = fingerprint(folder)

    def score(self, query: str, documents: Sequence[str], *, max_tokens: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of N documents.

        Args:
            query: any string.
            documents: any strings.
            max_tokens: own tokens kept of each document; then the longer of the two is cut to the model's limit.

        Returns:
            logits (N, fp32), the tokens that each pair took, special ones counted (N, int64), and whether
            something of the pair was cut off (N, bool).

        Raises:
            ModelError: the model gave a NaN or an infinite logit.
        """
        work = self.work(Inputs(query, documents, max_tokens))
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return self.logits(work), lengths, torch.tensor([pair.cut for pair in work], dtype=torch.bool, device="cpu")

    def reading(self) -> str:
        """What the folder asks for beyond a plain reading, as JSON for results; "" where that is nothing."""
        return self.checkpoint.reading()

    def work(self, inputs: Inputs) -> list[Pair]:
        """The query with each of N documents, as the model reads them."""
        own, *_ = encodings(self.tokenizer, [self.checkpoint.pair_prompt + inputs.query])
        pairs: list[Pair] = []
        for document in encodings(self.tokenizer, inputs.texts):
            wanted = len(own) + len(document)
            document.truncate(min(inputs.max_tokens, 1 << 31), direction=self.truncation_side)
            tokens = Tokens.of(self.pairing.post_process(own, document), wanted)
            pairs.append(Pair([len(pairs)], len(tokens), len(tokens) < wanted + self.specials, tokens))
        return pairs

    @exactly(tensors=True)
    def logits(self, work: Sequence[Work]) -> Tensor:
        """One logit a pair (fp32, on the CPU), of one query or of many.

        Raises:
            ModelError: the model gave a NaN or an infinite logit.
        """
        logits = torch.zeros(len(work), dtype=torch.float32, device="cpu")
        for batch, texts in batches([_tokens(pair) for pair in work], self.network, self.device):
            with torch.inference_mode():
                logits[torch.from_numpy(batch)] = self._run(texts)[:, 0].float().cpu()
        if not bool(logits.isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite score")
        return logits

    def _run(self, texts: TokenBatch) -> Tensor:
        if isinstance(self.network, Padded):
            return self.network.logits(*texts)
        first = self.network(*texts, first=True).last[:, None]
        pooler = getattr(self.network.model, "pooler", None)
        logits: Tensor = self.model.classifier(first if pooler is None else pooler(first))
        return logits

    def flops(self, work: Sequence[Work]) -> int:
        """FLOPs of these pairs; the head is left out."""
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return encoder_flops(self.config, lengths, first=isinstance(self.network, Packed))


def _tokens(work: Work) -> Tokens:
    assert isinstance(work, Pair)
    return work.tokens


def load(name: str, place: Place, loaded: Mapping[str, Encoder]) -> CrossEncoder:
    """A cross-encoder by registry id, folder or hub name; it shares no encoder.

    Raises:
        UserError: not to be found, or of another role.
    """
    return CrossEncoder(locate(name, "cross-encoder"), name, device=pick_device(place.device), runtime=place.runtime, precision=place.precision)
