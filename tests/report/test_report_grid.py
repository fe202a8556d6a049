"""The report of a grid: one page about many evaluations, its text and its errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from rerank_lab.eval.__main__ import main as evaluation
from rerank_lab.measures import stats
from rerank_lab.report import figures
from rerank_lab.report.__main__ import main
from rerank_lab.report.grid import CellRow, FinishedCell, JoinedRows, read
from rerank_lab.report.load import newest
from rerank_lab.report.verdict import frontier, ratio, verdict
from tests.conftest import DOCUMENTS, QUERIES, write_beir
from tests.report.test_report import failing, made_up

TOPICS = ["volcano", "guitar", "tax", "glacier", "bread", "chess", "whale", "bridge", "opera", "vaccine", "tennis", "copper"]
NAMES, LENGTHS, METHODS = ["topics", "small"], [3, 512], ["fast", "best"]
TITLE = "# Reranking on topics and small: a grid over max_tokens_per_doc"
LABELS = [f"{method} ({tokens})" for tokens in LENGTHS for method in METHODS]
MS = {"fast": {3: 1.0, 512: 2.0}, "best": {3: 4.0, 512: 8.0}}  # they replace measured latencies, so that the cheapest row is known


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two collections and two lengths. Beside it are two evaluations that may replace a cell: with fewer queries, with another first measure.

    In topics, all documents share their first three tokens, so that length decides. In small, length does not change the candidates.
    """
    root = tmp_path_factory.mktemp("grid")
    documents = {f"d{i}": ("", f"notes about the {topic}") for i, topic in enumerate(TOPICS)}
    queries = {f"q{i}": f"a {topic}" for i, topic in enumerate(TOPICS)}
    topics = write_beir(root / "topics", documents, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(TOPICS))})
    small = write_beir(root / "small", qrels={"q1": {"d4": 1}, "q2": {"d5": 1}, "q3": {"d2": 1, "d3": 1}, "q4": {"d1": 1}})
    (root / "all.trec").write_text("".join(f"{q} Q0 {d} 1 {9 - n} x\n" for q in QUERIES for n, d in enumerate(DOCUMENTS)))
    common = ["--methods", "fast,best", "--cold-queries", "0", "--no-kernel-check", "--no-cache", "--top-k", "8", "--measures"]
    for tokens in LENGTHS:
        for folder, rest in ((topics, ["nDCG@10,P@1"]), (small, ["nDCG@10,P@1", "--candidates", f"run:{root / 'all.trec'}"])):
            out = root / "grid" / f"{folder.name},{tokens}"
            assert evaluation([*common, *rest, "--dataset", str(folder), "--max-tokens-per-doc", str(tokens), "--out", str(out)]) == 0
            changed(out / "results.json", partial(with_latencies, tokens))
    assert evaluation([*common, "nDCG@10,P@1", "--dataset", str(topics), "--limit-queries", "5", "--out", str(root / "fewer")]) == 0
    assert evaluation([*common, "P@1", "--dataset", str(topics), "--methods", "fast", "--out", str(root / "other")]) == 0
    cells = {f"{name},{tokens}": {"dataset": name, "max_tokens_per_doc": tokens} for name in NAMES for tokens in LENGTHS}
    write_grid(root / "grid", {"dataset": NAMES, "max_tokens_per_doc": LENGTHS}, cells)
    return root


@pytest.fixture
def grid(made: Path, tmp_path: Path) -> Path:
    """A copy of the grid that a test may damage."""
    return Path(shutil.copytree(made / "grid", tmp_path / "grid"))


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the report of the whole grid."""
    out = tmp_path_factory.mktemp("page")
    assert main([str(made / "grid"), "--out", str(out), "--latex", "--examples", "0"]) == 0
    return out


@pytest.fixture
def text(page: Path) -> str:
    return (page / "report.md").read_text()


@pytest.fixture(scope="module")
def elsewhere(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the grid, in which one cell ran with another number of threads."""
    copy = Path(shutil.copytree(made / "grid", tmp_path_factory.mktemp("elsewhere") / "grid"))
    changed(copy / "topics,512" / "results.json", lambda result: result["environment"].update(threads=98))
    assert main([str(copy)]) == 0
    return (copy / "report.md").read_text()


def write_grid(folder: Path, axes: Mapping[str, list[Any]], cells: Mapping[str, dict[str, Any]]) -> None:
    listed = [{"name": name, "values": values} for name, values in cells.items()]
    (folder / "grid.json").write_text(json.dumps({"schema": 1, "axes": axes, "cells": listed}))


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def with_latencies(tokens: int, result: dict[str, Any]) -> None:
    for row in result["rows"]:
        row["latency_ms"] = {"p50": MS[row["method"]][tokens], "p95": 9.0}


def with_model(model: str, result: dict[str, Any]) -> None:
    result["config"]["model"] = model


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table under a heading, each row as column name → cell. If two columns have one name, the second is called `name 2`."""
    part = text[text.index(f"{heading}\n\n") :]
    lines = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)[0].splitlines()
    head, _, *rows = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines]
    names = [name if name not in head[:i] else f"{name} 2" for i, name in enumerate(head)]
    return [dict(zip(names, row)) for row in rows]


def measured(made: Path, name: str) -> dict[str, pd.Series]:
    """Label → nDCG@10 by query, read directly from the cells' files."""
    found: dict[str, pd.Series] = {}
    for tokens in LENGTHS:
        frame = pd.read_csv(made / "grid" / f"{name},{tokens}" / "per_query.csv").set_index("query")
        found |= {f"{method} ({tokens})": frame[frame["method"] == method]["nDCG@10"] for method in METHODS}
    return found


def made_up_grid(rows: dict[str, tuple[np.ndarray, float]]) -> JoinedRows:
    """Rows of cells with these values by query and these median latencies. A label is a method, followed by the cell's values in brackets."""
    one = made_up(rows)
    cell = FinishedCell("cell", {}, one)
    own = {label: CellRow(replace(row, label=label.partition(" (")[0]), {}, "", cell) for label, row in one.rows.items()}
    return JoinedRows(one.name, one.stem, one.primary, one.baseline, one.seed, own, {label: one.measure(label) for label in own})


def shown(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


@pytest.mark.parametrize(("name", "use"), [("topics", "fast (512)"), ("small", "fast (3)")])  # in topics a cheaper row is worse
def test_the_page_names_the_cheapest_of_all_rows_that_cannot_be_told_from_the_highest(made: Path, text: str, name: str, use: str) -> None:
    values = {label: series.to_numpy() for label, series in measured(made, name).items()}
    ms = {f"{method} ({tokens})": MS[method][tokens] for method in METHODS for tokens in LENGTHS}
    pairs = [*combinations(LABELS, 2)]
    p = dict(zip(map(frozenset, pairs), stats.holm([stats.paired_randomization(values[a], values[b], 0) for a, b in pairs])))
    highest = max(LABELS, key=lambda label: (values[label].mean(), -ms[label]))
    assert use == min((label for label in LABELS if label == highest or p[frozenset((label, highest))] >= 0.05), key=lambda label: ms[label])
    sentence = next(line for line in text.splitlines() if line.startswith(f"- **{name}**: **{use}**"))
    change = (values[use] - values["fast (3)"]).mean() if use != "fast (3)" else (values[highest] - values[use]).mean()
    assert f"{change:.3f} [".removeprefix("0") in sentence
    assert ("beats fast (3)" in sentence and "at 2.0 × its latency" in sentence) if use == highest else f"The highest mean is {highest}'s" in sentence
    rows = {f"{row['method']} ({row['max_tokens_per_doc']})": row for row in table(text, f"## {name}")}
    assert next(iter(rows)) == highest and {*rows} == {*LABELS}
    assert (means := [float(row["nDCG@10 [95% CI]"].split()[0]) for row in rows.values()]) == sorted(means, reverse=True)
    tested = [label for label in LABELS if label != "fast (3)"]
    against = dict(zip(tested, stats.holm([stats.paired_randomization(values[label], values["fast (3)"], 0) for label in tested])))
    for label, row in rows.items():
        assert row["× latency"] == f"{ms[label]:.2f}", "the baseline takes 1 ms"
        if label != highest:
            assert row["Δ highest [95% CI]"].startswith(f"{(values[label] - values[highest]).mean():+.4f} [")
            assert row["p, Holm"] == shown(p[frozenset((label, highest))])
        if label in against:
            assert row["Δ baseline [95% CI]"].startswith(f"{(values[label] - values['fast (3)']).mean():+.4f} [")
            assert row["p, Holm 2"] == shown(against[label])


def test_the_first_table_holds_every_row_of_every_collection(made: Path, text: str, page: Path) -> None:
    first = table(text, TITLE)
    assert [f"{row['method']} ({row['max_tokens_per_doc']})" for row in first] == LABELS
    for name in NAMES:
        for row, label in zip(first, LABELS):
            assert row[f"{name}, nDCG@10"].startswith(f"{measured(made, name)[label].mean():.4f} [")
            assert row[f"{name}, × latency"] == f"{MS[row['method']][int(row['max_tokens_per_doc'])]:.2f}"
    pictures = re.findall(r"^!\[.+\]\(figures/(.+\.png)\)$", text, re.MULTILINE)
    wanted = ["pareto-topics", "pareto-small", "differences-topics", "queries-topics", "differences-small", "queries-small"]
    assert pictures == [f"{name}.png" for name in wanted] and {*pictures} == {path.name for path in (page / "figures").iterdir()}
    assert (page / "report.html").read_text().count("<img") == len(pictures)
    tex = (page / "report.tex").read_text()
    assert tex.count("\nfast & ") == tex.count("\nbest & ") == 2 and r"max\_tokens\_per\_doc" in tex


def test_what_an_axis_changes_is_the_paired_difference_of_its_cells(made: Path, text: str) -> None:
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What max_tokens_per_doc changes", *NAMES, "Cells"]
    rows, wanted = table(text, "## What max_tokens_per_doc changes"), [*product(NAMES, METHODS)]
    assert [(row["collection"], row["method"]) for row in rows] == wanted and {row["from → to"] for row in rows} == {"3 → 512"}
    changes = [(measured(made, name)[f"{method} (512)"] - measured(made, name)[f"{method} (3)"]).to_numpy() for name, method in wanted]
    p_values = stats.holm([stats.paired_randomization(change, np.zeros(len(change)), 0) for change in changes])
    for row, (name, method), change, p in zip(rows, wanted, changes, p_values):
        low, high = (re.sub(r"0\.", ".", f"{end:+.4f}") for end in stats.bootstrap_interval(change, 0) or ())
        assert row["Δ nDCG@10 [95% CI]"] == f"{change.mean():+.4f} [{low}, {high}]" and row["p, Holm"] == shown(p)
        assert row["won/tied/lost"] == f"{(change > 0).sum()}/{(change == 0).sum()}/{(change < 0).sum()}"
        assert row["× latency"] == f"{MS[method][512] / MS[method][3]:.2f}"
        hashes = {json.loads((made / "grid" / f"{name},{n}" / "results.json").read_text())["candidates"]["hash"] for n in LENGTHS}
        assert row["candidates"] == ("same" if len(hashes) == 1 else "other")
    assert {row["candidates"] for row in rows} == {"same", "other"} and "the first stage changed too" in text
    assert sum(p < 0.05 and change.mean() > 0 for p, change in zip(p_values, changes)) == 2
    assert "- **3 → 512**: better in 2 of 4, worse in 0, not told from chance in 2, at 2.00 to 2.00 × the median latency." in text


def test_every_cell_stands_at_the_end_with_its_command_and_what_its_machine_had_different(made: Path, elsewhere: str) -> None:
    end = elsewhere.partition("\n## Cells\n")[2]
    threads = json.loads((made / "grid" / "topics,512" / "results.json").read_text())["environment"]["threads"]
    assert re.findall(r"^\*\*(.+?)\*\*: (.+)$", end, re.MULTILINE) == [
        ("topics,3", "the first cell."), ("topics,512", f"in its environment threads 98, not {threads}."),
        ("small,3", "the first cell's environment."), ("small,512", "the first cell's environment."),
    ]  # fmt: skip
    commands = re.findall(r"^    python -m rerank_lab.eval (.+)$", end, re.MULTILINE)
    assert [re.findall(r"--max-tokens-per-doc (\d+)", command) for command in commands] == [["3"], ["512"], ["3"], ["512"]]
    assert "<details><summary>4 folders" in end


def test_cells_that_are_not_finished_are_named_and_left_out(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(grid / "small,3")
    (grid / "topics,512" / "partial").mkdir()
    assert main([str(grid)]) == 0
    text, said = (grid / "report.md").read_text(), capsys.readouterr()
    line = "Not finished and left out, 2 of 4 cells: topics,512; small,3."
    assert said.err == f"rerank_lab: {line}\n" and f"- {line}\n" in text
    assert "What max" not in text, "nothing varies within a collection"
    means = pd.read_csv(grid / "small,512" / "per_query.csv").groupby("method")["nDCG@10"].mean()
    rows = table(text, "# Reranking on topics and small: a grid of 2")
    assert [(row["method"], row["small, nDCG@10"].split()[0]) for row in rows] == [(method, f"{means[method]:.4f}") for method in METHODS]
    for name in ("small,512", "topics,3"):
        shutil.rmtree(grid / name)
    assert "none of the grid's 4 cells is finished" in failing(capsys, grid)


def test_times_of_different_machines_are_never_set_against_each_other(elsewhere: str, text: str) -> None:
    said = "- Cells were timed on different machines or settings of one"
    assert said in elsewhere and said not in text and "timed with" not in text
    ratios = {(row["method"], row["max_tokens_per_doc"]): row["topics, × latency"] for row in table(elsewhere, TITLE)}
    assert ratios == {("fast", "3"): "1.00", ("best", "3"): "4.00", ("fast", "512"): "-", ("best", "512"): "-"}
    assert [row["× latency"] for row in table(elsewhere, "## What max_tokens_per_doc changes")] == ["-", "-", "2.00", "2.00"]
    for row in table(elsewhere, "## topics"):
        assert (row["timed with"] == "threads 98") == (row["max_tokens_per_doc"] == "512") == (row["× latency"] == "-")
    (sentence,) = (line for line in elsewhere.splitlines() if line.startswith("- **topics**"))
    assert "× " not in sentence and re.search(
        r"; with threads \d+ all are told from it; with threads 98 the cheapest that .* is \*\*fast \(512\)\*\*", sentence
    )
    plots = re.findall(r"on topics, threads \d+: (.*?); not dominated: (.*?)\]", elsewhere)
    assert [("(512)" in points, "(3)" in points) for points, _ in plots] == [(False, True), (True, False)]
    assert [kept.startswith(label) for (_, kept), label in zip(plots, ("fast (3)", "fast (512)"))] == [True, True]


def test_another_set_of_judged_queries_is_another_collection(made: Path, grid: Path) -> None:
    shutil.copytree(made / "fewer", grid / "fewer")
    write_grid(grid, {"limit_queries": [None, 5]}, {"topics,512": {"limit_queries": None}, "fewer": {"limit_queries": 5}})
    assert main([str(grid)]) == 0
    assert re.findall(r"^## (.*)$", (grid / "report.md").read_text(), re.MULTILINE) == ["topics (12 queries)", "topics (5 queries)", "Cells"]


def test_a_row_that_two_cells_hold_stands_once(grid: Path, text: str) -> None:
    shutil.copytree(grid / "topics,512", grid / "again")
    changed(grid / "again" / "results.json", partial(with_latencies, 3))
    write_grid(grid, {"methods": [["fast"], ["best"]]}, {"topics,512": {"methods": ["fast"]}, "again": {"methods": ["best"]}})
    assert main([str(grid)]) == 0
    said, once = "A row that several cells hold stands once", (grid / "report.md").read_text()
    assert said in once and said not in text
    assert [row["method"] for row in table(once, "# Reranking on topics: a grid of 2")] == METHODS
    assert {row["method"]: row["p50 ms"] for row in table(once, "## topics")} == {"fast": "2.0", "best": "8.0"}, "from the first"


def test_values_are_named_by_as_few_words_as_tell_them_apart(grid: Path) -> None:
    models = ["hub/a-model-of-a-very-long-name-v1", "hub/a-model-of-a-very-long-name-v2", "own/a-model-of-a-very-long-name-v2"]
    for n, model in enumerate(models):
        shutil.copytree(grid / "topics,512", grid / f"m{n}")
        changed(grid / f"m{n}" / "results.json", partial(with_model, model))
    for count, names in ((2, ["a-model-…name-v1", "a-model-…name-v2"]), (3, models)):
        write_grid(grid, {"model": models[:count]}, {f"m{n}": {"model": model} for n, model in enumerate(models[:count])})
        found = read(grid)
        assert [*found.axes["model"].values()] == names
        assert [*found.collections[0].whole.rows] == [f"{method} ({name})" for name in names for method in METHODS]


def with_prompt(prompt: str, result: dict[str, Any]) -> None:
    result["config"]["query_prompt"] = prompt


@pytest.mark.parametrize(("prompts", "names"), [(["", "query: "], ["none", "query: "]), (["none", ""], ["none", "''"])])
def test_a_prompt_that_is_empty_has_a_name(grid: Path, prompts: list[str], names: list[str]) -> None:
    for n, prompt in enumerate(prompts):
        shutil.copytree(grid / "topics,512", grid / f"p{n}")
        changed(grid / f"p{n}" / "results.json", partial(with_prompt, prompt))
    write_grid(grid, {"query_prompt": prompts}, {f"p{n}": {"query_prompt": prompt} for n, prompt in enumerate(prompts)})
    assert [*read(grid).collections[0].whole.rows] == [f"{method} ({name})" for name in names for method in METHODS]
    assert main([str(grid)]) == 0
    assert f"- **{names[0]} → {names[1].rstrip()}**: " in (grid / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "does not read back"),
        (lambda text: "[]", "schema None, and this version reads schema 1"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "a newer rerank_lab made it: upgrade"),
        (lambda text: text.replace('"axes"', '"axis"'), "axes is missing"),
        (lambda text: text.replace('"cells": [', '"cells": [1, '), "cells[0]. is no object"),
        (lambda text: re.sub(r'"cells": \[.*\]', '"cells": []', text), "it has no cells"),
        (lambda text: text.replace('"small,3"', '"topics,3"'), "the cell topics,3 stands there twice"),
        (lambda text: text.replace('"small,3"', '"../small,3"'), "names no folder in it"),
        (lambda text: text.replace('"small,3"', '".."'), "the cell '..' names no folder in it"),
        (
            lambda text: text.replace('"max_tokens_per_doc": [3, 512]', '"max_tokens_per_doc": [3]'),
            "the values of the cell topics,512 are not those of its axes",
        ),
    ],
)
def test_a_damaged_grid_is_refused(grid: Path, change: Callable[[str], str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (grid / "grid.json").write_text(change((grid / "grid.json").read_text()))
    said = failing(capsys, grid)
    assert message in said and str(grid / "grid.json") in said and ("run the grid again" in said or "upgrade" in said)
    assert not (grid / "report.md").exists()


def test_cells_that_do_not_fit_are_refused_by_name(made: Path, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def replaced(name: str) -> str:
        shutil.rmtree(grid / "topics,512")
        shutil.copytree(made / name, grid / "topics,512")
        return failing(capsys, grid)

    assert "topics,3 is measured by nDCG@10 and topics,512 by P@1" in replaced("other")
    assert "topics,512 is not the cell that grid.json describes: its max_tokens_per_doc is 3, not 512" in replaced("grid/topics,3")
    (grid / "topics,512" / "results.json").write_text("{")
    assert "topics,512/results.json does not read back" in failing(capsys, grid)
    shutil.rmtree(grid / "topics,512")
    (grid / "topics,512").mkdir()
    assert "topics,512 has no results.json" in failing(capsys, grid) and not (grid / "report.md").exists()


def test_the_command_line_says_what_does_not_go_with_a_grid(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cell = made / "grid", made / "grid" / "topics,3"
    assert "a page of its own: name it alone" in failing(capsys, cell, whole, "--out", tmp_path / "out")
    assert "name two of its cells" in failing(capsys, "--compare", cell, whole, "--out", tmp_path / "out")
    said = failing(capsys, whole, "--out", tmp_path / "out", "--examples", "3", "--dataset", "topics=x", "--cache", "y", "--bench", "z", "--quote", "topics")
    assert "not bench, dataset, cache, quote, examples" in said and not (tmp_path / "out").exists()


def test_the_newest_results_may_be_a_grids(made: Path, tmp_path: Path) -> None:
    for name in ("other", "grid"):
        shutil.copytree(made / name, tmp_path / name)
    for newer, folder in (("other", "other"), ("grid/small,3", "grid")):
        (tmp_path / newer / "results.json").touch()
        assert newest(tmp_path) == tmp_path / folder


def test_in_a_crowd_the_plot_numbers_what_nothing_dominates_and_no_number_hides_another() -> None:
    rng, base = np.random.default_rng(0), np.linspace(0.2, 0.8, 50)
    methods, models, kinds = ("fast", "best", "standard", "best+cross"), ("all-MiniLM-L6-v2", "b"), ("fp32", "bf16", "int8")
    names = [f"{method} ({model}, {kind})" for method, model, kind in product(methods, models, kinds)]
    one = made_up_grid({label: (base + 0.01 * i + rng.normal(0, 0.01, 50), 2.0 + i % 5 + i) for i, label in enumerate(names)})
    figure, kept = figures.pareto(one), frontier(one)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    assert [note.get_text() for note in axes.texts] == [str(n) for n in range(1, len(kept) + 1)] and 5 < len(kept) < len(names)
    legend = [entry.get_text() for entry in figure.legends[0].get_texts()]
    assert [entry for entry in legend if entry[0].isdigit()] == [f"{n}  {label}" for n, label in enumerate(kept, 1)]
    boxes = [Text.get_window_extent(note, renderer) for note in axes.texts]  # without the lines to their markers
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(0 <= end <= limit for end, limit in zip(figure.legends[0].get_window_extent(renderer).max, figure.bbox.max))
    assert {line.get_color() for line in axes.lines if len(line.get_xdata()) == 1} >= {figures.DOMINATED}  # type: ignore[arg-type]
    assert all(figures.looks(one.rows)[name] == figures.looks({})[name.split()[0]] for name in names), "a method looks the same under all values"


def test_a_server_is_not_weighed_against_what_ran_here_under_any_values() -> None:
    base, server = np.linspace(0.2, 0.6, 50), "endpoint:http://127.0.0.1:8000:best (b)"
    one = made_up_grid({"fast (b)": (base, 1.0), "best (b)": (base + 0.1, 2.0), server: (base + 0.3, 0.5)})
    assert (verdict(one).use, frontier(one), ratio(one, server, "fast (b)")) == ("best (b)", ["fast (b)", "best (b)"], None)
    hollow = [line for line in figures.pareto(one).axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [tuple(np.ravel(line.get_xydata())) for line in hollow] == [(0.5, (base + 0.3).mean())]


def test_swaps_are_enough_for_the_tests_that_are_corrected_together() -> None:
    rng = np.random.default_rng(0)
    changes = [rng.normal(shift, 0.2, 60) for shift in (0.0, 0.03, 0.05, 0.2)]
    few, many = (stats.randomized_family(changes, family, 0) for family in (4, 600))
    assert few == [stats.paired_randomization(change, np.zeros(60), 0) for change in changes]
    assert many == pytest.approx(few, abs=0.01) and few[3] * 600 > 0.05 > many[3] * 600
    assert stats.randomized_family([np.zeros(60)], 600, 0) == [1.0]
