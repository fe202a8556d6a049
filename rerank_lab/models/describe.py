"""What a model's folder says, for people: how it would be read, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rerank_lab.models.base import Overrides
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.families import BI, CROSS
from rerank_lab.models.folder import Folder, read_json
from rerank_lab.models.forward import limit_of
from rerank_lab.models.registry import REGISTRY, Source


def bi_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A bi-encoder, by title."""
    folder = source.folder
    found = read_checkpoint(folder, BI).overridden(asked)
    modules = [found.pooling, *(kind if kind == "Normalize" else _dense(folder, place.name) for kind, place in found.after)]
    kept = "" if found.truncate_dim is None else f"; the first {found.truncate_dim} components are kept"
    return {
        "kind": BI,
        "transformer": transformer(folder),
        "pooling": ", then ".join(modules) + kept,
        "query prompt": _prompt(found.query_prompt),
        "document prompt": _prompt(found.document_prompt),
        "reads": limit(found, pair=False),
        "score": "cosine, -1 to 1" if found.similarity == "cosine" else "dot product, without bounds",
    }


def cross_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A cross-encoder, by title."""
    found = read_checkpoint(source.folder, CROSS).overridden(asked)
    return {
        "kind": CROSS,
        "transformer": transformer(source.folder),
        "prompt": _prompt(found.pair_prompt),
        "reads": limit(found, pair=True),
        "score": "sigmoid of the logit, 0 to 1",
    }


def one_way(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A one-way cross-encoder, by title."""
    info = REGISTRY.get(source.name)
    known = "" if info is None else f", {info.source.removeprefix('adapter:')}, {info.token_limit} tokens of a text"
    return {
        "kind": "one-way cross-encoder",
        "reads": f"vectors of documents that its bi-encoder has made{known}",
        "score": "sigmoid of the logit, 0 to 1",
    }


def transformer(folder: Folder) -> str:
    """Architecture, layers and width of a folder's transformer."""
    config = configuration(folder)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    return f"{folder.architecture or type(config).__name__.removesuffix('Config')}, {layers} layers of {width} dimensions"


def configuration(folder: Folder) -> Any:
    """The configuration of a folder's transformer, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder.root, trust_remote_code=False)


def limit(found: Checkpoint, *, pair: bool) -> str:
    """How many tokens a model reads. Its shape is made without memory, which tells how many positions there are."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(found.root, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(configuration(Folder(found.root, found.name)), trust_remote_code=False)
    specials = int(tokenizer.num_special_tokens_to_add(pair))
    most = limit_of(found, model, tokenizer, specials)
    return f"{most - (0 if pair else specials)} tokens of a {'pair' if pair else 'text'}, {specials} special ones {'counted' if pair else 'not counted'}"


def _dense(folder: Folder, place: str) -> str:
    config = read_json(folder.path / place / "config.json")
    return f"Dense to {config.get('out_features')} dimensions"


def _prompt(text: str) -> str:
    return repr(text) if text else "none"
