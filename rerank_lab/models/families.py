"""Recognises a checkpoint's family and role by its files. Families other than bi-encoders and cross-encoders are refused by name, with a remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError

BI, CROSS = "bi-encoder", "cross-encoder"
OPTIONS = {BI: "--model", CROSS: "--model-cross"}
T5 = ("longt5", "mt5", "switch_transformers", "t5", "t5gemma", "t5gemma2", "udop", "umt5")
LARGE, POINTER = (".safetensors", ".bin", ".json", ".model"), b"version https://git-lfs"  # files that git-lfs may replace by pointers, and how a pointer begins
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
OTHERS = {"ONNX": "*.onnx", "GGUF": "*.gguf", "TensorFlow": "tf_model*.h5", "Flax": "flax_model*.msgpack", "OpenVINO": "openvino_*.xml"}
LATE = "a late-interaction model (ColBERT, as {sign} says): it has a vector for each token and none for a text, and its own score is not computed here"
SPARSE = "a sparse encoder (SPLADE, as {sign} says): it weighs words of its vocabulary, which is not computed here"
STATIC = "a static embedding model (as {sign} says): it has no transformer, and is not computed here"
CAUSAL = "a causal language model (as {sign} says): a reranker of this kind answers a prompt with yes or no, which is not computed here"
# Patterns of a module's full dotted name, or of model_type, and the family that they mean.
FAMILIES = [
    (re.compile(r"pylate\..*|.*\.multi_vector_encoder\..*|ColBERT|MultiVectorEncoder"), LATE),
    (re.compile(r".*\.sparse_encoder\..*|SparseEncoder"), SPARSE),
    (re.compile(r".*\.StaticEmbedding"), STATIC),
    (re.compile(r".*\.LogitScore"), CAUSAL),
]
INSTEAD = {BI: "name an embedding model that pools", CROSS: "name a model with a classification head of one label"}


def refuse_family(folder: Path, name: str, role: str, types: Sequence[str], about: Mapping[str, Any]) -> None:
    """Refuses other families of models by their signs in modules.json and config_sentence_transformers.json.

    Args:
        folder, name, role: as read_checkpoint takes them.
        types: full dotted names of the modules.
        about: config_sentence_transformers.json.
    """
    signs = [(kind, "modules.json") for kind in types] + [(str(about.get("model_type")), "config_sentence_transformers.json")]
    for value, place in signs:
        for pattern, family in FAMILIES:
            if pattern.fullmatch(value):
                raise _refusal(name, family.format(sign=f"{value} in {place}"), role)
    late = "artifact.metadata" if (folder / "artifact.metadata").is_file() else None
    late = "config_sentence_transformers.json" if about.get("similarity_fn_name") == "MaxSim" or "query_prefix" in about else late
    late = "a Dense module on token vectors in modules.json" if [last_part(kind) for kind in types[:2]] == ["Transformer", "Dense"] else late
    if late:
        raise _refusal(name, LATE.format(sign=late), role)
    if about.get("model_type") not in (None, "SentenceTransformer", "CrossEncoder"):
        raise _refusal(name, f"a {about['model_type']} (model_type in config_sentence_transformers.json), which is not known here", role)


def refuse_parts(folders: Sequence[Path], name: str) -> None:
    """Refuses folders that are incomplete: a LoRA adapter without its model, or pointers of git-lfs instead of files."""
    for folder in dict.fromkeys(folders):
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "another model"
            raise UserError(
                f"model {name!r} is a LoRA adapter of {base}, without the weights that it changes; merge them first "
                "(peft: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(folder)) and name that folder"
            )
        for path in sorted(path for path in folder.rglob("*") if path.suffix in LARGE and path.is_file()):
            with path.open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    raise UserError(f"model {name!r}: {path} is a pointer of git-lfs and no file yet; run git lfs pull in {folder}")


def weights_of(root: Path) -> tuple[str, ...]:
    """Patterns of the files that transformers loads a model's weights from. A folder may hold them in several formats."""
    order = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    return next(((pattern,) for pattern in order if any(root.glob(pattern))), WEIGHTS)


def refuse_foreign(root: Path, name: str, role: str, config: Mapping[str, Any]) -> None:
    """Refuses a transformer by its config.json and weights: other families, code of its own, weights in other formats.

    Args:
        root: the transformer's folder.
        name, role: as read_checkpoint takes them.
        config: config.json.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
        raise UserError(f"model {name!r}: {root / 'config.json'} is no readable model configuration (architectures must be a list of names)")
    architecture = next(iter(architectures), "")
    if architecture == "HF_ColBERT":
        raise _refusal(name, LATE.format(sign="HF_ColBERT in config.json"), role)
    if config.get("model_type") == "model2vec" or architecture == "StaticModel":
        raise _refusal(name, STATIC.format(sign="config.json"), role)
    if code := _own_code(config) or _own_code(read_json(root / "tokenizer_config.json")):
        raise UserError(f"model {name!r} brings code of its own ({code}), which is never run here; name a checkpoint that transformers loads by itself")
    if odd := [key for key in ("vision_config", "audio_config") if key in config]:
        raise _refusal(name, f"a model of more than text ({architecture or odd[0]}), which is not computed here", role)
    if config.get("model_type") == "dpr":
        raise _refusal(name, f"a half of DPR ({architecture}), whose questions and passages are read by two models, which is not computed here", role)
    if config.get("quantization_config"):
        method = as_dict(config["quantization_config"]).get("quant_method", "a quantisation")
        raise UserError(f"model {name!r} holds weights quantised by {method}, which are not read here; name the checkpoint that they were made of")
    kind = str(config.get("model_type", ""))
    if config.get("attention_type") == "block_sparse" or (kind == "big_bird" and "attention_type" not in config):
        raise UserError(
            f"model {name!r} attends by blocks (attention_type block_sparse), and once it has read a short text no more: what it makes of a text depends on those "
            f"before; set attention_type to original_full in {root / 'config.json'}"
        )
    if config.get("is_encoder_decoder") or kind in T5:
        raise _refusal(name, f"an encoder-decoder or a half of one ({architecture or kind}), which is not computed here", role)
    others = sorted(format for format, pattern in OTHERS.items() if any(root.rglob(pattern)))
    if others and not any(path for pattern in WEIGHTS for path in root.glob(pattern)):
        raise UserError(
            f"model {name!r}: {root} has weights for {' and '.join(others)} alone, which are not read here; name the model that they were made of, "
            "with model.safetensors (--runtime onnx and openvino convert that themselves)"
        )


def role_of(folder: Path, name: str, role: str, modules: Sequence[tuple[str, str]], config: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[str, str]:
    """BI or CROSS, and the evidence for messages.

    Args:
        folder, name, role: as read_checkpoint takes them.
        modules: (full dotted type, path) of each module.
        config: the transformer's config.json.
        about: config_sentence_transformers.json.

    Raises:
        UserError: the files contradict each other, or the model is neither.
    """
    architecture = next(iter(config.get("architectures") or ()), "")
    kinds = ", ".join(last_part(kind) for kind, _ in modules)
    scores = any(last_part(kind) == "Dense" and read_json(folder / path / "config.json").get("module_output_name") == "scores" for kind, path in modules)
    if about.get("model_type") == "CrossEncoder" or scores:
        return CROSS, kinds or architecture
    classifies = architecture.endswith("ForSequenceClassification")
    if classifies and len(modules) > 1:
        raise UserError(
            f"model {name!r} says two things: modules.json makes it a bi-encoder ({kinds}), config.json a cross-encoder ({architecture}); "
            "save it again with sentence-transformers as the one that it is"
        )
    if classifies:
        return CROSS, architecture
    generates, masked = architecture.endswith(("ForCausalLM", "LMHeadModel")), architecture.endswith(("ForMaskedLM", "ForPreTraining"))
    if len(modules) < 2 and (generates or _decodes_only(str(config.get("model_type", "")))):
        raise _refusal(name, CAUSAL.format(sign=f"{architecture or config['model_type']} in config.json"), role)
    if len(modules) < 2 and masked:
        raise UserError(
            f"model {name!r} is a masked language model ({architecture}) that no file says how to pool: a pre-trained model, or a sparse encoder such as SPLADE; "
            + ("name an embedding model, or save it with sentence-transformers as Transformer and Pooling" if role == BI else INSTEAD[CROSS])
        )
    if not generates and not masked and re.search(r"For[A-Z]", architecture):
        raise _refusal(name, f"a {architecture}, which is neither a bi-encoder nor a cross-encoder", role)
    return BI, architecture or kinds or "a bare transformer"


def _refusal(name: str, what: str, role: str) -> UserError:
    return UserError(f"model {name!r} is {what}; {INSTEAD[role]}")


def last_part(kind: str) -> str:
    """The last part of a dotted name."""
    return kind.rsplit(".", 1)[-1]


def _own_code(config: Mapping[str, Any]) -> str | None:
    """The custom class that a configuration names in auto_map; None: it uses transformers' own classes."""
    for key, named in as_dict(config.get("auto_map")).items():
        if key != "AutoProcessor" and (first := next((one for one in (named if isinstance(named, list) else [named]) if one), None)):
            return str(first)
    return None


def _decodes_only(model_type: str) -> bool:
    """Whether a model type is only a left-to-right language model, by transformers' tables."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_NAMES

    return model_type in CAUSAL_NAMES and model_type not in MASKED_NAMES


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no such file.

    Raises:
        UserError: the file cannot be read, or does not hold an object.
    """
    if not path.is_file():
        return {}
    value = parse_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def as_dict(value: object) -> dict[str, Any]:
    """The value if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def parse_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
