"""Reads the JSON files of a checkpoint folder before any weight is loaded, and decides how the model is scored.

A model is scored exactly as its folder describes, or refused. Anything that is not supported (a module, a key that changes
scores, a family of models) is refused with a message that says what it is and what to do. sentence-transformers 6 is the
reference for what the files mean.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.models.base import Overrides
from rerank_lab.models.families import BI, CROSS, INSTEAD, family, refuse_foreign, refuse_headless, refuse_parts, wrong_role
from rerank_lab.models.folder import Folder, as_dict, last_part, read_json
from rerank_lab.models.tasks import ARGUMENTS, ChatSettings, check_task

log = logging.getLogger(__name__)
POOLINGS = ("mean", "cls", "max", "lasttoken")
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU")
RISING = ("Identity", "Sigmoid", "Tanh")  # increasing activations: they do not change a cross-encoder's order
KNOWN_MODULE = re.compile(r"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)(?:\.\w+)?\.(Transformer|Pooling|Dense|Normalize)")
# Files in which sentence-transformers keeps a Transformer's settings; the first that exists counts.
SETTINGS = tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"))
KEYS = {
    "about": {  # config_sentence_transformers.json
        "__version__", "activation_fn", "default_prompt_name", "keep_in_fp32_modules", "model_type", "prompts", "requirements", "similarity_fn_name", "truncate_dim",
    },
    "Transformer": {
        *ARGUMENTS, "do_lower_case", "document_length", "max_seq_length", "modality_config", "module_output_name", "processing_kwargs", "query_expansion",
        "query_length", "transformer_task", "unpad_inputs",
    },
    "Pooling": {"embedding_dimension", "include_prompt", "pooling_mode", "word_embedding_dimension"},  # and pooling_mode_…
    "Dense": {"activation_function", "bias", "in_features", "module_input_name", "module_output_name", "out_features", "use_residual"},
    "Normalize": {"module_input_name", "module_output_name"},
    "LayerNorm": {"dimension"},
    "LogitScore": {"false_token_id", "module_input_name", "true_token_id"},
}  # fmt: skip
MODULE_FOLDER = re.compile(r"\d_(Transformer|Pooling|Dense|Normalize)")


@dataclass(frozen=True)
class Checkpoint:
    """How the model in a folder is scored.

    Attributes:
        name: what messages and results call it.
        folder: the checkpoint.
        root: the folder inside that holds the transformer.
        role: BI or CROSS.
        pooling: one of POOLINGS; only for bi-encoders, as the next five.
        after: what follows the pooling, in order: "Dense" or "Normalize", and its folder.
        similarity: "cosine" or "dot".
        truncate_dim: how many components of a pooled vector are kept; None: all.
        query_prompt, document_prompt: put before a text; "" for no prompt.
        pair_prompt: put before a cross-encoder's query; with a chat template, the message of the role `system`.
        chat: how a cross-encoder's query and document enter its chat template; None: it reads two plain texts.
        max_seq_length: tokens of an input, special ones counted; None: as many as tokenizer and transformer allow.
        lower: whether texts are lower-cased first.
        newly_read: settings that earlier releases ignored. They go into the cache's key, so that vectors made then are not used now.
    """

    name: str
    folder: Path
    root: Path
    role: str = BI
    pooling: str = "mean"
    after: tuple[tuple[str, Path], ...] = ()
    similarity: str = "cosine"
    truncate_dim: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    pair_prompt: str = ""
    chat: ChatSettings | None = None
    max_seq_length: int | None = None
    lower: bool = False
    newly_read: tuple[str, ...] = ()

    def overridden(self, asked: Overrides) -> Checkpoint:
        """The same with what a person asks for in place of what the folder says.

        Raises:
            UserError: this kind of model cannot do it.
        """
        pair = self.role == CROSS
        odd = [name for name in (("query_prompt", "document_prompt", "truncate_dim") if pair else ("instruction",)) if getattr(asked, name) is not None]
        odd += ["instruction"] if pair and asked.instruction is not None and not self.pair_prompt and self.chat is None else []
        if odd:
            raise UserError(f"model {self.name!r} takes no {odd[0]}: it is a {self.role} without one")
        given = {"pair_prompt": asked.instruction} if pair else {name: getattr(asked, name) for name in ("query_prompt", "document_prompt", "truncate_dim")}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def reading(self) -> str:
        """Settings that differ from the defaults (similarity, prompts, dimensions), as JSON for results; "" without any."""
        usual = {"similarity": "cosine", "truncate_dim": None, "query_prompt": "", "document_prompt": "", "pair_prompt": ""}
        asked = {key: value for key, before in usual.items() if (value := getattr(self, key)) != before}
        return json.dumps(asked, ensure_ascii=False) if asked else ""


def checked_truncate_dim(value: object, place: str) -> int | None:
    """truncate_dim, where it is a whole number of at least 1; None without one. UserError otherwise; `place` says where it stands."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{place} must be a whole number of at least 1, not {value!r}")
    return value


def read_checkpoint(folder: Folder, role: str) -> Checkpoint:
    """Reads a folder's JSON files and decides how the model is scored. No weight is loaded.

    Args:
        folder: the checkpoint.
        role: BI or CROSS, the role that is needed.

    Raises:
        UserError: the model has another role, or the folder has something that is not supported.
    """
    path, name, about, types, root = folder.path, folder.name, folder.about, folder.types, folder.root
    found, sign = family(folder)
    if found not in (BI, CROSS):
        raise wrong_role(name, found, sign, role)
    if about.get("model_type") not in (None, "SentenceTransformer", "CrossEncoder"):
        raise UserError(
            f"model {name!r} is a {about['model_type']} (model_type in config_sentence_transformers.json), which is not known here; {INSTEAD[role]}"
        )
    if about.get("model_type") != "CrossEncoder":
        _check_modules(path, [kind for kind in types if not KNOWN_MODULE.fullmatch(kind)])
    config = read_config(folder)
    refuse_foreign(folder, role)
    if found == CROSS and len(types) > 1:
        raise UserError(f"model {name!r} is a cross-encoder made of modules ({sign}), and a {role} is needed here; give it as --model-cross")
    refuse_headless(folder, role)
    kinds = [last_part(kind) for kind in types]
    if kinds == ["Transformer"] and found == BI:
        raise UserError(f"{path / 'modules.json'}: names no Pooling, which makes one vector of those of the tokens; add one with sentence-transformers")
    ordered = kinds in ([], ["Transformer"]) or (kinds[:2] == ["Transformer", "Pooling"] and not {"Transformer", "Pooling"} & {*kinds[2:]})
    _check_modules(path, [] if ordered else kinds)
    if found != role:
        raise wrong_role(name, found, sign, role)
    _only(about, "config_sentence_transformers.json", "about", name)
    settings = _settings(root, name) if types else {}
    chat = check_task(settings, root, name, found, bare=not types)
    read = _read_cross if found == CROSS else _read_bi if types else _read_bare
    return read(
        Checkpoint(name, path, root, found, chat=chat, max_seq_length=_length(settings, root), lower=bool(settings.get("do_lower_case"))),
        folder.modules, config, about,
    )  # fmt: skip


def read_scorer(folder: Folder, task: str) -> Checkpoint:
    """Reads what scorers of pairs have in common, whatever stands behind their transformer. No weight is loaded.

    Args:
        folder: a checkpoint, with or without modules.json.
        task: what its transformer does, a key of TASKS.

    Raises:
        UserError: the folder has something that is not supported.
    """
    config, about, root, name = read_config(folder), folder.about, folder.root, folder.name
    refuse_foreign(folder, CROSS)
    _only(about, "config_sentence_transformers.json", "about", name)
    settings = _settings(root, name) if folder.types else {}
    found = Checkpoint(
        name, folder.path, root, CROSS, chat=check_task(settings, root, name, task, bare=not folder.types), max_seq_length=_length(settings, root),
        lower=bool(settings.get("do_lower_case")),
    )  # fmt: skip
    return _read_cross(found, folder.modules, config, about)


def read_module(folder: Folder, path: str, kind: str) -> dict[str, Any]:
    """Reads the config.json of the module at this path.

    Raises:
        UserError: it has keys that are not known for this kind of module.
    """
    config = folder.module_config(path)
    _only(config, f"{path}/config.json", kind, folder.name)
    return config


def read_config(folder: Folder) -> dict[str, Any]:
    """The transformer's config.json, after a look at whether the folder is whole.

    Raises:
        UserError: there is none, or parts of the folder are missing.
    """
    refuse_parts((folder.path, folder.root), folder.name)
    if not (folder.root / "config.json").is_file():
        raise UserError(f"model {folder.name!r}: {folder.root / 'config.json'} is no readable model configuration (there is none)")
    return folder.config


def _read_cross(found: Checkpoint, modules: Sequence[tuple[str, str]], config: Mapping[str, Any], about: Mapping[str, Any]) -> Checkpoint:
    if not modules:
        _refuse_leftovers(found, about)
    activation = (
        about.get("activation_fn") or config.get("sbert_ce_default_activation_function") or as_dict(config.get("sentence_transformers")).get("activation_fn")
    )
    if activation is not None and _activation(activation) not in RISING:
        raise UserError(f"model {found.name!r} shows its logits through {activation}, which may change their order; known are {', '.join(RISING)} of torch.nn")
    return replace(found, pair_prompt=_prompts(about, found.folder).get(about.get("default_prompt_name") or "", ""))


def _read_bare(found: Checkpoint, modules: Sequence[tuple[str, str]], config: Mapping[str, Any], about: Mapping[str, Any]) -> Checkpoint:
    _refuse_leftovers(found, about)
    log.warning("model %r has no modules.json: the states of its tokens are mean-pooled, as sentence-transformers does", found.name)
    return found


def _read_bi(found: Checkpoint, modules: Sequence[tuple[str, str]], config: Mapping[str, Any], about: Mapping[str, Any]) -> Checkpoint:
    name, (_, place), after = found.name, modules[1], tuple((last_part(kind), found.folder / path) for kind, path in modules[2:])
    if not (file := found.folder / place / "config.json").is_file():
        raise UserError(f"model {name!r}: {file} is missing, which says how the model pools; copy the whole model")
    pooling, prompts = read_json(file), _prompts(about, found.folder)
    _only({key: value for key, value in pooling.items() if not key.startswith("pooling_mode_")}, f"{place}/config.json", "Pooling", name)
    for kind, folder in after:
        config = read_json(folder / "config.json")
        _only(config, f"{folder.name}/config.json", kind, name)
        if kind == "Normalize" and (odd := set(config.values()) - {None, "sentence_embedding"}):
            raise UserError(f"model {name!r}: {folder.name} normalises {', '.join(map(str, odd))}, which is not known here")
    query, document = prompts.get("query", ""), prompts.get("document", "")
    if pooling.get("include_prompt") is False and (query or document):
        raise UserError(f"model {name!r} leaves its prompt out of the pooling (include_prompt: false), which is not known here")
    unused = {key for key in ("passage", "corpus", about.get("default_prompt_name")) if key not in ("query", "document") and prompts.get(key or "")}
    if unused:
        log.warning(
            "model %r: its prompts called %s are not used: queries get the one called query and documents the one called document, as sentence-transformers' "
            "encode_query and encode_document have it; rename them in config_sentence_transformers.json if they are meant",
            name, ", ".join(sorted(map(str, unused))),
        )  # fmt: skip
    truncate = checked_truncate_dim(about.get("truncate_dim"), f"model {name!r}: truncate_dim in config_sentence_transformers.json")
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise UserError(f"model {name!r} compares by {similarity} (similarity_fn_name), which is not computed here; known are cosine and dot")
    before = next((prompts[key] for key in ("document", "passage", "corpus") if prompts.get(key)), "")
    kinds = [kind for kind, _ in after]
    newly_read = [f"document prompt {document!r}"] if document != before else []
    newly_read += [f"modules {kinds}"] if "Normalize" in kinds[:-1] else []
    newly_read += [f"truncate_dim {truncate}"] if truncate is not None else []
    return replace(
        found, pooling=_pooling_mode(pooling, name), after=after, similarity=similarity, truncate_dim=truncate, query_prompt=query, document_prompt=document,
        newly_read=tuple(newly_read),
    )  # fmt: skip


def dense_activation(config: Mapping[str, Any], folder: Path, name: str) -> str:
    """The activation of a Dense module, one of ACTIVATIONS.

    Args:
        config: the module's config.json.
        folder: of the module, for messages.
        name: of the model, for messages.

    Raises:
        UserError: the activation is unknown, or the module does more than map the pooled vector linearly.
    """
    places = {config.get("module_input_name") or "sentence_embedding", config.get("module_output_name") or "sentence_embedding"}
    if config.get("use_residual") or places != {"sentence_embedding"}:
        raise UserError(f"model {name!r}: {folder} is a Dense module with a residual, on token vectors or for another output, which is not known here")
    given = config.get("activation_function") or "torch.nn.modules.activation.Tanh"
    if (activation := _activation(given)) not in ACTIVATIONS:
        raise UserError(f"model {name!r}: activation {activation} ({given}) of its Dense module is not known; known are {', '.join(ACTIVATIONS)} of torch.nn")
    return activation


def _check_modules(folder: Path, odd: Sequence[str]) -> None:
    """Refuses a folder if there are odd modules: unknown ones, or an order that is not supported."""
    if odd:
        raise UserError(
            f"{folder / 'modules.json'}: only Transformer, Pooling, Dense and Normalize modules of sentence-transformers are known, a Transformer and a Pooling "
            f"first, not {', '.join(odd)}"
        )


def _refuse_leftovers(found: Checkpoint, about: Mapping[str, Any]) -> None:
    """Refuses a folder without modules.json that has other files or settings of sentence-transformers."""
    left = [
        path.name
        for path in sorted(found.folder.iterdir())
        if path.name in SETTINGS or ((path / "config.json").is_file() and MODULE_FOLDER.fullmatch(path.name))
    ]
    left += [
        f"{key} in config_sentence_transformers.json" for key in ("prompts", "similarity_fn_name", "truncate_dim") if about.get(key) not in (None, {}, "cosine")
    ]
    if left:
        raise UserError(f"model {found.name!r}: {found.folder} has {', '.join(left)} but no modules.json, which says how that is used; copy the whole model")


def _settings(root: Path, name: str) -> dict[str, Any]:
    for file in SETTINGS:
        if settings := read_json(root / file):
            _only(settings, file, "Transformer", name)
            return settings
    return {}


def _length(settings: Mapping[str, Any], root: Path) -> int | None:
    value = settings.get("max_seq_length")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{root}: max_seq_length must be a whole number of at least 1, not {value!r}")
    return value


def _only(config: Mapping[str, Any], file: str, kind: str, name: str) -> None:
    """Refuses keys that are not known for this kind of module."""
    if unknown := sorted(set(config) - KEYS[kind]):
        raise UserError(f"model {name!r}: {file} has {', '.join(unknown)}, which is not understood here and may change scores; remove it if it does not")


def _prompts(about: Mapping[str, Any], folder: Path) -> dict[str, str]:
    prompts, chosen = about.get("prompts") or {}, about.get("default_prompt_name")
    place = folder / "config_sentence_transformers.json"
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{place}: prompts must be an object of strings")
    if chosen is not None and chosen not in ("query", "document") and chosen not in prompts:
        raise UserError(f"{place}: default_prompt_name {chosen!r} is none of its prompts ({', '.join(prompts) or 'it has none'})")
    return {key: text or "" for key, text in prompts.items()}


def _activation(dotted: object) -> str:
    """The short name of a class of torch.nn, given its dotted name; anything else as it is."""
    found = re.fullmatch(r"torch\.nn\.(?:modules\.\w+\.)?(\w+)", str(dotted))
    return found[1] if found else str(dotted)


def _pooling_mode(config: Mapping[str, Any], name: str) -> str:
    if "pooling_mode" in config:
        modes = config["pooling_mode"] if isinstance(config["pooling_mode"], list) else [config["pooling_mode"]]
    else:
        switched = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key in switched]
    modes = modes or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise UserError(f"model {name!r} pools by {', '.join(map(str, modes))}; known are {', '.join(POOLINGS)}, one at a time")
    return str(modes[0])
