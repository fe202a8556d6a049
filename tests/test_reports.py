"""README says what reports/ say."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from rerank_lab.datasets import load_dataset
from rerank_lab.eval import results, table
from rerank_lab.report import figures
from rerank_lab.report.load import ResultsFolder
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BASELINE = ROOT / "reports" / "baseline"
REPORT = (BASELINE / "report.md").read_text()
COLLECTIONS = ("numpydoc", "scifact", "cranfield")
RESULTS: dict[str, dict[str, Any]] = {name: json.loads((BASELINE / f"{name}.json").read_text()) for name in COLLECTIONS}


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Every Markdown table in a text; each row is column name → cell."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip(" *") for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield [dict(zip(head, row)) for row in rows]


def section(title: str, text: str = REPORT) -> str:
    """The text under a heading, up to the next heading of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no heading {title!r}"
    return found[2]


def row(collection: str, method: str) -> dict[str, str]:
    """A method's row in a collection's table of reports/baseline."""
    (table,) = tables(section("The table", section(collection)))
    return next(row for row in table if row["method"] == method)


def test_the_table_of_quality_is_the_baselines() -> None:
    table = next(tables(README))
    assert len(table) == len(COLLECTIONS)
    for own, collection in zip(table, COLLECTIONS):
        (head, name), *cells = own.items()
        assert head.startswith("nDCG@10") and name.lower().startswith(collection)
        for method, value in cells:
            assert value == row(collection, method)["nDCG@10 [95% CI]"].split()[0], (collection, method)


def test_bold_is_the_highest_of_each_row() -> None:
    for line in README[README.index("| nDCG@10") :].split("\n\n")[0].splitlines()[2:]:
        cells = line.strip("|").split("|")[1:]
        values = [float(cell.strip(" *")) for cell in cells]
        assert [cell for cell in cells if "**" in cell] == [cells[values.index(max(values))]]


def test_what_eval_prints_is_the_baselines() -> None:
    start = README.index("numpydoc (test): 300")
    assert README[start:].startswith(table.table(results.parse(RESULTS["numpydoc"])).rstrip() + "\n```")


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_the_report_is_of_the_results_beside_it(collection: str) -> None:
    result = RESULTS[collection]
    for own in result["rows"]:
        shown = row(collection, own["method"])
        assert shown["nDCG@10 [95% CI]"] == table.interval(own["measures"]["nDCG@10"], own["ci95"]["nDCG@10"])
        assert shown["p50 ms"] == f"{own['latency_ms']['p50']:,.1f}" and shown["MFLOP"] == f"{own['flops_per_query'] / 1e6:,.0f}"
    part = section("Depth and length", section(collection))
    assert len(result["sweeps"]) == 5 * 3 + 3 * 5 and all(f"{point['measures']['nDCG@10']:.4f}" in part for point in result["sweeps"])


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_the_picture_is_of_its_collection(collection: str, tmp_path: Path) -> None:
    def pixels(source: Any) -> np.ndarray:
        return np.asarray(image.imread(source))[..., :3]

    kept = pixels(BASELINE / "figures" / f"pareto-{collection}.png")
    gaps = {}
    for name, result in RESULTS.items():
        drawn = pixels(io.BytesIO(figures.saved(figures.pareto(ResultsFolder(tmp_path, name, name, results.parse(result), pd.DataFrame(), None)), "png")))
        gaps[name] = float(np.abs(drawn - kept).mean()) if drawn.shape == kept.shape else 1.0
    assert gaps[collection] < 0.004 and min(gaps, key=lambda name: gaps[name]) == collection, gaps


@pytest.mark.parametrize(("heading", "report"), [("Speed of the models", "models.md"), ("Kernels", "kernels.md")])
def test_ratios_are_in_the_report_that_the_section_names(heading: str, report: str) -> None:
    part, held = section(heading, README), (ROOT / "reports" / report).read_text()
    assert f"reports/{report}" in part
    ratios = re.findall(r"(?<![\w.,])\d+(?:\.\d+)?(?= ×)|(?<![\w.-])\d+\.\d{2}(?![\w.])", "\n".join(line for line in part.splitlines() if line.startswith("|")))
    assert len(ratios) >= 6
    numbers = [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", held)]
    for ratio in ratios:
        digits = len(ratio.partition(".")[2])
        assert any(f"{number:.{digits}f}" == ratio for number in numbers), f"{ratio} is not in reports/{report}"


def test_pictures_are_there_and_every_report_names_its_command() -> None:
    pictures = re.findall(r"""(?:\]\(|src=")(reports/[^")]+\.(?:png|svg))""", README) + [
        f"reports/baseline/{path}" for path in re.findall(r"\]\((figures/[^)]+)\)", REPORT)
    ]  # fmt: skip
    assert len(pictures) > 15 and all((ROOT / path).is_file() for path in pictures)
    assert {path.name for path in (BASELINE / "figures").iterdir()} == {path.rpartition("/")[2] for path in pictures if "baseline/figures" in path}
    for collection in COLLECTIONS:
        made = section("Made by", section(collection))
        assert re.search(r"^    python -m rerank_lab.eval .*--dataset \S+", made, re.MULTILINE) and re.search(r"at commit [0-9a-f]{12} on ", made)
    assert "make reports DATA=" in REPORT


def test_texts_of_numpydoc_alone_are_quoted() -> None:
    part, queries = section("numpydoc").replace("\\", ""), load_dataset("numpydoc").queries
    assert sum(f"| {text} |" in part for text in queries.values()) >= 20
    for collection in ("scifact", "cranfield"):
        part = section("Queries that gained and lost", section(collection))
        rows = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| query |")]
        assert "ids alone" in part and len(rows) >= 40
        assert all(
            re.fullmatch(r"\| \d+ \| [\d.]+ → [\d.]+ \| [\d:;→ ]*(?:not ranked[\d:;→ ]*)*(?:and \d+ more )?\|", line) for line in rows if "---" not in line
        )
