"""The modules of sentence-transformers that follow the pooling: Dense, LayerNorm and Normalize. Dropout does nothing here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from rerank_lab.errors import UserError
from rerank_lab.models.folder import read_json

SENTENCE, TOKENS = "sentence_embedding", "token_embeddings"  # what a module maps: pooled vectors or token vectors
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU")


class Normalize(nn.Module):
    """Scales vectors to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        """B × d, each row divided by its length."""
        return normalize(x, dim=-1)


def after_pooling(after: Sequence[tuple[str, Path]], name: str, of: str | None = SENTENCE) -> nn.Sequential:
    """The modules that follow a checkpoint's pooling, in their order, on the CPU.

    Args:
        after: kind and folder of each: "Dense", "LayerNorm", "Normalize" or "Dropout".
        name: of the model, for messages.
        of: what Dense modules map, as dense_activation takes it.

    Raises:
        UserError: a module's weights do not fit its configuration.
    """
    made: dict[str, Callable[[Path, str], nn.Module]] = {
        "Dense": partial(read_dense, of=of),
        "LayerNorm": _layer_norm,
        "Normalize": lambda place, name: Normalize(),
    }
    return nn.Sequential(*(made[kind](place, name) for kind, place in after if kind != "Dropout")).eval()


def width_after(after: nn.Sequential, width: int) -> int:
    """Columns of a vector after these modules; before, it has `width`."""
    linear = [module.out_features for module in after.modules() if isinstance(module, nn.Linear)]
    return int(linear[-1] if linear else width)


def check_width(name: str, asked: int | None, width: int) -> None:
    """Refuses to keep more components than there are.

    Args:
        name: of the model, for messages.
        asked: components that a person asks for; None: nothing.
        width: components of the model's vectors.
    """
    if asked is not None and asked > width:
        raise UserError(f"model {name!r}: truncate_dim {asked} keeps more components than its vectors have, {width}")


def dense_activation(config: Mapping[str, Any], folder: Path, name: str, of: str | None = SENTENCE) -> str:
    """The activation of a Dense module, one of ACTIVATIONS.

    Args:
        config: the module's config.json.
        folder: of the module, for messages.
        name: of the model, for messages.
        of: what the module must map: SENTENCE, without a residual, or TOKENS; None: that is known already.

    Raises:
        UserError: the activation is unknown, or the module maps something else.
    """
    source = config.get("module_input_name") or of
    places = {str(source), str(config.get("module_output_name") or (source if of == TOKENS else of))}
    if of == SENTENCE and (config.get("use_residual") or places != {of}):
        raise UserError(f"model {name!r}: {folder} is a Dense module with a residual, on token vectors or for another output, which is not known here")
    if of == TOKENS and places != {of}:
        raise UserError(f"model {name!r}: {folder} is a Dense module of {', '.join(sorted(places - {of}))} between token vectors, which is not computed here")
    given = config.get("activation_function") or "torch.nn.modules.activation.Tanh"
    if (activation := activation_name(given)) not in ACTIVATIONS:
        raise UserError(f"model {name!r}: activation {activation} ({given}) of its Dense module is not known; known are {', '.join(ACTIVATIONS)} of torch.nn")
    return activation


def activation_name(dotted: object) -> str:
    """The short name of a class of torch.nn, given its dotted name; anything else as it is."""
    found = re.fullmatch(r"torch\.nn\.(?:modules\.\w+\.)?(\w+)", str(dotted))
    return found[1] if found else str(dotted)


class Dense(nn.Module):
    """activation(W x + b), plus the residual x or R x in some late-interaction models.

    Args:
        ins, outs: components of x and of the result.
        bias: whether there is a b.
        activation: a class of torch.nn.
        residual: whether the residual is added; it is x if the two sizes are equal.
    """

    def __init__(self, ins: int, outs: int, *, bias: bool, activation: str, residual: bool = False):
        super().__init__()
        self.linear = nn.Linear(ins, outs, bias=bias, device="cpu", dtype=torch.float32)
        self.activation: nn.Module = getattr(nn, activation)()
        self.adds = residual
        if residual and ins != outs:
            self.residual = nn.Linear(ins, outs, bias=False, device="cpu", dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """B × ins → B × outs."""
        made: Tensor = self.activation(self.linear(x))
        return made if not self.adds else made + (self.residual(x) if hasattr(self, "residual") else x)


def read_dense(place: Path, name: str, of: str | None = SENTENCE) -> Dense:
    """Loads a Dense module of sentence-transformers or PyLate.

    Args:
        place: folder of the module.
        name: of the model, for messages.
        of: what it maps, as dense_activation takes it.

    Raises:
        UserError: files are missing or damaged, or the module does something that is not computed here.
    """
    config = read_json(place / "config.json")
    activation = dense_activation(config, place, name, of)
    try:
        residual = bool(config.get("use_residual"))
        dense = Dense(config["in_features"], config["out_features"], bias=config.get("bias", True), activation=activation, residual=residual)
        dense.load_state_dict({key if "." in key else f"linear.{key}": value for key, value in _state(place).items()})
    except Exception as error:  # torch, pickle and safetensors raise errors of their own
        raise _broken(place, name, "Dense", error) from error
    return dense.eval()


def _layer_norm(place: Path, name: str) -> nn.Module:
    try:
        norm = nn.LayerNorm(read_json(place / "config.json")["dimension"], device="cpu", dtype=torch.float32)
        norm.load_state_dict({key.removeprefix("norm."): value for key, value in _state(place).items()})
    except Exception as error:
        raise _broken(place, name, "LayerNorm", error) from error
    return norm


def _state(place: Path) -> dict[str, Tensor]:
    weights = place / "model.safetensors"
    found: dict[str, Tensor] = load_file(weights) if weights.is_file() else torch.load(place / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return found


def _broken(place: Path, name: str, kind: str, error: Exception) -> UserError:
    return UserError(f"model {name!r}: {place} is no whole {kind} module: {type(error).__name__}: {' '.join(str(error).split()):.200}")
