"""Prompts, dimensions and an instruction that a person asks for in place of what a model's folder says: API, command line, TOML, grid, server, results, report."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.eval import grid
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Overrides
from rerank_lab.models.kinds import described, load_bi_encoder, load_cross_encoder
from rerank_lab.server.__main__ import OVERRIDES, overrides
from rerank_lab.server.fleet import Fleet
from tests.conftest import report_of
from tests.models.checkpoints import bi_encoder, cross_encoder, st_about

QUERY, TEXTS = "complex dot product", ["Return the dot product of two vectors.", "Sort an array.", ""]
PROMPTS = {"query_prompt": "query: ", "document_prompt": "passage: "}
ASKED = Overrides("query: ", "passage: ")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A bi-encoder whose folder has no prompts."""
    return bi_encoder(tmp_path / "plain", "Normalize")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The same weights with prompts and dimensions in its folder."""
    return bi_encoder(tmp_path / "stored", "Normalize", about=st_about(prompts={"query": "query: ", "document": "passage: "}, truncate_dim=12))


def scores(model: Any, method: str = "fast", **options: Any) -> torch.Tensor:
    ranking = Reranker(model, method, device="cpu", **options).score(QUERY, TEXTS)
    return ranking.scores[torch.tensor(ranking.order).argsort()]


@pytest.mark.parametrize("method", ["fast", "best", "maxsim"])
def test_what_is_asked_for_is_what_a_folder_would_say(plain: Path, stored: Path, method: str) -> None:
    asked = scores(plain, method=method, **PROMPTS, truncate_dim=12)
    assert torch.equal(asked, scores(stored, method=method))
    assert not torch.equal(asked, scores(plain, method=method))
    assert torch.equal(scores(stored, method=method, query_prompt="", document_prompt="", truncate_dim=32), scores(plain, method=method))


def test_documents_of_each_prompt_have_vectors_of_their_own(plain: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys = {Reranker(plain, "fast", device="cpu", cache_dir=cache, **asked).encoder.key() for asked in ({}, {"document_prompt": "a"}, {"truncate_dim": 8})}  # type: ignore[union-attr]
    assert len(keys) == 3
    first = scores(plain, cache_dir=cache)
    assert not torch.equal(scores(plain, cache_dir=cache, document_prompt="passage: "), first) and torch.equal(scores(plain, cache_dir=cache), first)
    assert load_bi_encoder(plain, device="cpu", overrides=Overrides(query_prompt="q: ")).key() == load_bi_encoder(plain, device="cpu").key()


def test_a_query_of_another_prompt_is_not_taken_from_the_cache(plain: Path, tmp_path: Path) -> None:
    vectors = [
        Reranker(plain, "fast", device="cpu", cache_dir=tmp_path / "cache", query_prompt=prompt).pooled([QUERY], kind="query") for prompt in (None, "", "q: ")
    ]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_prompt": 3}, "query_prompt must be a string"),
        ({"document_prompt": "\ud800"}, "document_prompt must be a string"),
        ({"truncate_dim": 0}, "truncate_dim must be at least 1"),
        ({"truncate_dim": True}, "truncate_dim must be a whole number"),
        ({"instruction": b"x"}, "instruction must be a string"),
        ({"model_cross": "minilm-cross", "method": "standard", "instruction": "rank"}, "'minilm-cross' takes no instruction"),
        ({"instruction": "rank"}, "instruction: no model is loaded here that reads it; name one as model_cross"),
        ({"truncate_dim": 33}, "truncate_dim 33 keeps more components than its vectors have, 32"),
        (
            {"document_prompt": "one two three four five: ", "max_tokens_per_doc": 6},
            "its document prompt takes 6 tokens, and 6 are read of prompt and text together",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores(plain, **options)


def test_a_loaded_model_reads_as_it_was_loaded(plain: Path) -> None:
    encoder = load_bi_encoder(plain, device="cpu", overrides=ASKED)
    assert torch.equal(scores(encoder), scores(plain, **PROMPTS))
    with pytest.raises(UserError, match="query_prompt: no model is loaded here that reads it; model is loaded already: give it as overrides"):
        scores(encoder, **PROMPTS)
    with pytest.raises(UserError, match="query_prompt: no model is loaded here that reads it; name one as model"):
        scores(None, method="standard", model_cross="minilm-cross", query_prompt="q: ")


def test_a_prompt_that_is_taken_away_is_told(stored: Path) -> None:
    reading = load_bi_encoder(stored, device="cpu", overrides=Overrides(query_prompt="")).reading()
    assert json.loads(reading) == {"truncate_dim": 12, "query_prompt": "", "document_prompt": "passage: "}


def test_an_instruction_stands_where_the_folder_has_its_prompt(tmp_path: Path) -> None:
    asked = cross_encoder(tmp_path / "a", about=st_about(model_type="CrossEncoder", prompts={"query": "Find: "}, default_prompt_name="query"))
    bare = cross_encoder(tmp_path / "b")
    found = {text: scores(None, method="standard", model_cross=asked, instruction=text) for text in (None, "Find: ", "", "Other: ")}
    assert torch.equal(found[None], found["Find: "]) and torch.equal(found[""], scores(None, method="standard", model_cross=bare))
    assert not torch.equal(found["Other: "], found[None])
    with pytest.raises(UserError, match="takes no instruction"):
        load_cross_encoder(bare, device="cpu", overrides=Overrides(instruction="x"))
    prints = {load_cross_encoder(asked, device="cpu", overrides=Overrides(instruction=text)).fingerprint for text in (None, "Other: ")}
    assert len(prints) == 2


def test_minilm_cross_is_not_changed_by_the_prompts_of_the_bi_encoder() -> None:
    found = [scores("all-MiniLM-L6-v2", method="standard", model_cross="minilm-cross", query_prompt=prompt) for prompt in (None, "query: ")]
    assert torch.equal(*found)


def test_results_and_report_say_what_was_asked_for(plain: Path, tmp_path: Path, beir: Callable[..., Path]) -> None:
    words = ["--dataset", str(beir()), "--model", str(plain), "--model-cross", "none", "--no-cache", "--cold-queries", "0"]
    config = tmp_path / "asked.toml"
    config.write_text('query-prompt = "query: "\ndocument_prompt = "passage: "\n')
    for out, more in (("plain", []), ("flags", ["--query-prompt", "query: ", "--document-prompt=passage: "]), ("file", ["--config", str(config)])):
        assert main([*words, "--out", str(tmp_path / out), *more]) == 0
    read = {out: json.loads((tmp_path / out / "results.json").read_text()) for out in ("plain", "flags", "file")}
    assert not {"query_prompt", "instruction", "truncate_dim"} & read["plain"]["config"].keys(), "runs that were begun before these options existed go on"
    assert {name: read["flags"]["config"][name] for name in PROMPTS} == PROMPTS
    assert read["flags"]["config"] == read["file"]["config"] and read["flags"]["models"] == read["file"]["models"]
    assert read["flags"]["models"]["model_vectors"] != read["plain"]["models"]["model_vectors"]
    page = report_of(tmp_path / "flags")
    assert "--query-prompt 'query: '" in page and '"document_prompt": "passage: "' in page
    assert main([*words, "--out", str(tmp_path / "flags"), "--resume"]) == 2, "another prompt is another run"


def test_results_tell_of_a_family_that_wants_prompts_and_has_none(tmp_path: Path, beir: Callable[..., Path]) -> None:
    words = ["--dataset", str(beir()), "--model", str(bi_encoder(tmp_path / "e5-small-v2", "Normalize")), "--methods", "fast", "--cold-queries", "0"]
    for out, more, told in (("bare", [], True), ("asked", ["--query-prompt", "query: ", "--document-prompt", "passage: "], False)):
        assert main([*words, "--out", str(tmp_path / out), *more]) == 0
        notes = json.loads((tmp_path / out / "results.json").read_text())["dataset"]["notes"]
        assert any("--query-prompt 'query: ' --document-prompt 'passage: '" in note for note in notes) is told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "standard", "--candidates", "bm25", "--query-prompt", "q"], "--query-prompt: no row runs a model that reads it"),
        (["--methods", "fast", "--instruction", "x"], "--instruction: no row runs a model that reads it"),
        (
            ["--methods", "endpoint:http://127.0.0.1:1", "--candidates", "bm25", "--document-prompt", "q"],
            "--document-prompt: no model here reads it; start the server",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_an_axis_of_a_grid(plain: Path, tmp_path: Path, beir: Callable[..., Path]) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        f'dataset = "{beir()}"\nmodel = "{plain}"\nmodel_cross = "none"\nmethods = ["fast"]\ncold_queries = 0\n'
        '[grid]\nquery_prompt = ["", "query: "]\ndocument-prompt = ["", "passage: "]\ntruncate_dim = [8]\n'
    )
    out = tmp_path / "out"
    assert main(["--grid", str(file), "--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
    names = {cell["name"] for cell in json.loads((out / "grid.json").read_text())["cells"]}
    assert names == {f"query_prompt={q},document_prompt={d}" for q in ("none", "query") for d in ("none", "passage")}
    means = {name: json.loads((out / name / "results.json").read_text())["candidates"]["hash"] for name in names}
    assert len({*means.values()}) > 1
    vectors = [cell.options for cell in grid.read(file, [], out)[1]]
    assert {options.truncate_dim for options in vectors} == {8} and {options.document_prompt for options in vectors} == {"", "passage: "}


ROLES = {"a": "bi-encoder", "b": "bi-encoder", "c": "cross-encoder"}


def flags(**given: Any) -> Namespace:
    return Namespace(**{name: [] for name in ("model", "model_cross", *OVERRIDES)} | given)


def test_the_servers_flags_name_the_model_that_they_mean() -> None:
    options = flags(model=["a", "b"], query_prompt=["a=query: ", "b=x=y"], truncate_dim=["b=16"], instruction=["Rank."])
    assert overrides(options, ROLES) == {
        "a": Overrides(query_prompt="query: "),
        "b": Overrides(query_prompt="x=y", truncate_dim=16),
        "c": Overrides(instruction="Rank."),
    }
    assert overrides(flags(model=["a"], document_prompt=[""]), ROLES) == {"a": Overrides(document_prompt="")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query_prompt": ["query: "]}, "there are 2 models of its role"),
        ({"query_prompt": ["z=query: "]}, "'z' is no bi-encoder of this server"),
        ({"instruction": ["a=x"]}, "'a' is no cross-encoder of this server"),
        ({"query_prompt": ["a=x", "a=y"]}, "stands there twice for 'a'"),
        ({"truncate_dim": ["a=0"]}, "must be a whole number of at least 1"),
    ],
)
def test_a_flag_of_the_server_that_means_no_model_is_refused(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        overrides(flags(**given), ROLES)


def test_a_fleet_reads_each_model_as_it_was_asked(plain: Path) -> None:
    fleet = Fleet.load(["all-MiniLM-L6-v2", str(plain)], [], device="cpu", overrides={str(plain): ASKED})
    for name, asked in (("all-MiniLM-L6-v2", {}), (str(plain), PROMPTS)):
        ranking = fleet.reranker("fast", name, None).score(QUERY, TEXTS)
        assert torch.equal(ranking.scores[torch.tensor(ranking.order).argsort()], scores(name, **asked))


def test_how_a_model_would_be_read(plain: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", str(stored)]) == 0
    said = capsys.readouterr().out
    for part in (
        "--model\n",
        "bi-encoder",
        "BertModel, 2 layers of 32 dimensions",
        "mean, then Normalize; the first 12",
        "'query: '",
        "'passage: '",
        "46 tokens of a text",
    ):
        assert part in said
    assert all(len(line) <= 80 or " " not in line[17:] for line in said.splitlines())
    assert main(["--list", str(plain), "--query-prompt", "q: "]) == 0 and "'q: '" in capsys.readouterr().out
    assert "--model-cross" in described(str(cross_encoder(tmp_path / "cross")))["give it as"] and "one-way" in described("minilm-cross")["kind"]
    assert main(["--list", str(tmp_path / "none")]) == 2
