"""A causal reranker: a language model that reads a query and a document through a prompt. Its score is the logit of yes, less that of no, behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_kernels import exactly
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import AS_IT_IS, Encoder, Inputs, Needs, Overrides, WorkItem
from rerank_lab.models.causal_checkpoint import read_causal
from rerank_lab.models.chat import ChatTemplate
from rerank_lab.models.decoder import Decoder
from rerank_lab.models.families import CAUSAL, family
from rerank_lab.models.folder import Folder, as_dict
from rerank_lab.models.forward import fast_tokenizer, limit_of, load_checkpoint, plan_batches, token_budget
from rerank_lab.models.packed_decoder import KeysValues
from rerank_lab.models.registry import Placement, Source, pick_device
from rerank_lab.models.templates import TemplatePrompt
from rerank_lab.models.transformer_encoder import scorer_fingerprint


class Beginning:
    """What all sequences of a query begin with. It is run when it is first needed, and once.

    Args:
        decoder: the model.
        ids: its P tokens, int64.
    """

    def __init__(self, decoder: Decoder, ids: np.ndarray):
        self.decoder, self.ids = decoder, ids

    @cached_property
    def keys_values(self) -> KeysValues | None:
        """Its keys and values; None if it has no tokens."""
        return self.decoder.shared(self.ids) if len(self.ids) else None


@dataclass(frozen=True, eq=False)
class DocumentBatch(WorkItem):
    """Some of a query's documents, which share one forward.

    Attributes:
        beginning: of the query's sequences.
        rests: the tokens of each behind it, int64.
    """

    beginning: Beginning
    rests: Sequence[np.ndarray]


MOVING = {"dynamic", "longrope"}  # kinds of rotary positions whose frequencies follow the length of the input


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions in a configuration, which may differ between kinds of layers."""
    given = as_dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    return {str(one.get("rope_type") or one.get("type")) for one in (given, *map(as_dict, given.values()))}


class CausalReranker:
    """Scores pairs of texts by a causal language model, as its family's own formula does.

    Args:
        folder: the checkpoint.
        name: what messages and results call it.
        device: torch device.
        runtime: "auto" or "torch".
        precision: "fp32" or "bf16". What comes behind the last layer's states is fp32.
        overrides: an instruction other than the family's.

    Raises:
        UserError: there is no such checkpoint, its prompt is not known, or it cannot do what is asked.
    """

    needs: Needs | None = None
    shares = False
    runtime = "torch"

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
        from transformers import AutoModelForCausalLM

        self.name, self.device, self.precision = name, torch.device(device), precision
        if runtime not in ("auto", "torch") or precision not in ("fp32", "bf16"):
            raise UserError(
                f"model {name!r} is a causal reranker, which runs by torch in fp32 or bf16 alone, not by {runtime} in {precision}: "
                "--runtime torch --precision bf16"
            )
        self.checkpoint = found = read_causal(Folder(folder, name)).overridden(overrides)
        number = torch.bfloat16 if precision == "bf16" else torch.float32
        model, tokenizer = load_checkpoint(AutoModelForCausalLM, found.scorer.root, name, number=number)
        if moving := _rope_types(model.config) & MOVING:
            raise UserError(
                f"model {name!r} turns its positions by frequencies that depend on how much is read at once (rope_type {', '.join(sorted(moving))}): a score would "
                "depend on what shares its batch; name a model with fixed ones"
            )
        fast = fast_tokenizer(tokenizer, lower=found.scorer.lower)
        positions = limit_of(found.scorer, model, tokenizer, 0)
        self.prompt: ChatTemplate | TemplatePrompt
        if found.template is not None:
            self.prompt = TemplatePrompt(found.template, tokenizer, fast, found.instruction, positions, name)
        else:
            assert found.scorer.chat is not None
            self.prompt = ChatTemplate(found.scorer.chat, tokenizer, fast, found.instruction, positions, name)
            self.prompt.check(overrides)
        self.limit = self.prompt.limit
        yes, no = found.answers(fast)
        self.decoder = Decoder(model.to(self.device), yes, no, name)
        self.fingerprint = scorer_fingerprint(folder, found.template is None, overrides.instruction)

    @property
    def notes(self) -> tuple[str, ...]:
        """As Scorer.notes."""
        return self.checkpoint.scorer.notes

    def reading(self) -> str:
        """As Scorer.reading."""
        return self.checkpoint.reading()

    def score(self, query: str, documents: Sequence[str], *, max_tokens: int = 512) -> Tensor:
        """Scores of N documents (N, fp32, on the CPU).

        Args:
            query: any string.
            documents: N strings.
            max_tokens: tokens kept of each document. If the whole is still too long, it is cut as the family does it.

        Raises:
            ModelError: the model gave a NaN or an infinite score.
        """
        work, scores = self.work(Inputs(query, documents, max_tokens)), torch.zeros(len(documents), dtype=torch.float32, device="cpu")
        scores[[place for batch in work for place in batch.positions]] = self.logits(work)
        return scores

    def work(self, inputs: Inputs) -> list[DocumentBatch]:
        """Tokenises the query with each document, and groups the documents into batches of those that were cut and those that were not."""
        prompted = self.prompt.sequences(inputs.query, inputs.texts, inputs.max_tokens)
        beginning = Beginning(self.decoder, common_beginning([one.ids for one in prompted]))
        rests, start = [one.ids[len(beginning.ids) :] for one in prompted], len(beginning.ids)
        found: list[DocumentBatch] = []
        for cut in (True, False):
            own = [n for n, one in enumerate(prompted) if one.cut == cut]
            for batch in plan_batches([len(rests[n]) for n in own], token_budget(self.device)):
                positions = [own[n] for n in batch]
                size = sum(len(rests[n]) for n in positions) + (start if not found else 0)  # the beginning counts once
                found.append(DocumentBatch(positions, size, cut, beginning, [rests[n] for n in positions]))
        return found

    @exactly(tensors=True)
    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """One score for each document, batch by batch (fp32, on the CPU).

        Raises:
            ModelError: the model gave a NaN or an infinite score.
        """
        found = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        with torch.inference_mode():
            for batch in work:
                assert isinstance(batch, DocumentBatch)
                found.append(self.decoder.answers(batch.rests, batch.beginning.keys_values).cpu())
        scores = torch.cat(found)
        if not bool(scores.isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite score")
        return scores

    def flops(self, work: Sequence[WorkItem]) -> int:
        """FLOPs of these batches, without embeddings and head. What a query's sequences begin with counts once."""
        beginnings, total = {}, 0
        for batch in work:
            assert isinstance(batch, DocumentBatch)
            beginnings[id(batch.beginning)] = len(batch.beginning.ids)
            total += self.decoder.flops([len(rest) for rest in batch.rests], len(batch.beginning.ids))
        return total + self.decoder.flops(list(beginnings.values()), 0)


def common_beginning(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The longest beginning that all sequences share, short of their last tokens; empty for fewer than two."""
    if len(sequences) < 2:
        return np.zeros(0, dtype=np.int64)
    first, most = sequences[0], min(map(len, sequences)) - 1
    for other in sequences[1:]:
        apart = np.flatnonzero(first[:most] != other[:most])
        most = int(apart[0]) if len(apart) else most
    return first[:most]


def takes(source: Source) -> bool:
    """Whether a model is a causal language model."""
    return family(source.folder)[0] == CAUSAL


def load(source: Source, placement: Placement, loaded: Mapping[str, Encoder]) -> CausalReranker:
    """Loads a causal reranker. It shares no encoder, so that `loaded` is not used.

    Raises:
        UserError: the model is not found, or cannot do what is asked.
    """
    device = pick_device(placement.device)
    return CausalReranker(
        source.folder.path, source.name, device=device, runtime=placement.runtime, precision=placement.precision, overrides=placement.overrides
    )
