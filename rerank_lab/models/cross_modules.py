"""A cross-encoder made of modules of sentence-transformers: a transformer reads the pair, a pooling makes a vector of it, and the last Dense a logit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from rerank_lab.errors import UserError
from rerank_lab.models.base import AS_IT_IS, Encoder, Overrides, WorkItem
from rerank_lab.models.checkpoint import ACTIVATIONS, POOLINGS, Checkpoint, read_module, read_scorer
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.families import BI, CROSS, family
from rerank_lab.models.folder import Folder, last_part
from rerank_lab.models.forward import TokenBatch, encoder_flops, load_checkpoint
from rerank_lab.models.packed import Packed
from rerank_lab.models.registry import Placement, Source, pick_device

AFTER = ("Dense", "LayerNorm", "Normalize")
KNOWN = re.compile(r"sentence_transformers\.(?:[a-z_]+\.)+(?:Transformer|Pooling|Dense|LayerNorm|Normalize)")


class ModularCrossEncoder(CrossEncoder):
    """Scores pairs of texts. Logits equal those of sentence_transformers.CrossEncoder.

    Args:
        folder, name, device, runtime, precision, overrides: as for CrossEncoder. What comes behind the transformer stays fp32.

    Raises:
        UserError: as CrossEncoder; or a module is not known, or the last one makes no single score.
    """

    headed = False

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
        super().__init__(folder, name, device=device, runtime=runtime, precision=precision, overrides=overrides)
        found = Folder(folder, name)
        self.after = nn.Sequential(*(_module(found, kind, place) for kind, place in self.checkpoint.after)).to(self.device).eval()

    def read(self, folder: Folder) -> Checkpoint:
        """As CrossEncoder.read."""
        return read_modules(folder)

    def open(self, found: Checkpoint) -> tuple[Any, Any]:
        """As CrossEncoder.open."""
        from transformers import AutoModel

        return load_checkpoint(AutoModel, found.root, found.name, spare="pooler")

    def _run(self, texts: TokenBatch) -> Tensor:
        pooling = self.checkpoint.pooling
        if pooling == "cls" and isinstance(self.network, Packed):
            vectors = self.network(*texts, first=True).last
        else:
            vectors = pooled(self.network(*texts).last, texts.lengths, pooling)
        logits: Tensor = self.after(vectors.float())
        return logits

    def flops(self, work: Sequence[WorkItem]) -> int:
        """As CrossEncoder.flops."""
        lengths = torch.tensor([pair.size for pair in work], dtype=torch.int64, device="cpu")
        return encoder_flops(self.config, lengths, first=self.checkpoint.pooling == "cls" and isinstance(self.network, Packed))


def pooled(states: Tensor, lengths: list[int], pooling: str) -> Tensor:
    """One vector for each of B texts with T tokens together: B × d.

    Args:
        states: T × d, one text after another.
        lengths: of each text, at least 1.
        pooling: one of POOLINGS.
    """
    parts = torch.split(states, lengths)
    match pooling:
        case "cls":
            return torch.stack([part[0] for part in parts])
        case "lasttoken":
            return torch.stack([part[-1] for part in parts])
        case "max":
            return torch.stack([part.amax(0) for part in parts])
        case _:
            return torch.stack([part.mean(0) for part in parts])


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
    modes = [*pooling["pooling_mode"]] if isinstance(pooling.get("pooling_mode"), list) else [pooling["pooling_mode"]] if "pooling_mode" in pooling else []
    modes = modes or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key, on in pooling.items() if on is True and "mode_" in key
    ]
    if len(modes) > 1 or not {*modes} <= {*POOLINGS}:
        raise UserError(f"model {name!r} pools by {', '.join(map(str, modes))}; known are {', '.join(POOLINGS)}, one at a time")
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
            _activation(config.get("activation_function"), name)
    return replace(found, pooling=str(modes[0]) if modes else "mean", after=after)


def _activation(given: object, name: str) -> nn.Module:
    short = "Tanh" if given is None else last_part(str(given))
    if short not in ACTIVATIONS or not str(given or "torch.nn.").startswith("torch.nn."):
        raise UserError(f"model {name!r}: activation {given} of its Dense module is not known; known are {', '.join(ACTIVATIONS)} of torch.nn")
    found: nn.Module = getattr(nn, short)()
    return found


class _Normalize(nn.Module):
    """Scales vectors to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1)


def _module(folder: Folder, kind: str, place: Path) -> nn.Module:
    """A module behind the pooling, with its weights, fp32."""
    if kind == "Normalize":
        return _Normalize()
    config: Any = folder.module_config(str(place.relative_to(folder.path)))
    try:
        if kind == "Dense":
            inner: nn.Module = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True), device="cpu", dtype=torch.float32)
        else:
            inner = nn.LayerNorm(config["dimension"], device="cpu", dtype=torch.float32)
        weights = place / "model.safetensors"
        state = load_file(weights) if weights.is_file() else torch.load(place / "pytorch_model.bin", map_location="cpu", weights_only=True)
        inner.load_state_dict({key.removeprefix("linear.").removeprefix("norm."): value for key, value in state.items()})
    except Exception as error:  # torch, pickle and safetensors raise errors of their own
        raise UserError(f"model {folder.name!r}: {place} is no whole {kind} module: {type(error).__name__}: {' '.join(str(error).split()):.200}") from error
    return nn.Sequential(inner, _activation(config.get("activation_function"), folder.name)) if kind == "Dense" else inner


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
