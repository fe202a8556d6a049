"""What every method is: a class whose fields are its settings and whose `score` looks at a pool."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from rerank_lab import inputs
from rerank_lab.methods.pool import Pool


@dataclass(frozen=True)
class Method:
    """A way to score the documents of a pool; its fields are its settings, its docstring holds the formula.

    Class attributes:
        name: what the user types.
        roles: model roles that it cannot do without.
        tokens: whether it reads token vectors.
        uses_cross: whether it uses a cross-encoder where one is given.
        stage1_share: of an evaluation's candidates, what stage1_top_k is where it is not given; None: its own default.
        optional_cross: whether it runs with and without a cross-encoder; a table then has a row for each.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("bi-encoder",)
    tokens: ClassVar[bool] = False
    uses_cross: ClassVar[bool] = False
    stage1_share: ClassVar[float | None] = None

    @classmethod
    def __init_subclass__(cls) -> None:
        """Says whether a cross-encoder joins the method only where one is given."""
        super().__init_subclass__()
        cls.optional_cross = cls.uses_cross and "cross-encoder" not in cls.roles

    optional_cross: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            read = inputs.whole if field.name.endswith("top_k") else inputs.weight
            object.__setattr__(self, field.name, read(f"{self.name}: {field.name}", getattr(self, field.name)))

    def score(self, pool: Pool) -> Tensor:
        """n scores, fp32, higher is better; DROPPED for what stage 1 left behind."""
        raise NotImplementedError

    def relevance(self, scores: Tensor) -> Tensor:
        """The scores as they are shown: a strictly rising map, 0 to 1 unless the method says otherwise (fp64)."""
        return torch.sigmoid(scores.double())

    def settings(self) -> dict[str, Any]:
        """The effective settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
