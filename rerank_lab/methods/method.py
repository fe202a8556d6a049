"""What every method is: a class that declares its settings, its needs and its sentence, and whose `score` looks at a pool."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rerank_lab.methods import inputs
from rerank_lab.methods.pool import Pool

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Setting:
    """What a method's class declares of one of its fields.

    Attributes:
        kind: int or float.
        default: where nothing else is given.
        about: what it does, in half a sentence.
        least, most: bounds, both allowed; None: those of `inputs.whole` or `inputs.weight`.
    """

    kind: type[int | float]
    default: float
    about: str = ""
    least: float | None = None
    most: float | None = None

    def read(self, name: str, value: Any) -> float:
        """The value, in this setting's type and within its bounds.

        Raises:
            UserError: it is neither; the message gives it this name.
        """
        bounds: dict[str, float] = {key: bound for key, bound in (("least", self.least), ("most", self.most)) if bound is not None}
        return inputs.whole(name, value, **{key: int(bound) for key, bound in bounds.items()}) if self.kind is int else inputs.weight(name, value, **bounds)


def setting(default: Number, about: str, *, least: Number | None = None, most: Number | None = None) -> Number:
    """A field of a method, as in `tau: float = setting(0.1, "temperature")`; see Setting."""
    return field(default=default, metadata={"about": about, "least": least, "most": most})


@dataclass(frozen=True)
class Method:
    """A way to score the documents of a pool; its fields are its settings, its docstring holds the formula.

    Class attributes that a method declares:
        name: what the user types.
        about: the sentence that the page, --list and the docs show.
        roles: model roles that it cannot do without.
        tokens: whether it reads token vectors.
        optional_cross: whether it uses a cross-encoder where one is given and does without elsewhere. A table then has two rows of it.
        about_cross: the sentence of the second row.
        stage1_share: of an evaluation's candidates, what stage1_top_k is there where it is not given; None: its own default.

    Class attributes that follow:
        uses_cross: whether it uses a cross-encoder where one is given.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("bi-encoder",)
    tokens: ClassVar[bool] = False
    optional_cross: ClassVar[bool] = False
    about_cross: ClassVar[str] = ""
    stage1_share: ClassVar[float | None] = None
    uses_cross: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.uses_cross = cls.optional_cross or "cross-encoder" in cls.roles

    def __post_init__(self) -> None:
        for name, declared in settings_of(type(self)).items():
            object.__setattr__(self, name, declared.read(f"{self.name}: {name}", getattr(self, name)))

    def score(self, pool: Pool) -> Tensor:
        """n scores, fp32, higher is better; DROPPED for what stage 1 left behind."""
        raise NotImplementedError

    def relevance(self, scores: Tensor) -> Tensor:
        """The scores as they are shown: a strictly rising map, 0 to 1 unless the method says otherwise (fp64)."""
        return torch.sigmoid(scores.double())

    def settings(self) -> dict[str, float]:
        """The effective settings by name."""
        return {name: getattr(self, name) for name in settings_of(type(self))}


def settings_of(kind: type[Method]) -> Mapping[str, Setting]:
    """The settings that a method's class declares, by name.

    Raises:
        TypeError: one is neither int nor float, or has no default.
    """
    found = _DECLARED.get(kind)
    if found is None:
        types, found = typing.get_type_hints(kind), {}
        for one in fields(kind):
            if types[one.name] not in (int, float) or not isinstance(one.default, (int, float)):
                raise TypeError(f"{kind.__name__}.{one.name}: a setting is an int or a float with a default")
            found[one.name] = Setting(types[one.name], one.default, **one.metadata)
        _DECLARED[kind] = found
    return found


_DECLARED: dict[type[Method], dict[str, Setting]] = {}  # kept, since it takes longer to look up what a class's types mean than to read a spec
