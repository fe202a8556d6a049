"""Reads the JSON files of a checkpoint folder before any weight is loaded, and decides how the model is scored.

A model is scored exactly as its folder describes, or refused. Anything that is not supported (a module, a key that changes
scores, a family of models) is refused with a message that says what it is and what to do. sentence-transformers 6 is the
reference for what the files mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rerank_lab.errors import UserError
from rerank_lab.models.after import activation_name
from rerank_lab.models.base import Overrides
from rerank_lab.models.families import (
    BI,
    CROSS,
    INSTEAD,
    family,
    refuse_foreign,
    refuse_headless,
    refuse_parts,
    wrong_role,
)
from rerank_lab.models.folder import ABOUT, Folder, as_dict, last_part, read_json
from rerank_lab.models.pooling import pooling_mode
from rerank_lab.models.prompts import CardPrompts, card_prompts, prompts_of, side_prompts
from rerank_lab.models.tasks import ARGUMENTS, ChatSettings, check_task

RISING = ("Identity", "Sigmoid", "Tanh")  # increasing activations: they do not change a cross-encoder's order
AFTER = ("Dense", "LayerNorm", "Normalize", "Dropout")  # what may follow the pooling, in any order
KNOWN_MODULE = re.compile(rf"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)(?:\.\w+)?\.(Transformer|Pooling|{'|'.join(AFTER)})")
# What other modules of sentence-transformers do, for messages.
OTHER_MODULES = {
    "Router": "queries and documents go through modules of their own",
    "Asym": "queries and documents go through modules of their own",
    "WeightedLayerPooling": "it pools over several layers of the transformer",
    "CLIPModel": "it reads images too",
    "WordEmbeddings": "it looks words up and has no transformer",
    "BoW": "it counts words and has no transformer",
}
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
    "Dropout": {"dropout"},
    "LogitScore": {"false_token_id", "module_input_name", "true_token_id"},
}  # fmt: skip
TOKEN_HEAD, WORD_HEAD = "colbert_linear.pt", "sparse_linear.pt"  # two more heads of bge-m3, beside its bi-encoder
MODULE_FOLDER = re.compile(rf"\d_(Transformer|Pooling|{'|'.join(AFTER)})")


@dataclass(frozen=True)
class Checkpoint:
    """How the model in a folder is scored.

    Attributes:
        name: what messages and results call it.
        folder: the checkpoint.
        root: the folder inside that holds the transformer.
        role: its family: BI, CROSS, STATIC or SPARSE.
        pooling: one of POOLINGS; only for models that make vectors, as the next eight.
        prompt_pooled: whether the pooling counts the prompt's tokens.
        after: what follows the pooling, in order: one of AFTER, and its folder.
        similarity: "cosine" or "dot".
        truncate_dim: how many components of a pooled vector are kept; None: all.
        token_head: the file of a linear map that makes token vectors of hidden states, as bge-m3 has it; "": none.
        query_prompt, document_prompt: put before a text; "" for no prompt.
        pair_prompt: put before a cross-encoder's query; with a chat template, the message of the role `system`.
        chat: how a cross-encoder's query and document enter its chat template; None: it reads two plain texts.
        max_seq_length: tokens of an input, special ones counted; None: as many as tokenizer and transformer allow.
        lower: whether texts are lower-cased first.
        card: the prompts that models of this family are known to want, if the folder has none and none are asked for.
        said: what is passed over or assumed, a sentence each.
        asked: names of the fields that a person has asked for in place of what the folder says.
        newly_read: settings that earlier releases ignored. They go into the cache's key, so that vectors made then are not used now.
    """

    name: str
    folder: Path
    root: Path
    role: str = BI
    pooling: str = "mean"
    prompt_pooled: bool = True
    after: tuple[tuple[str, Path], ...] = ()
    similarity: str = "cosine"
    truncate_dim: int | None = None
    token_head: str = ""
    query_prompt: str = ""
    document_prompt: str = ""
    pair_prompt: str = ""
    chat: ChatSettings | None = None
    max_seq_length: int | None = None
    lower: bool = False
    card: CardPrompts | None = None
    said: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    newly_read: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of this reading: a sentence each, without the model's name."""
        return self.said if self.card is None else (*self.said, self.card.note)

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
        given: dict[str, Any] = (
            {"pair_prompt": asked.instruction} if pair else {name: getattr(asked, name) for name in ("query_prompt", "document_prompt", "truncate_dim")}
        )
        changed = {name: value for name, value in given.items() if value is not None}
        if {"query_prompt", "document_prompt"} & changed.keys():
            changed["card"] = None
        return replace(self, asked=tuple(name for name in changed if name != "card"), **changed)

    def reading(self) -> str:
        """Settings that differ from the defaults (similarity, prompts, dimensions, heads), as JSON for results; "" without any."""
        usual = {"similarity": "cosine", "truncate_dim": None, "token_head": "", "query_prompt": "", "document_prompt": "", "pair_prompt": ""}
        asked = {key: value for key, before in usual.items() if (value := getattr(self, key)) != before or key in self.asked}
        if not self.prompt_pooled and (self.query_prompt or self.document_prompt):
            asked["include_prompt"] = False
        return json.dumps(asked, ensure_ascii=False) if asked else ""


AnyCheckpoint = TypeVar("AnyCheckpoint", bound=Checkpoint)


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
        check_modules(path, [kind for kind in types if not KNOWN_MODULE.fullmatch(kind)])
    read_config(folder)
    refuse_foreign(folder, role)
    if found == CROSS and len(types) > 1:
        raise UserError(f"model {name!r} is a cross-encoder made of modules ({sign}), and a {role} is needed here; give it as --model-cross")
    refuse_headless(folder, role)
    kinds = [last_part(kind) for kind in types]
    if kinds == ["Transformer"] and found == BI:
        raise UserError(f"{path / 'modules.json'}: names no Pooling, which makes one vector of those of the tokens; add one with sentence-transformers")
    ordered = kinds in ([], ["Transformer"]) or (kinds[:2] == ["Transformer", "Pooling"] and not {"Transformer", "Pooling"} & {*kinds[2:]})
    check_modules(path, [] if ordered else kinds)
    if found != role:
        raise wrong_role(name, found, sign, role)
    if found == CROSS:
        return read_scorer(folder, CROSS)
    only_known(about, ABOUT, "about", name)
    return (_read_bi if types else _read_bare)(Checkpoint(name, path, root, found, **transformer_settings(folder, found)), folder)


def transformer_settings(folder: Folder, role: str, task: str | None = None) -> dict[str, Any]:
    """The fields max_seq_length and lower of a Checkpoint, as the settings of a Transformer that reads plain text say.

    Args:
        folder: the checkpoint.
        role: a key of TASKS.
        task: what the Transformer does where its settings do not say; None: what the role asks for.

    Raises:
        UserError: the settings ask for something that is not done.
    """
    settings = settings_of(folder)
    check_task(({} if task is None else {"transformer_task": task}) | settings, folder.root, folder.name, role, bare=not folder.types)
    return {"max_seq_length": _length(settings, folder.root), "lower": bool(settings.get("do_lower_case"))}


def read_scorer(folder: Folder, task: str) -> Checkpoint:
    """Reads what scorers of pairs have in common, whatever stands behind their transformer. No weight is loaded.

    Args:
        folder: a checkpoint, with or without modules.json.
        task: what its transformer does, a key of TASKS.

    Raises:
        UserError: the folder has something that is not supported.
    """
    config, root, name = read_config(folder), folder.root, folder.name
    refuse_foreign(folder, CROSS)
    only_known(folder.about, ABOUT, "about", name)
    chat = check_task(settings_of(folder), root, name, task, bare=not folder.types)
    return _read_cross(Checkpoint(name, folder.path, root, CROSS, chat=chat, **transformer_settings(folder, task)), folder, config)


def read_module(folder: Folder, path: str, kind: str) -> dict[str, Any]:
    """Reads the config.json of the module at this path.

    Raises:
        UserError: it has keys that are not known for this kind of module.
    """
    config = folder.module_config(path)
    only_known(
        {key: value for key, value in config.items() if kind != "Pooling" or not key.startswith("pooling_mode_")}, f"{path}/config.json", kind, folder.name
    )
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


def _read_cross(found: Checkpoint, folder: Folder, config: Mapping[str, Any]) -> Checkpoint:
    about = folder.about
    if not folder.modules:
        refuse_leftovers(folder)
    activation = (
        about.get("activation_fn") or config.get("sbert_ce_default_activation_function") or as_dict(config.get("sentence_transformers")).get("activation_fn")
    )
    if activation is not None and activation_name(activation) not in RISING:
        raise UserError(f"model {found.name!r} shows its logits through {activation}, which may change their order; known are {', '.join(RISING)} of torch.nn")
    return replace(found, pair_prompt=prompts_of(folder).get(about.get("default_prompt_name") or "", ""))


def _read_bare(found: Checkpoint, folder: Folder) -> Checkpoint:
    refuse_leftovers(folder)
    said = "it has no modules.json: the states of its tokens are mean-pooled, as sentence-transformers does"
    return replace(_heads(found, folder), card=card_prompts(folder), said=(said, *_heads(found, folder).said))


def _read_bi(found: Checkpoint, folder: Folder) -> Checkpoint:
    name, place = found.name, folder.modules[1][1]
    if not (file := found.folder / place / "config.json").is_file():
        raise UserError(f"model {name!r}: {file} is missing, which says how the model pools; copy the whole model")
    pooling = read_json(file)
    only_known({key: value for key, value in pooling.items() if not key.startswith("pooling_mode_")}, f"{place}/config.json", "Pooling", name)
    found = replace(found, pooling=pooling_mode(pooling, name), prompt_pooled=pooling.get("include_prompt") is not False)
    return read_pooled(_heads(found, folder), folder, 2)


def _heads(found: Checkpoint, folder: Folder) -> Checkpoint:
    """Adds bge-m3's head for token vectors, and says that its head for words is left out."""
    if not any((folder.path / head).is_file() for head in (TOKEN_HEAD, WORD_HEAD)):
        return found
    said = f"its head for words of a sparse search ({WORD_HEAD}) is left out; its head for token vectors ({TOKEN_HEAD}) serves maxsim and best"
    head = TOKEN_HEAD if (folder.path / TOKEN_HEAD).is_file() else ""
    return replace(found, token_head=head, said=(*found.said, said.partition(";")[0] if not head else said))


def read_pooled(found: Checkpoint, folder: Folder, first: int) -> Checkpoint:
    """Adds how pooled vectors are changed, compared and prompted.

    Args:
        found: what is read already.
        folder: the checkpoint.
        first: the place in modules.json of the first module after the pooling. What follows is of AFTER.

    Raises:
        UserError: a module or a setting is not understood.
    """
    name, about, after = found.name, folder.about, tuple((last_part(kind), found.folder / path) for kind, path in folder.modules[first:])
    for kind, place in after:
        config = read_json(place / "config.json")
        only_known(config, f"{place.name}/config.json", kind, name)
        if kind == "Normalize" and (odd := [value for value in config.values() if value not in (None, "sentence_embedding")]):
            raise UserError(f"model {name!r}: {place.name} normalises {', '.join(map(str, odd))}, which is not known here")
    found = read_prompts(found, folder)
    truncate = checked_truncate_dim(about.get("truncate_dim"), f"model {name!r}: truncate_dim in config_sentence_transformers.json")
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise UserError(f"model {name!r} compares by {similarity} (similarity_fn_name), which is not computed here; known are cosine and dot")
    kinds = [kind for kind, _ in after]
    newly_read = [f"modules {kinds}"] if "Normalize" in kinds[:-1] else []
    newly_read += [f"truncate_dim {truncate}"] if truncate is not None else []
    return replace(found, after=after, similarity=similarity, truncate_dim=truncate, newly_read=(*found.newly_read, *newly_read))


def read_prompts(found: AnyCheckpoint, folder: Folder) -> AnyCheckpoint:
    """Adds the prompts of queries and documents, and what is to be said of the others.

    Raises:
        UserError: config_sentence_transformers.json holds no prompts where it should.
    """
    prompts = prompts_of(folder)
    query, document, said = side_prompts(folder)
    before = next((prompts[key] for key in ("document", "passage", "corpus") if prompts.get(key)), "")
    return replace(
        found, query_prompt=query, document_prompt=document, card=None if query or document else card_prompts(folder),
        said=(*found.said, *said), newly_read=(f"document prompt {document!r}",) if document != before else (),
    )  # fmt: skip


def check_modules(folder: Path, odd: Sequence[str]) -> None:
    """Refuses a folder if there are odd modules: unknown ones, or an order that is not supported."""
    if odd:
        why = "".join(f"; {last_part(kind)}: {OTHER_MODULES[last_part(kind)]}" for kind in odd if last_part(kind) in OTHER_MODULES)
        raise UserError(
            f"{folder / 'modules.json'}: only Transformer, Pooling, Dense and Normalize (and LayerNorm, Dropout) modules of sentence-transformers are known, a Transformer and a Pooling "
            f"first, not {', '.join(odd)}{why}"
        )


def refuse_leftovers(folder: Folder) -> None:
    """Refuses a folder without modules.json that has other files or settings of sentence-transformers."""
    left = [
        path.name
        for path in sorted(folder.path.iterdir())
        if path.name in SETTINGS or ((path / "config.json").is_file() and MODULE_FOLDER.fullmatch(path.name))
    ]
    left += [
        f"{key} in config_sentence_transformers.json"
        for key in ("prompts", "similarity_fn_name", "truncate_dim")
        if folder.about.get(key) not in (None, {}, "cosine")
    ]
    if left:
        raise UserError(f"model {folder.name!r}: {folder.path} has {', '.join(left)} but no modules.json, which says how that is used; copy the whole model")


def settings_of(folder: Folder) -> dict[str, Any]:
    """The settings of a folder's Transformer module; empty without modules.json.

    Raises:
        UserError: a key is not known.
    """
    for file in SETTINGS if folder.types else ():
        if settings := read_json(folder.root / file):
            only_known(settings, file, "Transformer", folder.name)
            return settings
    return {}


def _length(settings: Mapping[str, Any], root: Path) -> int | None:
    value = settings.get("max_seq_length")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{root}: max_seq_length must be a whole number of at least 1, not {value!r}")
    return value


def only_known(config: Mapping[str, Any], file: str, kind: str, name: str, known: AbstractSet[str] | None = None) -> None:
    """Refuses keys that are not known for this kind of module; `known` are those of a kind that KEYS lacks."""
    if unknown := sorted(set(config) - (KEYS[kind] if known is None else known)):
        raise UserError(f"model {name!r}: {file} has {', '.join(unknown)}, which is not understood here and may change scores; remove it if it does not")
