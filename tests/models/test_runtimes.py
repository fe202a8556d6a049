"""Every runtime and precision gives the vectors and logits of torch in fp32, within a tolerance. Combinations that are not available are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)  # fmt: skip

from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Detail, Vectors
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.exported import TensorModel, _inner, choose
from rerank_lab.models.forward import position_count
from rerank_lab.models.kinds import load_cross_encoder
from rerank_lab.models.one_way import OneWayCrossEncoder
from rerank_lab.models.packed import Packed
from rerank_lab.models.runtimes import RUNTIMES
from tests.conftest import DOCUMENTS, QUERIES, load_bi, report_of

TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "merge two tables on a key " * 40]
PAIRS = [(runtime, precision) for runtime, precisions in RUNTIMES.items() for precision in precisions if (runtime, precision) != ("torch", "fp32")]
# largest difference of unit vectors' components, smallest cosine
NEAR = {"fp32": (2e-3, 0.99999), "bf16": (0.03, 0.9998), "int8": (0.2, 0.96)}


@pytest.fixture(scope="module")
def exact() -> tuple[Vectors, list[Any]]:
    model = load_bi("all-MiniLM-L6-v2", device="cpu")
    return model.encode(TEXTS, detail=Detail.STATES), model.encode_queries(model.tokenize(list(QUERIES.values()), "query", 64), detail=Detail.STATES)


@pytest.mark.parametrize(("runtime", "precision"), [pair for pair in PAIRS if pair[0] != "compile"])
def test_vectors_are_those_of_torch_in_fp32(exact: tuple[Vectors, list[Any]], runtime: str, precision: str) -> None:
    model = load_bi("all-MiniLM-L6-v2", device="cpu", runtime=runtime, precision=precision)
    apart, cosine = NEAR[precision]
    found, wanted = model.encode(TEXTS, detail=Detail.STATES), exact[0]
    assert float((found.pooled * wanted.pooled).sum(1).min()) > cosine
    assert float((found.tokens.float() - wanted.tokens.float()).abs().max()) < apart
    correlation = torch.corrcoef(torch.stack([found.states.float().flatten(), wanted.states.float().flatten()]))[0, 1]
    assert float(correlation) > cosine - 0.01
    for read, own in zip(model.encode_queries(model.tokenize(list(QUERIES.values()), "query", 64), detail=Detail.STATES), exact[1]):
        for a, b in ((read.start, own.start), (read.last, own.last)):
            assert a is not None and torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > cosine - 0.01
    if precision != "fp32":
        assert not torch.equal(found.pooled, wanted.pooled), "it is another arithmetic"
    keys = {model.key(), load_bi("all-MiniLM-L6-v2", device="cpu").key()}
    assert len(keys) == 2, "vectors of another runtime or precision are others in the cache"


@pytest.mark.parametrize(("runtime", "precision"), PAIRS)
def test_logits_are_those_of_torch_in_fp32(small_cross: Path, runtime: str, precision: str) -> None:
    def logits(**options: str) -> torch.Tensor:
        model = load_cross_encoder(str(small_cross), device="cpu", **options)  # type: ignore[arg-type]
        assert isinstance(model, CrossEncoder)
        return model.score("join two tables", TEXTS)[0]

    found, wanted = logits(runtime=runtime, precision=precision), logits()
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > {"fp32": 0.999999, "bf16": 0.99, "int8": 0.96}[precision]
    assert float((found - wanted).abs().max()) < (1e-4 if precision == "fp32" else 1.0)
    assert precision == "fp32" or not torch.equal(found, wanted), "it is another arithmetic"


def test_a_one_way_cross_encoder_starts_from_the_weights_as_they_are() -> None:
    rough = load_bi("all-MiniLM-L6-v2", device="cpu", precision="bf16")
    assert isinstance(rough.network, Packed) and rough.network.dtype == torch.bfloat16
    own, plain = (load_cross_encoder("minilm-cross", device="cpu", encoder=encoder) for encoder in (rough, None))
    assert isinstance(own, OneWayCrossEncoder) and isinstance(plain, OneWayCrossEncoder)
    for a, b in zip(own.net.parameters(), plain.net.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("runtime", "precision", "message"),
    [
        ("openvino", "int8", r"openvino does not compute in int8.*compile, onnx"),
        ("torch", "int8", "torch does not compute in int8"),
        ("tensorrt", "fp32", "runtimes are auto, torch, compile"),
        ("torch", "fp8", "precisions fp32, bf16, int8"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(runtime: str, precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(runtime, precision)


def test_auto_takes_what_computes_in_the_precision() -> None:
    assert [choose("auto", precision) for precision in ("fp32", "bf16", "int8")] == ["torch", "torch", "compile"]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime and onnx.*rerank_lab\[runtimes\]"):
        choose("onnx", "fp32")


def test_a_model_that_the_runtime_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch, small_cross: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("operator nonsense is not known\nand more")

    monkeypatch.setattr("torch.onnx.export", fails)
    with pytest.raises(UserError, match=r"runtime onnx in fp32 does not take the model: RuntimeError: operator nonsense is not known$"):
        load_cross_encoder(str(small_cross), device="cpu", runtime="onnx")


def test_eval_says_what_a_precision_changes(beir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", str(beir()), "--methods", "fast,standard", "--precision", "bf16", "--cold-queries", "0", "--no-cache", "--out", str(out)]
    assert main(arguments) == 0
    result = json.loads((out / "results.json").read_text())
    assert result["models"]["arithmetic"] == "torch, bf16"
    for row in result["rows"]:
        assert row["vs_fp32"]["queries"] == len(QUERIES) and 0 < row["vs_fp32"]["max_score_diff"] < 0.02
        assert row["vs_fp32"]["delta_ndcg@10"] == 0.0
    assert "fast under torch, bf16: +0.0000" in " ".join(capsys.readouterr().out.split())
    assert report_of(out).count("against torch, fp32") == 2


def test_another_runtime_is_compared_with_torch_and_not_with_its_own_vectors(beir: Callable[..., Path], tmp_path: Path) -> None:
    """With one cache, which holds torch's vectors already."""
    folder, shared = str(beir()), ["--cold-queries", "0", "--cache", str(tmp_path / "cache"), "--methods", "fast"]
    assert main(["--dataset", folder, *shared, "--out", str(tmp_path / "torch")]) == 0
    assert main(["--dataset", folder, *shared, "--runtime", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    result = json.loads((tmp_path / "onnx" / "results.json").read_text())
    assert 0 < result["rows"][0]["vs_fp32"]["max_score_diff"] < 1e-4
    assert len(list((tmp_path / "cache" / "vectors").iterdir())) == 2


SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
KINDS: dict[str, Callable[[], Any]] = {
    "albert": lambda: AlbertModel(AlbertConfig(embedding_size=16, **SMALL)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **SMALL)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SMALL)),
    "bert": lambda: BertForSequenceClassification(BertConfig(num_labels=1, **SMALL)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_int8_reaches_the_layers_of_any_architecture_and_no_head(kind: str) -> None:
    model = KINDS[kind]()
    inner = _inner(model)
    names = [name for name, module in model.named_modules() if id(module) in inner]
    assert names and not [name for name in names if "pooler" in name or "classifier" in name]


@pytest.mark.parametrize("kind", ["albert", "modernbert", "mpnet"])
def test_only_layers_of_berts_kind_give_keys_and_values(kind: str) -> None:
    outputs = TensorModel(KINDS[kind]().eval(), False)
    assert outputs.upper == range(0)
    ids = torch.tensor([[5, 6, 7]])
    assert [tuple(part.shape) for part in outputs(ids, torch.ones_like(ids))] == [(1, 3, 32)]


SLIM: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}


@pytest.mark.parametrize(
    ("kind", "config", "wanted"),
    [
        (RobertaModel, RobertaConfig(max_position_embeddings=514, pad_token_id=1, **SLIM), 512),
        (XLMRobertaModel, XLMRobertaConfig(max_position_embeddings=40, pad_token_id=3, **SLIM), 36),
        (BertModel, BertConfig(max_position_embeddings=512, **SLIM), 512),
        (MPNetModel, MPNetConfig(max_position_embeddings=514, **SLIM), 512),
        (LongformerModel, LongformerConfig(max_position_embeddings=4098, pad_token_id=1, attention_window=[4], **SLIM), 4096),
    ],
)
def test_positions_count_from_the_padding_where_a_model_counts_so(kind: Any, config: Any, wanted: int) -> None:
    assert position_count(kind(config)) == wanted


def test_exact_runs_are_not_compared_with_themselves(beir: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--dataset", str(beir()), "--methods", "fast", "--cold-queries", "0", "--no-cache", "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["rows"][0]["vs_fp32"] is None


def test_bf16_runs_on_any_bi_encoder(tmp_path: Path) -> None:
    """A model that is not of BERT's kind, so that it runs padded."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    source = load_bi("all-MiniLM-L6-v2", device="cpu")
    DistilBertModel(DistilBertConfig(vocab_size=30522, dim=32, n_layers=2, n_heads=4, hidden_dim=48)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source.folder / name).read_bytes())
    rough, plain = (BiEncoder(tmp_path, "distil", precision=precision).encode(TEXTS) for precision in ("bf16", "fp32"))
    cosine = torch.nn.functional.cosine_similarity(rough.pooled, plain.pooled)
    assert float(cosine.min()) > 0.999 and not torch.equal(rough.pooled, plain.pooled)
