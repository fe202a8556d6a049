"""A v3 server as a row of an evaluation: the requests, how answers are read, and the messages about bad answers."""

from __future__ import annotations

import email.utils
import json
import math
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rerank_lab.client.endpoint import Endpoint, NoAnswer, check_address, key_from, retry_after
from rerank_lab.client.v3 import KEY, V3
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.journal import file_name
from rerank_lab.eval.settings import parser
from rerank_lab.eval.system import System
from rerank_lab.methods import make_method
from tests.conftest import DOCUMENTS, QUERIES, report_of
from tests.eval.test_eval import failing, load
from tests.serving import KEY as SERVER_KEY
from tests.serving import Server
from tests.standin import Reply, StandIn, error, models, ok, standing_in

SECRET = "sk-very-secret-0123456789"
QUERY, TEXTS = "dot product of two arrays", ["Sort by the values.", "Inner product of two vectors.", "A cat."]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as running:
        yield running


@pytest.fixture
def arguments(beir: Callable[..., Path], tmp_path: Path) -> list[str]:
    return ["--dataset", str(beir()), "--out", str(tmp_path / "out"), "--cold-queries", "0", "--top-k", "4", "--measures", "nDCG@10,P@1", "--methods"]


def endpoint(server: StandIn, method: str = "fast", **options: Any) -> Endpoint:
    return Endpoint(server.url, make_method(method, stage1_top_k=2), model="all-MiniLM-L6-v2", **options)


@pytest.mark.parametrize(
    ("label", "split"),
    [
        ("fast", (None, "fast")),
        ("best:tau=0.05", (None, "best:tau=0.05")),
        ("endpoint:http://127.0.0.1:8000", ("http://127.0.0.1:8000", "fast")),
        ("endpoint:http://127.0.0.1:8000:best", ("http://127.0.0.1:8000", "best")),
        ("endpoint:http://127.0.0.1:8000/:best+cross", ("http://127.0.0.1:8000", "best+cross")),
        ("endpoint:https://api.example.com:standard", ("https://api.example.com", "standard")),
        ("endpoint:https://api.example.com/a/b-c:optimal", ("https://api.example.com/a/b-c", "optimal")),
        ("endpoint:http://[::1]:8000:best", ("http://[::1]:8000", "best")),
        ("endpoint:http://[::1]", ("http://[::1]", "fast")),
    ],
)
def test_a_label_is_an_address_and_a_method(label: str, split: tuple[str | None, str]) -> None:
    assert (System.parse(label).server, System.parse(label).twin) == split


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("endpoint", "endpoint:URL"),
        ("endpoint:127.0.0.1:8000:best", "'127.0.0.1:8000:best' is no http"),
        ("endpoint:ftp://host:8000", "no http"),
        ("endpoint:http://host:70000:best", "'http://host:70000' is no http"),
        ("endpoint:http://host:8000:bset", "'bset' is none that v3 knows; valid: fast, standard, optimal, best, best\\+cross, maxsim$"),
        ("endpoint:http://host:8000:", "'' is none that v3 knows"),
        ("endpoint:http://host:8000:best:tau=0.05", "takes no settings"),
        ("endpoint:http://me:pass@host:8000:best", KEY),
        ("endpoint:http://host:8000/?key=pass", KEY),
    ],
)
def test_a_wrong_label_is_named_with_its_remedy_and_without_a_password(label: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        System.parse(label)
    assert "pass" not in str(raised.value)


def test_labels_make_safe_file_names_that_differ() -> None:
    labels = ["http://a:80:best", "http://a/80:best", "http://a-80:best", "https://a:80:best", "http://[::1]:80:best", "http://a/" + 300 * "b"]
    names = [file_name(f"endpoint:{label}") for label in labels]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"endpoint-[\w.+=-]{1,90}", name) for name in names)
    assert file_name("best:tau=0.05") == "best-tau=0.05" and file_name("best+cross") == "best+cross"


def test_what_is_sent_and_what_a_row_holds(stand_in: StandIn, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = ["fast", "standard", "optimal", "best", "best+cross"]
    remote = [f"endpoint:{stand_in.url}{'' if name == 'fast' else f':{name}'}" for name in local]
    assert main([*arguments, ",".join([*local, *remote]), "--max-tokens-per-doc", "9", "--limit-queries", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == "rerank_lab: small: only the first 3 of 4 judged queries (--limit-queries)\n"

    # One request to check the server, two to warm up, three that count. No other request, and none twice.
    assert len(stand_in.asked) == len(remote) * (1 + 2 + 3) and {path for path, _, _ in stand_in.asked} == {V3}
    assert not any("authorization" in headers for _, headers, _ in stand_in.asked)
    fixed: dict[str, Any] = {"model": "all-MiniLM-L6-v2", "max_tokens_per_doc": 9}
    sent: list[dict[str, Any]] = [
        {"method": "fast"},
        {"method": "standard", "model_cross": "minilm-cross"},
        {"method": "optimal", "model_cross": "minilm-cross", "stage1_top_k": 2},
        {"method": "best", "stage1_top_k": 100},
        {"method": "best", "stage1_top_k": 100, "model_cross": "minilm-cross"},
    ]
    settings = [{k: v for k, v in body.items() if k not in ("query", "documents")} for body in stand_in.bodies]
    assert settings == [fixed | own for own in sent] + [fixed | own for own in sent for _ in range(5)]
    assert stand_in.bodies[-1]["query"] == QUERIES["q3"] and len(stand_in.bodies[-1]["documents"]) == 4

    rows = {row["method"]: row for row in load(tmp_path / "out")["rows"]}
    assert list(rows) == [*local, *remote]
    for ours, theirs in zip(local, remote):
        a, b = rows[ours], rows[theirs]
        assert b["measures"] == a["measures"] and (b["model"], b["model_cross"]) == (a["model"], a["model_cross"])
        assert a["agreement"] is None and b["agreement"] == pytest.approx(
            {"with": ours, "queries": 3, "kendall_tau": 1.0, "overlap@10": 1.0, "max_score_diff": 0.0}, abs=1e-4
        )
        assert b["latency_ms"]["p50"] > 0 and b["docs_per_s"] > 0 and b["tie_rate"] == a["tie_rate"] and b["coverage"] == 1
        unknown = ["flops_per_query", "peak_rss_mb", "phases_ms", "truncated_share", "token_limit"]
        unknown += [f"cold_{name}" for name in ("latency_ms", "phases_ms", "docs_per_s", "peak_rss_mb", "flops_per_query")]
        assert {name: b[name] for name in unknown} == dict.fromkeys(unknown), "a server does not tell, and 0 would be a claim"
        assert a["flops_per_query"] > 0 and a["truncated_share"] > 0
        assert f"{theirs} beside {ours} here, 3 queries: Kendall's tau 1.0000" in report_of(tmp_path / "out")
        assert f"{theirs} beside {ours} here, 3 queries" in " ".join(said.out.split())
    assert rows[remote[2]]["settings"] == {"stage1_top_k": 2, "max_tokens_per_doc": 9} and rows[remote[0]]["settings"] == {"max_tokens_per_doc": 9}
    assert all(len(line) <= 80 for line in said.out.splitlines() if not line.startswith(("Written to", "As a page"))), said.out
    assert re.search(rf"^{remote[0]}\n +0\.\d{{4}} .* -$", said.out, re.MULTILINE), "no figure of its FLOPs, memory or new documents"
    assert f"| {remote[0]} | - | 3 |" in report_of(tmp_path / "out")

    per_query = pd.read_csv(tmp_path / "out" / "per_query.csv")
    columns = ["kendall_tau", "overlap@10", "max_score_diff"]
    assert list(per_query.columns)[-3:] == columns
    assert per_query[per_query["method"].isin(local)][columns].isna().all(axis=None)
    assert (per_query[per_query["method"].isin(remote)][["kendall_tau", "overlap@10"]] == 1).all(axis=None)
    assert load(tmp_path / "out")["config"]["methods"] == [*local, *remote]
    assert len(list((tmp_path / "out" / "runs").glob("endpoint-*.trec"))) == len(remote)


def test_how_far_a_server_that_ranks_otherwise_agrees(stand_in: StandIn, arguments: list[str], tmp_path: Path) -> None:
    """The server reverses the order and subtracts .25 from each score."""

    def turned(answer: dict[str, Any]) -> dict[str, Any]:
        items = answer["results"]
        scores = sorted((item["relevance_score"] - 0.25 for item in items), reverse=True)
        return answer | {"results": [{"index": item["index"], "relevance_score": score} for item, score in zip(items[::-1], scores)]}

    stand_in.alter = turned
    assert main([*arguments, f"fast,endpoint:{stand_in.url}"]) == 0
    ours, theirs = (load(tmp_path / "out")["rows"][i] for i in (0, 1))
    assert theirs["agreement"]["kendall_tau"] == -1 and theirs["agreement"]["overlap@10"] == 1 and theirs["measures"]["nDCG@10"] < ours["measures"]["nDCG@10"]
    shown = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    wide = shown.assign(method=shown["method"].str[:4]).pivot_table(index=["query", "document"], columns="method", values="relevance")
    largest = (wide["fast"] - wide["endp"]).abs().groupby("query").max()
    per_query = pd.read_csv(tmp_path / "out" / "per_query.csv").dropna(subset="max_score_diff").set_index("query")["max_score_diff"]
    assert per_query.to_dict() == pytest.approx(largest.to_dict()) and theirs["agreement"]["max_score_diff"] == pytest.approx(largest.max())


@pytest.mark.parametrize("methods", ["best:tau=0.05,best+cross,endpoint:URL:best,endpoint:URL", "endpoint:URL:best+cross,best"])
def test_without_the_same_method_here_nothing_is_said_of_agreement(stand_in: StandIn, arguments: list[str], tmp_path: Path, methods: str) -> None:
    assert main([*arguments, methods.replace("URL", stand_in.url), "--limit-queries", "2"]) == 0
    assert [row["agreement"] for row in load(tmp_path / "out")["rows"]] == [None] * len(methods.split(","))
    assert " beside " not in report_of(tmp_path / "out").partition("## Trust")[2]


def test_a_run_without_an_endpoint_has_none_of_its_columns_and_one_of_endpoints_alone_runs(stand_in: StandIn, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "fast"]) == 0
    assert "kendall_tau" not in (tmp_path / "out" / "per_query.csv").read_text() and "HTTP" not in report_of(tmp_path / "out")
    assert main([*arguments, f"endpoint:{stand_in.url}:standard,endpoint:{stand_in.url}", "--candidates", "bm25", "--overwrite"]) == 0
    row = load(tmp_path / "out")["rows"][1]
    assert row["vs"]["baseline"] == f"endpoint:{stand_in.url}:standard" and row["model"] == "all-MiniLM-L6-v2"
    assert load(tmp_path / "out")["rows"][0]["model_cross"] == "minilm-cross"
    assert load(tmp_path / "out")["models"]["model_cross"] is None, "loaded though only the server runs it"


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (error(401, f"no {SECRET} here"), UserError, rf"answers 401 to method fast: no \(the key\) here; put its key into {KEY}"),
        (error(403), UserError, KEY),
        (error(404, "model: no such model. Known ids: a, b."), UserError, "Known ids: a, b.; .*'all-MiniLM-L6-v2'"),
        (error(413), UserError, "--top-k"),
        (error(422, [{"loc": ["body", "documents", 3], "msg": "too much", "type": "x"}]), UserError, "body.documents.3: too much;"),
        (error(308, Location=f"https://elsewhere/{SECRET}"), UserError, r"sends on to https://elsewhere/\(the key\): "),
        (error(500, "model x gave a NaN"), ModelError, "answers 500 .*: model x gave a NaN; .*--resume"),
        ((502, {}, b"<h1>Bad\x1b[31m\n gateway</h1>"), ModelError, r"answers 502 .*: <h1>Bad \[31m gateway</h1>; "),
        (ok(f"<html>{SECRET}".encode()), ModelError, r"no JSON but '<html>\(the key\)'"),
        (ok([]), ModelError, "no list under 'results'"),
        (ok({"results": {}}), ModelError, "no list under 'results'"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(stand_in: StandIn, reply: Reply, kind: type[Exception], message: str) -> None:
    stand_in.replies = [reply]
    with pytest.raises(kind, match=message) as raised:
        endpoint(stand_in, key=SECRET).score(QUERY, TEXTS)
    assert stand_in.url in str(raised.value) and SECRET not in str(raised.value)


def items(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"index": index, "relevance_score": score} for index, score in pairs]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (items((0, 0.9), (1, 0.8), (3, 0.7)), r"results\[2\].index 3, where 0 to 2"),
        (items((0, 0.9), (-1, 0.8), (2, 0.7)), r"results\[1\].index -1"),
        (items((0, 0.9), (True, 0.8), (2, 0.7)), r"results\[1\].index True"),
        (items((0, 0.9), ("1", 0.8), (2, 0.7)), r"results\[1\].index '1'"),
        ([{"relevance_score": 1.0}], r"results\[0\].index None"),
        (["x"], r"results\[0\].index None"),
        (items((0, 0.9), (1, 0.8), (1, 0.8)), r"results\[2\].index 1, which stands there twice"),
        (items((0, math.nan), (1, 0.8), (2, 0.7)), r"results\[0\].relevance_score nan"),
        (items((0, math.inf), (1, 0.8), (2, 0.7)), r"results\[0\].relevance_score inf"),
        (items((0, "0.9"), (1, 0.8), (2, 0.7)), r"results\[0\].relevance_score '0.9'"),
        (items((0, None), (1, 0.8), (2, 0.7)), r"results\[0\].relevance_score None"),
        (items((0, True), (1, 0.8), (2, 0.7)), r"results\[0\].relevance_score True"),
        (items((0, 0.7), (1, 0.8), (2, 0.6)), r"results\[1\] above 0.7, the score before it"),
        (items((0, 0.9), (2, 0.8)), "2 results where 3 are due; missing: 1"),
        (items(), "0 results where 3 are due; missing: 0, 1, 2"),
    ],
)
def test_an_answer_that_is_no_ranking_is_no_row(stand_in: StandIn, results: list[Any], message: str) -> None:
    stand_in.replies = [ok({"results": results, "meta": {}})]
    with pytest.raises(ModelError, match=message):
        endpoint(stand_in).score(QUERY, TEXTS)


def test_stage_1_drops_as_many_as_it_should_and_the_method_is_the_one_that_was_asked_for(stand_in: StandIn) -> None:
    optimal = endpoint(stand_in, "optimal", model_cross="minilm-cross")
    ranking = optimal.score(QUERY, TEXTS)
    expected = models().using(make_method("optimal:stage1_top_k=2")).score(QUERY, TEXTS)
    assert ranking.order == expected.order and ranking.relevance.tolist() == pytest.approx(expected.relevance.tolist(), abs=1e-5)
    stand_in.replies = [ok({"results": items((0, 0.9), (1, 0.8), (2, 0.7))})]
    with pytest.raises(ModelError, match="3 results where 2 are due"):
        optimal.score(QUERY, TEXTS)
    stand_in.replies = [ok({"results": items((0, 0.9), (1, 0.8)), "meta": {"method": "fast"}})]
    with pytest.raises(ModelError, match=r"method optimal with meta.method 'fast'"):
        optimal.score(QUERY, TEXTS)
    stand_in.replies = [ok({"results": items((1, 0.5), (0, 0.5), (2, 0))})]
    assert endpoint(stand_in).score(QUERY, TEXTS).order == [1, 0, 2], "the server's own order of equal scores is what a client sees"


def test_429_and_503_are_asked_again_as_the_server_wishes(stand_in: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_lab.client.endpoint.PAUSE", 0.1)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    stand_in.replies = [error(429, Retry_After="7"), error(503, Retry_After="0"), error(503, Retry_After="soon"), error(429, Retry_After="1e-9")]
    asking = endpoint(stand_in)
    assert asking.score(QUERY, TEXTS).order[0] == 1
    assert [wait for wait in waits if wait] == pytest.approx([7, 0.2, 0.4, 0.1])
    stand_in.replies = [error(429)]
    asking.score(QUERY, TEXTS)
    assert [record.getMessage().partition(" answers ")[2][:16] for record in caplog.records] == ["429: asked again"], "said once a server"


def test_retry_after_is_seconds_or_a_date_to_come() -> None:
    known: dict[str | None, float | None] = {"3": 3, "0.5": 0.5, "inf": math.inf, "0": None, "-1": None, "nan": None, "soon": None, None: None}
    assert {header: retry_after(header) for header in known} == known
    assert retry_after("Wed, 01 Jan 2020 00:00:00 GMT") is None
    assert 58 < (retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) or 0) <= 60


def test_waiting_is_bounded(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_lab.client.endpoint.PAUSE", 0.1)
    stand_in.replies = [error(429, Retry_After="3600")]
    with pytest.raises(ModelError, match=r"answers 429 .*asked again for 60 s at most.*--resume"):
        endpoint(stand_in).score(QUERY, TEXTS)
    assert len(stand_in.asked) == 1
    stand_in.replies = [error(503, Retry_After="0.1") for _ in range(20)]
    with pytest.raises(ModelError, match="answers 503"):
        endpoint(stand_in, patience=0.35).score(QUERY, TEXTS)
    assert len(stand_in.asked) == 1 + 4, "0.3 s of waiting, and the fourth would have been too much"


def test_one_connection_serves_all_and_one_that_breaks_is_tried_once_more(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that cannot reach this machine's loopback
    asking = endpoint(stand_in)
    for _ in range(3):
        asking.score(QUERY, TEXTS)
    assert stand_in.connections == 1
    stand_in.replies = [None]
    assert asking.score(QUERY, TEXTS).order[0] == 1 and stand_in.connections == 2
    stand_in.replies = [None, None]
    with pytest.raises(NoAnswer, match=r"does not answer: .*--resume"):
        asking.score(QUERY, TEXTS)


def test_a_server_that_is_silent_or_gone(stand_in: StandIn) -> None:
    stand_in.pause = 1.0
    with pytest.raises(NoAnswer, match="timed out"):
        endpoint(stand_in, timeout=0.1).score(QUERY, TEXTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"{gone} does not answer: .*refused.*start the server"):
        Endpoint(gone, make_method("fast"), model="m").check()


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("endpoint:URL:bset", [], "'bset' is none that v3 knows"),
        ("endpoint:URL:best,endpoint:URL:wrost", [], "'wrost'"),
        ("endpoint:URL:standard", ["--model-cross", "none"], "needs a cross-encoder, and --model-cross is none"),
        ("fast,endpoint:URL", ["--fuse-first-stage"], "leave out --fuse-first-stage"),
        ("fast,endpoint:http://127.0.0.1:9", [], "127.0.0.1:9 does not answer"),
        ("fast,endpoint:URL", ["--baseline", "endpoint:URL:best"], "--baseline"),
    ],
)
def test_wrong_input_is_known_before_any_work(
    stand_in: StandIn, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, more: list[str], message: str
) -> None:
    given = [part.replace("URL", stand_in.url) for part in (method, *more)]
    assert message in failing(capsys, *arguments, *given)
    assert not (tmp_path / "out").exists() and not stand_in.asked


def test_the_key_goes_to_the_server_and_nowhere_else(
    stand_in: StandIn, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    assert main([*arguments, f"fast,endpoint:{stand_in.url}"]) == 0
    assert {headers["authorization"] for _, headers, _ in stand_in.asked} == {f"Bearer {SECRET}"}
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    stand_in.replies = [error(401, f"unknown key {SECRET}")]
    assert "unknown key (the key)" in failing(capsys, *arguments, f"endpoint:{stand_in.url}", "--overwrite")
    monkeypatch.setenv(KEY, "two words-secret")
    assert KEY in (message := failing(capsys, *arguments, f"endpoint:{stand_in.url}", "--overwrite")) and "words" not in message
    monkeypatch.setenv(KEY, " ")
    assert key_from(KEY) is None


def test_resume_asks_only_for_what_is_missing(stand_in: StandIn, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*arguments, f"fast,endpoint:{stand_in.url}/v/1"]
    healthy = [ok({"results": items(*((i, 1 - i / 8) for i in range(n)))}) for n in (1, 4, 4, 4)]  # one to check, two to warm up, one that counts
    stand_in.replies = [*healthy, error(500, "out of memory")]
    assert main(run) == 1
    assert "out of memory" in (said := capsys.readouterr().err) and "--resume" in said and "Traceback" not in said
    assert {path for path, _, _ in stand_in.asked} == {"/v/1" + V3}
    kept = next((tmp_path / "out" / "partial").glob("endpoint-*.jsonl")).read_text()
    assert len(kept.splitlines()) == 1 and '"flops": null' in kept and '"peak_rss_mb": null' in kept
    stand_in.asked.clear()
    assert main([*run, "--resume"]) == 0
    assert {body["query"] for body in stand_in.bodies[1:]} == {*QUERIES.values()} - {QUERIES[json.loads(kept)["query"]]}
    assert load(tmp_path / "out")["rows"][1]["timed_queries"] == 4
    assert main([*run, "--resume"]) == 0 and "Kendall's tau" in capsys.readouterr().out, "a finished run is shown whole, the server unasked"
    assert len(stand_in.asked) == 1 + 2 + 3


def test_without_httpx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"pip install 'rerank_lab\[server\]'"):
        Endpoint("http://127.0.0.1:8000", make_method("fast"), model="m")


def test_list_and_help_tell_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "endpoint:URL[:M]" in (text := capsys.readouterr().out) and KEY in text
    assert "endpoint:http://host:8000:best" in parser().format_help() and "endpoint:URL[:METHOD]" in parser().format_help()


def test_an_address_for_a_server_alone() -> None:
    assert check_address("https://host/a/", "URL_A") == "https://host/a"
    for wrong in ("host:8000", "http://host:8000:best", "http://", "http://host:99999"):
        with pytest.raises(UserError, match=r"^URL_A: .* is no http"):
            check_address(wrong, "URL_A")


def test_the_real_server_agrees_with_the_same_methods_here(server: Server, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SERVER_KEY)
    names = ["fast", "standard", "optimal", "best", "best+cross"]
    assert main([*arguments, ",".join([*names, *(f"endpoint:{server.url}:{name}" for name in names)])]) == 0
    for row in load(tmp_path / "out")["rows"][5:]:
        agreed = row["agreement"]
        assert (agreed["queries"], agreed["kendall_tau"], agreed["overlap@10"]) == (4, 1.0, 1.0) and agreed["max_score_diff"] < 1e-4, row["method"]
    assert len(DOCUMENTS) > 4, "top-k must drop some"
