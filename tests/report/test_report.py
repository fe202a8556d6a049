"""python -m rerank_lab.report: its text, its figures, its errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from rerank_lab.datasets.runs import read_trec
from rerank_lab.eval.__main__ import main as evaluation
from rerank_lab.eval.results import Latency, Versus, read
from rerank_lab.measures import stats
from rerank_lab.methods.best import SPREAD_IN_TAUS
from rerank_lab.methods.spread import spread_of
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.report import figures
from rerank_lab.report.__main__ import main
from rerank_lab.report.load import ResultsFolder, load
from rerank_lab.report.verdict import frontier, sentence, verdict
from tests.conftest import ROOT, write_beir

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ["join <b>two</b> tables", "sort | order", "dot product", "roots"]
HOSTILE = {  # texts that a collection may have; a page must neither run nor lose them
    "d1": ("Merge", "Merge DataFrame or named Series objects. <script>document.title = 'hacked'</script> ![x](http://x.invalid/y.png) | a | b |"),
    "d2": ("Sort", "Sort by the values along either axis. [link](javascript:alert(1)) **bold** _it_ `code` # head"),
    "d3": ("Dot", "Dot product of two arrays, complex ones conjugated first.\n\n</details></table>"),
    "d|4": ("", "Read a Stata file into a DataFrame."),
    "d5": ("Roots", "Return the roots of a polynomial with coefficients given in p."),
    "d6": ("", ""),
}
QUERIES = {f"q{i}": name for i, name in enumerate(NAMES, 1)} | {"q5": "zeros of a polynomial & more", "q6": "merge frames"}
QRELS = {  # arbitrary, so that methods differ
    "q1": {"d1": 1, "d|4": 2}, "q2": {"d2": 1, "d|4": 1}, "q3": {"d5": 1, "d2": 2}, "q4": {"d1": 1, "d3": 2}, "q5": {"d2": 1, "d6": 1}, "q6": {"d3": 1, "d|4": 1}
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of one small collection. Together they have everything that a report can show."""
    root = tmp_path_factory.mktemp("report")
    folder = write_beir(root / "small", HOSTILE, QUERIES, QRELS)
    arguments = ["--dataset", str(folder), "--top-k", "5", "--cold-queries", "1", "--no-cache"]
    sweeps = ["--sweep", "stage1_top_k=1,3,6", "--sweep", "max_tokens_per_doc=3,50"]
    assert evaluation([*arguments, "--methods", "fast,standard,best,best:tau=0.3,best+cross,best:stage1_top_k=2", *sweeps, "--out", str(root / "a")]) == 0
    assert evaluation([*arguments, "--methods", "fast,best,optimal", "--max-tokens-per-doc", "2", "--out", str(root / "b"), "--no-kernel-check"]) == 0
    return root


@pytest.fixture
def one(made: Path) -> ResultsFolder:
    return load([made / "a"])[0]


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def made_up(rows: dict[str, tuple[np.ndarray, float]]) -> ResultsFolder:
    """An evaluation with these values by query and these median latencies; the first row is the baseline."""
    base, *_ = rows
    kept = read(ROOT / "reports" / "baseline" / "numpydoc.json")
    found = []
    for label, (values, latency) in rows.items():
        test = stats.paired(values, rows[base][0], 0)
        vs = None if label == base else Versus(baseline=base, measure="nDCG@10", p_holm=test["p_randomization"], **test)
        mean, ci95 = {"nDCG@10": float(values.mean())}, {"nDCG@10": stats.bootstrap_interval(values, 0)}
        found.append(replace(kept.rows[0], label=label, queries=len(values), measures=mean, ci95=ci95, latency_ms=Latency(latency, latency), vs=vs))
    frame = pd.concat([pd.DataFrame({"query": [f"q{i}" for i in range(len(v))], "method": label, "nDCG@10": v}) for label, (v, _) in rows.items()])
    result = replace(kept, config=replace(kept.config, measures=["nDCG@10"], baseline=base, seed=0), rows=found)
    return ResultsFolder(Path("x"), "made up", "made-up", result, frame, None)


def test_a_report_holds_every_part_and_every_figure(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made / "a"), "--out", str(tmp_path), "--latex"]) == 0
    said = capsys.readouterr()
    assert "small: " in said.out and said.err == ""
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    result = json.loads((made / "a" / "results.json").read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    parts = ["Quality", "Differences", "Cost", "Depth and length", "Kernels and their definition", "Queries that gained and lost", "Trust", "Made by"]
    assert headings == ["Reranking on small", *parts]
    for row in result["rows"]:
        assert re.search(rf"^\| {re.escape(row['method'])} \| {row['measures']['nDCG@10']:.4f} \[", text, re.MULTILINE)
        cost = [row["latency_ms"]["p50"], row["latency_ms"]["p95"], *(row["phases_ms"][p] for p in ("tokenise", "encode", "score", "rank"))]
        assert f"| {row['method']} | seen | 6 | {' | '.join(f'{ms:,.1f}' for ms in cost)} |" in text
    for point in result["sweeps"]:
        assert f"{point['measures']['nDCG@10']:.4f}" in text
        assert f"{point['oracle_ndcg@10']:.4f}" in text or point["method"] == "best:stage1_top_k=2", "the most of any method"
    change = result["rows"][2]["vs_definition"]["fp8"]
    assert f"| best | fp8 | {change['delta_ndcg@10']:+.4f}" in text and f"{change['max_score_diff']:.1e}" in text
    pictures = re.findall(r"^!\[.+\]\((figures/.+\.png)\)$", text, re.MULTILINE)
    assert [Path(p).stem.rpartition("-")[0] for p in pictures] == ["pareto", "differences", "queries", "cost", "stage1_top_k", "max_tokens_per_doc"]
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and (tmp_path / picture).stat().st_size > 10_000
    assert page.count('src="data:image/svg+xml;base64,') == len(pictures) == page.count("<img")
    assert not re.search(r"""(?:src|href)=(?!["']?(?:data:|#))""", page), "a page that stands alone loads nothing"
    tex = (tmp_path / "report.tex").read_text()
    assert r"\toprule" in tex and r"best:tau=0.3 &" in tex and "Δ" not in tex and tex.count(r"\\") >= len(result["rows"]) + 1
    assert re.sub(r"\\.|\$[^$]*\$", "", tex).count("%") == 0 and r"best:stage1\_top\_k=2 &" in tex
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.html", "report.md", "report.tex"]


def test_the_same_results_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        assert main([str(made / "a"), "--out", str(tmp_path / name), "--examples", "2", "--command", "z"]) == 0
    for path in sorted((tmp_path / "x").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "y" / path.relative_to(tmp_path / "x")).read_bytes(), path.name


def test_several_results_stand_on_one_page_under_names_of_their_own(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in failing(capsys, made / "a", made / "b")
    assert main([str(made / "a"), str(made / "b"), "--out", str(tmp_path), "--examples", "0"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Reranking on small (a) and small (b)\n") and "\n## small (a)\n" in text and "\n## small (b)\n" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.split("\n\n")[2].splitlines()}
    assert rows["optimal"].split(" | ")[1] == "-", "it ran in b alone"
    assert len({*re.findall(r"figures/[^)]+", text)}) == len([*(tmp_path / "figures").iterdir()]) == text.count("](figures/")
    twin = tmp_path / "twin" / "a"
    shutil.copytree(made / "a", twin)
    assert main([str(made / "a"), str(twin), "--out", str(tmp_path / "out"), "--examples", "0"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert len({*re.findall(r"^## (.*)$", text, re.MULTILINE)}) == 2 and len({*re.findall(r"figures/pareto[^)]+", text)}) == 2
    assert "named twice" in failing(capsys, twin, twin.parent / "." / "a", "--out", tmp_path)


@pytest.mark.parametrize(
    ("gains", "latencies", "use", "said"),
    [
        ({"best": 0.1, "cross": 0.1}, {"best": 2, "cross": 30}, "best", "best beats fast by .09"),
        ({"best": 0.1, "cross": 0.2}, {"best": 2, "cross": 30}, "cross", "cross beats fast by .2"),
        ({"best": 0.0, "cross": 0.001}, {"best": 2, "cross": 30}, "fast", "fast, the baseline, has nDCG@10"),
        ({"best": -0.1, "cross": -0.2}, {"best": 0.5, "cross": 30}, "fast", "fast, the baseline, has nDCG@10"),
        ({"best": 0.1, "cross": 0.101}, {"best": 50, "cross": 30}, "cross", "cross beats fast by .1"),
    ],
)
def test_the_finding_is_the_cheapest_of_those_that_cannot_be_told_from_the_highest(
    gains: dict[str, float], latencies: dict[str, float], use: str, said: str
) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 200)
    rows = {"fast": (base, 1.0)} | {label: (base + gain + rng.normal(0, 0.05, 200), latencies[label]) for label, gain in gains.items()}
    one = made_up(rows)
    assert verdict(one).use == use
    words = "".join(sentence(one))
    assert said in words, words
    if use not in ("fast", verdict(one).highest):
        assert f"at {latencies['cross'] / latencies['best']:.1f} × its latency" in words and "not tell that from chance" in words


def test_the_frontier_is_what_nothing_dominates() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        one = made_up({f"m{i}": (rng.uniform(0, 1, 4).round(1), float(rng.integers(1, 5))) for i in range(6)})
        kept = frontier(one)
        points = {label: (row.measures["nDCG@10"], row.latency_ms.p50) for label, row in one.rows.items() if row.latency_ms}
        for label, (quality, latency) in points.items():
            beaten = any(q >= quality and t <= latency and (q, t) != (quality, latency) for q, t in points.values())
            assert (points[label] in [points[k] for k in kept]) == (not beaten)


def test_servers_are_shown_and_not_weighed_against_what_ran_here() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 100)
    server = "endpoint:http://127.0.0.1:8000:best"
    one = made_up({"fast": (base, 1.0), "best": (base + 0.1 + rng.normal(0, 0.05, 100), 2.0), server: (base + 0.3, 0.5)})
    assert (verdict(one).use, verdict(one).highest, frontier(one)) == ("best", "best", ["fast", "best"])
    assert "the highest mean of 2 methods" in "".join(sentence(one))
    hollow = [line for line in figures.pareto(one).axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [tuple(np.ravel(line.get_xydata())) for line in hollow] == [(0.5, (base + 0.3).mean())]
    alone = made_up({server: (base, 1.0), f"{server}+cross": (base + 0.1, 2.0)})
    assert verdict(alone).use == f"{server}+cross"
    assert len({figures.short(f"endpoint:http://127.0.0.1:8000:{name}") for name in ("fast", "best", "best+cross", "optimal")}) == 4


def test_equal_means_are_not_told_as_a_gap() -> None:
    values = np.linspace(0.1, 0.9, 20)
    one = made_up({"slow": (values, 5.0), "quick": (values[::-1].copy(), 1.0)})
    assert verdict(one).use == verdict(one).highest == "quick" and "above" not in "".join(sentence(one))


def test_the_pareto_plot_shows_what_the_results_say(one: ResultsFolder) -> None:
    axes = figures.pareto(one).axes[0]
    marks = {tuple(np.ravel(line.get_xydata())): line.get_color() for line in axes.lines if len(line.get_xdata()) == 1}  # type: ignore[arg-type]
    for label, row in one.rows.items():
        assert row.latency_ms is not None
        colour = marks[row.latency_ms.p50, row.measures["nDCG@10"]]
        assert (colour == figures.DOMINATED) == (label not in frontier(one))
    assert axes.get_xscale() == "log" and {note.get_text() for note in axes.texts} == {*one.rows}


def test_other_figures_show_what_the_results_say(one: ResultsFolder) -> None:
    tested = {label: row.vs for label, row in one.rows.items() if row.vs}
    forest = figures.forest(tested, "nDCG@10", "small", "fast", one.rows).axes[0]
    drawn = {tuple(np.ravel(line.get_xdata())) for line in forest.lines}
    changes = {label: (one.measure(label) - one.measure("fast")).to_numpy() for label in tested}
    strips = figures.strips(changes, "nDCG@10", "small", "fast", one.rows).axes
    for axes, (label, vs) in zip(strips, tested.items(), strict=True):
        assert {(vs.delta,), tuple(vs.ci95 or ())} <= drawn
        change = np.sort(one.measure(label).to_numpy() - one.measure("fast").to_numpy())[::-1]
        up, down = (patch.get_data().values for patch in axes.patches)  # type: ignore[attr-defined]
        assert np.allclose(up + down, change) and f"{(change > 0).sum()} won" in axes.get_title("right")
    seen = figures.phases(one).axes[0]
    assert sum(patch.get_width() for patch in seen.patches) == pytest.approx(sum(sum((row.phases_ms or {}).values()) for row in one.result.rows))  # type: ignore[attr-defined]
    _, below = figures.swept(one, "stage1_top_k").axes
    line = next(line for line in below.lines if line.get_label() == "best")
    assert np.asarray(line.get_ydata()).tolist() == [p.measures["nDCG@10"] for p in one.result.sweeps if p.setting == "stage1_top_k" and p.label == "best"]


def test_examples_are_those_that_gained_and_lost_most_with_their_ranks(made: Path, one: ResultsFolder, tmp_path: Path) -> None:
    assert main([str(made / "a"), "--out", str(tmp_path), "--examples", "2"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"(?<!\\)(!\[x|\[link|\*\*bold|_it_|`code|<script)", text) is None, "Markdown of a document"
    part = text.partition("<summary>standard against fast</summary>")[2].partition("\n</details>")[0]
    change = (one.measure("standard") - one.measure("fast")).sort_values()
    runs = {label: read_trec(made / "a" / "runs" / f"{label}.trec") for label in ("fast", "standard")}
    lines = [line for line in part.splitlines() if re.match(r"\| .*\d → \d", line)]
    assert len(lines) == min(2, (change > 0).sum()) + min(2, (change < 0).sum()) > 0
    for line in lines:
        q = next(q for q, name in QUERIES.items() if name.split()[0] in line.split("|")[1])
        assert abs(change[q]) >= np.sort(change.abs())[-4] and f"{one.measure('fast')[q]:.3f} → {one.measure('standard')[q]:.3f}" in line
        for d in [d for d in QRELS[q] if d != "d|4"]:
            places = [str(run[q].documents.index(d) + 1) if d in run[q].documents else "not ranked" for run in runs.values()]
            assert f"{d}: {places[0]} → {places[1]}" in line


def soft(q: Tensor, d: Tensor, tau: float) -> Tensor:
    """For each query token, its soft maximum over a document's tokens, as docs/methods.md defines it; -1 if the document has no tokens."""
    s = (q.float() @ d.float().T).double()
    weights = ((s - 1) / tau).exp()
    return (weights * s).sum(1) / weights.sum(1) if len(d) else torch.full((len(q),), -1.0, dtype=torch.float64)


def test_token_alignment_shows_what_each_query_token_found(made: Path, one: ResultsFolder, encoder: BiEncoder, tmp_path: Path) -> None:
    assert main([str(made / "a"), "--out", str(tmp_path), "--examples", "6"]) == 0
    text = (tmp_path / "report.md").read_text()
    change, tau = one.measure("best") - one.measure("fast"), spread_of(encoder).value / SPREAD_IN_TAUS
    part = text.partition("<summary>best against fast</summary>")[2]
    tables = re.findall(r"<summary>(.*?) \((?:gained|lost), .*?\)</summary>\n+((?:\|.*\n)+)", part.partition("<summary>best:tau")[0])
    assert len(tables) == (change != 0).sum() > 0
    for name, table in tables:
        query = next(text for text in QUERIES.values() if text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") == name)
        head, _, *rows = [[cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        shown = re.match(r"(\S+)(?: \(relevant\))?, \d", head[2])
        assert shown is not None
        document = " ".join(HOSTILE[shown[1]]).strip()
        q, d = encoder.encode([query], kind="query"), encoder.encode([document])
        found = read_trec(made / "a" / "runs" / "fast.trec")[next(i for i, text in QUERIES.items() if text == query)].documents
        pool = torch.stack([soft(q.tokens, encoder.encode([" ".join(HOSTILE[d]).strip()]).tokens, tau) for d in found])
        contrast = pool.amax(0) - pool.mean(0)
        assert [float(row[1]) for row in rows] == pytest.approx((contrast / contrast.sum()).tolist(), abs=0.006)
        if document == "":
            assert {row[2] for row in rows} == {"no tokens -1.00"}
            continue
        s, A = q.tokens.float() @ d.tokens.float().T, soft(q.tokens, d.tokens, tau).tolist()
        (tokens,) = encoder.tokenize([document], "document", 512)
        words = [encoder.tokenizer.id_to_token(int(i)) for i, special in zip(tokens.ids, tokens.special) if not special]
        assert [row[2] for row in rows] == [f"{words[j]} {value:.2f}" for j, value in zip(s.argmax(1).tolist(), A)]


def test_texts_that_may_not_be_quoted_are_nowhere(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made / "a"), "--out", str(tmp_path), "--quote", "none"]) == 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "ids alone" in text and "q5" in text and "not ranked" in text
        for secret in ("Merge", "conjugated", "polynomial", "Stata", "join"):
            assert secret not in text
    assert "not among the collections small" in failing(capsys, made / "a", "--quote", "smal")


def test_a_collection_that_moved_or_changed_costs_only_the_texts(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, away = tmp_path / "a", tmp_path / "away"
    shutil.copytree(made / "a", copy)
    result = json.loads((copy / "results.json").read_text())
    result["config"]["dataset"] = str(tmp_path / "gone" / "small")
    (copy / "results.json").write_text(json.dumps(result))
    assert main([str(copy)]) == 0
    assert "no texts: dataset" in capsys.readouterr().err and "Left out: dataset" in (text := (copy / "report.md").read_text()) and "| q" in text
    assert main([str(copy), "--dataset", f"small={made / 'small'}"]) == 0 and "Merge" in (copy / "report.md").read_text()
    shutil.copytree(made / "small", away)
    with (away / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d9", "text": "new"}\n')
    capsys.readouterr()
    assert "another collection than the one that was ranked" in failing(capsys, copy, "--dataset", f"small={away}")
    assert "is no folder" in failing(capsys, copy, "--dataset", f"small={tmp_path / 'nowhere'}")
    (copy / "scores.parquet").unlink()
    assert main([str(copy)]) == 0 and "has no scores.parquet" in (copy / "report.md").read_text()


def test_an_evaluation_of_one_query_and_one_method_has_a_report(made: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(made / "small"), "--methods", "fast", "--limit-queries", "1", "--cold-queries", "0", "--out", str(tmp_path / "out")]
    assert evaluation(arguments) == 0 and main([str(tmp_path / "out")]) == 0
    assert "One method ran" in (tmp_path / "out" / "report.md").read_text()
    assert "fast, the baseline, has nDCG@10" in (text := (tmp_path / "out" / "report.md").read_text().replace("*", "")) and "## Differences" not in text


def test_shares_of_the_roofline_come_from_bench(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"name": "MaxSim", "status": "ok", "slower": 1.0, "of_gemm": 0.71, "of_read": 0.33}
    bench = {"command": "python -m rerank_kernels.bench", "machine": "some CPU", "implementation": "c", "threads": 2}
    (tmp_path / "b.json").write_text(json.dumps(bench | {"tasks": [{"task": "MaxSim, d = 128", "rows": [row, {"name": "peer", "status": "not installed"}]}]}))
    assert main([str(made / "b"), "--out", str(tmp_path), "--bench", str(tmp_path / "b.json"), "--examples", "0"]) == 0
    assert "| MaxSim, d = 128 | MaxSim | 1.00 | - | 0.71 | 0.33 |" in (text := (tmp_path / "report.md").read_text()) and "peer" not in text
    assert "\n### Kernels and the machine's limits\n" in text.partition("## Cost")[2].partition("\n## ")[0]
    (tmp_path / "b.json").write_text("{}")
    assert "--bench" in failing(capsys, made / "b", "--bench", tmp_path / "b.json")


@pytest.fixture
def page(browser: Browser, made: Path, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    assert main([str(made / "a"), "--out", str(tmp_path)]) == 0
    contexts = []

    def opened(**options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.goto((tmp_path / "report.html").as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()


def test_the_page_runs_nothing_of_a_collection_and_sorts_its_tables(page: Callable[..., Page]) -> None:
    tab = page(viewport={"width": 1280, "height": 900})
    assert tab.title() == "Reranking on small" and tab.locator("img").count() == 6
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
    assert tab.evaluate("[...document.images].filter(image => image.alt.length < 20).length") == 0
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert tab.get_by_text("<script>document.title = 'hacked'</script>").count() > 0, "shown as text"
    table = tab.locator("table").first
    names = table.locator("tbody th").all_inner_texts()
    table.get_by_role("button", name="p50 ms").click()
    values = [float(v.replace(",", "")) for v in table.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert values == sorted(values)
    for _ in range(2):
        table.get_by_role("button", name="Holm p").click()
        assert table.locator("tbody tr").last.locator("th").inner_text() == "fast", "what has no value stands last"
    table.get_by_role("button", name="Δ").click()
    values = [float(v.split()[0]) if v != "baseline" else 0.0 for v in table.locator("tbody td:nth-child(3)").all_inner_texts()]
    assert values == sorted(values) and min(values) < 0 < max(values), "by value, not by letter"
    table.get_by_role("button", name="p50 ms").click()
    table.get_by_role("button", name="p50 ms").click()
    values = [float(v.replace(",", "")) for v in table.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert values == sorted(values, reverse=True) and sorted(table.locator("tbody th").all_inner_texts()) == sorted(names)


def test_the_page_reads_on_a_phone_and_without_scripts(page: Callable[..., Page]) -> None:
    tab = page(viewport={"width": 360, "height": 700}, java_script_enabled=False)
    tab.emulate_media(media="print")
    assert all(table.is_visible() for table in tab.locator("table.alignment").all()) and tab.locator("table.alignment").count() > 3, "closed parts print too"
    tab.emulate_media(media="screen")
    assert tab.locator("button").count() == 0 and tab.get_by_text("nDCG@10").first.is_visible()
    summary = tab.locator("summary", has_text="best against fast").first
    part = summary.locator("xpath=..")
    before = part.get_attribute("open")
    summary.click()
    assert part.get_attribute("open") != before, "opens without a script"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    for image in tab.locator("img").all():
        shape = image.bounding_box()
        assert shape is not None and shape["x"] >= 0 and shape["x"] + shape["width"] <= 360
