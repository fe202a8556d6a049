"""A late-interaction model gives the token vectors and scores of sentence-transformers' MultiVectorEncoder, wherever it runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder

from rerank_kernels import use_backend
from rerank_lab import Reranker
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.errors import ModelError, UserError
from rerank_lab.methods import METHODS, Method
from rerank_lab.models import kinds
from rerank_lab.models.base import Detail, Overrides
from rerank_lab.models.forward import encoder_flops
from rerank_lab.models.kinds import load_bi_encoder
from rerank_lab.models.late_interaction import LateInteraction
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import Padded
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.steps import Steps
from tests.conftest import DOCUMENTS, QUERIES, ROOT
from tests.models.checkpoints import BASE, MODELS, WIDTH, Make, add_weights, bi_encoder, change, late_interaction, modules, put, st_about, stanford, transformer

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import late_interaction as reference

LONG = "Merge DataFrame or named Series objects, with a database-style join (on keys). " * 8
TEXTS = ["", "?!", "naïve 你好 \n\t [SEP] x", " a space, and [Q] [D] [unused1] [MASK]", QUERIES["q1"], DOCUMENTS["d1"][1], LONG, LONG[:150]]
DOCS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + [LONG, ""]
SQUARE = {"out_features": WIDTH, "use_residual": True, "bias": True, "activation_function": "torch.nn.modules.activation.GELU"}
MODERN: dict[str, Any] = {
    "architecture": "ModernBertModel",
    "pad_token_id": 0,
    "eos_token_id": 102,
    "bos_token_id": 101,
    "cls_token_id": 101,
    "sep_token_id": 102,
}


def native(folder: Path, made: Path, **settings: Any) -> Path:
    """The model of another folder as sentence-transformers saves it, with more settings of its Transformer."""
    MultiVectorEncoder(str(made), device="cpu").save(str(folder))
    return change(folder, "sentence_bert_config.json", **settings) if settings else folder


LIKE_REFERENCE: dict[str, Make] = {
    "PyLate": late_interaction,
    "PyLate of ModernBERT": lambda f: late_interaction(f, **MODERN),
    "PyLate without expansion": lambda f: late_interaction(f, about={"do_query_expansion": False}),
    "PyLate, mask tokens attended to": lambda f: late_interaction(f, about={"attend_to_expansion_tokens": True}),
    "PyLate without a model_type": lambda f: late_interaction(f, about={"model_type": None, "skiplist_words": None}),
    "PyLate without lengths": lambda f: late_interaction(f, about={"query_length": None, "document_length": None, "skiplist_words": []}),
    "PyLate with a prompt behind its marker": lambda f: late_interaction(f, about={"prompts": {"query": "find: ", "document": "[D] text: "}}),
    "PyLate of XLM-R": lambda f: late_interaction(f, architecture="XLMRobertaModel", max_position_embeddings=514),
    "several Dense modules, with residuals": lambda f: late_interaction(f, SQUARE, {"use_residual": True}),
    "Dense on tokens, and nothing else": lambda f: put(
        late_interaction(f), {"modules.json": modules("Transformer", MODELS + "Dense"), "config_sentence_transformers.json": st_about()}
    ),
    "Stanford": lambda f: stanford(f, {"query_token_id": "[unused5]", "doc_token_id": "[unused6]"}),
    "Stanford, all attended to, with punctuation": lambda f: stanford(f, {"attend_to_mask_tokens": True, "mask_punctuation": False}, binary=True),
    "Stanford without its metadata": stanford,
    "sentence-transformers": lambda f: native(f, late_interaction(f.parent / "pylate")),
    "sentence-transformers of Stanford's": lambda f: native(f, stanford(f.parent / "stanford", {})),
    "sentence-transformers, queries expanded to a least length": lambda f: native(
        f, late_interaction(f.parent / "pylate"), query_length=24, query_expansion={"strategy": "min", "length": 16, "attend": False, "token": "[SEP]"}
    ),
    "sentence-transformers, punctuation skipped on both sides": lambda f: change(
        native(f, late_interaction(f.parent / "pylate")), "2_MultiVectorMask/config.json", skiplist_tasks=["query", "document"], skiplist_words=["?", "!", "join"]
    ),
}  # fmt: skip


def load(folder: Path, **options: Any) -> LateInteraction:
    model = load_bi_encoder(str(folder), device="cpu", **options)
    assert isinstance(model, LateInteraction)
    return model


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return late_interaction(tmp_path_factory.mktemp("late") / "colbert")


@pytest.fixture(scope="module")
def model(colbert: Path) -> LateInteraction:
    return load(colbert)


@pytest.mark.parametrize("name", LIKE_REFERENCE)
def test_vectors_and_scores_are_the_references(name: str, tmp_path: Path) -> None:
    folder = LIKE_REFERENCE[name](tmp_path / "model")
    model = load(folder)
    assert isinstance(model.network, Padded if "ModernBERT" in name else Packed)
    for kind in ("query", "document"):
        found, wanted = model.encode(TEXTS, kind=kind), reference.vectors(folder, TEXTS, kind)
        assert found.tokens.dtype == torch.float32 and found.pooled.shape == (len(TEXTS), 0)
        for n, own in enumerate(wanted):
            torch.testing.assert_close(found.row(n).tokens, own, atol=1e-5, rtol=0)
    ranking = Reranker(model, "maxsim").score(LONG, DOCS)
    scores = torch.tensor(reference.scores(folder, LONG, DOCS))
    torch.testing.assert_close(ranking.scores, scores[ranking.order], atol=1e-4, rtol=0)


def test_what_it_is_called(model: LateInteraction, colbert: Path) -> None:
    assert (model.dimensions, model.token_dimensions, model.similarity, model.pools) == (0, 16, "maxsim", False)
    assert not kinds.pools(str(colbert)) and kinds.pools("all-MiniLM-L6-v2")
    assert (model.specials, model.limit, model.prompt("query"), model.prompt("document")) == (3, 37, "[Q] ", "[D] ")
    assert json.loads(model.reading()) == {
        "late_interaction": "PyLate", "query_prompt": "[Q] ", "document_prompt": "[D] ", "document_length": 40,
        "query_expansion": {"length": 16, "fixed": True, "attend": False, "token": None}, "skiplist": " ".join('!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'),
    }  # fmt: skip
    assert model.about()["token_dimensions"] == "16"


def test_vectors_do_not_depend_on_their_companions(tmp_path: Path) -> None:
    for number, architecture in enumerate(({}, MODERN)):
        model = load(late_interaction(tmp_path / str(number), **architecture))
        for kind in ("query", "document"):
            together = model.encode(TEXTS, kind=kind)
            for n, text in enumerate(TEXTS):
                torch.testing.assert_close(model.encode([text], kind=kind).tokens, together.row(n).tokens, atol=1e-5, rtol=0)


def test_mask_tokens_read_the_query_and_it_does_not_read_them(model: LateInteraction, tmp_path: Path) -> None:
    (tokens,) = model.tokenize(["join two tables"], "query", 512)
    assert len(tokens) == 16 and tokens.attended == 6 and (tokens.ids[6:] == 103).all() and not tokens.special.any()
    (long,) = model.tokenize([LONG], "query", 512)
    assert len(long) == 16 and long.attended is None and long.full_length > 16
    plain = load(late_interaction(tmp_path / "plain", about={"do_query_expansion": False}))
    attending = load(late_interaction(tmp_path / "attending", about={"attend_to_expansion_tokens": True}))
    own, alone, read = (one.encode(["join two tables"], kind="query").tokens for one in (model, plain, attending))
    torch.testing.assert_close(own[:6], alone, atol=1e-5, rtol=0)
    assert len(read) == 16 and not torch.allclose(read[:6], alone, atol=1e-2)
    assert attending.tokenize(["join two tables"], "query", 512)[0].attended is None


def test_punctuation_of_documents_has_no_vectors(model: LateInteraction) -> None:
    (document,), (query,) = (model.tokenize(["a, b! [SEP]"], kind, 512) for kind in ("document", "query"))
    words = [[word.strip().upper() for word in model.words(tokens)] for tokens in (document, query)]
    assert words[0] == ["[CLS]", "[D]", "A", "B", "[SEP]", "[SEP]"] and document.special.sum() == 2
    assert words[1][:8] == ["[CLS]", "[Q]", "A", ",", "B", "!", "[SEP]", "[SEP]"]
    assert len(model.encode(["!?"]).tokens) == 3, "markers and special tokens count"


def test_documents_are_cut_to_max_tokens_first_and_the_marker_is_not_counted(model: LateInteraction) -> None:
    text = "one two three four five six"
    vectors = model.encode([text, "one two"], max_tokens=3)
    assert vectors.lengths.tolist() == [6, 2] and vectors.offsets.diff().tolist() == [6, 5]
    torch.testing.assert_close(vectors.row(0).tokens, model.encode(["one two three"]).tokens)
    ranking = Reranker(model, "maxsim", max_tokens_per_doc=3).score("two", [text, "one two", LONG])
    assert ranking.truncated == 2 and ranking.tokens == 1 + 3 + 2 + 3
    assert Reranker(model, "maxsim").score("two", [LONG]).truncated == 1 and Reranker(model, "maxsim").token_limit == 37


def test_prompts_that_are_asked_for_stand_behind_the_marker(model: LateInteraction, colbert: Path, tmp_path: Path) -> None:
    peer = MultiVectorEncoder(str(colbert), device="cpu")
    asked = load(colbert, overrides=Overrides(query_prompt="query: ", document_prompt="passage: "))
    for kind, prompt, encode in (("query", "[Q] query: ", peer.encode_query), ("document", "[D] passage: ", peer.encode_document)):
        assert asked.prompt(kind) == prompt
        for found, wanted in zip((asked.encode([text], kind=kind).tokens for text in TEXTS), encode(TEXTS, prompt=prompt)):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert json.loads(asked.reading())["document_prompt"] == "[D] passage: "
    prompted = late_interaction(tmp_path / "prompted", about={"prompts": {"document": "passage: "}})
    assert load(prompted, overrides=Overrides(document_prompt="")).prompt("document") == "[D] "
    keys = {one.key() for one in (model, asked, load(prompted))}
    assert len(keys) == 3 and model.key() == load(colbert, overrides=Overrides(query_prompt="query: ")).key(), "queries are not cached"
    for wrong in ({"truncate_dim": 8}, {"instruction": "find"}):
        with pytest.raises(UserError, match=f"takes no {next(iter(wrong))}"):
            load(colbert, overrides=Overrides(**wrong))
    with pytest.raises(UserError, match="takes no subspace"):
        load(colbert, subspace="any.safetensors")


def test_what_changes_a_documents_vectors_changes_the_key(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{}, {"doc_maxlen": 20}, {"mask_punctuation": False}, {"doc_token_id": "[unused7]"}]
    made = [stanford(tmp_path / str(n), metadata) for n, metadata in enumerate(others)]
    assert len({load(folder).key() for folder in made}) == 4
    assert load(made[0]).key() != load(made[0], precision="bf16").key()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_vectors_come_back_from_the_cache(model: LateInteraction, place: str, tmp_path: Path) -> None:
    folder = None if place == "memory" else tmp_path
    cache = VectorCache(model.key(), folder, about=model.about())
    wanted = model.encode(TEXTS)
    keys = ensure(model, cache, TEXTS, max_tokens=512, detail=Detail.TOKENS)
    again = VectorCache(model.key(), folder) if folder else cache
    assert all(again.has(key, Detail.TOKENS) for key in keys)
    found = again.gather(keys[::-1], Detail.TOKENS)
    assert found.tokens.dtype == torch.float32 and found.pooled.shape == (len(TEXTS), 0)
    for n in range(len(TEXTS)):
        torch.testing.assert_close(found.row(len(TEXTS) - 1 - n).tokens, wanted.row(n).tokens, atol=1e-5, rtol=0)
    nothing = model.encode(TEXTS, detail=Detail.POOLED)
    assert len(nothing.tokens) == 0 and nothing.lengths.tolist() == wanted.lengths.tolist() and not nothing.offsets.any()


@pytest.mark.parametrize(("spec", "cross"), [("maxsim", None), ("maxsim:stage1_top_k=3", None), ("best", None), ("best:lexical=0.5", None), ("best", "minilm-cross"), ("optimal:stage1_top_k=4", "minilm-cross")])  # fmt: skip
def test_methods_rank_alike_alone_and_on_a_server(colbert: Path, spec: str, cross: str | None) -> None:
    """A one-way cross-encoder brings its own encoder along."""
    fleet = Fleet.load([str(colbert), "all-MiniLM-L6-v2"], ["minilm-cross"], device="cpu")
    assert len(fleet.caches) == 2
    reranker = fleet.reranker(spec if ":" in spec else METHODS[spec](), str(colbert), cross)
    direct, steps = reranker.without_cache().score(QUERIES["q1"], DOCS), Steps(reranker, QUERIES["q1"], DOCS)
    while (ranking := steps.advance()) is None:
        for unit in list(steps.units):
            unit.run([unit])
    assert ranking.order == direct.order and (ranking.tokens, ranking.truncated, ranking.flops) == (direct.tokens, direct.truncated, direct.flops)
    torch.testing.assert_close(ranking.scores, direct.scores, atol=1e-4, rtol=0)
    if "stage1_top_k" in spec:
        assert sorted(direct.order) == list(range(int(spec[-1]))), "stage 1 keeps the first documents as they came in"


def test_what_compares_vectors_of_whole_texts_is_refused(colbert: Path, model: LateInteraction) -> None:
    for spec in ("fast", "best:gamma=0.5", "optimal:cosine_weight=1"):
        with pytest.raises(UserError, match=r"whole texts, and model .* has none: it has a vector for each token alone"):
            Reranker(str(colbert), spec, "minilm-cross" if spec.startswith("optimal") else None, device="cpu")
    with pytest.raises(UserError, match="has no vector of a whole text"):
        Reranker(model, "maxsim").pooled(DOCS)
    assert [name for name, kind in METHODS.items() if kind().refusal(pools=False)] == ["fast"]


def test_a_fleet_warms_what_can_run(colbert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet.load([str(colbert)], [], device="cpu")
    warmed, real = list[str | Method](), fleet.reranker

    def reranker(self: Fleet, method: str | Method, *names: str | None) -> Reranker:
        warmed.append(method)
        return real(method, *names)

    monkeypatch.setattr(Fleet, "reranker", reranker)
    fleet.warm()
    assert warmed == ["best", "maxsim"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_kernels_take_its_fp32_vectors(model: LateInteraction, backend: str) -> None:
    for method in ("maxsim", "best"):
        reranker = Reranker(model, method)
        wanted = reranker.score(QUERIES["q1"], DOCS[:4])
        with use_backend(backend):
            found = reranker.score(QUERIES["q1"], DOCS[:4])
        torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)


def test_flops_count_mask_tokens_and_projection(model: LateInteraction) -> None:
    lengths, projection = torch.tensor([10, 7]), 2 * WIDTH * 16
    assert model.flops(lengths, Detail.TOKENS) == encoder_flops(model.config, lengths + 3) + (13 + 10) * projection
    assert model.flops(lengths, Detail.POOLED) == 0
    ranking = Reranker(model, "maxsim").score("two", ["one"])
    query = encoder_flops(model.config, torch.tensor([16])) + 16 * projection
    assert ranking.flops.seen == query + 2 * 16 * 4 * 16 and ranking.flops.new == encoder_flops(model.config, torch.tensor([4])) + 4 * projection


@pytest.mark.parametrize("way", [("torch", "bf16"), ("onnx", "fp32"), ("openvino", "fp32")])
def test_other_runtimes_follow_the_expansion_rule(colbert: Path, model: LateInteraction, way: tuple[str, str]) -> None:
    runtime, precision = way
    if runtime != "torch" and (importlib.util.find_spec(runtime.replace("onnx", "onnxruntime")) is None or importlib.util.find_spec("onnx") is None):
        pytest.skip(f"no {runtime}: pip install -e '.[runtimes]'")
    other = load(colbert, runtime=runtime, precision=precision)
    for kind in ("query", "document"):
        found, wanted = (one.encode(TEXTS, kind=kind).tokens for one in (other, model))
        torch.testing.assert_close(found, wanted, atol=0.1 if precision == "bf16" else 1e-4, rtol=0)


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    folder = late_interaction(tmp_path)
    weights = load_file(folder / "1_Dense" / "model.safetensors")
    save_file({name: value * torch.nan for name, value in weights.items()}, folder / "1_Dense" / "model.safetensors")
    with pytest.raises(ModelError, match="NaN or infinite vector"):
        load(folder).encode(["one"])


def of_native(**files: dict[str, Any] | None) -> Make:
    """A folder of sentence-transformers with keys of JSON files changed."""

    def make(folder: Path) -> Path:
        native(folder, late_interaction(folder.parent / "pylate"))
        for name, keys in files.items():
            change(
                folder,
                {"mask": "2_MultiVectorMask/config.json", "normalize": "3_Normalize/config.json", "settings": "sentence_bert_config.json"}[name],
                **keys or {},
            )
        return folder

    return make


REFUSED: dict[str, tuple[Make, str]] = {
    "own code": (lambda f: change(stanford(f, {}), "config.json", auto_map={"AutoModel": "modeling.Mine"}), "brings code of its own (modeling.Mine)"),
    "a Pooling": (lambda f: bi_encoder(f, about=st_about(similarity_fn_name="MaxSim")), "are known, not sentence_transformers.models.Transformer, sentence"),
    "no Dense module": (lambda f: put(late_interaction(f), {"modules.json": modules("Transformer")}), "names no Dense module"),
    "a Dense module without its files": (
        lambda f: put(late_interaction(f), {"modules.json": modules("Transformer", "Dense", "Dense")}), "2_Dense is no whole Dense module"),
    "a Dense module of another package": (
        lambda f: put(late_interaction(f), {"modules.json": modules("Transformer", "mine.Dense")}), "are known, not sentence_transformers.models.Transformer, mine.Dense"),
    "a Dense module of a whole text": (lambda f: late_interaction(f, {"module_input_name": "sentence_embedding"}), "is a Dense module of sentence_embedding"),
    "an activation that is not known": (lambda f: late_interaction(f, {"activation_function": "torch.nn.Softmax"}), "activation Softmax"),
    "a key of Dense": (lambda f: late_interaction(f, {"dropout": 0.5}), "1_Dense/config.json has dropout, which is not understood"),
    "a key that is not known": (lambda f: late_interaction(f, about={"token_pooling": 2}), "has token_pooling, which is not understood"),
    "another similarity": (lambda f: late_interaction(f, about={"similarity_fn_name": "xtr"}), "compares by xtr"),
    "truncate_dim": (lambda f: late_interaction(f, about={"truncate_dim": 8}), "has truncate_dim, which nothing applies to token vectors"),
    "a length of no number": (lambda f: late_interaction(f, about={"document_length": "40"}), "document_length must be a whole number"),
    "a skiplist of no words": (lambda f: late_interaction(f, about={"skiplist_words": "?!"}), "skiplist_words must be a list of strings"),
    "a prefix of no text": (lambda f: late_interaction(f, about={"query_prefix": 3}), "query_prefix must be a string"),
    "no room for a text": (lambda f: late_interaction(f, about={"document_length": 3}), "a limit of 3 tokens leaves none for the text"),
    "an expansion past the positions": (
        lambda f: late_interaction(f, about={"query_length": 64}, max_position_embeddings=48), "expands queries to 64 tokens, and has positions for 48"),
    "an expansion on the left": (lambda f: change(late_interaction(f), "tokenizer_config.json", padding_side="left"), "expands queries on the left"),
    "an expansion by a token that is not there": (
        of_native(settings={"query_expansion": {"strategy": "fixed", "length": 16, "token": "<none>"}}), "expands queries by <none>, which its tokenizer does not know"),
    "an expansion of another strategy": (of_native(settings={"query_expansion": {"strategy": "soft", "length": 16}}), "is not understood; it has a strategy"),
    "an expansion longer than a query": (of_native(settings={"query_length": 8}), "expands queries to 16 tokens and cuts them to 8"),
    "a task of another kind": (of_native(settings={"transformer_task": "fill-mask"}), "runs its transformer for fill-mask"),
    "a mask that keeps images": (of_native(mask={"keep_only_token_ids": [5]}), "keeps only some tokens (keep_only_token_ids)"),
    "a key of the mask": (of_native(mask={"decay": 1}), "2_MultiVectorMask/config.json has decay"),
    "a Normalize of whole texts": (of_native(normalize={"module_input_name": "sentence_embedding"}), "maps something else than token_embeddings"),
    "vectors of any length": (
        lambda f: put(of_native()(f), {"modules.json": modules("Transformer", BASE + "dense.Dense")}), "MultiVectorMask and Normalize must follow"),
    "pooled tokens": (
        lambda f: put(of_native()(f), {"modules.json": modules("Transformer", "Dense", "sentence_transformers.multi_vector_encoder.modules.token_pooling.TokenPooling")}),
        "are known, not"),
    "Stanford's without a projection": (
        lambda f: change(put(transformer(f), {"artifact.metadata": {"query_maxlen": 16}}), "config.json", architectures=["HF_ColBERT"]), "have no linear.weight"),
    "Stanford's with weights that nothing takes": (lambda f: add_weights(stanford(f, {}), "score.weight"), "nothing takes the weights score.weight"),
    "Stanford's by squared distance": (lambda f: stanford(f, {"similarity": "l2"}), "artifact.metadata has similarity 'l2', which is not computed here; cosine is"),
    "a folder that lost its modules.json": (
        lambda f: put(late_interaction(f), {"modules.json": None}), "has no modules.json, which says how its config_sentence_transformers.json is used"),
    "a projection beside PyLate's": (lambda f: add_weights(late_interaction(f), "linear.weight"), "nothing takes the weights linear.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    folder = make(tmp_path / "model")
    with pytest.raises(UserError) as refused:
        load_bi_encoder(str(folder), device="cpu")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_mean_is_told_and_orders_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(change(native(tmp_path / "mean", late_interaction(tmp_path / "pylate")), "config_sentence_transformers.json", similarity_fn_name="meanmaxsim"))
    assert "divided by the number of the query's tokens" in caplog.text and json.loads(model.reading())["similarity"] == "meanmaxsim"
