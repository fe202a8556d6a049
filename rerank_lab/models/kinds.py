"""The kinds of models, and a name → a loaded model in a role. A new kind is a file here, a line in ENCODERS or SCORERS, and a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rerank_kernels import exactly
from rerank_lab.files import expanded
from rerank_lab.models import bi_encoder, cross_encoder, one_way
from rerank_lab.models.base import Encoder, Scorer
from rerank_lab.models.one_way import ADAPTERS, backbone_of
from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL, FETCHED, REGISTRY, ModelInfo, Place, locate, pick_device

__all__ = [
    "ADAPTERS", "DEFAULT_CROSS", "DEFAULT_MODEL", "ENCODERS", "FETCHED", "REGISTRY", "SCORERS", "EncoderKind", "ModelInfo", "Place", "ScorerKind", "backbone_of",
    "load_bi_encoder", "load_cross_encoder", "locate", "pick_device",
]  # fmt: skip


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder.

    Attributes:
        takes: whether a name (an id, a folder, a file, a hub name) is of this kind.
        load: name, place and the file of a token projection → the model.
    """

    takes: Callable[[str], bool]
    load: Callable[[str, Place, str | None], Encoder]


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer.

    Attributes:
        takes: whether a name (an id, a folder, a file, a hub name) is of this kind.
        load: name, place and the encoders that are loaded already, by name → the model, which shares those that it needs.
    """

    takes: Callable[[str], bool]
    load: Callable[[str, Place, Mapping[str, Encoder]], Scorer]


# The last kind that takes a name loads it; the first takes all that is left.
ENCODERS = {"bi-encoder": EncoderKind(lambda name: True, bi_encoder.load)}
SCORERS = {
    "cross-encoder": ScorerKind(lambda name: True, cross_encoder.load),
    "one-way": ScorerKind(lambda name: backbone_of(name) is not None, one_way.load),
}


@exactly(tensors=True)
def load_bi_encoder(
    name: str | Path, *, subspace: str | Path | None = None, device: str | torch.device = "auto", runtime: str = "auto", precision: str = "fp32"
) -> Encoder:
    """A bi-encoder by registry id, checkpoint folder or hub name.

    Args:
        name: e.g. "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-small-en-v1.5".
        subspace: a safetensors file with V, as experiments/training/fit_subspace.py writes it; None: the shipped one, or none.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        runtime, precision: "auto", "torch", "compile", "onnx", "openvino"; "fp32", "bf16", "int8".

    Raises:
        UserError: not to be found, or of another role.
    """
    name = expanded(str(name))
    kind = next(kind for kind in reversed(ENCODERS.values()) if kind.takes(name))
    return kind.load(name, Place(device, runtime, precision), None if subspace is None else expanded(str(subspace)))


@exactly(tensors=True)
def load_cross_encoder(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    runtime: str = "auto",
    precision: str = "fp32",
    encoder: Encoder | Mapping[str, Encoder] | None = None,
) -> Scorer:
    """A cross-encoder by registry id, checkpoint folder, hub name, or the file of a one-way adapter on the default model.

    Args:
        name, device, runtime, precision: as for load_bi_encoder.
        encoder: a loaded bi-encoder, or several by name, shared by a one-way adapter that belongs to one of them.

    Raises:
        UserError: as for load_bi_encoder.
    """
    name = expanded(str(name))
    loaded = encoder if isinstance(encoder, Mapping) else {} if encoder is None else {encoder.name: encoder}
    kind = next(kind for kind in reversed(SCORERS.values()) if kind.takes(name))
    return kind.load(name, Place(device, runtime, precision), loaded)
