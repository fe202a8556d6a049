"""The spread of token similarities and tau=auto: measured as defined, the same wherever it comes from, and never from a request's texts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rerank_kernels import MIN_TAU
from rerank_lab import Reranker
from rerank_lab.cache.__main__ import main as cache_command
from rerank_lab.cache.store import Store
from rerank_lab.datasets.beir import BUNDLED
from rerank_lab.datasets.load import load_dataset
from rerank_lab.engine import Engine
from rerank_lab.methods import spread
from rerank_lab.methods.best import SPREAD_IN_TAUS, Best
from rerank_lab.methods.spread import Entry, Spread, entry, known, measured_text, shipped, spread_of, with_entry
from rerank_lab.models.base import Detail, Encoder, Overrides
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder, origin
from rerank_lab.server.fleet import Fleet
from tests.conftest import DOCUMENTS, QUERIES, ROOT
from tests.models.checkpoints import WIDTH, bi_encoder, late_interaction, model2vec, stanford, static
from tests.models.test_token_head import m3

sys.path.insert(0, str(ROOT / "experiments" / "training"))
import measure_spread as script

QUERY, TEXTS = QUERIES["q2"], [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + [""]
Make = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged is seen, whatever level a command has left behind."""
    caplog.set_level(logging.INFO, "rerank_lab")


def prompted(folder: Path) -> Path:
    return bi_encoder(folder, about={"prompts": {"query": "query: ", "document": "passage: "}})


def crowded(folder: Path) -> Path:
    """Static embeddings whose rows all point one way."""
    table = torch.randn(30522, WIDTH, generator=torch.Generator().manual_seed(3)) + 20
    return static(folder, tensors={"embedding.weight": table})


def loaded(folder: Path, **asked: Any) -> Encoder:
    return load_bi_encoder(folder, device="cpu", overrides=Overrides(**asked))


def plain(encoder: Encoder) -> tuple[float, int, int]:
    """The spread by a loop in numpy, and the numbers of tokens. Texts are encoded one at a time."""
    found = load_dataset(str(BUNDLED / "numpydoc"), "train")
    chosen = [*found.queries][::15][:64]
    assert len(found.queries) // 64 == 15 and len(chosen) == 64

    def rows(kind: str, text: str) -> np.ndarray:
        tokens: torch.Tensor = encoder.encode_queries(encoder.tokenize([text], kind, encoder.limit), detail=Detail.TOKENS)[0].vectors.tokens
        return tokens.double().numpy()

    above, counts = list[float](), [0, 0]
    for query in chosen:
        relevant = max(found.qrels[query], key=lambda document: found.qrels[query][document])
        sides = rows("query", found.queries[query]), rows("document", found.corpus[relevant])
        counts = [count + len(side) for count, side in zip(counts, sides)]
        for x in sides[0]:
            s = [float(x @ y) for y in sides[1]]
            above.append(max(s) - sum(s) / len(s))
    return sum(above) / len(above), counts[0], counts[1]


def same(found: Spread, wanted: tuple[float, int, int]) -> None:
    assert found.value == pytest.approx(wanted[0], rel=0.051) and (found.query_tokens, found.document_tokens) == wanted[1:]
    assert found.value in (float(f"{wanted[0] * off:.2g}") for off in (1 - 1e-3, 1, 1 + 1e-3)) and found.text == measured_text().name


@pytest.mark.parametrize("make", [bi_encoder, prompted, m3, late_interaction, stanford, static, model2vec, crowded], ids=lambda make: make.__name__)
def test_it_is_how_far_the_best_match_stands_above_the_average(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    encoder = loaded(folder)
    found = spread_of(encoder)
    same(found, plain(encoder))
    assert found.source == "measured" and origin(str(folder)) == encoder.origin()
    reranker = Reranker(str(folder), "best", device="cpu")
    assert reranker.spread == found and reranker.settings["tau"] == max(MIN_TAU, found.value / SPREAD_IN_TAUS)
    assert (found.value / SPREAD_IN_TAUS < MIN_TAU) == (make is crowded), "the clamp"


def test_texts_without_tokens_do_not_count() -> None:
    rows, nothing = torch.eye(4), torch.zeros(0, 4)
    assert spread.mean_reach([rows[:2], rows, nothing], [rows[:2], nothing, rows]) == 0.5 and spread.mean_reach([nothing], [nothing]) == 0


def test_the_shipped_figure_is_what_is_measured(encoder: BiEncoder) -> None:
    assert shipped() and {one.spread.text for one in shipped()} == {measured_text().name}
    found, measured = spread_of(encoder), spread_of(encoder, known=())
    assert found == measured and (found.source, measured.source) == ("shipped", "measured")
    vectors = [encoder.encode(texts, kind=kind, max_tokens=encoder.limit).tokens.double().numpy() for kind, texts in (
        ("query", measured_text().queries), ("document", measured_text().documents))]  # fmt: skip
    assert (found.query_tokens, found.document_tokens) == (len(vectors[0]), len(vectors[1])) and 0.45 < found.value < 0.55


def test_a_shipped_figure_is_taken_for_the_same_weights_projection_prompts_and_text_alone(tmp_path: Path) -> None:
    encoder = loaded(prompted(tmp_path / "model"))
    own = entry(encoder, Spread(0.5, measured_text().name, *plain(encoder)[1:]))
    assert spread_of(encoder, known=[own]).value == 0.5
    other = {"weights": "w", "reading": "r", "projection": "p", "query_prompt": "q", "document_prompt": "d"}
    strangers = [replace(own, origin=replace(own.origin, **{name: value})) for name, value in other.items()]
    strangers += [replace(own, spread=replace(own.spread, text="older")), replace(own, spread=replace(own.spread, query_tokens=1))]
    assert spread_of(encoder, known=strangers).source == "measured"


def test_auto_is_its_number_to_the_last_bit_and_the_same_whatever_was_ranked_before(tmp_path: Path) -> None:
    folder, cache = str(bi_encoder(tmp_path / "model")), tmp_path / "cache"
    first = Reranker(folder, "best", device="cpu", cache_dir=cache)
    wanted = first.score(QUERY, TEXTS)
    later = Reranker(folder, "fast", device="cpu", cache_dir=cache)
    later.score("another query", ["and quite another text"] * 3)
    uncached = Reranker(folder, Best(tau="auto"), device="cpu")
    for other in ("zeros of a polynomial", "join two tables"):
        uncached.score(other, TEXTS[:3])
    assert [one.spread and one.spread.source for one in (first, later, later.using("best"), uncached)] == ["measured", None, "cache", "measured"]
    number = first.using(f"best:tau={first.settings['tau']!r}")
    assert number.spread is None and number.settings == first.settings and first.method.settings()["tau"] == "auto"
    for one in (later.using("best:tau=auto"), uncached, number, first.without_cache()):
        found = one.score(QUERY, TEXTS)
        assert found.order == wanted.order and torch.equal(found.scores, wanted.scores)
    code = "import sys; from rerank_lab import Reranker; r = Reranker(sys.argv[1], device='cpu'); print(r.score(sys.argv[2], sys.argv[3:]).scores.tolist())"
    done = subprocess.run([sys.executable, "-c", code, folder, QUERY, *TEXTS], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted.scores.tolist()
    assert not torch.equal(first.using("best:tau=0.1").score(QUERY, TEXTS).scores, wanted.scores)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "vectors").glob("*/spread-*.json"))


def test_the_cache_keeps_a_figure_for_each_model_and_query_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = str(prompted(tmp_path / "model")), tmp_path / "cache"

    def found(**asked: str) -> Spread:
        made = Reranker(folder, "best", device="cpu", cache_dir=cache, **asked).spread  # type: ignore[arg-type]
        assert made is not None
        return made

    own = found()
    (path,) = files(cache)
    text = path.read_text()
    assert found() == own and found().source == "cache" and path.read_text() == text
    longer = found(query_prompt="Represent this sentence: ")
    assert longer != own and len(files(cache)) == 2 and {one.parent for one in files(cache)} == {path.parent}
    assert found(document_prompt="") not in (own, longer) and len({one.parent for one in files(cache)}) == 2
    assert found() == own and found().source == "cache"
    fewer = text.replace(f'"document_tokens": {own.document_tokens}', f'"document_tokens": {own.document_tokens - 1}')
    assert fewer != text
    for damaged in (fewer, "", text[:-20], text.replace(str(own.value), "NaN"), text.replace('"query_prompt": "query: "', '"query_prompt": "q"'), "[]"):
        path.write_text(damaged)
        caplog.clear()
        assert found() == own and found().source == "cache" and path.read_text() == text
        assert f"{path.name} does not read back" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    path.unlink()
    assert found() == own and "cannot be written (No space left on device)" in caplog.text


def test_a_shared_cache_behind_a_url_and_one_that_is_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = loaded(static(tmp_path / "model"))
    own = spread_of(encoder, Store(f"memory://{tmp_path}/x"))
    (tmp_path / "file").touch()
    for name, source in ((f"memory://{tmp_path}/x", "cache"), (str(tmp_path / "file"), "measured")):
        found = spread_of(encoder, Store(name))
        assert (found, found.source) == (own, source)
    assert "cannot be written" in caplog.text


def test_the_cache_command_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    Reranker(str(static(tmp_path / "model")), "best", device="cpu", cache_dir=cache)
    assert cache_command(["info", "--cache", str(cache)]) == 0
    assert "1 file, last used just now" in (said := capsys.readouterr().out) and "unknown model" not in said
    assert cache_command(["clear", "--cache", str(cache), "--older-than", "1"]) == 0 and len(files(cache)) == 1
    assert cache_command(["clear", "--cache", str(cache)]) == 0 and not any((cache / "vectors").iterdir())


@pytest.mark.parametrize("make", [bi_encoder, prompted, m3, late_interaction, stanford, static, model2vec], ids=lambda make: make.__name__)
def test_what_decides_it_is_known_without_the_weights(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    asked = Overrides(query_prompt="find: ", document_prompt="text: ")
    assert origin(str(folder), asked) == load_bi_encoder(folder, device="cpu", overrides=asked).origin() != origin(str(folder))
    encoder = loaded(folder)
    own, cache = encoder.origin(), tmp_path / "cache"
    assert known(own, None) is None and known(own, str(cache)) is None and known(own, "memory://nothing") is None
    found = spread_of(encoder, Store(cache).child("vectors").child(encoder.key()))
    told = known(own, str(cache))
    assert told == found and told is not None and told.source == "measured before in fp32, torch, cpu"


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | keys))


def test_heads_limit_and_truncation_are_part_of_it_and_cosmetic_keys_are_not(tmp_path: Path) -> None:
    folder = bi_encoder(tmp_path / "model")
    seen = [loaded(folder).origin()]
    change(folder / "config.json", transformers_version="9", _name_or_path="elsewhere", dtype="bfloat16", torch_dtype="float16", use_cache=False)
    assert origin(str(folder)) == loaded(folder).origin() == seen[0]
    heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    others: list[tuple[str, dict[str, object]]] = [
        ("config.json", {"num_attention_heads": 2 if heads == 1 else 1}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
        ("sentence_bert_config.json", {"max_seq_length": 40}),
    ]
    for file, keys in others:
        change(folder / file, **keys)
        encoder = loaded(folder)
        assert origin(str(folder)) == encoder.origin() not in seen and encoder.origin().weights == seen[0].weights
        seen.append(encoder.origin())


@pytest.mark.parametrize("make", [late_interaction, static], ids=lambda make: make.__name__)
def test_the_json_files_of_other_kinds_are_part_of_it(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    before = origin(str(folder))
    change(folder / "config_sentence_transformers.json", __version__={"sentence_transformers": "9"})
    found = origin(str(folder))
    assert before is not None and found is not None and found == loaded(folder).origin() and found.reading != before.reading


def test_a_figure_of_the_precision_asked_for_comes_first(tmp_path: Path) -> None:
    encoder = loaded(static(tmp_path / "model"))
    for folder, precision, value in (("a", "bf16", 0.25), ("b", "fp32", 0.5)):
        one = replace(entry(encoder, Spread(value, measured_text().name, 1, 1)), arithmetic=f"{precision}, torch, cpu")
        Store(str(tmp_path / "cache")).child("vectors").child(folder).write("spread-0.json", json.dumps(spread._plain(one)).encode())
    found = [known(encoder.origin(), str(tmp_path / "cache"), precision) for precision in ("bf16", "fp32", "int8")]
    assert [one and one.value for one in found] == [0.25, 0.5, 0.5]


def test_the_projection_is_part_of_it(tmp_path: Path, encoder: BiEncoder) -> None:
    V = torch.linalg.qr(torch.randn(384, 16, generator=torch.Generator().manual_seed(0))).Q.contiguous()
    save_file({"V": V}, tmp_path / "V.safetensors")
    name, file = "all-MiniLM-L6-v2", str(tmp_path / "V.safetensors")
    own = origin(name, subspace=file)
    assert origin(name) == encoder.origin() != own == load_bi_encoder(name, subspace=file, device="cpu").origin()
    assert origin("minilm-cross") is None and own is not None and known(own, None) is None


def test_it_is_measured_when_models_are_loaded_and_in_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder, real, seen = str(bi_encoder(tmp_path / "model")), spread.measure, list[str]()

    def watched(encoder: Encoder, *texts: Any) -> float:
        seen.append(encoder.name)
        return real(encoder, *texts)

    monkeypatch.setattr(spread, "measure", watched)
    reranker = Reranker(folder, "maxsim", device="cpu")
    elsewhere = reranker.elsewhere(device="cuda").using("best")
    assert seen == [] and elsewhere.spread is None and elsewhere.settings["tau"] == "auto", "models that describe those of other processes"
    best = reranker.using("best")
    assert seen == [folder] and "measured, once: as much work as 128 documents" in caplog.text
    for one in (best, best.without_cache(), reranker.using("best:gamma=0.5"), Reranker.of(best.engine, "best")):
        one.score(QUERY, TEXTS)
    assert seen == [folder]
    fleet = Fleet.load([folder, "all-MiniLM-L6-v2"], ["minilm-cross"], device="cpu")
    assert seen == [folder]
    fleet.warm()
    assert seen == [folder, folder] and len(fleet.spreads) == 2
    fleet.reranker("best", folder, None).score(QUERY, TEXTS), fleet.reranker("best", folder, "minilm-cross").score(QUERY, TEXTS)
    assert seen == [folder, folder]
    monkeypatch.setattr(spread, "SLOW", 0.0)
    spread_of(best.engine.encoder)  # type: ignore[arg-type]
    assert sum("about" in record.message and record.levelno == logging.WARNING for record in caplog.records) == 1


def test_an_engine_of_loaded_models_has_it_too(tmp_path: Path) -> None:
    encoder = loaded(static(tmp_path / "model"))
    reranker = Reranker(encoder, "best")
    assert isinstance(reranker.engine, Engine) and reranker.spread == spread_of(encoder)
    assert Reranker(None, "standard", load_cross_encoder("minilm-cross", device="cpu")).spread is None


def test_the_script_writes_an_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = prompted(tmp_path / "model"), tmp_path / "out" / "spreads.json"
    for arguments in (["--name", "tiny"], [], ["--query-prompt", ""]):
        assert script.main(["--model", str(folder), "--out", str(out), *arguments]) == 0
    made = spread.read_entries(out)
    assert [(one.model, one.origin.query_prompt) for one in made] == [(str(folder), ""), (str(folder), "query: ")], "an entry takes an older one's place"
    assert made[1].spread == spread_of(loaded(folder)) and out.read_text() == with_entry([made[0]], made[1])
    stale = [replace(made[0], spread=replace(made[0].spread, text="older")), made[1]]
    out.write_text(with_entry(stale[:1], stale[1]))
    assert script.main(["--model", str(folder), "--out", str(out)]) == 0 and len(spread.read_entries(out)) == 1
    capsys.readouterr()
    for damaged in ("{", '{"schema": 1, "entries": [{}]}', '{"schema": 9}'):
        out.write_text(damaged)
        assert script.main(["--model", str(folder), "--out", str(out)]) == 2 and str(out) in capsys.readouterr().err
    assert isinstance(made[0], Entry) and os.path.getsize(spread.SHIPPED) < 20_000
