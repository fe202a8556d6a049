"""What a model's folder says, for people: how it would be read, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from rerank_lab.errors import UserError
from rerank_lab.models.base import Origin, Overrides
from rerank_lab.models.causal_checkpoint import read_causal
from rerank_lab.models.chat import ChatTemplate
from rerank_lab.models.checkpoint import Checkpoint, read_checkpoint
from rerank_lab.models.cross_encoder import check_labels, check_padding_token
from rerank_lab.models.cross_modules import read_modules
from rerank_lab.models.families import BI, CAUSAL, CROSS, LATE, SPARSE, STATIC, weights_of
from rerank_lab.models.folder import Folder, read_json
from rerank_lab.models.forward import fast_tokenizer, limit_of, load_checkpoint
from rerank_lab.models.late_checkpoint import LateCheckpoint, read_late
from rerank_lab.models.late_interaction import Side, origin_of, read_sides
from rerank_lab.models.registry import DEFAULT_MODEL, REGISTRY, Source, locate
from rerank_lab.models.sparse import read_sparse
from rerank_lab.models.static import read_static, read_tokenizer
from rerank_lab.models.templates import TemplatePrompt
from rerank_lab.models.transformer_encoder import fingerprint

LOGIT = "sigmoid of the logit, 0 to 1"
PROMPTED = "{limit} tokens of query and document together, those of the prompt around them not counted"


def bi_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A bi-encoder, by title."""
    found = read_checkpoint(source.folder, BI).overridden(asked)
    model, tokenizer = shape("AutoModel", found)
    return {
        "kind": BI,
        "transformer": transformer(source.folder, model),
        **_pooled(found, found.pooling),
        "reads": limit(found, model, tokenizer),
        **notes(found.notes),
    }


def late_interaction(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A late-interaction model, by title."""
    found, model, sides = _late(source, asked)
    query, document = sides["query"], sides["document"]
    attend = "" if found.expansion is None else f", which {'are' if found.expansion.attend else 'are not'} attended to"
    expanded = f"; queries are expanded to {query.filled} tokens, special ones counted, by mask tokens{attend}" if query.filled else ""
    skipped = " and ".join(f"{len(side.skipped)} tokens in a {kind}" for kind, side in sides.items() if len(side.skipped))
    return {
        "kind": f"{LATE} (ColBERT), in the layout of {found.layout}",
        "transformer": transformer(source.folder, model),
        "query prompt": _prompt(query.prompt),
        "document prompt": _prompt(document.prompt),
        "reads": f"{query.limit} tokens of a query and {document.limit} of a document, special ones and markers not counted{expanded}",
        "no vector for": f"its skiplist: {skipped}" if skipped else "nothing",
        "score": "maxsim: the sum of each query token's best match",
        **notes(found.notes),
    }


def late_origin(source: Source, asked: Overrides, subspace: str | None = None) -> Origin:
    """Encoder.origin of a late-interaction model. Its weights are hashed, not loaded. It takes no subspace."""
    found, _, sides = _late(source, asked)
    return origin_of(found, fingerprint(found.root, weights_of(found.root)), sides)


def _late(source: Source, asked: Overrides) -> tuple[LateCheckpoint, Any, dict[str, Side]]:
    """A late-interaction model's checkpoint, its transformer without weights, and how it reads queries and documents."""
    found = read_late(source.folder)
    found.check(asked)
    model, tokenizer = shape("AutoModel", found)
    return found, model, read_sides(found, model, tokenizer, fast_tokenizer(tokenizer, lower=found.lower), asked)[1]


def sparse(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A sparse encoder, by title."""
    found = read_sparse(source.folder)
    if odd := [one.name for one in fields(asked) if getattr(asked, one.name) is not None]:
        raise UserError(f"model {found.name!r} takes no {odd[0]}: it is a {SPARSE}, which is read as its folder says")
    model, tokenizer = shape("AutoModelForMaskedLM", found)
    return {
        "kind": SPARSE,
        "transformer": transformer(source.folder, model),
        "pooling": f"{found.pooling} over a text's tokens of the weights of words",
        "query prompt": _prompt(found.query_prompt),
        "document prompt": _prompt(found.document_prompt),
        "reads": limit(found, model, tokenizer),
        "score": "dot product of weighted words",
        **notes(found.notes),
    }


def static(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A static embedding model, by title."""
    found = read_static(source.folder).overridden(asked)
    cut = read_tokenizer(found).truncation or {}
    reads = f"{cut['max_length']} tokens of a text" if "max_length" in cut else "all tokens of a text"
    return {"kind": STATIC, **_pooled(found, "mean of the rows of its tokens"), "reads": reads, **notes(found.notes)}


def cross_encoder(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A cross-encoder, by title."""
    found = read_checkpoint(source.folder, CROSS).overridden(asked)
    model, tokenizer = shape("AutoModelForSequenceClassification", found)
    check_labels(found, model)
    return {"kind": CROSS, "transformer": transformer(source.folder, model), **_pair(found, model, tokenizer, asked), "score": LOGIT, **notes(found.notes)}


def cross_modules(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A cross-encoder made of modules, by title."""
    found = read_modules(source.folder).overridden(asked)
    model, tokenizer = shape("AutoModel", found)
    return {
        "kind": f"{CROSS} made of modules",
        "transformer": transformer(source.folder, model),
        "pooling": ", then ".join([found.pooling, *(kind for kind, _ in found.after)]),
        **_pair(found, model, tokenizer, asked),
        "score": LOGIT,
        **notes(found.notes),
    }


def causal(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A causal reranker, by title."""
    found = read_causal(source.folder).overridden(asked)
    model, tokenizer = shape("AutoModelForCausalLM", found.scorer)
    fast, positions = fast_tokenizer(tokenizer, lower=found.scorer.lower), limit_of(found.scorer, model, tokenizer, 0)
    if found.template is None:
        read = _chat(found.scorer, tokenizer, fast, found.instruction, positions, asked)
    else:
        prompt = TemplatePrompt(found.template, tokenizer, fast, found.instruction, positions, source.name)
        read = {"prompt": f"that of {found.template.family}", "instruction": _prompt(found.instruction), "reads": PROMPTED.format(limit=prompt.limit)}
    _, no = found.answers(fast)
    score = f"{LOGIT}: of yes{'' if no is None else ' less that of no'} behind the prompt"
    return {"kind": CAUSAL, "transformer": transformer(source.folder, model), **read, "score": score, **notes(found.scorer.notes)}


def one_way(source: Source, asked: Overrides) -> Mapping[str, str]:
    """A one-way cross-encoder, by title."""
    info = REGISTRY.get(source.name)
    if asked.instruction is not None:
        raise UserError(f"model {source.name!r} takes no instruction")
    if info is None:
        _check_adapter(source.name)
    known = "" if info is None else f", {info.source.removeprefix('adapter:')}, {info.token_limit} tokens of a text"
    return {
        "kind": "one-way cross-encoder",
        "reads": f"vectors of documents that its bi-encoder has made{known}",
        "score": LOGIT,
    }


def _check_adapter(name: str) -> None:
    """Refuses a one-way adapter's file that is missing, is no safetensors file, or names no bi-encoder."""
    if not Path(name).is_file():
        raise UserError(f"model {name!r}: no file {name}")
    try:
        with safe_open(name, framework="pt") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {name!r}: {name} is no safetensors file: {str(error).partition(chr(10))[0]}") from error
    root = locate(DEFAULT_MODEL, BI)
    if about.get("backbone") != fingerprint(root, weights_of(root)):
        raise UserError(f"model {name!r}: {name} was trained on other weights than those of {DEFAULT_MODEL!r}; a checkpoint is named by its folder")


class Weightless:
    """Stands in for an Auto class of transformers where forward.load_checkpoint takes one: it makes a model without memory, and reads no weights.

    Args:
        kind: the name of the Auto class.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def from_pretrained(self, folder: Path, **options: object) -> tuple[Any, dict[str, tuple[str, ...]]]:
        """A model of the folder's shape on the device "meta", and that all its weights fit."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = getattr(transformers, self.kind).from_config(config, trust_remote_code=False)
        return model, {"mismatched_keys": (), "missing_keys": (), "unexpected_keys": ()}


def shape(kind: str, found: Checkpoint | LateCheckpoint) -> tuple[Any, Any]:
    """A checkpoint's transformer without its weights, and its tokenizer.

    Args:
        kind: the name of the Auto class of transformers that loads it.
        found: the checkpoint.

    Raises:
        UserError: config.json or the tokenizer is one with which the model does not load.
    """
    return load_checkpoint(Weightless(kind), found.root, found.name)


def transformer(folder: Folder, model: Any) -> str:
    """Architecture, layers and width of a folder's transformer."""
    config = model.config
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    return f"{folder.architecture or type(config).__name__.removesuffix('Config')}, {layers} layers of {width} dimensions"


def limit(found: Checkpoint, model: Any, tokenizer: Any) -> str:
    """How many tokens of a text a model reads."""
    specials = int(tokenizer.num_special_tokens_to_add(False))
    return f"{limit_of(found, model, tokenizer, specials) - specials} tokens of a text, {specials} special ones not counted"


def _pair(found: Checkpoint, model: Any, tokenizer: Any, asked: Overrides) -> dict[str, str]:
    """How a classifier reads a pair, with the refusals of CrossEncoder."""
    specials = 0 if found.chat else int(tokenizer.num_special_tokens_to_add(True))
    longest = limit_of(found, model, tokenizer, specials)
    check_padding_token(found, model)
    if found.chat is not None:
        return _chat(found, tokenizer, fast_tokenizer(tokenizer, lower=found.lower), found.pair_prompt, longest, asked)
    return {"prompt": _prompt(found.pair_prompt), "reads": f"{longest} tokens of a pair, {specials} special ones counted"}


def _chat(found: Checkpoint, tokenizer: Any, fast: Tokenizer, instruction: str, longest: int, asked: Overrides) -> dict[str, str]:
    """How a scorer reads a pair through its chat template, with the refusals of CrossEncoder and CausalReranker."""
    assert found.chat is not None
    template = ChatTemplate(found.chat, tokenizer, fast, instruction, longest, found.name)
    template.check(asked)
    told = _prompt(instruction) if template.has_place_for_instruction() else "none: its chat template has no place for one"
    return {"prompt": "its own chat template", "instruction": told, "reads": PROMPTED.format(limit=template.limit)}


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
