"""Recognises a checkpoint's family by its files, and refuses what cannot be scored, by name and with a remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.models.folder import ABOUT, Folder, as_dict, last_part, read_json

BI, CROSS, LATE, CAUSAL, STATIC, SPARSE = "bi-encoder", "cross-encoder", "late-interaction model", "causal reranker", "static embedding model", "sparse encoder"
# The option that takes a family.
OPTIONS = {BI: "--model", CROSS: "--model-cross", LATE: "--model", CAUSAL: "--model-cross", STATIC: "--model", SPARSE: "--candidates splade:MODEL"}
LISTWISE = ("JinaForRanking",)
T5 = ("longt5", "mt5", "switch_transformers", "t5", "t5gemma", "t5gemma2", "udop", "umt5")
T5_ENCODERS = ("MT5EncoderModel", "T5EncoderModel", "UMT5EncoderModel")
LARGE, POINTER = (".safetensors", ".bin", ".json", ".model"), b"version https://git-lfs"  # files that git-lfs may replace by pointers, and how a pointer begins
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
OTHERS = {"ONNX": "*.onnx", "GGUF": "*.gguf", "TensorFlow": "tf_model*.h5", "Flax": "flax_model*.msgpack", "OpenVINO": "openvino_*.xml"}
# What messages say of a family, with the evidence in brackets.
SAID = {
    BI: "a bi-encoder ({sign})",
    CROSS: "a cross-encoder ({sign})",
    LATE: "a late-interaction model (ColBERT, as {sign} says): it has a vector for each token and none for a text",
    CAUSAL: "a causal language model (as {sign} says): a reranker of this kind answers a prompt with yes or no",
    STATIC: "a static embedding model (as {sign} says): it has a vector for each token of its vocabulary and no transformer",
    SPARSE: "a sparse encoder (SPLADE, as {sign} says): it weighs words of its vocabulary",
}
# Patterns of a module's full dotted name, or of model_type, and the family that they mean.
FAMILIES = [
    (re.compile(r"pylate\..*|.*\.multi_vector_encoder\..*|ColBERT|MultiVectorEncoder"), LATE),
    (re.compile(r".*\.sparse_encoder\..*|SparseEncoder"), SPARSE),
    (re.compile(r".*\.StaticEmbedding"), STATIC),
    (re.compile(r".*\.LogitScore"), CAUSAL),
]
INSTEAD = {
    BI: "name an embedding model that pools",
    CROSS: "name a model with a classification head of one label",
    SPARSE: "name a masked language model that was trained to weigh words",
}


def family(folder: Folder) -> tuple[str, str]:
    """The family of a checkpoint, and the evidence for messages.

    Raises:
        UserError: a file cannot be read, or the files contradict each other.
    """
    about, types = folder.about, folder.types
    for value, place in [(kind, "modules.json") for kind in types] + [(str(about.get("model_type")), ABOUT)]:
        for pattern, found in FAMILIES:
            if pattern.fullmatch(value):
                return found, f"{value} in {place}"
    late = "artifact.metadata" if (folder.path / "artifact.metadata").is_file() else None
    late = ABOUT if about.get("similarity_fn_name") == "MaxSim" or "query_prefix" in about else late
    late = "a Dense module on token vectors in modules.json" if [last_part(kind) for kind in types[:2]] == ["Transformer", "Dense"] else late
    late = "HF_ColBERT in config.json" if folder.architecture == "HF_ColBERT" else late
    if late:
        return LATE, late
    if folder.config.get("model_type") == "model2vec" or folder.architecture == "StaticModel":
        return STATIC, "config.json"
    return _family_of_transformer(folder)


def _family_of_transformer(folder: Folder) -> tuple[str, str]:
    modules, architecture = folder.modules, folder.architecture
    if architecture in LISTWISE:
        raise UserError(
            f"model {folder.name!r} is a listwise reranker ({architecture}): it reads all documents of a query at once, so that a document's score depends on the others, "
            "which is not computed here; name a model that scores one pair at a time"
        )
    kinds = ", ".join(map(last_part, folder.types))
    scores = any(last_part(kind) == "Dense" and folder.module_config(path).get("module_output_name") == "scores" for kind, path in modules)
    if folder.about.get("model_type") == "CrossEncoder" or scores:
        return CROSS, kinds or architecture
    classifies = architecture.endswith("ForSequenceClassification")
    if classifies and len(modules) > 1:
        raise UserError(
            f"model {folder.name!r} says two things: modules.json makes it a bi-encoder ({kinds}), config.json a cross-encoder ({architecture}); "
            "save it again with sentence-transformers as the one that it is"
        )
    if classifies:
        return CROSS, architecture
    model_type = str(folder.config.get("model_type", ""))
    if len(modules) < 2 and (architecture.endswith(GENERATES) or _decodes_only(model_type)):
        return CAUSAL, f"{architecture or model_type} in config.json"
    return BI, architecture or kinds or "a bare transformer"


GENERATES, MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "ForPreTraining")


def wrong_role(name: str, found: str, sign: str, role: str) -> UserError:
    """The refusal of a model of a family where another role is needed."""
    pools = " if it is a reranker; an embedding model needs a modules.json that says how it pools" if (found, role) == (CAUSAL, BI) else ""
    return UserError(f"model {name!r} is {SAID[found].format(sign=sign)}, and a {role} is needed here; give it as {OPTIONS[found]}{pools}")


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


def refuse_foreign(folder: Folder, role: str) -> None:
    """Refuses a transformer by its config.json and weights: code of its own, models of more than text, weights in other formats.

    Args:
        folder: the checkpoint.
        role: BI, CROSS or SPARSE, the role that is needed.
    """
    root, name, config = folder.root, folder.name, folder.config
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
        raise UserError(f"model {name!r}: {root / 'config.json'} is no readable model configuration (architectures must be a list of names)")
    architecture = next(iter(architectures), "")
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
    encodes = role == BI and architecture in T5_ENCODERS
    if (config.get("is_encoder_decoder") or kind in T5) and not encodes:
        raise _refusal(name, f"an encoder-decoder or a half of one ({architecture or kind}), which is not computed here", role)
    others = sorted(format for format, pattern in OTHERS.items() if any(root.rglob(pattern)))
    if others and not any(path for pattern in WEIGHTS for path in root.glob(pattern)):
        raise UserError(
            f"model {name!r}: {root} has weights for {' and '.join(others)} alone, which are not read here; name the model that they were made of, "
            "with model.safetensors (--runtime onnx and openvino convert that themselves)"
        )


def refuse_headless(folder: Folder, role: str) -> None:
    """Refuses a transformer that is neither an encoder nor a classifier: a masked language model that nothing says how to pool, or another head."""
    architecture = folder.architecture
    generates, masked = architecture.endswith(GENERATES), architecture.endswith(MASKED)
    if len(folder.modules) < 2 and masked:
        raise UserError(
            f"model {folder.name!r} is a masked language model ({architecture}) that no file says how to pool: a pre-trained model, or a sparse encoder such as SPLADE; "
            + (f"give a sparse encoder as {OPTIONS[SPARSE]}, name an embedding model, or save it as Transformer and Pooling" if role == BI else INSTEAD[CROSS])
        )
    if not generates and not masked and re.search(r"For[A-Z]", architecture) and not architecture.endswith("ForSequenceClassification"):
        raise _refusal(folder.name, f"a {architecture}, which is neither a bi-encoder nor a cross-encoder", role)


def _refusal(name: str, what: str, role: str) -> UserError:
    return UserError(f"model {name!r} is {what}; {INSTEAD[role]}")


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
