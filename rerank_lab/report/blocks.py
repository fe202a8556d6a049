"""The blocks of a report, before they become Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure


class Strong(str):
    """Words that are emphasised."""


class Quoted(str):
    """Words that are not ours: ids and texts of a collection."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph or, with item=True, an item of a list. Its parts follow each other."""

    parts: Sequence[str]
    item: bool = False


@dataclass(frozen=True)
class Code:
    """Lines that a reader may copy."""

    text: str


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        value: the number that it is sorted by; None: it is sorted by its text.
        shade: how dark its background is, 0 to 1; None: not at all.
        quoted: whether the text is not ours.
    """

    text: str
    value: float | None = None
    shade: float | None = None
    quoted: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head. The first column has names."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = ""  # a class of the page's style


@dataclass(frozen=True)
class Plot:
    """A figure, with the stem of its file's name and a text for readers who cannot see it."""

    name: str
    figure: Figure
    alt: str


@dataclass(frozen=True)
class Plots:
    """Plots, side by side if there is room."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Details:
    """Blocks that a reader can open and close."""

    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass
class Section:
    """A heading and the blocks under it; level 1 is the title."""

    title: str
    level: int
    blocks: list[Block] = field(default_factory=list)


Block = Paragraph | Code | Table | Plots | Details | Section


def plots(block: Block) -> list[Plot]:
    """All figures in a block, in order."""
    if isinstance(block, Plots):
        return list(block.plots)
    inside = block.blocks if isinstance(block, (Section, Details)) else ()
    return [plot for part in inside for plot in plots(part)]
