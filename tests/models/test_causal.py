"""Causal rerankers give the scores of their authors' formulas, or of sentence-transformers where the folder carries its prompt."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rerank_lab import Reranker
from rerank_lab.errors import UserError
from rerank_lab.eval.__main__ import main
from rerank_lab.models.base import Inputs, Overrides
from rerank_lab.models.causal import CausalReranker, common_beginning
from rerank_lab.models.decoder import Decoder
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from rerank_lab.models.packed_decoder import KeysValues
from rerank_lab.server.steps import Steps
from tests.conftest import DOCUMENTS, ROOT
from tests.models.checkpoints import Make, change, put
from tests.models.decoders import CHAT, NO_SYSTEM, ROLES, STRUCTURED, decoder, logit_score, texts
from tests.serving import serving

sys.path.insert(0, str(ROOT / "experiments" / "references"))
import causal as formulas
import cross_encoder as sentence_transformers_says

QUERY = "sort the rows of an array by a column"
SHORT = [*(text for _, text in DOCUMENTS.values()), "", "naïve 你好 🎉 \n x", "<|im_end|> yes"]
LONG = " ".join(texts())
FAMILIES: dict[str, Make] = {
    "Qwen3-Reranker": lambda f: decoder(f / "qwen3-reranker-tiny"),
    "mxbai-rerank-v2": lambda f: decoder(f / "mxbai-rerank-tiny-v2", "Qwen2ForCausalLM"),
    "bge-reranker-v2-gemma": lambda f: decoder(f / "bge-reranker-v2-gemma", "GemmaForCausalLM", num_key_value_heads=1),
}
CARRIED: dict[str, Make] = {
    "Qwen3, yes and no": logit_score,
    "no prompt of its own": lambda f: logit_score(f, prompts={}),
    "yes alone, a template without instruction": lambda f: logit_score(
        f, chat=NO_SYSTEM, prompts={}, no=None, settings={"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    ),
    "contents in parts": lambda f: logit_score(f, chat=STRUCTURED, prompts={}),
    "Llama": lambda f: logit_score(f, "LlamaForCausalLM"),
    "Mistral with a window": lambda f: logit_score(f, "MistralForCausalLM", sliding_window=24),
    "Phi3, of no kind that is packed": lambda f: logit_score(f, "Phi3ForCausalLM"),
    "no modules.json beside a template with both roles": lambda f: decoder(f / "lm", chat=ROLES),
}


def load(folder: Path, instruction: str | None = None, **options: Any) -> CausalReranker:
    model = load_cross_encoder(folder, device="cpu", overrides=Overrides(instruction=instruction), **options)
    assert isinstance(model, CausalReranker)
    return model


def assert_equal(found: Tensor, wanted: list[float], *, told_apart: bool = True) -> None:
    assert not told_apart or torch.tensor(wanted).std() > 0.01, "the model tells documents apart"
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_familys_formula(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path)
    model = load(folder)
    assert_equal(model.score(QUERY, SHORT), formulas.scores(folder, QUERY, SHORT))
    long = [LONG[:30_000], LONG[:1200], SHORT[0]]
    for query in (QUERY, LONG[:3000], LONG[:26_000]):
        assert_equal(model.score(query, long, max_tokens=10**9), formulas.scores(folder, query, long), told_apart=query == QUERY)
    assert json.loads(model.reading())["prompt"] == family


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruction_takes_the_place_of_the_familys_own(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path)
    own, told = load(folder), load(folder, "Find code that sorts. Answer 'Yes' or 'No'.")
    assert_equal(told.score(QUERY, SHORT), formulas.scores(folder, QUERY, SHORT, "Find code that sorts. Answer 'Yes' or 'No'."))
    assert (told.score(QUERY, SHORT) - own.score(QUERY, SHORT)).abs().max() > 0.01
    assert told.fingerprint != own.fingerprint == load(folder).fingerprint
    assert json.loads(told.reading())["instruction"].startswith("Find code")


@pytest.mark.parametrize("layout", CARRIED)
def test_scores_are_sentence_transformers_where_the_folder_carries_its_prompt(layout: str, tmp_path: Path) -> None:
    folder = CARRIED[layout](tmp_path)
    model = load(folder)
    assert_equal(model.score(QUERY, SHORT, max_tokens=10**9), sentence_transformers_says.scores(folder, QUERY, SHORT))
    assert (model.decoder.packed is None) == (layout.startswith(("Mistral", "Phi3")))
    change(folder, "tokenizer_config.json", model_max_length=150)
    model = load(folder)
    for query in ("sort", LONG[:150]):  # what is too long is cut, and the end of the template is put back
        long = [LONG[:3000], SHORT[0], LONG[100:400]]
        assert_equal(model.score(query, long, max_tokens=10**9), sentence_transformers_says.scores(folder, query, long), told_apart=query == "sort")


def test_the_default_prompt_of_a_folder_is_its_instruction(tmp_path: Path) -> None:
    folder = logit_score(tmp_path / "m")
    told = load(folder, "Find code.")
    assert_equal(told.score(QUERY, SHORT), sentence_transformers_says.scores(folder, QUERY, SHORT, "Find code."))
    assert_equal(load(folder, "").score(QUERY, SHORT), sentence_transformers_says.scores(folder, QUERY, SHORT, ""))
    assert json.loads(told.reading())["instruction"] == "Find code."
    with pytest.raises(UserError, match="takes no instruction: its chat template has no place for one"):
        load(logit_score(tmp_path / "n", chat=NO_SYSTEM, prompts={}), "Find code.")


def test_max_tokens_cuts_the_documents_text_before_it_enters_the_template(tmp_path: Path) -> None:
    folder = FAMILIES["Qwen3-Reranker"](tmp_path)
    model, text = load(folder), LONG[:900]
    tokens = model.prompt.fast.encode(text, add_special_tokens=False)
    kept = text[: tokens.offsets[49][1]]
    assert_equal(model.score(QUERY, [text, SHORT[0]], max_tokens=50), formulas.scores(folder, QUERY, [kept, SHORT[0]]))
    work = model.work(Inputs(QUERY, [text, SHORT[0], text[:90], LONG[:1500]], 50))
    assert {n: part.cut for part in work for n in part.positions} == {0: True, 1: False, 2: False, 3: True}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_its_own_whatever_shares_its_batch(family: str, tmp_path: Path) -> None:
    model, many = load(FAMILIES[family](tmp_path)), [*SHORT, *(LONG[n : n + 40 * n] for n in range(1, 30))]
    together = model.score(QUERY, many)
    alone = torch.cat([model.score(QUERY, [text]) for text in many])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(model.score(QUERY, many), together) and len(model.work(Inputs(QUERY, many, 512))) > 2
    torch.testing.assert_close(model.score(QUERY, [SHORT[0]] * 3), alone[:1].expand(3), atol=1e-5, rtol=0)
    assert model.score(QUERY, []).shape == (0,)


@pytest.mark.parametrize("layout", ["Qwen3, yes and no", "Phi3, of no kind that is packed"])
def test_what_a_querys_sequences_begin_with_runs_once(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = load(CARRIED[layout](tmp_path)), list[int]()
    own = Decoder.shared

    def counted(self: Decoder, ids: np.ndarray) -> KeysValues:
        ran.append(len(ids))
        return own(self, ids)

    monkeypatch.setattr(Decoder, "shared", counted)
    work = model.work(Inputs(QUERY, texts()[:30], 100))
    assert len(work) > 1
    scores = torch.cat([model.logits([part]) for part in reversed(work)])  # as a server does it, part by part
    (shared,) = ran
    sequences = model.prompt.sequences(QUERY, texts()[:30], 100)
    assert shared == len(common_beginning([one.ids for one in sequences])) > 50
    assert sum(part.size for part in work) == shared + sum(len(one.ids) - shared for one in sequences)
    torch.testing.assert_close(scores, torch.cat([model.logits([part]) for part in reversed(work)]))
    assert len(ran) == 1


def test_flops_count_what_is_shared_once(tmp_path: Path) -> None:
    model = load(FAMILIES["Qwen3-Reranker"](tmp_path))
    a_token = 3 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48)  # q and o, k and v, the three maps of the MLP; three layers
    assert model.decoder.flops([5], 0) == 2 * 5 * a_token + 4 * 64 * 3 * (1 + 2 + 3 + 4 + 5)
    assert model.decoder.flops([5], 7) + model.decoder.flops([7], 0) == model.decoder.flops([12], 0)
    work = model.work(Inputs(QUERY, SHORT, 512))
    ids = [one.ids for one in model.prompt.sequences(QUERY, SHORT, 512)]
    shared = len(common_beginning(ids))
    assert model.flops(work) == model.decoder.flops([shared], 0) + model.decoder.flops([len(one) - shared for one in ids], shared)


def test_what_sequences_begin_with_ends_before_their_last_token() -> None:
    def common(*rows: list[int]) -> list[int]:
        return [int(n) for n in common_beginning([np.array(row) for row in rows])]

    assert common([1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 9]) == [1, 2]
    assert common([1, 2, 3], [1, 2, 3]) == [1, 2] and common([1, 2, 3, 4], [1, 2]) == [1]
    assert common([1, 2, 3]) == common() == common([1], [2]) == []


def test_bf16_is_near(tmp_path: Path) -> None:
    folder = FAMILIES["Qwen3-Reranker"](tmp_path)
    near, exact = load(folder, precision="bf16"), load(folder)
    assert (near.runtime, near.precision) == ("torch", "bf16")
    found, wanted = near.score(QUERY, texts()[:20]), exact.score(QUERY, texts()[:20])
    assert 0 < (found - wanted).abs().max() < 0.15 < wanted.std()


# What is refused as --model-cross, and the message.
REFUSED: dict[str, tuple[Make, str]] = {
    "a language model": (lambda f: decoder(f / "qwen3-0.6b"), "and its prompt is not known here; known by their names are Qwen3-Reranker, mxbai-rerank-v2"),
    "a language model of another architecture": (lambda f: decoder(f / "qwen3-reranker", "LlamaForCausalLM"), "a causal language model (as LlamaForCausalLM"),
    "no head": (lambda f: change(decoder(f / "qwen3-reranker"), "config.json", architectures=["Qwen3Model"]), "its prompt is not known here"),
    "a template without both roles": (lambda f: logit_score(f, chat=CHAT), "its chat template has no place for query and document"),
    "a template that raises": (lambda f: logit_score(f, chat="{{ raise_exception('user must be first') }}"), "takes no query and document (TemplateError"),
    "plain texts": (
        lambda f: change(logit_score(f), "sentence_bert_config.json", modality_config={"text": {"method": "forward", "method_output_name": "logits"}}),
        "reads its pairs as two plain texts",
    ),
    "no tokens": (lambda f: put(logit_score(f), {"1_LogitScore/config.json": {"true_token_id": None}}), "must name true_token_id and false_token_id"),
    "a token past the vocabulary": (
        lambda f: change(logit_score(f), "1_LogitScore/config.json", true_token_id=10**6), "answers with the tokens [1000000, "),
    "a key that is not known": (lambda f: change(logit_score(f), "1_LogitScore/config.json", temperature=2), "1_LogitScore/config.json has temperature"),
    "another truncation": (
        lambda f: change(logit_score(f), "sentence_bert_config.json", processing_kwargs={"chat_template": {"restore_suffix": True}}),
        "restore_suffix in its Transformer's settings is True",
    ),
    "logits that are bent": (lambda f: logit_score(f, "CohereForCausalLM", logit_scale=0.5), "makes its logits in another way"),
    "no room": (lambda f: change(logit_score(f), "tokenizer_config.json", model_max_length=40), "a limit of 40 tokens leaves none for the text"),
    "listwise": (
        lambda f: change(decoder(f), "config.json", architectures=["JinaForRanking"], auto_map={"AutoModel": "modeling.JinaForRanking"}),
        "is a listwise reranker (JinaForRanking): it reads all documents of a query at once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        load_cross_encoder(make(tmp_path), device="cpu")
    assert message in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_other_roles_runtimes_and_prompts_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["Qwen3-Reranker"](tmp_path)
    with pytest.raises(UserError, match=r"is a causal language model .* and a bi-encoder is needed here; give it as --model-cross"):
        load_bi_encoder(folder, device="cpu")
    for options in ({"runtime": "onnx"}, {"runtime": "compile"}, {"precision": "int8"}):
        with pytest.raises(UserError, match=r"is a causal reranker, which runs by torch in fp32 or bf16 alone"):
            load(folder, **options)
    with pytest.raises(UserError, match="takes no query_prompt: it is a causal reranker"):
        load_cross_encoder(folder, device="cpu", overrides=Overrides(query_prompt="query: "))


def test_it_ranks_travels_and_is_evaluated(tmp_path: Path, beir: Callable[..., Path]) -> None:
    folder = FAMILIES["Qwen3-Reranker"](tmp_path)
    documents = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    ranker = Reranker(None, "standard", str(folder), device="cpu", instruction="Find code.")
    wanted = formulas.scores(folder, QUERY, documents, "Find code.")
    ranking = pickle.loads(pickle.dumps(ranker)).score(QUERY, documents)
    torch.testing.assert_close(ranking.scores, torch.tensor(wanted)[ranking.order], atol=1e-4, rtol=0)
    arguments = ["--dataset", str(beir()), "--model-cross", str(folder), "--methods", "standard", "--cold-queries", "0", "--no-cache"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["models"]["model_cross"] == str(folder)
    assert {line.split()[0] for line in (tmp_path / "out" / "runs" / "standard.trec").read_text().splitlines()} == {"q1", "q2", "q3", "q4"}


def test_a_server_runs_its_parts_one_by_one(tmp_path: Path) -> None:
    folder, many = FAMILIES["Qwen3-Reranker"](tmp_path), texts()[:30]
    ranker = Reranker(None, "standard", str(folder), device="cpu", max_tokens_per_doc=100)
    direct, steps = ranker.score(QUERY, many), Steps(ranker, QUERY, many)
    units = list(steps.units)
    assert len({unit.group for unit in units}) == len(units) > 1
    for unit in units:
        unit.run([unit])
    ranking = steps.advance()
    assert ranking is not None and ranking.order == direct.order
    torch.testing.assert_close(ranking.scores, direct.scores, atol=1e-5, rtol=0)
    assert (ranking.tokens, ranking.truncated, ranking.flops) == (direct.tokens, direct.truncated, direct.flops)
    assert direct.truncated == sum(len(one) > 100 for one in ranker.cross.prompt.fast.encode_batch(many, add_special_tokens=False)) > 0  # type: ignore[union-attr]


def test_it_is_served(tmp_path: Path) -> None:
    folder = FAMILIES["mxbai-rerank-v2"](tmp_path)
    with serving("--model-cross", str(folder)) as server:
        status, answer, _ = server.post({"model": "all-MiniLM-L6-v2", "model_cross": str(folder), "method": "standard", "query": QUERY, "documents": SHORT[:5]})
    assert status == 200
    shown = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [shown[n] for n in range(5)] == pytest.approx(torch.tensor(formulas.scores(folder, QUERY, SHORT[:5])).sigmoid().tolist(), abs=1e-4)


def test_another_chat_template_is_another_model(tmp_path: Path) -> None:
    folder = logit_score(tmp_path)
    before = load_cross_encoder(str(folder), device="cpu").fingerprint
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")
    assert load_cross_encoder(str(folder), device="cpu").fingerprint != before


def test_positions_that_follow_the_length_of_the_input_are_refused(tmp_path: Path) -> None:
    folder = logit_score(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="frequencies that depend on how much is read at once"):
        load_cross_encoder(str(folder), device="cpu")
