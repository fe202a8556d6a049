"""The JSON files of a checkpoint folder, read once, before any weight is."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError

ABOUT = "config_sentence_transformers.json"


class Folder:
    """A checkpoint folder. Its JSON files are read when they are first wanted.

    Args:
        path: the folder.
        name: what messages call the model.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    @cached_property
    def modules(self) -> list[tuple[str, str]]:
        """(full dotted type, path) of each module in modules.json; empty without that file.

        Raises:
            UserError: modules.json is no list of modules, or names a place outside the folder.
        """
        return _modules(self.path)

    @cached_property
    def types(self) -> list[str]:
        """The modules' full dotted types."""
        return [kind for kind, _ in self.modules]

    @cached_property
    def about(self) -> dict[str, Any]:
        """config_sentence_transformers.json; empty without that file."""
        return read_json(self.path / ABOUT)

    @cached_property
    def root(self) -> Path:
        """The folder inside that holds the transformer."""
        return self.path / (self.modules[0][1] if self.modules else "")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's config.json; empty without that file.

        Raises:
            UserError: it does not read back.
        """
        try:
            return read_json(self.root / "config.json")
        except UserError as error:
            raise UserError(f"model {self.name!r}: no readable model configuration: {error}") from None

    @property
    def architecture(self) -> str:
        """The first of config.json's architectures; "" without any."""
        found = self.config.get("architectures") or []
        return str(found[0]) if isinstance(found, list) and found else ""

    def module_config(self, path: str) -> dict[str, Any]:
        """config.json of the module at this path."""
        return read_json(self.path / path / "config.json")


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(full dotted type, path) of each module in modules.json; empty without that file."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    value = parse_json(path)
    try:
        modules = [(module["type"], module["path"]) for module in value]
        odd = [module for module in value if module.get("kwargs")]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: must list modules, each with type and path") from None
    inside = all(
        isinstance(kind, str) and isinstance(place, str) and not Path(place).is_absolute() and ".." not in Path(place).parts for kind, place in modules
    )
    if odd or not modules or not inside:
        raise UserError(f"{path}: must list modules, each with a type, a path inside the folder and no kwargs")
    return modules


def last_part(kind: str) -> str:
    """The last part of a dotted name."""
    return kind.rsplit(".", 1)[-1]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no such file.

    Raises:
        UserError: the file cannot be read, or does not hold an object.
    """
    if not path.is_file():
        return {}
    value = parse_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def as_dict(value: object) -> dict[str, Any]:
    """The value if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def parse_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
