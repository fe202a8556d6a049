"""A cross-encoder from a Hugging Face sequence-classification checkpoint: one logit for each (query, document) pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from rerank_kernels import exactly
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import AS_IT_IS, Encoder, Inputs, Needs, Overrides, Tokens, WorkItem
from rerank_lab.models.chat import ChatTemplate
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.exported import choose, network
from rerank_lab.models.families import CROSS
from rerank_lab.models.folder import Folder
from rerank_lab.models.forward import TokenBatch, batches, encoder_flops, encodings, fast_tokenizer, limit_of, load_checkpoint, padding
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import Padded
from rerank_lab.models.registry import Placement, Source, pick_device
from rerank_lab.models.transformer_encoder import scorer_fingerprint


@dataclass(frozen=True, eq=False)
class Pair(WorkItem):
    """The tokens of a query with one document."""

    tokens: Tokens


class CrossEncoder:
    """Scores pairs of texts. Logits equal those of sentence_transformers.CrossEncoder, with the folder's prompt, chat template and limit.

    Args:
        folder: the checkpoint, with exactly one label.
        name: what messages and results call it.
        device: torch device.
        runtime, precision: as models.exported.choose takes them. If torch runs a BERT, the head stays fp32.
        overrides: an instruction other than the folder's.

    Raises:
        UserError: there is no such checkpoint, the runtime is not available, the checkpoint has no trained classification
            head or more than one label.
    """

    needs: Needs | None = None
    shares = True

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        device: torch.device | str = "cpu",
        runtime: str = "auto",
        precision: str = "fp32",
        overrides: Overrides = AS_IT_IS,
    ):
        self.name, self.device = name, torch.device(device)
        self.checkpoint = found = self.read(Folder(folder, name)).overridden(overrides)
        model, tokenizer = self.open(found)
        self.model = model.to(self.device)
        self.config: Any = model.config
        self.specials: int = 0 if found.chat else tokenizer.num_special_tokens_to_add(True)
        longest = limit_of(found, model, tokenizer, self.specials)
        check_padding_token(found, model)
        self.tokenizer, self.truncation_side = fast_tokenizer(tokenizer, lower=found.lower), str(tokenizer.truncation_side)
        self.template = None if found.chat is None else ChatTemplate(found.chat, tokenizer, self.tokenizer, found.pair_prompt, longest, name)
        if self.template is not None:
            self.template.check(overrides)
        self.limit: int = longest if self.template is None else self.template.limit
        self.runtime, self.precision = choose(runtime, precision), precision
        self.network = network(model, runtime=self.runtime, precision=precision, head=self.headed, **padding(model, tokenizer)._asdict())
        # A second tokenizer: truncation is a state of the tokenizer, and threads share it.
        self.pairing = Tokenizer.from_str(self.tokenizer.to_str())
        self.pairing.enable_truncation(longest, strategy="longest_first", direction=self.truncation_side)
        self.fingerprint = scorer_fingerprint(folder, self.template is not None, overrides.instruction)

    headed = True  # whether the transformer's class has the head

    def read(self, folder: Folder) -> Checkpoint:
        """Reads the checkpoint's JSON files.

        Raises:
            UserError: it is no checkpoint of this kind.
        """
        return read_checkpoint(folder, CROSS)

    def open(self, found: Checkpoint) -> tuple[Any, Any]:
        """Loads transformer and tokenizer.

        Raises:
            UserError: they do not load, or the head has more than one label.
        """
        from transformers import AutoModelForSequenceClassification

        model, tokenizer = load_checkpoint(AutoModelForSequenceClassification, found.root, found.name)
        check_labels(found, model)
        return model, tokenizer

    def score(self, query: str, documents: Sequence[str], *, max_tokens: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of N documents.

        Args:
            query: any string.
            documents: N strings.
            max_tokens: tokens kept of each document, special ones not counted. If the pair is still too long for the model,
                the longer of the two is cut.

        Returns:
            logits (N, fp32), tokens of each pair, special ones counted (N, int64), and whether query or document was cut
            (N, bool); all on the CPU.

        Raises:
            ModelError: the model gave a NaN or an infinite logit.
        """
        work = self.work(Inputs(query, documents, max_tokens))
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return self.logits(work), lengths, torch.tensor([pair.cut for pair in work], dtype=torch.bool, device="cpu")

    @property
    def notes(self) -> tuple[str, ...]:
        """As Scorer.notes."""
        return self.checkpoint.notes

    def reading(self) -> str:
        """As Scorer.reading."""
        return self.checkpoint.reading()

    def work(self, inputs: Inputs) -> list[Pair]:
        """Tokenises the query with each of N documents: N work items."""
        if self.template is not None:
            prompted = self.template.sequences(inputs.query, inputs.texts, inputs.max_tokens)
            return [Pair([n], len(one.ids), one.cut, _plain(one.ids)) for n, one in enumerate(prompted)]
        own, *_ = encodings(self.tokenizer, [self.checkpoint.pair_prompt + inputs.query])
        pairs: list[Pair] = []
        for document in encodings(self.tokenizer, inputs.texts):
            wanted = len(own) + len(document)
            document.truncate(min(inputs.max_tokens, 1 << 31), direction=self.truncation_side)
            tokens = Tokens.of(self.pairing.post_process(own, document), wanted)
            pairs.append(Pair([len(pairs)], len(tokens), len(tokens) < wanted + self.specials, tokens))
        return pairs

    @exactly(tensors=True)
    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """One logit for each pair (fp32, on the CPU). The pairs may belong to several queries.

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

    def flops(self, work: Sequence[WorkItem]) -> int:
        """FLOPs of these pairs, without the head."""
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return encoder_flops(self.config, lengths, first=isinstance(self.network, Packed))


def check_labels(found: Checkpoint, model: Any) -> None:
    """Refuses a classifier that does not have exactly one label."""
    if model.config.num_labels != 1:
        raise UserError(f"model {found.name!r} has {model.config.num_labels} labels; a cross-encoder for reranking has one")


def check_padding_token(found: Checkpoint, model: Any) -> None:
    """Refuses a classifier without a padding token."""
    if getattr(model.config, "pad_token_id", None) is None:
        raise UserError(
            f"model {found.name!r} names no padding token, by which it finds the end of a text; set pad_token in {found.root / 'tokenizer_config.json'}"
        )


def _plain(ids: np.ndarray) -> Tokens:
    """Tokens of a text of one segment, none of them special."""
    return Tokens(ids.astype(np.int32), np.zeros(len(ids), dtype=np.int8), np.zeros(len(ids), dtype=bool), len(ids))


def _tokens(work: WorkItem) -> Tokens:
    assert isinstance(work, Pair)
    return work.tokens


def load(source: Source, placement: Placement, loaded: Mapping[str, Encoder]) -> CrossEncoder:
    """Loads a cross-encoder. It shares no encoder, so that `loaded` is not used.

    Raises:
        UserError: the model is not found or has another role.
    """
    device = pick_device(placement.device)
    return CrossEncoder(source.folder.path, source.name, device=device, runtime=placement.runtime, precision=placement.precision, overrides=placement.overrides)
