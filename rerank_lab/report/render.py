"""Writes a report as Markdown and as one HTML page, and a table as LaTeX."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from rerank_lab.report.blocks import Block, Code, Details, Paragraph, Plot, Plots, Quoted, Section, Strong, Table
from rerank_lab.report.figures import saved
from rerank_lab.report.load import anchor

ESCAPED_OWN = re.compile(r"([\\`*|$]|<(?=[A-Za-z/!?]))")
ESCAPED_QUOTED = re.compile(r"([\\`*_\[\]!|<~$&])")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"} | {"<": "$<$", ">": "$>$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def markdown(block: Block) -> str:
    """A block with its contents as GitHub's Markdown. Figures are images in the folder figures/."""
    text = re.sub(r"(?m)^(- .*)\n(?!- |\n)", r"\1\n\n", "\n".join(_lines(block)))  # an empty line ends a list
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def html(report: Section) -> str:
    """The report as one self-contained page, with style, figures and the script that sorts tables."""
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    page.filters["svg"] = lambda plot: "data:image/svg+xml;base64," + base64.b64encode(saved(plot.figure, "svg")).decode()
    page.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in BLOCK_KINDS.items()}
    page.filters["anchor"] = anchor
    return page.get_template("page.html").render(report=report)


BLOCK_KINDS = {"text": Paragraph, "code": Code, "table": Table, "plots": Plots, "details": Details, "section": Section, "strong": Strong}


def latex(table: Table, caption: str, label: str) -> str:
    """A table for a paper (booktabs)."""
    rows = [[cell.text for cell in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=[head.translate(LATEX).replace("Δ", r"$\Delta$").replace("×", r"$\times$") for head in table.head])
    style = frame.style.format(lambda text: str(text).translate(LATEX).replace("×", r"$\times$").replace("−", "$-$")).hide(axis="index")
    made: str = style.to_latex(
        hrules=True, column_format="l" + "r" * (len(table.head) - 1), caption=caption.translate(LATEX), label=label, position="t", position_float="centering"
    )
    return made


def escaped(text: str, quoted: bool = False) -> str:
    """Escapes text for Markdown. In our own text only some characters are escaped, in quoted text every one with a meaning."""
    return (ESCAPED_QUOTED if quoted else ESCAPED_OWN).sub(r"\\\1", " ".join(text.split()))


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Section():
            yield from (f"{'#' * block.level} {escaped(block.title)}", "")
            for part in block.blocks:
                yield from _lines(part)
        case Paragraph():
            text = "".join(f"**{escaped(part)}**" if isinstance(part, Strong) else _spaced(part) for part in block.parts)
            yield f"- {text}" if block.item else text
            if not block.item:
                yield ""
        case Code():
            yield from ("", *(f"    {line}" for line in block.text.splitlines()), "")
        case Table():
            yield from _table(block)
        case Plots():
            yield from (line for plot in block.plots for line in (_image(plot), ""))
        case Details():
            yield from ("<details" + (" open" if block.open else "") + f"><summary>{escape(' '.join(block.summary.split()), quote=False)}</summary>", "")
            for part in block.blocks:
                yield from _lines(part)
            yield from ("</details>", "")


def _spaced(part: str) -> str:
    """Like `escaped`, but keeps one space at each end."""
    inner = escaped(part, isinstance(part, Quoted))
    return f"{' ' * (part[:1] == ' ')}{inner}{' ' * (part[-1:] == ' ' and bool(inner))}" if inner else part


def _image(plot: Plot) -> str:
    return f"![{escaped(plot.alt).replace('[', '(').replace(']', ')')}](figures/{plot.name}.png)"


def _table(table: Table) -> Sequence[str]:
    rows = [[escaped(cell.text, cell.quoted) for cell in row] for row in table.rows]
    head = [escaped(name, isinstance(name, Quoted)) for name in table.head]
    caption = ["", f"{escaped(table.caption)}:", ""] if table.caption else [""]
    return [*caption, *(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]), ""]
