"""The kinds of models, and loading a model by its name. To add a kind, write a file here, a line in ENCODERS or SCORERS, and a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from rerank_kernels import exactly
from rerank_lab.files import expanded
from rerank_lab.models import bi_encoder, causal, cross_encoder, cross_modules, describe, late_interaction, one_way, sparse, static
from rerank_lab.models.base import AS_IT_IS, Detail, Encoder, Origin, Overrides, Scorer
from rerank_lab.models.families import BI, CROSS, LATE, MASKED, OPTIONS, SPARSE, STATIC, family
from rerank_lab.models.one_way import ADAPTERS, backbone_of
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL, REGISTRY, ModelInfo, Placement, Source, locate, pick_device

__all__ = [
    "ADAPTERS", "DEFAULT_CROSS", "DEFAULT_MODEL", "ENCODERS", "REGISTRY", "SCORERS", "EncoderKind", "ModelInfo", "Overrides", "Placement", "ScorerKind", "Source", "backbone_of", "described",
    "load_bi_encoder", "load_cross_encoder", "load_sparse_encoder", "locate", "needs_of", "origin", "pick_device", "pools",
]  # fmt: skip


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder.

    Attributes:
        takes: whether a model is of this kind, by its name, or by its folder, which is fetched if it is asked for.
        load: source, placement, and the file of a token projection or None → the model.
        origin: source, what is asked of it, and the file of a token projection or None → what decides the model's token vectors. No weight is
            loaded.
        pools: whether its models make a vector of a whole text. Known before anything is loaded.
        describe: source and what is asked of it → what `--list MODEL` says, by title. No weight is loaded.
    """

    takes: Callable[[Source], bool]
    load: Callable[[Source, Placement, str | None], Encoder]
    origin: Callable[[Source, Overrides, str | None], Origin]
    pools: bool = True
    describe: Callable[[Source, Overrides], Mapping[str, str]] = lambda source, asked: {}


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer.

    Attributes:
        takes: as for EncoderKind.
        load: source, placement, and the loaded encoders by name → the model. It uses a loaded encoder if it needs that one.
        needs: name → the name of the encoder whose vectors it will need, and their detail; None: its models need none. Known
            before anything is loaded.
        describe: as for EncoderKind.
    """

    takes: Callable[[Source], bool]
    load: Callable[[Source, Placement, Mapping[str, Encoder]], Scorer]
    needs: Callable[[str], tuple[str, Detail] | None] | None = None
    describe: Callable[[Source, Overrides], Mapping[str, str]] = lambda source, asked: {}


# The last kind that takes a model loads it. The first kind takes every model.
ENCODERS = {
    "bi-encoder": EncoderKind(lambda source: True, bi_encoder.load, bi_encoder.origin, describe=describe.bi_encoder),
    "static": EncoderKind(lambda source: family(source.folder)[0] == STATIC, static.load, static.origin, describe=describe.static),
    "late-interaction": EncoderKind(
        lambda source: family(source.folder)[0] == LATE, late_interaction.load, describe.late_origin, False, describe.late_interaction
    ),
}
SCORERS = {
    "cross-encoder": ScorerKind(lambda source: True, cross_encoder.load, describe=describe.cross_encoder),
    "cross-encoder of modules": ScorerKind(cross_modules.takes, cross_modules.load, describe=describe.cross_modules),
    "causal reranker": ScorerKind(causal.takes, causal.load, describe=describe.causal),
    # It goes by names alone, and stands last, so that its names are not looked for on the hub.
    "one-way": ScorerKind(
        lambda source: backbone_of(source.name) is not None, one_way.load, lambda name: (backbone_of(name) or "", Detail.STATES), describe.one_way
    ),
}


AnyKind = TypeVar("AnyKind", EncoderKind, ScorerKind)


@exactly(tensors=True)
def load_bi_encoder(
    name: str | Path,
    *,
    subspace: str | Path | None = None,
    device: str | torch.device = "auto",
    runtime: str = "auto",
    precision: str = "fp32",
    overrides: Overrides = AS_IT_IS,
) -> Encoder:
    """Loads an encoder by registry id, checkpoint folder or hub name.

    Args:
        name: e.g. "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-small-en-v1.5".
        subspace: a safetensors file with the projection V, as experiments/training/fit_subspace.py writes it; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime: "auto", "torch", "compile", "onnx", "openvino".
        precision: "fp32", "bf16", "int8".
        overrides: prompts and dimensions other than the folder's.

    Raises:
        UserError: the model is not found, has another role, or cannot do what `overrides` asks.
    """
    source = Source(expanded(str(name)), BI)
    return _kind(ENCODERS, source).load(source, Placement(device, runtime, precision, overrides), None if subspace is None else expanded(str(subspace)))


@exactly(tensors=True)
def load_cross_encoder(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    runtime: str = "auto",
    precision: str = "fp32",
    encoder: Encoder | Mapping[str, Encoder] | None = None,
    overrides: Overrides = AS_IT_IS,
) -> Scorer:
    """Loads a cross-encoder by registry id, checkpoint folder, hub name, or the file of a one-way adapter on the default model.

    Args:
        name, device, runtime, precision: as for load_bi_encoder.
        encoder: a loaded bi-encoder, or several by name. A one-way adapter that belongs to one of them uses it.
        overrides: an instruction other than the folder's.

    Raises:
        UserError: as for load_bi_encoder.
    """
    source = Source(expanded(str(name)), CROSS)
    loaded = encoder if isinstance(encoder, Mapping) else {} if encoder is None else {encoder.name: encoder}
    return _kind(SCORERS, source).load(source, Placement(device, runtime, precision, overrides), loaded)


@exactly(tensors=True)
def load_sparse_encoder(name: str | Path, *, device: str = "auto") -> sparse.SparseModel:
    """Loads a sparse encoder by checkpoint folder or hub name, for a first stage.

    Raises:
        UserError: the model is not found, or is of another family.
    """
    return sparse.load(Source(expanded(str(name)), SPARSE), device)


def needs_of(name: str) -> tuple[str, Detail] | None:
    """What a cross-encoder of this name will need: the name of an encoder, and the detail of its vectors; None: nothing. Loads no model."""
    source = Source(expanded(name), CROSS)
    return next((kind.needs(source.name) for kind in reversed(SCORERS.values()) if kind.needs is not None and kind.takes(source)), None)


def pools(name: str) -> bool:
    """Whether an encoder of this name makes a vector of a whole text. Its folder is fetched, but no weight is loaded.

    Raises:
        UserError: the model is not found.
    """
    return _kind(ENCODERS, Source(expanded(name), BI)).pools


def described(name: str, asked: Overrides = AS_IT_IS) -> Mapping[str, str]:
    """How a model would be read, by title. Its folder is fetched, but no weight is loaded.

    Args:
        name: as for load_bi_encoder and load_cross_encoder.
        asked: of the model in place of what its folder says.

    Raises:
        UserError: the model is not found, or would be refused.
    """
    source, option = _recognised(name)
    if option == OPTIONS[SPARSE]:
        return {"model": name, "give it as": option, **describe.sparse(source, asked)}
    kind = _kind(SCORERS, source) if option == OPTIONS[CROSS] else _kind(ENCODERS, source)
    return {"model": name, "give it as": option, **kind.describe(source, asked)}


def origin(name: str, asked: Overrides = AS_IT_IS, subspace: str | None = None) -> Origin | None:
    """What decides the token vectors of the encoder of this name; None: it is no encoder. Its weights are hashed, not loaded.

    Args:
        name, asked: as for `described`.
        subspace: as for load_bi_encoder.

    Raises:
        UserError: as `described`, or the file holds no projection.
    """
    source, option = _recognised(name)
    return _kind(ENCODERS, source).origin(source, asked, subspace) if option == OPTIONS[BI] else None


def _recognised(name: str) -> tuple[Source, str]:
    """A model of any family, and the option that takes it."""
    source = Source(expanded(name), REGISTRY[name].role if name in REGISTRY else BI)
    by_name = any(kind.needs is not None and kind.takes(source) for kind in SCORERS.values())
    found = CROSS if by_name else family(source.folder)[0]
    # A bare masked language model may be a sparse encoder. The reader of bi-encoders refuses any other without a pooling.
    sparse_too = found == BI and not source.folder.types and source.folder.architecture.endswith(MASKED[0])
    return source, OPTIONS[SPARSE if sparse_too else found]


def _kind(registry: Mapping[str, AnyKind], source: Source) -> AnyKind:
    every: list[AnyKind] = list(registry.values())
    return next(kind for kind in reversed(every) if kind.takes(source))
