"""The row `late` of bench_models: a late-interaction model over documents, beside MultiVectorEncoder.encode_document on the same texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rerank_lab.models.base import Detail
from rerank_lab.models.kinds import load_bi_encoder
from rerank_lab.models.late_interaction import LateInteraction
from rerank_lab.models.registry import DEFAULT_MODEL, locate

R, QUERY_TOKENS = 128, 32  # columns of the projection, tokens of a query


def colbert(folder: Path, limit: int) -> Path:
    """Writes a late-interaction model in PyLate's layout with the default bi-encoder's weights and an untrained projection to R dimensions."""
    source = locate(DEFAULT_MODEL, "bi-encoder")
    shutil.copytree(source, folder, ignore=lambda place, names: [name for name in names if name[:1].isdigit() or name.endswith(".safetensors")])
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    (folder / "1_Dense").mkdir()
    width = json.loads((source / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    weight = torch.randn(R, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
    save_file({"linear.weight": weight}, folder / "1_Dense" / "model.safetensors")
    kinds = (("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    files: dict[str, Any] = {
        "modules.json": [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(kinds)],
        "1_Dense/config.json": {"in_features": width, "out_features": R, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"},
        "config_sentence_transformers.json": {
            "model_type": "ColBERT", "query_prefix": "[unused0] ", "document_prefix": "[unused1] ", "query_length": QUERY_TOKENS, "document_length": limit,
        },
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def peer(folder: str, texts: Sequence[str]) -> Callable[[], Tensor]:
    """Token vectors of the texts by sentence-transformers."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(folder, device="cpu")
    return lambda: torch.cat([*model.encode_document(list(texts), show_progress_bar=False)])


def ours(folder: str, texts: Sequence[str], limit: int, **way: Any) -> Callable[[], Tensor]:
    """The same here, under a runtime and a precision."""
    model = load_bi_encoder(folder, device="cpu", **way)
    assert isinstance(model, LateInteraction)
    return lambda: model.encode(texts, max_tokens=limit).tokens


def flops(folder: str, texts: Sequence[str], limit: int) -> float:
    """FLOPs of that, by the model's own formula."""
    model = load_bi_encoder(folder, device="cpu")
    lengths = torch.tensor([len(t) - model.specials for t in model.tokenize(texts, "document", limit)])
    return float(model.flops(lengths, Detail.TOKENS))
