"""The kinds of models, and loading a model by its name. To add a kind, write a file here, a line in ENCODERS or SCORERS, and a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rerank_kernels import exactly
from rerank_lab.files import expanded
from rerank_lab.models import bi_encoder, cross_encoder, one_way
from rerank_lab.models.base import Detail, Encoder, Scorer
from rerank_lab.models.one_way import ADAPTERS, backbone_of
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL, FETCHED, REGISTRY, ModelInfo, Placement, locate, pick_device

__all__ = [
    "ADAPTERS", "DEFAULT_CROSS", "DEFAULT_MODEL", "ENCODERS", "FETCHED", "REGISTRY", "SCORERS", "EncoderKind", "ModelInfo", "Placement", "ScorerKind", "backbone_of",
    "load_bi_encoder", "load_cross_encoder", "locate", "needs_of", "pick_device",
]  # fmt: skip


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder.

    Attributes:
        takes: whether a name (an id, a folder, a file, a hub name) is of this kind.
        load: name, placement, and the file of a token projection or None → the model.
    """

    takes: Callable[[str], bool]
    load: Callable[[str, Placement, str | None], Encoder]


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer.

    Attributes:
        takes: whether a name (an id, a folder, a file, a hub name) is of this kind.
        load: name, placement, and the loaded encoders by name → the model. It uses a loaded encoder if it needs that one.
        needs: name → the name of the encoder whose vectors it will need, and their detail; None: none. Known before anything is loaded.
    """

    takes: Callable[[str], bool]
    load: Callable[[str, Placement, Mapping[str, Encoder]], Scorer]
    needs: Callable[[str], tuple[str, Detail] | None] = lambda name: None


# The last kind that takes a name loads it. The first kind takes every name.
ENCODERS = {"bi-encoder": EncoderKind(lambda name: True, bi_encoder.load)}
SCORERS = {
    "cross-encoder": ScorerKind(lambda name: True, cross_encoder.load),
    "one-way": ScorerKind(lambda name: backbone_of(name) is not None, one_way.load, lambda name: (backbone_of(name) or "", Detail.STATES)),
}


@exactly(tensors=True)
def load_bi_encoder(
    name: str | Path, *, subspace: str | Path | None = None, device: str | torch.device = "auto", runtime: str = "auto", precision: str = "fp32"
) -> Encoder:
    """Loads a bi-encoder by registry id, checkpoint folder or hub name.

    Args:
        name: e.g. "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-small-en-v1.5".
        subspace: a safetensors file with the projection V, as experiments/training/fit_subspace.py writes it; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime: "auto", "torch", "compile", "onnx", "openvino".
        precision: "fp32", "bf16", "int8".

    Raises:
        UserError: the model is not found or has another role.
    """
    name = expanded(str(name))
    kind = next(kind for kind in reversed(ENCODERS.values()) if kind.takes(name))
    return kind.load(name, Placement(device, runtime, precision), None if subspace is None else expanded(str(subspace)))


@exactly(tensors=True)
def load_cross_encoder(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    runtime: str = "auto",
    precision: str = "fp32",
    encoder: Encoder | Mapping[str, Encoder] | None = None,
) -> Scorer:
    """Loads a cross-encoder by registry id, checkpoint folder, hub name, or the file of a one-way adapter on the default model.

    Args:
        name, device, runtime, precision: as for load_bi_encoder.
        encoder: a loaded bi-encoder, or several by name. A one-way adapter that belongs to one of them uses it.

    Raises:
        UserError: as for load_bi_encoder.
    """
    name = expanded(str(name))
    loaded = encoder if isinstance(encoder, Mapping) else {} if encoder is None else {encoder.name: encoder}
    return _scorer_kind(name).load(name, Placement(device, runtime, precision), loaded)


def needs_of(name: str) -> tuple[str, Detail] | None:
    """What a cross-encoder of this name will need: the name of an encoder, and the detail of its vectors; None: nothing. Loads no model."""
    name = expanded(name)
    return _scorer_kind(name).needs(name)


def _scorer_kind(name: str) -> ScorerKind:
    return next(kind for kind in reversed(SCORERS.values()) if kind.takes(name))
