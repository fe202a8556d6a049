"""Packed and Padded give the outputs of the Hugging Face model, for each text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

from rerank_lab.models.forward import in_advance
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import Padded
from tests.conftest import load_bi, load_pairs

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.5,
    "max_position_embeddings": 40,
}  # fmt: skip
LENGTHS = [7, 1, 30, 7, 2]


def build(kind: type, config: type, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**SIZES | more)).eval()


MODELS = {
    "bert": lambda: build(BertModel, BertConfig),
    "bert, relu": lambda: build(BertModel, BertConfig, hidden_act="relu", layer_norm_eps=0.1),
    "roberta": lambda: build(RobertaModel, RobertaConfig, pad_token_id=1),
    "xlm-roberta": lambda: build(XLMRobertaModel, XLMRobertaConfig, pad_token_id=3),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def texts() -> tuple[Tensor, Tensor, list[int]]:
    torch.manual_seed(1)
    total = sum(LENGTHS)
    ids = torch.randint(5, 50, (total,))
    ids[[3, 12]] = torch.tensor([1, 3])  # the padding tokens of the models, inside a text
    return ids, torch.zeros(total, dtype=torch.int64), LENGTHS


def own(model: Any, ids: Tensor) -> Any:
    """The model's output for one text."""
    return model(input_ids=ids[None], output_hidden_states=True)


@torch.inference_mode()
def test_both_leave_what_the_model_leaves_of_each_text_alone(model: Any) -> None:
    ids, types, lengths = texts()
    alone = [own(model, part) for part in torch.split(ids, lengths)]
    last, middle = (torch.cat([one.hidden_states[n][0] for one in alone]) for n in (-1, 1))
    layers = [model.encoder.layer[n].attention.self for n in (1, 2)]
    keys_values = torch.cat([part(torch.cat([one.hidden_states[n][0] for one in alone])) for n, s in zip((1, 2), layers) for part in (s.key, s.value)], 1)
    padded = Padded(model, model.config.pad_token_id, True)(ids, types, lengths, keep=1, keys_values=range(1, 3))
    packed = Packed(model)(ids, types, lengths, keep=1, keys_values=range(1, 3))
    for found in (padded, packed):
        torch.testing.assert_close(found.last, last, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.kept[1], middle, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.keys_values, keys_values, atol=1e-4, rtol=1e-5)
    first = Packed(model)(ids, types, lengths, first=True, keys_values=range(2, 3))
    torch.testing.assert_close(first.last, torch.stack([one.last_hidden_state[0, 0] for one in alone]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(first.keys_values, keys_values[:, 64:], atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_segments_are_read() -> None:
    model = MODELS["bert"]()
    ids, types, lengths = texts()
    types[3:7] = 1
    wanted = model(input_ids=ids[None, :7], token_type_ids=types[None, :7]).last_hidden_state[0]
    for network in (Padded(model, 0, True), Packed(model)):
        torch.testing.assert_close(network(ids, types, lengths).last[:7], wanted, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(own(model, ids[:7]).last_hidden_state[0], wanted, atol=1e-2)


@torch.inference_mode()
def test_segments_that_the_tokenizer_does_not_know_are_left_out() -> None:
    model = MODELS["roberta"]()
    ids, types, lengths = texts()
    found = Packed(model, token_types=False)(ids, types + 1, lengths).last[:7]
    torch.testing.assert_close(found, own(model, ids[:7]).last_hidden_state[0], atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_a_text_without_tokens_leaves_nothing() -> None:
    model = MODELS["bert"]()
    ids = torch.tensor([7, 8, 9])
    for network in (Padded(model, 0, True), Packed(model)):
        found = network(ids, torch.zeros_like(ids), [2, 0, 1])
        torch.testing.assert_close(found.last[2:], own(model, ids[2:]).last_hidden_state[0], atol=1e-4, rtol=1e-5)
        assert len(found.last) == 3


def test_the_models_weights_are_held_once() -> None:
    model = MODELS["bert"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Packed(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    parts = [getattr(model.encoder.layer[0].attention.self, name).weight for name in ("query", "key", "value")]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_what_is_not_known_runs_as_it_is(small_cross: Path) -> None:
    distil = DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=4, hidden_dim=48)).eval()
    assert not Packed.fits(distil)
    assert not Packed.fits(MODELS["bert"]().half())
    assert not Packed.fits(build(BertModel, BertConfig, is_decoder=True))
    assert isinstance(load_bi("all-MiniLM-L6-v2", device="cpu").network, Packed)
    cross = load_pairs(str(small_cross), device="cpu")
    assert isinstance(cross.network, Packed)
    query, documents = "merge two tables", ["join on a key", "", "sort by the values along either axis"]
    packed = cross.score(query, documents)[0]
    cross.network = Padded(cross.model, 0, True)
    torch.testing.assert_close(cross.score(query, documents)[0], packed, atol=1e-4, rtol=1e-5)


def test_what_comes_in_advance_is_in_order_one_ahead_and_raises_where_it_is_due() -> None:
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        if number == 4:
            raise ValueError("broken on purpose")
        return number

    results = in_advance(partial(call, number) for number in range(6))
    assert next(results) == 0
    assert max(made) <= 1
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="on purpose"):
        next(results)
