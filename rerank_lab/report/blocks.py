"""What a report is made of, before anything is Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure


class Strong(str):
    """Words that stand out."""


class Quoted(str):
    """Words of somebody else: ids and texts of a collection."""


@dataclass(frozen=True)
class Text:
    """A paragraph, or with `item` a line of a list; parts in turn."""

    parts: Sequence[str]
    item: bool = False


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    text: str


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by, where that is a number.
        shade: 0 to 1, how dark it stands.
        quoted: whether the text is somebody else's.
    """

    text: str
    value: float | None = None
    shade: float | None = None
    quoted: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head; a first column of names."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = ""  # a class of the page's style


@dataclass(frozen=True)
class Plot:
    """A figure, its file's stem, and what it shows for who cannot see it."""

    name: str
    figure: Figure
    alt: str


@dataclass(frozen=True)
class Plots:
    """Plots side by side where there is room."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Details:
    """What a reader opens."""

    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass
class Section:
    """A heading of some level (1: the title) and what stands under it."""

    title: str
    level: int
    blocks: list[Block] = field(default_factory=list)


Block = Text | Code | Table | Plots | Details | Section


def plots(block: Block) -> list[Plot]:
    """All figures in a block, in order."""
    if isinstance(block, Plots):
        return list(block.plots)
    inside = block.blocks if isinstance(block, (Section, Details)) else ()
    return [plot for part in inside for plot in plots(part)]
