"""A cross-encoder made of modules of sentence-transformers: a transformer reads the pair, a pooling makes a vector of it, and the last Dense a logit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rerank_lab.errors import UserError
from rerank_lab.models.after import after_pooling, dense_activation
from rerank_lab.models.base import Encoder, WorkItem
from rerank_lab.models.checkpoint import Checkpoint, read_module, read_scorer
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.families import BI, CROSS, family
from rerank_lab.models.folder import Folder, last_part
from rerank_lab.models.forward import TokenBatch, encoder_flops, load_checkpoint
from rerank_lab.models.packed import Packed
from rerank_lab.models.pooling import pooled, pooling_mode
from rerank_lab.models.registry import Placement, Source, pick_device

KNOWN = re.compile(r"sentence_transformers\.(?:[a-z_]+\.)+(?:Transformer|Pooling|Dense|LayerNorm|Normalize)")


class ModularCrossEncoder(CrossEncoder):
    """Scores pairs of texts. Logits equal those of sentence_transformers.CrossEncoder.

    Args:
        folder, name, device, runtime, precision, overrides: as for CrossEncoder. What comes behind the transformer stays fp32.

    Raises:
        UserError: as CrossEncoder; or a module is not known, or the last one makes no single score.
    """

    headed = False

    def read(self, folder: Folder) -> Checkpoint:
        """As CrossEncoder.read."""
        return read_modules(folder)

    def open(self, found: Checkpoint) -> tuple[Any, Any]:
        """As CrossEncoder.open."""
        from transformers import AutoModel

        model, tokenizer = load_checkpoint(AutoModel, found.root, found.name, spare="pooler")
        self.after = after_pooling(found.after, found.name, of=None).to(self.device)
        return model, tokenizer

    def _run(self, texts: TokenBatch) -> Tensor:
        pooling = self.checkpoint.pooling
        if pooling == "cls" and isinstance(self.network, Packed):
            vectors = self.network(*texts, first=True).last
        else:
            parts = torch.split(self.network(*texts).last, texts.lengths)
            vectors = torch.stack(
                [part[{"cls": 0, "lasttoken": -1}[pooling]] if pooling in ("cls", "lasttoken") else pooled(pooling, part, 0) for part in parts]
            )
        logits: Tensor = self.after(vectors.float())
        return logits

    def flops(self, work: Sequence[WorkItem]) -> int:
        """As CrossEncoder.flops."""
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return encoder_flops(self.config, lengths, first=self.checkpoint.pooling == "cls" and isinstance(self.network, Packed))


def read_modules(folder: Folder) -> Checkpoint:
    """Reads the JSON files of a cross-encoder that is made of modules. No weight is loaded.

    Raises:
        UserError: a module is not known, the last one makes no single score, or the folder has something that is not supported.
    """
    name, kinds = folder.name, [last_part(kind) for kind in folder.types]
    odd = [kind for kind in folder.types if not KNOWN.fullmatch(kind)]
    if odd or kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & {*kinds[2:]} or kinds[-1] != "Dense":
        raise UserError(
            f"{folder.path / 'modules.json'}: of a cross-encoder a Transformer, a Pooling, and then Dense, LayerNorm and Normalize modules with a Dense as the last "
            f"are known, not {', '.join(odd or kinds)}"
        )
    found = read_scorer(folder, BI)
    pooling = read_module(folder, folder.modules[1][1], "Pooling")
    if pooling.get("include_prompt") is False and found.pair_prompt:
        raise UserError(f"model {name!r} leaves its prompt out of the pooling (include_prompt: false), which is not known here")
    after = tuple(zip(kinds[2:], (folder.path / path for _, path in folder.modules[2:])))
    for n, (kind, (_, path)) in enumerate(zip(kinds[2:], folder.modules[2:]), 1):
        config = read_module(folder, path, kind)
        into = "scores" if n == len(after) else "sentence_embedding"
        places = config.get("module_input_name") or "sentence_embedding", config.get("module_output_name") or "sentence_embedding"
        if kind != "LayerNorm" and (places != ("sentence_embedding", into) or config.get("use_residual")):
            raise UserError(f"model {name!r}: {path} maps {places[0]} to {places[1]}, or has a residual, which is not known here")
        if into == "scores" and config.get("out_features") != 1:
            raise UserError(f"model {name!r} has {config.get('out_features')} labels; a cross-encoder for reranking has one")
        if kind == "Dense":
            dense_activation(config, folder.path / path, name, of=None)
    return replace(found, pooling=pooling_mode(pooling, name), after=after)


def takes(source: Source) -> bool:
    """Whether a model is a cross-encoder made of modules."""
    return family(source.folder)[0] == CROSS and len(source.folder.types) > 1


def load(source: Source, placement: Placement, loaded: Mapping[str, Encoder]) -> ModularCrossEncoder:
    """Loads a cross-encoder made of modules. It shares no encoder, so that `loaded` is not used.

    Raises:
        UserError: the model is not found or has another role.
    """
    device = pick_device(placement.device)
    return ModularCrossEncoder(
        source.folder.path, source.name, device=device, runtime=placement.runtime, precision=placement.precision, overrides=placement.overrides
    )
