"""A method in one file, registered only by this test, works everywhere: rank, evaluation, server, page and report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import numpy as np
import pytest

from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.eval import results
from rerank_lab.eval.__main__ import main
from rerank_lab.methods import METHODS, labels
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.kinds import load_cross_encoder
from rerank_lab.report.figures import looks
from rerank_lab.server.app import page_text
from tests.conftest import ROOT, report_of
from tests.methods.test_methods import QUERY, TEXTS, cosines, raw_scores, z
from tests.server.test_server_page import column, fill, opened, run
from tests.serving import Server, serving
from tests.toys.method import Brief

if TYPE_CHECKING:
    from playwright.sync_api import Browser

V3 = "/api/v3/inference/reranker"
REGISTERED = f"""
import sys
sys.path.append({str(ROOT)!r})
from rerank_lab.methods import METHODS
from tests.toys.method import Brief
METHODS[Brief.name] = Brief
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Brief.name, Brief)


@pytest.fixture(scope="module")
def serves() -> Iterator[Server]:
    with serving(code=REGISTERED) as running:
        yield running


def expected(encoder: BiEncoder, brevity: float) -> np.ndarray:
    words = np.array([len(text.split()) for text in TEXTS])
    return z(cosines(encoder)) - brevity * z(np.log1p(words))


def test_it_ranks(reranker: Reranker, encoder: BiEncoder) -> None:
    np.testing.assert_allclose(raw_scores(reranker.using("brief")), expected(encoder, 0.5), atol=1e-4)
    np.testing.assert_allclose(raw_scores(reranker.using("brief:brevity=-2")), expected(encoder, -2), atol=1e-4)
    assert len(reranker.using("brief:stage1_top_k=3").rank(QUERY, TEXTS)) == 3
    crossed = Reranker(method="brief", model_cross="minilm-cross", device="cpu")
    logits = raw_scores(Reranker(None, "standard", load_cross_encoder("minilm-cross", encoder=encoder, device="cpu"), device="cpu"))
    np.testing.assert_allclose(raw_scores(crossed), expected(encoder, 0.5) + z(logits), atol=1e-3)
    for spec, message in (
        ("brief:brevity=11", "brief: brevity must be a finite number from -10 to 10, not 11.0"),
        ("brief:length=1", "valid: stage1_top_k, brevity"),
        ("long", "valid: fast, standard, optimal, best, maxsim, brief"),
    ):
        with pytest.raises(UserError, match=message):
            reranker.using(spec)


def test_it_is_evaluated_swept_and_reported(beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = tmp_path / "out", ["fast", "brief", "brief:brevity=2"]
    sweeps = ["--sweep", "brevity=-1,0,0.5", "--sweep", "stage1_top_k=1,3"]
    assert main(["--dataset", str(beir()), "--methods", ",".join(rows), *sweeps, "--top-k", "4", "--cold-queries", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{label}  " in printed for label in rows)
    result = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in result["rows"]] == rows
    assert result["rows"][2]["settings"] == {"stage1_top_k": 100, "brevity": 2.0}
    points = {(point["setting"], point["value"], point["method"]) for point in result["sweeps"]}
    assert points == {(name, value, label) for name, values in (("brevity", (-1, 0, 0.5)), ("stage1_top_k", (1, 3))) for value in values for label in rows[1:]}
    report = report_of(out)
    assert all(f"| {label} |" in report for label in rows) and "brevity" in report
    assert any("brevity" in figure.name for figure in (out / "figures").iterdir())


def test_its_looks_come_next_and_change_no_others() -> None:
    with_it = looks({})
    assert [*with_it] == [*labels()] == ["fast", "standard", "optimal", "best", "best+cross", "maxsim", "brief", "brief+cross"]
    assert len({(look["color"], look["marker"]) for look in with_it.values()}) == len(with_it)
    del METHODS[Brief.name]
    row = results.parse(json.loads((ROOT / "reports/baseline/numpydoc.json").read_text())).rows[0]
    assert looks({"brief": replace(row, label="brief")}) == {label: look for label, look in with_it.items() if label != "brief+cross"}


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert f"brief {Brief.about}; needs a bi-encoder; stage1_top_k=100, brevity=0.5" in listed
    assert f"brief+cross {Brief.about_cross}" in listed


@pytest.mark.parametrize("more", [{}, {"stage1_top_k": 3}, {"model_cross": "minilm-cross"}], ids=["defaults", "stage 1", "crossed"])
def test_it_is_served(serves: Server, reranker: Reranker, more: dict[str, Any]) -> None:
    status, answer, _ = serves.post({"model": "all-MiniLM-L6-v2", "method": "brief", "query": QUERY, "documents": TEXTS} | more)
    assert status == 200 and answer["meta"] == {"method": "brief", "deployed_model_id": "all-MiniLM-L6-v2", "stage1_top_k": 100} | more
    local = Reranker(method="brief", model_cross="minilm-cross", device="cpu") if "model_cross" in more else reranker
    ranked = local.using(f"brief:stage1_top_k={more.get('stage1_top_k', 100)}").rank(QUERY, TEXTS)
    assert [result["index"] for result in answer["results"]] == [result.index for result in ranked]
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx([result.relevance_score for result in ranked], abs=1e-5)


def test_the_contract_holds_it(serves: Server) -> None:
    document = serves.get("/openapi.json")[1]
    assert "by one of six methods." in document["info"]["description"]
    content = document["paths"][V3]["post"]["requestBody"]["content"]["application/json"]
    about = content["schema"]["description"]
    assert "Cross-encoder: required for standard and optimal, joins best and brief where given, ignored for fast and maxsim." in about
    way = content["schema"]["anyOf"][-1]
    assert way["properties"]["stage1_top_k"]["description"] == "Documents that stage 1 of optimal, best, maxsim and brief keeps."
    assert way["properties"]["method"] == {"const": "brief"} and "brevity" not in way["properties"]
    example = content["examples"]["brief"]["value"]
    assert serves.post(example)[0] == 200
    for body, good in (
        (example, True),
        (example | {"model_cross": "minilm-cross"}, True),
        (example | {"model_cross": "nobody"}, False),
        (example | {"model": "minilm-cross"}, False),
        (example | {"method": "brie"}, False),
        (example | {"stage1_top_k": 0}, False),
    ):
        assert jsonschema_rs.is_valid(content["schema"], body) == good == (serves.post(body)[0] == 200)
    _, refused, _ = serves.post(example | {"method": "brie"})
    message = "Input should be 'fast', 'standard', 'optimal', 'best', 'maxsim' or 'brief'"
    assert refused == {"detail": [{"loc": ["body", "method"], "msg": message, "type": "literal_error"}]}


def test_no_sentence_ends_the_element_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts, hostile = page_text().count("</script>"), '</script><script>alert(1)</script> & "more"'
    monkeypatch.setattr(Brief, "about", hostile)
    assert page_text().count("</script>") == scripts
    found = re.search(r'<script id="methods" type="application/json">(.*)</script>', page_text())
    assert found is not None and json.loads(found[1])[-1]["about"] == hostile


def test_the_page_shows_and_runs_it(browser: Browser, serves: Server) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        opened(page, serves)
        assert page.title() == "rerank_lab: six methods side by side"
        assert page.inner_text("#brief .about") == Brief.about
        assert page.locator("#tabs input").evaluate_all("fields => fields.map((field) => field.value)") == [*METHODS]
        fill(page)
        page.fill("#stage1_top_k", "3")
        run(page)
        apart = [row["score"] for row in column(page, "brief")]
        assert len(apart) == 3
        page.check("#brief_cross")
        run(page)
        page.check("input[name=shown][value=brief]")
        assert json.loads(page.inner_text("#answer"))["meta"]["model_cross"] == "minilm-cross"
        assert [row["score"] for row in column(page, "brief")] != apart and len(column(page, "best")) == 3
