"""Sparse encoders (SPLADE): a masked language model weighs the words of its vocabulary for a text. sentence-transformers' SparseEncoder is the reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_kernels import exactly
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import SparseVectors, Tokens
from rerank_lab.models.checkpoint import Checkpoint, read_config, read_prompts, refuse_leftovers, transformer_settings
from rerank_lab.models.exported import network
from rerank_lab.models.families import MASKED, SPARSE, family, refuse_foreign, wrong_role
from rerank_lab.models.folder import Folder, last_part
from rerank_lab.models.forward import encodings, fast_tokenizer, forward, limit_of, load_checkpoint, padding
from rerank_lab.models.padded import Padded
from rerank_lab.models.registry import Source, pick_device
from rerank_lab.models.transformer_encoder import fingerprint

# Tokens whose logits over the whole vocabulary are held at once.
HEAD_TOKENS = {"cpu": 256, "cuda": 8192, "mps": 1024}
POOLINGS, ACTIVATIONS = ("max", "sum"), ("relu", "log1p_relu")
KEYS = {"activation_function", "chunk_size", "embedding_dimension", "pooling_strategy", "word_embedding_dimension"}
ABOUT_KEYS = {"__version__", "default_prompt_name", "max_active_dims", "model_type", "prompts", "requirements", "similarity_fn_name"}
# What other modules of sparse encoders do, for messages.
OTHER_MODULES = {
    "Router": "queries and documents go through modules of their own",
    "SparseStaticEmbedding": "queries are looked up in a table",
    "SparseAutoEncoder": "it makes a dense vector sparse (CSR)",
}


@dataclass(frozen=True)
class SparseCheckpoint(Checkpoint):
    """How the sparse encoder in a folder weighs words. `pooling` is "max" or "sum", `similarity` "dot".

    Attributes:
        activation: "relu" for log(1 + max(0, x)), "log1p_relu" for log(1 + log(1 + max(0, x))).
        max_active: how many words, the heaviest, keep their weight; None: all.
    """

    activation: str = "relu"
    max_active: int | None = None

    def reading(self) -> str:
        """Settings that differ from the usual (pooling, activation, prompts, words kept), as JSON; "" without any."""
        usual = {"pooling": "max", "activation": "relu", "max_active": None, "query_prompt": "", "document_prompt": ""}
        asked = {key: value for key, before in usual.items() if (value := getattr(self, key)) != before}
        return json.dumps(asked, ensure_ascii=False) if asked else ""


def read_sparse(folder: Folder) -> SparseCheckpoint:
    """Reads a folder's JSON files and decides how the model weighs words. No weight is loaded.

    A bare masked language model is read as SparseEncoder reads it: the maximum over the tokens.

    Raises:
        UserError: the model is of another family, or the folder has something that is not supported.
    """
    path, name, types, about = folder.path, folder.name, folder.types, folder.about
    found, sign = family(folder)
    bare = not types and folder.architecture.endswith(MASKED[0])
    if found != SPARSE and not bare:
        raise wrong_role(name, found, sign, SPARSE)
    kinds = [last_part(kind) for kind in types]
    if types and (kinds not in (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"]) or not all(map(_known, types))):
        why = "".join(f"; {kind}: {OTHER_MODULES[kind]}" for kind in kinds if kind in OTHER_MODULES)
        raise UserError(f"{path / 'modules.json'}: of sparse encoders only a Transformer with a SpladePooling is computed here, not {', '.join(kinds)}{why}")
    if not types and not bare:
        raise UserError(f"model {name!r} is {sign}, and has no modules.json that says how it weighs words; copy the whole model")
    read_config(folder)
    refuse_foreign(folder, SPARSE)
    if unknown := sorted(set(about) - ABOUT_KEYS):
        raise UserError(f"model {name!r}: config_sentence_transformers.json has {', '.join(unknown)}, which is not understood here and may change scores")
    if about.get("similarity_fn_name") not in (None, "dot"):
        raise UserError(f"model {name!r} compares by {about['similarity_fn_name']} (similarity_fn_name), which is not computed for sparse encoders; dot is")
    if bare:
        refuse_leftovers(folder)
        said = "it has no modules.json: the masked language model is read as SPLADE, as sentence-transformers does; one that was not trained so weighs no words"
        return SparseCheckpoint(name, path, folder.root, SPARSE, "max", similarity="dot", said=(said,), **transformer_settings(folder, SPARSE))
    settings = transformer_settings(folder, SPARSE, "feature-extraction" if kinds[0] == "Transformer" else None)
    pooling, activation = _pooling(folder, folder.modules[1][1])
    most = about.get("max_active_dims")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise UserError(f"model {name!r}: max_active_dims in config_sentence_transformers.json must be a whole number of at least 1, not {most!r}")
    read = SparseCheckpoint(name, path, folder.root, SPARSE, pooling, similarity="dot", activation=activation, max_active=most, **settings)
    return replace(read_prompts(read, folder), card=None)


def _known(kind: str) -> bool:
    return kind.startswith("sentence_transformers.")


def _pooling(folder: Folder, place: str) -> tuple[str, str]:
    """pooling_strategy and activation_function of a SpladePooling."""
    if not (folder.path / place / "config.json").is_file():
        raise UserError(f"model {folder.name!r}: {folder.path / place / 'config.json'} is missing, which says how words are weighed; copy the whole model")
    config = folder.module_config(place)
    pooling, activation = str(config.get("pooling_strategy", "max")), str(config.get("activation_function", "relu"))
    odd = sorted(set(config) - KEYS)
    if odd or pooling not in POOLINGS or activation not in ACTIVATIONS:
        said = f"has {', '.join(odd)}" if odd else f"pools by {pooling} of {activation}"
        raise UserError(f"model {folder.name!r}: {place}/config.json {said}; known are {' and '.join(POOLINGS)} of {' and '.join(ACTIVATIONS)}")
    return pooling, activation


class SparseModel:
    """A sparse encoder, in fp32.

    Args:
        folder: the checkpoint.
        device: torch device.

    Attributes:
        checkpoint: how it is read.
        limit: tokens of a text that it reads, special ones not counted.
        fingerprint: hash of everything that its weights of words depend on.

    Raises:
        UserError: the folder is not understood, or its head does not read hidden states alone.
    """

    def __init__(self, folder: Folder, device: torch.device | str = "cpu"):
        from transformers import AutoModelForMaskedLM

        self.checkpoint = found = read_sparse(folder)
        self.name, self.device = folder.name, torch.device(device)
        model, tokenizer = load_checkpoint(AutoModelForMaskedLM, found.root, folder.name)
        specials = tokenizer.num_special_tokens_to_add(False)
        self.limit: int = limit_of(found, model, tokenizer, specials) - specials
        self.head = _Head(model.to(self.device))
        pads = padding(model, tokenizer)
        self._probe(Padded(model, *pads), folder)
        self.network = network(self.head.base, runtime="torch", precision="fp32", **pads._asdict())
        self.tokenizer, self.truncation_side = fast_tokenizer(tokenizer, lower=found.lower), str(tokenizer.truncation_side)
        self.fingerprint = fingerprint(folder.path)

    @torch.inference_mode()
    def _probe(self, whole: Padded, folder: Folder) -> None:
        """Refuses a model whose head makes other logits of the states than the whole model does."""
        said = f"model {folder.name!r}: a {type(whole.model).__name__} does not make its logits of hidden states alone, and is not computed here"
        ids = torch.arange(3, 7, dtype=torch.int64, device=self.device)
        try:
            inputs = whole.inputs(ids, torch.zeros_like(ids), [len(ids)])
            fits = torch.allclose(
                whole.model(**inputs).logits[0], self.head(self.head.base(**inputs).last_hidden_state[0]), rtol=1e-4, atol=1e-4, equal_nan=True
            )
        except Exception as error:  # a model of another kind can fail in any way
            raise UserError(f"{said} ({type(error).__name__})") from error
        if not fits:
            raise UserError(said)

    def tokenize(self, texts: Sequence[str], kind: str) -> list[Tokens]:
        """Tokenises texts of a kind ("query" or "document") with its prompt, cut to the model's limit."""
        prompt, found = self.checkpoint.query_prompt if kind == "query" else self.checkpoint.document_prompt, []
        for encoding in encodings(self.tokenizer, [prompt + text for text in texts]):
            wanted = len(encoding)
            encoding.truncate(self.limit, direction=self.truncation_side)
            found.append(Tokens.of(self.tokenizer.post_process(encoding), wanted))
        return found

    @exactly(tensors=True)
    def encode(self, texts: Sequence[str], kind: str) -> SparseVectors:
        """Weights of words of N texts of a kind, "query" or "document".

        Raises:
            ModelError: the model gave a NaN or an infinite value.
        """
        found: dict[int, SparseVectors] = {}
        for batch, ends, states in forward(self.network, self.tokenize(texts, kind), self.device):
            with torch.inference_mode():
                weights = self._weights(states.last, ends.tolist())
            if not bool(weights.isfinite().all()):
                raise ModelError(f"model {self.name!r} gave a NaN or infinite weight")
            for i, row in zip(batch.tolist(), weights.cpu().numpy()):
                words = row.nonzero()[0]
                found[i] = SparseVectors(np.array([0, len(words)], dtype=np.int64), words.astype(np.int32), row[words])
        return SparseVectors.join(found[i] for i in range(len(texts)))

    def _weights(self, h: Tensor, ends: Sequence[int]) -> Tensor:
        """B × vocabulary, of B texts' hidden states h (T × d). Logits of HEAD_TOKENS tokens are held at once."""
        sums, size, text = self.checkpoint.pooling == "sum", HEAD_TOKENS.get(self.device.type, 1024), 0
        found = torch.zeros(len(ends) - 1, 1, dtype=torch.float32, device=h.device)
        for start in range(0, len(h), size):
            logits = self.head(h[start : start + size]).float()
            logits, end = self._activate(logits) if sums else logits, start + len(logits)
            if start == 0:
                found = found.repeat(1, logits.shape[1])
            while text < len(found) and ends[text] < end:
                own = logits[max(0, ends[text] - start) : ends[text + 1] - start]
                if len(own):  # a text without tokens has no words
                    found[text] = found[text] + own.sum(0) if sums else torch.maximum(found[text], own.amax(0))
                if ends[text + 1] > end:
                    break
                text += 1
        found = found if sums else self._activate(found)  # it rises, so that it may follow the maximum
        if self.checkpoint.max_active is not None:
            kept = found.topk(min(self.checkpoint.max_active, found.shape[1]), dim=1)
            found = torch.zeros_like(found).scatter_(1, kept.indices, kept.values)
        return found

    def _activate(self, x: Tensor) -> Tensor:
        x = x.relu().log1p()
        return x.log1p() if self.checkpoint.activation == "log1p_relu" else x


class _Head:
    """The head of a masked language model: hidden states (T × d) → logits (T × vocabulary).

    The model itself is called, with what is below its head replaced by the states, so that any head is computed as its authors wrote it.
    """

    def __init__(self, model: Any):
        self.base: Any = model.base_model
        self.given, self.model = _Given(), copy.copy(model)
        self.model._modules = dict(model._modules)
        setattr(self.model, model.base_model_prefix, self.given)
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    def __call__(self, h: Tensor) -> Tensor:
        self.given.states = h[None]
        logits: Tensor = self.model(input_ids=self.ids).logits
        return logits[0]


class _Given(nn.Module):
    """Stands in for a transformer, and gives the states that it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.states: Tensor | None = None

    def forward(self, *args: object, **kwargs: object) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.states)


def load(source: Source, device: str) -> SparseModel:
    """Loads a sparse encoder.

    Raises:
        UserError: the model is not found, or is of another family.
    """
    return SparseModel(source.folder, pick_device(device))
