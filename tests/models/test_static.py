"""Static embeddings give the vectors of sentence-transformers, and serve methods, first stage and endpoint like any encoder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Detail, Overrides
from rerank_lab.models.kinds import load_bi_encoder
from rerank_lab.models.static import StaticEncoder
from tests.conftest import DOCUMENTS, QUERIES, ROOT
from tests.models.checkpoints import WIDTH, Make, change, model2vec, put, st_about, static
from tests.serving import serving

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import bi_encoder as reference_scores

LONG = " ".join(text for _, text in DOCUMENTS.values()) * 12
TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "ΑΣ ΟΔΟΣ İ [SEP]", LONG]
G = torch.Generator().manual_seed(5)
MAPPED = {
    "embeddings": torch.randn(300, WIDTH, generator=G),
    "mapping": torch.randint(0, 300, (30522,), generator=G),
    "weights": torch.rand(30522, generator=G),
}
LIKE_REFERENCE: dict[str, Make] = {
    "as it is": static,
    "Normalize": lambda f: static(f, "Normalize"),
    "Dense": lambda f: static(f, "Dense"),
    "Normalize, LayerNorm": lambda f: static(f, "Normalize", "LayerNorm"),
    "prompts, a dot product, dimensions": lambda f: static(
        f, about=st_about(prompts={"query": "query: ", "document": "text: "}, similarity_fn_name="dot", truncate_dim=9)
    ),
    "model2vec": model2vec,
    "model2vec, not normalised": lambda f: model2vec(f, normalize=False),
    "model2vec, rows shared and weighted": lambda f: model2vec(f, tensors=MAPPED),
    "a tokenizer that cuts": lambda f: change(static(f), "0_StaticEmbedding/tokenizer.json", truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}),
    "a tokenizer that cuts on the left": lambda f: change(static(f), "0_StaticEmbedding/tokenizer.json", truncation={"direction": "Left", "max_length": 7, "strategy": "LongestFirst", "stride": 0}),
}  # fmt: skip


def load_static(folder: Path, **options: object) -> StaticEncoder:
    model = load_bi_encoder(folder, device="cpu", **options)  # type: ignore[arg-type]
    assert isinstance(model, StaticEncoder)
    return model


def pooled(model: StaticEncoder, texts: list[str], kind: str, max_tokens: int = 10**9) -> Tensor:
    return model.encode_tokens(model.tokenize(texts, kind, max_tokens), detail=Detail.POOLED).pooled


@pytest.mark.parametrize("layout", LIKE_REFERENCE)
def test_vectors_and_similarity_are_sentence_transformers(layout: str, tmp_path: Path) -> None:
    folder = LIKE_REFERENCE[layout](tmp_path)
    reference, model = SentenceTransformer(str(folder), device="cpu"), load_static(folder)
    queries = [*QUERIES.values(), LONG[:900]]
    wanted = [reference.encode_query(queries, batch_size=2, convert_to_tensor=True), reference.encode_document(TEXTS, batch_size=2, convert_to_tensor=True)]
    found = [pooled(model, queries, "query"), pooled(model, TEXTS, "document")]
    for a, b in zip(found, wanted):
        assert b.std(0).max() > 0.01, "texts differ"
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert model.dimensions == wanted[0].shape[1]
    fast = Reranker(model, "fast", max_tokens_per_doc=10**6)
    for query in queries:
        ranking, row = fast.score(query, TEXTS), torch.tensor(reference_scores.scores(folder, query, TEXTS))
        torch.testing.assert_close(ranking.scores, row[ranking.order], atol=1e-5, rtol=1e-5)


def test_dimensions_and_prompts_can_be_asked_for(tmp_path: Path) -> None:
    folder = static(tmp_path, "Normalize")
    reference, model = SentenceTransformer(str(folder), device="cpu", truncate_dim=6), load_static(folder, overrides=Overrides("find: ", "text: ", 6))
    for kind, prompt in (("query", "find: "), ("document", "text: ")):
        torch.testing.assert_close(pooled(model, TEXTS, kind), reference.encode(TEXTS, prompt=prompt, convert_to_tensor=True), atol=1e-6, rtol=1e-6)
    keys = [load_static(folder, overrides=asked).key() for asked in (Overrides(), Overrides("q: "), Overrides(None, "d: "), Overrides(truncate_dim=6))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    with pytest.raises(UserError, match="takes no instruction"):
        load_static(folder, overrides=Overrides(instruction="x"))


def test_token_vectors_are_rows_at_unit_length_and_a_limit_cuts(tmp_path: Path) -> None:
    folder = static(tmp_path)
    model, table = load_static(folder), load_file(folder / "0_StaticEmbedding" / "model.safetensors")["embedding.weight"]
    tokens = model.tokenize([TEXTS[0], "", LONG], "document", 5)
    vectors = model.encode_tokens(tokens)
    assert vectors.offsets.tolist() == [0, 5, 5, 10]
    assert vectors.lengths.tolist() == [len(model.tokenizer.encode(text, add_special_tokens=False)) for text in (TEXTS[0], "", LONG)]
    assert vectors.tokens.dtype == torch.float16 and vectors.tokens.shape[1] == model.token_dimensions == WIDTH
    torch.testing.assert_close(vectors.tokens[:5].float(), normalize(table[torch.from_numpy(tokens[0].ids).long()], dim=1), atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors.pooled[0], table[torch.from_numpy(tokens[0].ids).long()].mean(0))
    assert len(model.words(tokens[0])) == 5 and model.flops(torch.tensor([5]), Detail.TOKENS) == 0
    (query,) = model.encode_queries(model.tokenize([QUERIES["q1"]], "query", model.limit))
    assert bool(query.own.all()) and len(query.own) == len(query.vectors.tokens)


def test_many_texts_are_encoded_like_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = load_static(static(tmp_path)), list[int]()
    together = model.encode_tokens(model.tokenize(TEXTS, "document", 9999))
    monkeypatch.setattr("rerank_lab.models.static.TOKENS_AT_ONCE", 20)
    again = model.encode_tokens(model.tokenize(TEXTS, "document", 9999), progress=done.append)
    assert torch.equal(together.pooled, again.pooled) and torch.equal(together.tokens, again.tokens) and sum(done) == len(TEXTS) and len(done) > 3


def test_model2vec_without_modules_json_is_read_as_model2vec_writes_one(tmp_path: Path) -> None:
    wanted = pooled(load_static(model2vec(tmp_path / "a")), TEXTS, "document")
    model = load_static(put(model2vec(tmp_path / "b"), {"modules.json": None}))
    torch.testing.assert_close(pooled(model, TEXTS, "document"), wanted)
    assert "without modules.json is read as the one that model2vec writes" in model.checkpoint.notes[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: put(static(f), {"0_StaticEmbedding/tokenizer.json": None}), "tokenizer.json does not load"),
        (lambda f: put(static(f), {"0_StaticEmbedding/model.safetensors": None}), "has no weights"),
        (lambda f: static(f, tensors={"other": torch.ones(2, 2)}), "holds no table of static embeddings: KeyError: 'embeddings'"),
        (lambda f: static(f, tensors={"embedding.weight": torch.ones(30522, 4), "more": torch.ones(2)}), "nothing takes the weights more"),
        (lambda f: static(f, tensors={"embedding.weight": torch.ones(99, 4)}), "has 99 rows, and its tokenizer makes the token number 30521"),
        (lambda f: change(static(f), "config_sentence_transformers.json", similarity_fn_name="manhattan"), "compares by manhattan"),
        (lambda f: put(static(f), {"modules.json": [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}, {"path": "", "type": "sentence_transformers.models.CNN"}]}), "after a StaticEmbedding only Dense, LayerNorm"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(make: Make, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_static(make(tmp_path))
    assert message in str(refused.value)


@pytest.mark.parametrize("asked", [{"runtime": "compile"}, {"precision": "bf16"}, {"subspace": "v.safetensors"}])
def test_what_needs_a_transformer_is_refused(asked: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a static embedding model"):
        load_static(static(tmp_path), **asked)


def test_a_row_of_nan_is_a_failure_of_the_model(tmp_path: Path) -> None:
    folder = static(tmp_path)
    save_file({"embedding.weight": torch.full((30522, 4), torch.nan)}, folder / "0_StaticEmbedding" / "model.safetensors")
    with pytest.raises(RuntimeError, match="gave a NaN or infinite vector"):
        pooled(load_static(folder), ["join"], "document")


def test_an_evaluation_runs_on_them(tmp_path: Path, beir: Callable[..., Path]) -> None:
    folder = static(tmp_path / "m", "Normalize")
    arguments = ["--dataset", str(beir()), "--model", str(folder), "--model-cross", "none", "--methods", "fast,best,maxsim", "--cold-queries", "1"]
    assert main([*arguments, "--no-cache", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["candidates"]["source"] == "dense" and [row["method"] for row in found["rows"]] == ["fast", "best", "maxsim"]
    reference = SentenceTransformer(str(folder), device="cpu")
    texts = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    scores = reference.similarity(reference.encode_query(list(QUERIES.values())), reference.encode_document(texts))
    ranked: dict[str, list[str]] = {}
    for line in (tmp_path / "out" / "runs" / "fast.trec").read_text().splitlines():
        ranked.setdefault(line.split()[0], []).append(line.split()[2])
    assert ranked == {q: [list(DOCUMENTS)[i] for i in row.argsort(descending=True)] for q, row in zip(QUERIES, scores)}


def test_an_endpoint_serves_them(tmp_path: Path) -> None:
    folder, query, texts = static(tmp_path / "m", "Normalize"), QUERIES["q1"], [text for _, text in DOCUMENTS.values()]
    with serving("--model", str(folder)) as server:
        for method in ("fast", "best"):
            body = {"model": str(folder), "query": query, "documents": texts, "method": method}
            status, answer, _ = server.post(body)
            assert status == 200, answer
            wanted = Reranker(str(folder), method, device="cpu").rank(query, texts)
            assert [row["index"] for row in answer["results"]] == [row.index for row in wanted]
