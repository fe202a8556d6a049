"""The cost model computes what its formulas say and nothing negative, and its report says for every number how it was found."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rerank_lab.datasets import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.models.base import Detail
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import scale as script
import scale_measure
import scale_model as model
from scale_model import ScaleCase

KINDS = re.compile(r"measured|extrapolated|assumed|\(settings?\)|\(a setting\)")


def encoding(seconds: float) -> dict[str, Any]:
    """Encoding a document: 1 ms (tokens: 2 ms, states: 11 ms) plus `seconds` for each token, and its bytes."""
    lines = {"POOLED": (0.001, 2000, 0), "TOKENS": (0.002, 2000, 256), "STATES": (0.011, 2000, 4864)}
    return {name: [[n, fixed + seconds * n, size + each * n] for n in (100, 150, 250)] for name, (fixed, size, each) in lines.items()}


def index(files: int, each: int, mapped: int) -> dict[str, Any]:
    """Opening an index: 100 µs and 1,000 bytes for each file, 1 µs and 200 bytes for each key; 10 µs for listing a file."""
    keys = files * each
    opening = {"seconds": 1e-4 * files + 1e-6 * keys, "bytes": 1000 * files + 200 * keys, "list_seconds": 1e-5 * files}
    return {"files": files, "documents": keys, **opening, "mapped": mapped, "map_bytes": 5000 * mapped, "limit": 65_530, "maps_before": 530}


def made(documents: int, files: int) -> dict[str, Any]:
    read = files * 1e6
    return {
        "documents": documents, "files": files, "file_bytes": 1e6, "seconds": 1e-4 * files + 1e-6 * documents, "bytes": 1000 * files + 200 * documents,
        "first_bytes": read, "first_seconds": read * 1e-9, "warm_seconds": 0.001, "cold_bytes": 5e5,
    }  # fmt: skip


FOUND: dict[str, Any] = {
    "texts": {"tokens": 200.0, "pairs": 1600, "parts": [{"opened": 1, "seconds": 0.0081, "bytes": 1000.0}, {"opened": 101, "seconds": 0.0181, "bytes": 1010.0}]},
    "encode fp32": encoding(1e-4), "encode bf16": encoding(5e-5),
    **{f"rank {p}": {m: [[25, 0.0075 * k], [100, 0.015 * k]] for k, m in enumerate(model.METHODS, 1)} for p in ("fp32", "bf16")},
    **{f"actor {p} {m}": {"seconds": 5.0, "own_mb": 400.0, "peak_mb": 800.0} for p in ("fp32", "bf16") for m in ("best", "standard")},
    "driver": {step: [1e-5 * n, 100.0 * n, 150.0 * n] for n, step in enumerate((*model.STEPS, "candidates, Parquet"), 1)} | {"journal_bytes": 6000.0},
    "index 16 8192": index(16, 8192, 16), "index 2000 2": index(2000, 2, 2000), "index 66000 2": index(66_000, 2, 65_000),
    "made 4096": made(4096, 1), "made 1000000": made(1_000_000, 245),
    "encoded 1000 bf16 TOKENS": {"documents": 1000, "tokens": 64.0, "seconds": 6.0, "wall": 9.0, "bytes": 18_384_000, "files": 2},
    "ray 1": {"documents": 1000, "tokens": 100.0, "wall": 60.0, "encoders": [26.0]},
    "ray 2": {"documents": 1000, "tokens": 100.0, "wall": 50.0, "encoders": [14.0, 15.5]},
}  # fmt: skip
F = model.figures(FOUND)
CASE = ScaleCase(documents=1024, queries=32, workers=2, method="best", precision="fp32", workers_a_node=8, gbits=8.0, node_gb=10.0)
ALL = [replace(CASE, method=m, precision=p, documents=d, queries=q) for m in model.METHODS for p in ("fp32", "bf16") for d in (100, 10**8) for q in (1, 10**6)]


def test_the_figures_are_what_was_measured() -> None:
    assert F.encode["fp32"][Detail.STATES] == pytest.approx((0.011, 1e-4)) and F.encode["bf16"][Detail.TOKENS] == pytest.approx((0.002, 5e-5))
    assert F.vectors[Detail.TOKENS] == pytest.approx((2000, 256)) and F.rank["fp32"]["best"] == pytest.approx((0.010, 0.0001 * 2))
    assert (F.text_open, F.text_seconds, F.text_bytes) == pytest.approx((1e-4, 5e-6, 1000))
    assert (*F.open_seconds, *F.open_bytes) == pytest.approx((1e-4, 1e-6, 1000, 200), rel=0.02)  # a key's figure includes a share of the few files
    assert (F.list_seconds, F.check_seconds, F.map_bytes, F.maps) == pytest.approx((1e-5, 1e-9, 5000, 65_000))
    assert model.fitted([[25, 0.011], [100, 0.009]]) == pytest.approx((0.010, 0.0)), "noise makes no work cheaper than less of it"


def test_times_are_those_of_the_formulas() -> None:
    """1,024 documents in 2 shards, with 26.6 kB for a document, computed by hand."""
    taken = model.times(F, CASE)
    shard = 512 * (2000 + 200 * 256)
    new = 2 * (1 - 0.5**1600)
    assert taken["encode"] == pytest.approx(1024 * (0.002 + 0.02) / 2)
    assert taken["listing"] == pytest.approx(2 * 2 / 2 * 1e-5 / 2)
    assert taken["rank"] == pytest.approx(32 * (0.010 + 100 * 0.0002) / 2)
    assert taken["texts"] == pytest.approx(32 * (100 * 5e-6 + 1 / 16 * 1e-4) / 2)
    assert taken["checksums"] == pytest.approx(new * shard * 1e-9)
    assert taken["driver"] == pytest.approx(1024 * (1e-5 + 2e-5) + 32 * (3 + 4 + 5 + 6 + 7) * 1e-5)
    assert taken["start"] == pytest.approx(2 * 5 + 2e-4 + 1024e-6, rel=1e-3)
    assert taken["network, encode"] == pytest.approx(1024 * (1000 + 53_200) / 1e9)
    one = new * shard + (1600 - new) * 53_200 + 1600 * 1000
    assert taken["network, rank"] == pytest.approx(2 * one / 1e9), "both workers are on one node"
    assert model.network(F, CASE) == pytest.approx((1024 * 54_200, 2 * one))
    assert model.times(F, replace(CASE, workers=16))["network, encode"] == pytest.approx(1024 * (1000 + 53_200) / 2 / 1e9), "half on each of two nodes"
    assert model.times(F, replace(CASE, workers=12))["network, encode"] == pytest.approx(1024 * (1000 + 53_200) * 8 / 12 / 1e9), "the fuller of two nodes"
    assert model.times(F, replace(CASE, documents=4096))["listing"] == pytest.approx(8 * 8 / 2 * 1e-5 / 2)


def test_memory_and_limits_are_those_of_the_formulas() -> None:
    assert model.worker_bytes(F, CASE) == pytest.approx(800e6 + 2 * 1000 + 1024 * 200 + 2 * 5000, rel=1e-6)
    assert model.driver_bytes(F, CASE) == pytest.approx(1024 * 100 + 32 * 100 * (3 + 4 + 6) + max(1024 * 300, 32 * 1050))
    whole = replace(CASE, documents=10**8, queries=10**6, method="standard")
    assert model.files(10**8, Detail.STATES) == 1_562_500 and model.mapped(F, whole) == 32_768, "the rest was let go"
    assert model.mapped(F, replace(whole, documents=64 * 1000, queries=1)) == 500, "who encodes maps what it writes"
    assert model.times(F, replace(whole, workers=64))["listing"] == pytest.approx(100 / 64 * 1_562_500 / 2 * 1e-5), "once a hundredth"
    assert model.strain(F, whole)["memory of a node"] == pytest.approx(2 * model.worker_bytes(F, whole) / 10e9)
    assert model.pair_bytes(F, "optimal") == (model.pair_bytes(F, "standard") + model.pair_bytes(F, "fast")) / 2 == (2000 + 200 * 4864 + 2000) / 2


def test_random_draws_meet_each_shard_once() -> None:
    assert [model.touched(n, d) for n, d in ((1, 5), (2, 1), (2, 2), (4, 2))] == pytest.approx([1, 1, 1.5, 1.75])
    assert model.touched(1_562_500, 3) == pytest.approx(3, rel=1e-5) and model.touched(100, 10**6) == pytest.approx(100)


def test_more_workers_are_never_slower() -> None:
    """Compares the parts that workers compute. The network counts too if nodes are added, since the workers of a node share its network."""
    for case in ALL:
        for workers in (1, 2, 8, 64):
            few, many = (model.times(F, replace(case, workers=w)) for w in (workers, 2 * workers))
            assert all(many[part] <= few[part] * (1 + 1e-9) for part in few if not part.startswith("network")), (case, workers)
            assert many["encode"] == pytest.approx(few["encode"] / 2)
            if workers >= case.workers_a_node:
                assert sum(many.values()) <= sum(few.values()) * (1 + 1e-9), (case, workers)


def test_nothing_is_negative_and_more_documents_never_take_less() -> None:
    def amounts(case: ScaleCase) -> list[float]:
        return [
            model.worker_bytes(F, case),
            model.driver_bytes(F, case),
            *model.network(F, case),
            model.times(F, case)["encode"],
            model.store_bytes(F, case.documents, case.detail),
        ]

    for case in ALL:
        less, more = amounts(case), amounts(replace(case, documents=2 * case.documents))
        assert all(0 < a <= b * (1 + 1e-9) for a, b in zip(less, more)), case
        assert min(model.times(F, case).values()) >= 0 and min(model.strain(F, case).values()) > 0


def test_the_bottleneck_is_the_largest_part_and_what_does_not_fit() -> None:
    small = replace(CASE, queries=10**5, documents=100)
    assert model.bottleneck(F, small)[0] == "-" and model.bottleneck(F, small)[1].startswith("rank ")
    over, slowest = model.bottleneck(F, replace(CASE, documents=10**8))
    assert over.startswith("memory of a node 4.") and "memory of the driver 4.0 ×" in over and re.fullmatch(r"encode \d\d %", slowest)


def page(found: dict[str, Any] = FOUND) -> str:
    about = {"dataset": "small", "commit": "abc", "cpu": "a processor", "torch": "2", "kernels": "cpu"}
    return script.report(found, replace(CASE, documents=10**8, queries=10**6, node_gb=256), about)


def unmarked(text: str) -> list[str]:
    """Sentences and rows with a number that nothing calls measured, extrapolated or assumed: not they, not their heading, not their columns."""
    odd, heading, columns = [], "", ""
    for line in text.partition("\n## ")[2].splitlines():
        if line.startswith("#") or not heading:
            heading = line or heading
            continue
        columns = (columns or line) if line.startswith("|") else ""
        cells = columns.split("|")[2:-1]
        labelled = bool(cells) and all(KINDS.search(cell) for cell in cells)
        for sentence in [line] if columns else re.split(r"(?<=[.:;]) ", line):
            plain = re.sub(r"`[^`]*`|fp32|bf16|int8|^\d\.$", "", sentence)
            if re.search(r"\d", plain) and not (KINDS.search(sentence) or KINDS.search(heading) or labelled):
                odd.append(sentence)
    return odd


def test_every_number_of_the_report_is_called_what_it_is() -> None:
    text = page()
    assert unmarked(text) == []
    sections = re.findall(r"^## (.*)", text, re.MULTILINE)
    for name in sections:
        bare = name.partition(" (")[0]
        if bare != name and bare != "Assumptions":  # its sentences say it too
            assert unmarked(text.replace(f"## {name}", f"## {bare}")), f"{name} says what its numbers are, and nothing else does"
    assert unmarked(text.replace("predicted (extrapolated)", "predicted")) and unmarked(text.replace("(extrapolated)", ""))
    assert len(sections) == len(set(sections)) == 8


def test_the_report_shows_what_the_model_says() -> None:
    text = page()
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line for line in text.splitlines() if line.startswith("|")}
    for method in model.METHODS:
        for precision in ("fp32", "bf16"):
            for workers in (1, 8, 64):
                case = replace(CASE, documents=10**8, queries=10**6, node_gb=256, method=method, precision=precision, workers=workers)
                row = rows[f"{method}, {precision}", str(workers)]
                assert script.duration(model.times(F, case)["encode"]) in row and model.bottleneck(F, case)[1] in row
    assert "| 1,000 documents encoded, bf16, TOKENS | 5.2 s | 6 s | 1.15 |" in text, "1,000 documents of 64 tokens at 2 ms and 50 µs a token"
    assert "| 1,000 documents, STATES, on Ray: the busiest worker of 2 | 15.5 s | 15.5 s | 1.00 |" in text, "5 s to start, half of 1,000 documents at 21 ms"
    assert "2 for 14 and 16 s (measured" in text and "of 65,000 that the system lets it (measured)" in text
    assert "nan" not in text and "{" not in text and str(Path.home()) not in text


def test_amounts_are_in_units_that_people_use() -> None:
    assert [script.duration(s) for s in (0.5, 12, 150, 7300, 200_000, 5e6)] == ["0.5 s", "12 s", "2.5 min", "2 h", "2.3 days", "58 days"]
    assert [script.size(b) for b in (12, 1500, 2e9, 35e9, 5.8e12, 1.07e14)] == ["12 B", "1.5 kB", "2 GB", "35 GB", "5.8 TB", "107 TB"]
    assert [script.whole(n) for n in (64_252, 32_897_024, 999)] == ["64,000", "33 million", "1,000"]


@pytest.fixture
def run(beir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs the command with prepared results of its sections. Returns its exit code, and the sections that it measured."""
    asked: list[str] = []
    monkeypatch.setattr(script, "sections", lambda s: list(FOUND))
    given = ["--work", str(tmp_path / "work"), "--dataset", str(beir()), "--out", str(tmp_path / "scale.md"), "--largest", "10000"]

    def call(*flags: str, stop: str = "") -> tuple[int, list[str]]:
        def found_by(s: Any, section: str) -> Any:
            if section == stop:
                raise UserError(f"{section} ended")
            asked.append(section)
            return FOUND[section]

        monkeypatch.setattr(script, "found_by", found_by)
        asked.clear()
        return script.main([*given, *flags]), list(asked)

    return call


def test_what_was_measured_is_kept(run: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    names = list(FOUND)
    assert run(stop="driver") == (2, names[: names.index("driver")]) and not (tmp_path / "scale.md").exists()
    assert run() == (0, names[names.index("driver") :]) and unmarked((tmp_path / "scale.md").read_text()) == []
    assert run("--gbits", "100") == (0, []) and "100 Gbit/s" in (tmp_path / "scale.md").read_text()
    assert run("--fresh") == (0, names)
    assert run("--quick") == (0, names), "figures of small sizes are not those of a run"


def test_a_disk_that_is_too_small_is_refused(
    run: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    assert run() == (2, []) and "1.0 GB free and 2 GB are needed" in capsys.readouterr().err
    assert run("--largest", "1000000") == (2, []) and "20 GB are needed" in capsys.readouterr().err


def test_sections_measure(tmp_path: Path) -> None:
    s = model.ScaleSettings(str(tmp_path), "numpydoc", 10_000, True)
    scale_measure.tiny(s, "3", "4")
    found = scale_measure.index(s, "3", "4")
    assert (found["files"], found["documents"], found["mapped"]) == (3, 12, 3) and min(found["seconds"], found["list_seconds"], found["limit"]) > 0
    with pytest.raises(UserError, match="'made x' ended with 1"):
        script.found_by(s, "made x")
    scale_measure.beir(tmp_path / "two", {"d1": "one", "d2": "two"}, {"q1": "what", "q2": "which", "q3": "who"})
    assert load_dataset(str(tmp_path / "two")).qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d1": 1}}
    names = script.sections(s)
    assert {name.split(" ")[0] for name in names} <= set(scale_measure.SECTIONS) and len(names) == len(set(names))
    assert json.loads(json.dumps(FOUND)) == FOUND
