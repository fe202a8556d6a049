"""The modules of sentence-transformers that follow the pooling: Dense, LayerNorm and Normalize. Dropout does nothing here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from rerank_lab.errors import UserError
from rerank_lab.models.folder import read_json

ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU")


class Normalize(nn.Module):
    """Scales vectors to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        """B × d, each row divided by its length."""
        return normalize(x, dim=-1)


def after_pooling(after: Sequence[tuple[str, Path]], name: str) -> nn.Sequential:
    """The modules that follow a checkpoint's pooling, in their order, on the CPU.

    Args:
        after: kind and folder of each: "Dense", "LayerNorm", "Normalize" or "Dropout".
        name: of the model, for messages.

    Raises:
        UserError: a module's weights do not fit its configuration.
    """
    made: dict[str, Callable[[Path, str], nn.Module]] = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": lambda place, name: Normalize()}
    return nn.Sequential(*(made[kind](place, name) for kind, place in after if kind != "Dropout")).eval()


def width_after(after: nn.Sequential, width: int) -> int:
    """Columns of a vector after these modules; before, it has `width`."""
    linear = [module.out_features for module in after.modules() if isinstance(module, nn.Linear)]
    return int(linear[-1] if linear else width)


def dense_activation(config: Mapping[str, Any], folder: Path, name: str) -> str:
    """The activation of a Dense module, one of ACTIVATIONS.

    Args:
        config: the module's config.json.
        folder: of the module, for messages.
        name: of the model, for messages.

    Raises:
        UserError: the activation is unknown, or the module does more than map the pooled vector linearly.
    """
    places = {config.get("module_input_name") or "sentence_embedding", config.get("module_output_name") or "sentence_embedding"}
    if config.get("use_residual") or places != {"sentence_embedding"}:
        raise UserError(f"model {name!r}: {folder} is a Dense module with a residual, on token vectors or for another output, which is not known here")
    given = config.get("activation_function") or "torch.nn.modules.activation.Tanh"
    if (activation := activation_name(given)) not in ACTIVATIONS:
        raise UserError(f"model {name!r}: activation {activation} ({given}) of its Dense module is not known; known are {', '.join(ACTIVATIONS)} of torch.nn")
    return activation


def activation_name(dotted: object) -> str:
    """The short name of a class of torch.nn, given its dotted name; anything else as it is."""
    found = re.fullmatch(r"torch\.nn\.(?:modules\.\w+\.)?(\w+)", str(dotted))
    return found[1] if found else str(dotted)


def _dense(place: Path, name: str) -> nn.Module:
    config = read_json(place / "config.json")
    activation = dense_activation(config, place, name)
    try:
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True), device="cpu", dtype=torch.float32)
        _fill(linear, place, "linear.")
    except Exception as error:  # torch, pickle and safetensors raise errors of their own
        raise _broken(place, name, "Dense", error) from error
    return nn.Sequential(linear, getattr(nn, activation)())


def _layer_norm(place: Path, name: str) -> nn.Module:
    try:
        norm = nn.LayerNorm(read_json(place / "config.json")["dimension"], device="cpu", dtype=torch.float32)
        _fill(norm, place, "norm.")
    except Exception as error:
        raise _broken(place, name, "LayerNorm", error) from error
    return norm


def _fill(module: nn.Module, place: Path, prefix: str) -> None:
    weights = place / "model.safetensors"
    state = load_file(weights) if weights.is_file() else torch.load(place / "pytorch_model.bin", map_location="cpu", weights_only=True)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})


def _broken(place: Path, name: str, kind: str, error: Exception) -> UserError:
    return UserError(f"model {name!r}: {place} is no whole {kind} module: {type(error).__name__}: {' '.join(str(error).split()):.200}")
