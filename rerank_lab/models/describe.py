"""What a model's folder says, for people: how it would be read, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rerank_lab.models.base import Overrides
from rerank_lab.models.causal_checkpoint import read_causal
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.cross_modules import read_modules
from rerank_lab.models.families import BI, CAUSAL, CROSS, LATE, SPARSE, STATIC
from rerank_lab.models.folder import Folder, read_json
from rerank_lab.models.forward import limit_of
from rerank_lab.models.late_checkpoint import read_late
from rerank_lab.models.registry import REGISTRY, Source
from rerank_lab.models.sparse import read_sparse
from rerank_lab.models.static import read_static

LOGIT = "sigmoid of the logit, 0 to 1"


def bi_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A bi-encoder, by title."""
    found = read_checkpoint(source.folder, BI).overridden(asked)
    return {"kind": BI, "transformer": transformer(source.folder), **_pooled(found, found.pooling), "reads": limit(found, pair=False), **notes(found.notes)}


def late_interaction(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A late-interaction model, by title."""
    found = read_late(source.folder)
    markers = found.markers or ("", "")  # a prompt that is asked for stands after the marker
    query_prompt = found.query_prompt if asked.query_prompt is None else markers[0] + asked.query_prompt
    document_prompt = found.document_prompt if asked.document_prompt is None else markers[1] + asked.document_prompt
    query = found.query_length or (found.expansion.length if found.expansion is not None and found.expansion.fixed else found.max_seq_length)
    expanded = "" if found.expansion is None else f"; queries are expanded to {found.expansion.length} tokens by mask tokens"
    attend = "" if found.expansion is None else f", which {'are' if found.expansion.attend else 'are not'} attended to"
    return {
        "kind": f"{LATE} (ColBERT), in the layout of {found.layout}",
        "transformer": transformer(source.folder),
        "query prompt": _prompt(query_prompt),
        "document prompt": _prompt(document_prompt),
        "reads": f"{query} tokens of a query and {found.document_length or found.max_seq_length} of a document, special ones counted{expanded}{attend}",
        "no vector for": f"{len(found.skiplist)} skipped tokens of {' and '.join(f'a {side}' for side in found.skipped_in)}" if found.skiplist else "nothing",
        "score": "maxsim: the sum of each query token's best match",
        **notes(found.notes),
    }


def sparse(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A sparse encoder, by title."""
    found = read_sparse(source.folder)
    return {
        "kind": SPARSE,
        "transformer": transformer(source.folder),
        "pooling": f"{found.pooling} over a text's tokens of the weights of words",
        "query prompt": _prompt(found.query_prompt),
        "document prompt": _prompt(found.document_prompt),
        "reads": limit(found, pair=False),
        "score": "dot product of weighted words",
        **notes(found.notes),
    }


def static(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A static embedding model, by title."""
    found = read_static(source.folder).overridden(asked)
    return {"kind": STATIC, **_pooled(found, "mean of the rows of its tokens"), "reads": "all tokens of a text", **notes(found.notes)}


def cross_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A cross-encoder, by title."""
    found = read_checkpoint(source.folder, CROSS).overridden(asked)
    return {
        "kind": CROSS,
        "transformer": transformer(source.folder),
        "prompt": _prompt(found.pair_prompt),
        "reads": limit(found, pair=True),
        "score": LOGIT,
        **notes(found.notes),
    }


def cross_modules(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A cross-encoder made of modules, by title."""
    found = read_modules(source.folder).overridden(asked)
    return {
        "kind": f"{CROSS} made of modules",
        "transformer": transformer(source.folder),
        "pooling": ", then ".join([found.pooling, *(kind for kind, _ in found.after)]),
        "prompt": _prompt(found.pair_prompt),
        "reads": limit(found, pair=True),
        "score": LOGIT,
        **notes(found.notes),
    }


def causal(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A causal reranker, by title."""
    found = read_causal(source.folder).overridden(asked)
    return {
        "kind": CAUSAL,
        "transformer": transformer(source.folder),
        "prompt": "its own chat template" if found.template is None else f"that of {found.template.family}",
        "instruction": _prompt(found.instruction),
        "reads": limit(found.scorer, pair=True)
        if found.template is None
        else f"at most {found.template.room(0, 0)} tokens of query and document, as its authors have it",
        "score": f"{LOGIT}: of yes less that of no behind the prompt",
        **notes(found.scorer.notes),
    }


def one_way(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A one-way cross-encoder, by title."""
    info = REGISTRY.get(source.name)
    known = "" if info is None else f", {info.source.removeprefix('adapter:')}, {info.token_limit} tokens of a text"
    return {
        "kind": "one-way cross-encoder",
        "reads": f"vectors of documents that its bi-encoder has made{known}",
        "score": LOGIT,
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


def _pooled(found: Checkpoint, pooling: str) -> dict[str, str]:
    modules = [pooling if found.prompt_pooled else f"{pooling} without the prompt"]
    modules += [kind if kind != "Dense" else f"Dense to {read_json(place / 'config.json').get('out_features')} dimensions" for kind, place in found.after]
    kept = "" if found.truncate_dim is None else f"; the first {found.truncate_dim} components are kept"
    return {
        "pooling": ", then ".join(modules) + kept,
        "query prompt": _prompt(found.query_prompt),
        "document prompt": _prompt(found.document_prompt),
        "score": "cosine, -1 to 1" if found.similarity == "cosine" else "dot product, without bounds",
    }


def notes(given: Sequence[str]) -> dict[str, str]:
    """What is left out or assumed, and why, under one title; empty without any."""
    return {"notes": "; ".join(given)} if given else {}


def _prompt(text: str) -> str:
    return repr(text) if text else "none"
