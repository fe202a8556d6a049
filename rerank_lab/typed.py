"""Dataclasses as JSON, and JSON as dataclasses: what is missing or of another kind is named."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Option = str | int | float | bool | None | list[Any] | Mapping[str, Any]  # any value, as JSON has it


class Misfit(ValueError):
    """What a file lacks, or has of another kind: the place and the fault."""


def named(name: str, **options: Any) -> Any:
    """A field that stands in the file under a name which Python does not allow, or which another word says better."""
    return field(metadata={"name": name}, **options)


def encode(value: Any) -> Any:
    """A dataclass as JSON has it, under the names of the file."""
    if is_dataclass(value):
        return {f.metadata.get("name", f.name): encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(inner) for key, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def decode(kind: type[T], value: Any, place: str = "") -> T:
    """JSON as a dataclass.

    Args:
        kind: a dataclass whose fields are dataclasses, lists, dict[str, …], numbers, strings, booleans, or one of these or None.
        value: the JSON; keys that no field has are left out.
        place: where it stands, for messages.

    Raises:
        Misfit: a field without a default is missing, or something is of another kind.
    """
    found: T = _decoded(kind, value, place)
    return found


def _decoded(kind: Any, value: Any, place: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if kind == Option or (value is None and type(None) in inner):
            return value
        kind = next(one for one in inner if one is not type(None))
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict):
            raise Misfit(f"{place or 'it'}{'.' if place and not place.endswith('.') else ''} is no object")
        place = f"{place.removesuffix('.')}." if place else ""
        if origin is dict:
            return {key: _decoded(inner[1], own, f"{place}{key}") for key, own in value.items()}
        hints, given = typing.get_type_hints(kind), {}
        for f in fields(kind):
            name = f.metadata.get("name", f.name)
            if name in value:
                given[f.name] = _decoded(hints[f.name], value[name], f"{place}{name}")
            elif f.default is MISSING and f.default_factory is MISSING:
                raise Misfit(f"{place}{name} is missing")
        return kind(**given)
    if origin is list:
        if not isinstance(value, list):
            raise Misfit(f"{place} is no list")
        return [_decoded(inner[0], one, f"{place}[{n}].") for n, one in enumerate(value)]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise Misfit(f"{place.removesuffix('.')} is {json.dumps(value)[:40]}")
    return value
