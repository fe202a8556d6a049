"""What is fetched from the hub: what a model needs, and nothing else. A small server on this machine stands in for the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.models.checkpoints import bi_encoder, put

Files = Mapping[str, bytes]
ELSEWHERE = ["onnx/model.onnx", "onnx/config.json", "onnx/tokenizer.json", "openvino/openvino_model.xml", "openvino/openvino_model.bin", "tf_model.h5",
             "flax_model.msgpack", "model.gguf", "rust_model.ot", "README.md", "modeling.py", ".gitattributes", "original/model.safetensors", "original/params.json"]  # fmt: skip
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
STATIC = [{"path": "0_StaticEmbedding", "type": "sentence_transformers.models.StaticEmbedding"}]
SPLADE = [
    {"path": "", "type": "sentence_transformers.sparse_encoder.models.MLMTransformer"},
    {"path": "1_SpladePooling", "type": "sentence_transformers.sparse_encoder.models.SpladePooling"},
]


def index(*files: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer{n}": file for n, file in enumerate(files)}}).encode()


def repository(*needed: str, beside: list[str] = ELSEWHERE, **contents: object) -> tuple[set[str], Files]:
    """The files that a model needs, and all that its repository has. `contents` are of files whose names have _ for a dot."""
    given = {name.replace("_json", ".json"): json.dumps(value).encode() for name, value in contents.items()}
    files = {name: given.get(name, b"{}" if name.endswith(".json") else b"weights") for name in (*needed, *given, *beside)}
    return {*needed, *given}, files


PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
REPOSITORIES: dict[str, tuple[set[str], Files]] = {
    "a/bi-encoder": repository(
        *TOKENIZER, "config.json", "config_sentence_transformers.json", "sentence_bert_config.json", "model.safetensors", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors", modules_json=MODULES,
        beside=[*ELSEWHERE, "pytorch_model.bin", "2_Dense/pytorch_model.bin", "model.fp16.safetensors", "9_Other/config.json", "2_Dense/deeper/config.json"],
    ),
    "a/bi-encoder-of-torch": repository(
        *TOKENIZER, "config.json", "pytorch_model.bin", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", modules_json=MODULES,
    ),
    "a/stanford-colbert": repository(*TOKENIZER, "config.json", "artifact.metadata", "model.safetensors", beside=[*ELSEWHERE, "pytorch_model.bin", "colbert.onnx"]),
    "a/bge-m3": repository(
        *TOKENIZER, "sentencepiece.bpe.model", "config.json", "colbert_linear.pt", "pytorch_model.bin", "1_Pooling/config.json", modules_json=MODULES[:2],
        beside=[*ELSEWHERE, "sparse_linear.pt", "imgs/bm25.jpg", "onnx/model.onnx_data", "long.jpg"],
    ),
    "a/causal-in-parts": repository(
        *TOKENIZER, "config.json", "generation_config.json", "chat_template.jinja", "merges.txt", *PARTS,
        beside=[*ELSEWHERE, *BINS, "model-00001-of-00003.safetensors"], **{"model.safetensors.index_json": json.loads(index(*PARTS))},
    ),
    "a/parts-of-torch": repository(*TOKENIZER, "config.json", *BINS, **{"pytorch_model.bin.index_json": json.loads(index(*BINS))}),
    "a/static": repository("0_StaticEmbedding/tokenizer.json", "0_StaticEmbedding/model.safetensors", "config_sentence_transformers.json", modules_json=STATIC),
    "a/model2vec": repository("tokenizer.json", "config.json", "model.safetensors", modules_json=[STATIC[0] | {"path": "."}, MODULES[3] | {"path": "1_Normalize"}]),
    "a/splade": repository(*TOKENIZER, "config.json", "model.safetensors", "1_SpladePooling/config.json", modules_json=SPLADE, beside=[*ELSEWHERE, "pytorch_model.bin"]),
    "a/adapter": repository(*TOKENIZER, "adapter_config.json", beside=["README.md", "adapter_model.safetensors"]),
    "a/router": repository("router_config.json", modules_json=[{"path": "", "type": "sentence_transformers.models.Router"}], beside=["query_0_Transformer/model.safetensors"]),
}  # fmt: skip
NOT_FOR_TORCH = repository(*TOKENIZER, "config.json")


@dataclass
class Hub:
    """A stand-in for the hub.

    Attributes:
        url: its endpoint.
        asked: paths of requests, in order.
    """

    url: str
    asked: list[str] = field(default_factory=list)


def serve(repositories: Mapping[str, Files]) -> Iterator[Hub]:
    """Serves repositories as the hub's API does: a revision, a tree, and files of a commit."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            name = next((name for name in repositories if f"/{name}/" in f"{path}/"), None)
            if name is None:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
                return
            files, commit = repositories[name], hashlib.sha1(name.encode()).hexdigest()
            rest = path.partition(f"/{name}")[2].lstrip("/")
            if path.startswith("/api/models/"):
                blobs = [{"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for file, body in files.items()]
                found = blobs if rest.startswith("tree/") else {"id": name, "sha": commit, "siblings": []}
                self.answer(json.dumps(found).encode(), Content_Type="application/json")
            elif (body := files.get(rest.removeprefix(f"resolve/{commit}/"))) is not None:
                self.answer(body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            else:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(bi_encoder(tmp_path_factory.mktemp("real"), "Dense", "Normalize"), {"onnx/config.json": {}, "onnx/model.onnx": "x"})


@pytest.fixture(scope="module")
def hub(real: Path) -> Iterator[Hub]:
    own = {path.relative_to(real).as_posix(): path.read_bytes() for path in real.rglob("*") if path.is_file()}
    yield from serve({name: files for name, (_, files) in REPOSITORIES.items()} | {"a/none-for-torch": NOT_FOR_TORCH[1], "a/real": own})


def run(code: str, hub: Hub, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that asks this hub and keeps its files in this folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    asked = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300, env=kept | asked | env)


@pytest.fixture(scope="module")
def cache(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache after each repository was asked for."""
    home = tmp_path_factory.mktemp("home")
    names = [*REPOSITORIES, "a/real"]
    code = f"from rerank_lab.models.registry import locate\nfor name in {names!r}: print(name, locate(name, 'bi-encoder'))"
    done = run(code, hub, home)
    assert done.returncode == 0, done.stderr
    assert "No files matched" not in done.stderr, done.stderr
    folders = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name, folder in folders.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        stored = home / "hub" / f"models--{name.replace('/', '--')}"
        assert Path(folder) == stored / "snapshots" / commit and (stored / "refs" / "main").read_text() == commit
    return home


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_a_model_needs_is_fetched_and_nothing_else(name: str, cache: Path) -> None:
    (snapshot,) = (cache / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    wanted, files = REPOSITORIES[name]
    found = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert found == wanted
    assert all((snapshot / file).read_bytes() == files[file] for file in found)


def test_a_model_of_the_hub_runs_and_is_found_again_without_it(cache: Path, hub: Hub, real: Path) -> None:
    code = "from rerank_lab import Reranker\nprint([r.index for r in Reranker({!r}, 'fast', device='cpu').rank('sort values', ['join', 'sort values by key', 'plot'])])"
    before = len(hub.asked)
    done = run(code.format("a/real"), hub, cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == before, "the hub was asked"
    assert done.stdout == run(code.format(str(real)), hub, cache, HF_HUB_OFFLINE="1").stdout != ""


def test_each_file_is_fetched_once(cache: Path, hub: Hub) -> None:
    got = [path for path in hub.asked if "/resolve/" in path]
    bodies = {path: got.count(path) for path in got}
    assert bodies and max(bodies.values()) <= 2, "a HEAD and a GET"


@pytest.mark.parametrize("name", ["a/causal-in-parts", "a/parts-of-torch"])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_part_that_is_missing_is_fetched_again(name: str, missing: int, tmp_path: Path) -> None:
    wanted, files = REPOSITORIES[name]
    code = f"from rerank_lab.models.registry import locate\nprint(locate({name!r}, 'cross-encoder'))"
    with contextmanager(serve)({name: files}) as hub:
        first = run(code, hub, tmp_path)
        assert first.returncode == 0, first.stderr
        snapshot = Path(first.stdout.strip())
        part = snapshot / (PARTS if name == "a/causal-in-parts" else BINS)[missing]
        part.resolve().unlink()
        part.unlink(missing_ok=True)
        again = run(code, hub, tmp_path)
    assert again.returncode == 0, again.stderr
    assert part.read_bytes() == files[part.name]
    assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == wanted


@pytest.mark.parametrize(
    ("name", "message"), [("a/none-for-torch", "the hub has no weights of it for torch"), ("a/unknown", "no folder, and the hub did not give it")]
)
def test_what_the_hub_does_not_have_is_told(name: str, message: str, hub: Hub, tmp_path: Path) -> None:
    code = f"from rerank_lab.errors import UserError\nfrom rerank_lab.models.registry import locate\ntry: locate({name!r}, 'bi-encoder')\nexcept UserError as error: print(error)"
    done = run(code, hub, tmp_path)
    assert done.returncode == 0 and message in done.stdout, done.stdout + done.stderr
