"""The base class of methods. A method declares its settings, the models it needs and a description, and scores a pool."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rerank_lab.errors import UserError
from rerank_lab.methods import inputs
from rerank_lab.methods.pool import Pool
from rerank_lab.methods.spread import Spread
from rerank_lab.models.base import Encoder, Scorer

Value = float | str  # of a setting: a number, or one of its words
Number = TypeVar("Number", int, float, Value)


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting of a method.

    Attributes:
        kind: int or float.
        default: its value unless the user gives one.
        about: a short description.
        least, most: inclusive bounds; None: those of `inputs.whole` or `inputs.weight`.
        words: what it takes besides numbers. The method finds the number that a word stands for (Method.in_use).
    """

    kind: type[int | float]
    default: Value
    about: str = ""
    least: float | None = None
    most: float | None = None
    words: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        """What its values are, for messages."""
        return " or ".join([f"{self.kind.__name__} values", *self.words])

    def parse(self, text: str) -> Value:
        """A value as it is written on a command line.

        Raises:
            ValueError: it is neither a number of the setting's type nor one of its words.
        """
        return text.strip() if text.strip() in self.words else self.kind(text)

    def read(self, name: str, value: Any) -> Value:
        """Converts a value to the setting's type and checks its bounds.

        Args:
            name: names the setting in messages.
            value: as the user gave it.

        Raises:
            UserError: the value has another type or is out of bounds.
        """
        if isinstance(value, str) and value in self.words:
            return str(value)
        bounds: dict[str, float] = {key: bound for key, bound in (("least", self.least), ("most", self.most)) if bound is not None}
        try:
            return inputs.whole(name, value, **{key: int(bound) for key, bound in bounds.items()}) if self.kind is int else inputs.weight(name, value, **bounds)
        except UserError as error:
            raise error if not self.words else UserError(f"{error}; beside numbers it takes {' and '.join(self.words)}") from None


def setting(default: Number, about: str, *, least: float | None = None, most: float | None = None, words: tuple[str, ...] = ()) -> Number:
    """Declares a field of a method as a setting: `alpha: float = setting(2.0, "weight")`. Arguments as for Setting.

    A setting with words is a float | str: `tau: float | str = setting("auto", "temperature", words=("auto",))`.
    """
    return field(default=default, metadata={"about": about, "least": least, "most": most, "words": words})


def shown(value: Value) -> str:
    """A setting's value for people."""
    return value if isinstance(value, str) else f"{value:g}"


@dataclass(frozen=True)
class Method:
    """A way to score the documents of a pool. Its fields are its settings; its docstring holds the formula.

    A method declares these class attributes:
        name: what the user types.
        about: the description that the page, --list and the docs show.
        roles: the roles of models that it requires.
        tokens: whether it reads token vectors.
        optional_cross: whether it can use a cross-encoder without requiring one. A table then has two rows of it.
        about_cross: the description of the row with the cross-encoder.
        stage1_share: in an evaluation, the default of stage1_top_k as a share of the candidates; None: the setting's default.

    This one is derived:
        uses_cross: whether it uses a cross-encoder if there is one.
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

    def check_roles(self, model: object, cross: object) -> None:
        """Checks that the models that the method requires are named or loaded; None: there is none.

        Raises:
            UserError: one is missing.
        """
        if "cross-encoder" in self.roles and cross is None:
            raise UserError(f"method {self.name} needs a cross-encoder: name one as model_cross (--model-cross), minilm-cross, a hub name or a folder")
        if "bi-encoder" in self.roles and model is None:
            raise UserError(f"method {self.name} needs a bi-encoder: name one as model (--model)")

    def check_models(self, encoder: Encoder | None, cross: Scorer | None) -> None:
        """Checks that the method can run on these models.

        Raises:
            UserError: one is missing, or the encoder does not make the vectors that the method, as it is set, compares.
        """
        self.check_roles(encoder, cross)
        if encoder is not None and (why := self.refusal(encoder.pools)):
            raise UserError(
                f"{why}, and model {encoder.name!r} has none: it has a vector for each token alone (late interaction), which maxsim and best compare"
            )

    def refusal(self, pools: bool) -> str | None:
        """Why the method, as it is set, cannot run with an encoder that makes vectors of whole texts (pools) or does not; None: it can."""
        return None if pools or "bi-encoder" not in self.roles else self.needs_pooled()

    def needs_pooled(self) -> str | None:
        """Why the method, as it is set, cannot do without a vector of each whole text; None: it can. Stage 1 then keeps the documents' own order."""
        return f"method {self.name} compares vectors of whole texts"

    def needs_spread(self) -> bool:
        """Whether the method, as it is set, needs the spread of the model's token similarities (`Pool.spread`)."""
        return False

    def in_use(self, spread: Spread | None) -> dict[str, float]:
        """Name → number of each setting that is a word now, on a model whose token similarities spread so; empty where that is not known."""
        return {}

    def score(self, pool: Pool) -> Tensor:
        """Scores the pool's n documents.

        Returns:
            n scores, fp32, higher is better; DROPPED for documents that stage 1 dropped.
        """
        raise NotImplementedError

    def relevance(self, scores: Tensor) -> Tensor:
        """The shown scores, fp64: a strictly increasing function of the scores, from 0 to 1 unless the method's docstring says otherwise."""
        return torch.sigmoid(scores.double())

    def settings(self) -> dict[str, Value]:
        """Name → value of all settings, as they were set."""
        return {name: getattr(self, name) for name in settings_of(type(self))}


def settings_of(kind: type[Method]) -> Mapping[str, Setting]:
    """The settings that a method's class declares, by name.

    Raises:
        TypeError: a field is neither int nor float (with words: float | str), or has no default.
    """
    found = _DECLARED.get(kind)
    if found is None:
        types, found = typing.get_type_hints(kind), {}
        for one in fields(kind):
            words, default = one.metadata.get("words", ()), one.default
            number = float if words and types[one.name] == Value else types[one.name]
            if number not in (int, float) or not (isinstance(default, (int, float)) or (isinstance(default, str) and default in words)):
                raise TypeError(f"{kind.__name__}.{one.name}: a setting is an int or a float with a default")
            found[one.name] = Setting(number, default, **one.metadata)
        _DECLARED[kind] = found
    return found


_DECLARED: dict[type[Method], dict[str, Setting]] = {}  # cached: get_type_hints is slower than parsing a spec
