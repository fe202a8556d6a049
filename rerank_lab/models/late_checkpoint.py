"""Reads the JSON files of a late-interaction checkpoint (ColBERT) before any weight is loaded, and decides how its texts are read.

Three layouts are known: PyLate's, Stanford's, and that of sentence-transformers' MultiVectorEncoder, which is the reference for all three.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.models.after import TOKENS, dense_activation
from rerank_lab.models.base import Overrides
from rerank_lab.models.checkpoint import KNOWN_MODULE, only_known, read_config, settings_of, transformer_settings
from rerank_lab.models.families import BI, LATE, family, refuse_foreign, wrong_role
from rerank_lab.models.folder import ABOUT, Folder, as_dict, last_part, read_json
from rerank_lab.models.prompts import side_prompts

PYLATE, STANFORD, NATIVE = "PyLate", "Stanford", "sentence-transformers"
METADATA = "artifact.metadata"
PROJECTION = "linear.weight"  # of Stanford's checkpoints, among the transformer's weights
PUNCTUATION = tuple(string.punctuation)
EXPANDED = 32  # tokens of an expanded query where no file says how many
# What PyLate adds to config_sentence_transformers.json. It also stands in files without a model_type.
OF_PYLATE = {
    "attend_to_expansion_tokens", "attend_to_mask_tokens", "do_query_expansion", "document_length", "document_prefix", "query_expansion", "query_length",
    "query_prefix", "skiplist_words",
}  # fmt: skip
MASK, MASK_KEYS = "MultiVectorMask", {"keep_only_token_ids", "skiplist_tasks", "skiplist_words"}
KNOWN_LATE = re.compile(rf"pylate\.models(\.\w+)?\.Dense|sentence_transformers\.multi_vector_encoder\.modules(\.\w+)?\.{MASK}|{KNOWN_MODULE.pattern}")
# Keys of artifact.metadata that change scores, and the values that are computed here. Its other keys are those of training and indexing.
DONE: dict[str, tuple[object, ...]] = {"similarity": (None, "cosine"), "interaction": (None, "colbert")}
SUM, MEAN = "maxsim", "meanmaxsim"
# What similarity_fn_name means. PyLate writes MaxSim; sentence-transformers passes over cosine and dot.
SIMILARITIES = {None: SUM, "MaxSim": SUM, "maxsim": SUM, "cosine": SUM, "dot": SUM, "meanmaxsim": MEAN}


@dataclass(frozen=True)
class Expansion:
    """How queries are lengthened by mask tokens, which the score counts.

    Attributes:
        length: tokens of a query at least, special ones counted.
        fixed: whether it is also the most; a longer query is cut.
        attend: whether the query's own tokens attend to the mask tokens.
        token: the mask token; None: the tokenizer's.
    """

    length: int
    fixed: bool = True
    attend: bool = False
    token: str | None = None


@dataclass(frozen=True)
class LateCheckpoint:
    """How the late-interaction model in a folder reads texts.

    Attributes:
        name: what messages and results call it.
        folder: the checkpoint.
        root: the folder inside that holds the transformer.
        layout: PYLATE, STANFORD or NATIVE.
        dense: folders of the Dense modules on token vectors, in order. Empty in Stanford's layout, whose projection is PROJECTION.
        query_prompt, document_prompt: put before a text, with the marker that begins it.
        markers: prompts or their beginnings that the tokenizer must read as one token where it knows them. Empty in layout NATIVE,
            whose tokenizer does so by itself.
        query_length, document_length: tokens of a text at most, special ones counted; None: max_seq_length.
        expansion: of queries; None: they are not expanded.
        skiplist: tokens without a vector.
        skipped_in: in texts of which kinds.
        similarity: SUM or MEAN, how the model's own score adds up what a query's tokens found.
        max_seq_length: tokens of a text, special ones counted; None: as many as tokenizer and transformer allow.
        lower: whether texts are lower-cased first.
        notes: what a person should know of this reading: a sentence each, without the model's name.
    """

    name: str
    folder: Path
    root: Path
    layout: str = NATIVE
    dense: tuple[Path, ...] = ()
    query_prompt: str = ""
    document_prompt: str = ""
    markers: tuple[str, ...] = ()
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skiplist: tuple[str, ...] = ()
    skipped_in: tuple[str, ...] = ("document",)
    similarity: str = SUM
    max_seq_length: int | None = None
    lower: bool = False
    notes: tuple[str, ...] = ()

    def reading(self, query_prompt: str | None = None, document_prompt: str | None = None) -> str:
        """How texts are read, as JSON for results.

        Args:
            query_prompt, document_prompt: those that are in use; None: the folder's.
        """
        prompts = {"query_prompt": query_prompt, "document_prompt": document_prompt}
        own = {"late_interaction": self.layout} | {name: getattr(self, name) if given is None else given for name, given in prompts.items()}
        lengths = {"query_length": self.query_length, "document_length": self.document_length}
        more = lengths | {"query_expansion": None if self.expansion is None else asdict(self.expansion), "skiplist": " ".join(self.skiplist)}
        more |= {"similarity": self.similarity if self.similarity != SUM else None}
        return json.dumps(own | {key: value for key, value in more.items() if value}, ensure_ascii=False)

    def check(self, asked: Overrides) -> None:
        """Refuses what a person may ask of other models and a late-interaction model does not have.

        Raises:
            UserError: it is asked for.
        """
        if odd := [key for key in ("truncate_dim", "instruction") if getattr(asked, key) is not None]:
            raise UserError(f"model {self.name!r} takes no {odd[0]}: it is a late-interaction model without one")

    def of_documents(self, prompt: str) -> str:
        """Everything here that a document's vectors depend on, as a string for a hash.

        Args:
            prompt: of documents, the one that is in use.
        """
        skipped = self.skiplist if "document" in self.skipped_in else ()
        return json.dumps([prompt, self.markers, self.document_length, skipped, self.max_seq_length, self.lower])


def read_late(folder: Folder) -> LateCheckpoint:
    """Reads a folder's JSON files. No weight is loaded.

    Raises:
        UserError: the model is of another family, or the folder has something that is not supported.
    """
    found, sign = family(folder)
    if found != LATE:
        raise wrong_role(folder.name, found, sign, LATE)
    read_config(folder)
    refuse_foreign(folder, BI)
    about = folder.about
    only_known({key: value for key, value in about.items() if key not in OF_PYLATE}, ABOUT, "about", folder.name)
    if odd := [key for key in ("activation_fn", "truncate_dim") if about.get(key) is not None]:
        raise UserError(f"model {folder.name!r}: {ABOUT} has {odd[0]}, which nothing applies to token vectors; remove it")
    if not isinstance(about.get("similarity_fn_name"), str | None) or about.get("similarity_fn_name") not in SIMILARITIES:
        raise UserError(f"model {folder.name!r} compares by {about['similarity_fn_name']} (similarity_fn_name), which is not computed here; maxsim is")
    similarity = SIMILARITIES[about.get("similarity_fn_name")]
    said = ("its own score is maxsim divided by the number of the query's tokens, which orders documents alike",) if similarity == MEAN else ()
    begun = LateCheckpoint(folder.name, folder.path, folder.root, similarity=similarity, notes=said, **transformer_settings(folder, LATE))
    return _read_modules(begun, folder, settings_of(folder)) if folder.types else _read_stanford(begun, folder)


def _read_stanford(begun: LateCheckpoint, folder: Folder) -> LateCheckpoint:
    metadata = read_json(folder.path / METADATA)
    if (folder.architecture != "HF_ColBERT" and not metadata) or any(as_dict(folder.about.get("prompts")).values()):
        raise UserError(f"model {folder.name!r}: {folder.path} has no modules.json, which says how its {ABOUT} is used; copy the whole model")
    for key, done in DONE.items():
        if metadata.get(key) not in done:
            raise UserError(f"model {folder.name!r}: {METADATA} has {key} {metadata[key]!r}, which is not computed here; {done[-1]} is")
    query, document = (_text(folder, metadata.get(key) or usual, key) + " " for key, usual in (("query_token_id", "[unused0]"), ("doc_token_id", "[unused1]")))
    length = _count(folder, metadata.get("query_maxlen"), "query_maxlen") or EXPANDED
    return replace(
        begun,
        layout=STANFORD,
        query_prompt=query,
        document_prompt=document,
        markers=(query, document),
        document_length=_count(folder, metadata.get("doc_maxlen"), "doc_maxlen"),
        expansion=Expansion(length, attend=bool(metadata.get("attend_to_mask_tokens"))),
        skiplist=PUNCTUATION if metadata.get("mask_punctuation", True) else (),
    )


def _read_modules(begun: LateCheckpoint, folder: Folder, settings: Mapping[str, Any]) -> LateCheckpoint:
    about = folder.about
    dense, mask = _modules(folder)
    prefixes = {key: _text(folder, about[key], key) for key in ("query_prefix", "document_prefix") if key in about}
    query, document, said = side_prompts(folder)
    before = prefixes.get("query_prefix", ""), prefixes.get("document_prefix", "")
    given = _of_pylate(about) | {key: settings[key] for key in ("query_length", "document_length", "query_expansion") if key in settings}
    words = mask.get("skiplist_words", about.get("skiplist_words"))
    usual = PUNCTUATION if prefixes or about.get("model_type") == "ColBERT" else ()
    tasks = mask.get("skiplist_tasks") or ["document"]
    found = replace(
        begun,
        layout=PYLATE if prefixes or about.get("model_type") == "ColBERT" else NATIVE,
        dense=dense,
        query_prompt=before[0] + query.removeprefix(before[0]),
        document_prompt=before[1] + document.removeprefix(before[1]),
        markers=tuple(prefixes.values()),
        query_length=_count(folder, given.get("query_length"), "query_length"),
        document_length=_count(folder, given.get("document_length"), "document_length"),
        expansion=_expansion(folder, given.get("query_expansion")),
        skiplist=usual if words is None else _words(folder, words, "skiplist_words"),
        notes=(*begun.notes, *said),
        skipped_in=_words(folder, [tasks] if isinstance(tasks, str) else tasks, "skiplist_tasks"),
    )
    if found.expansion is not None and (found.query_length or found.expansion.length) < found.expansion.length:
        raise UserError(
            f"model {folder.name!r} expands queries to {found.expansion.length} tokens and cuts them to {found.query_length} (query_length); "
            f"set one of the two in {folder.root}"
        )
    return found


def _of_pylate(about: Mapping[str, Any]) -> dict[str, Any]:
    """What PyLate's keys mean in the words of sentence-transformers; empty without any."""
    found = {key: about[key] for key in ("query_length", "document_length") if about.get(key) is not None}
    if "query_expansion" in about or about.get("do_query_expansion") is False:
        return found | {"query_expansion": about.get("query_expansion")}
    if not OF_PYLATE & about.keys():
        return found
    attend = about.get("attend_to_expansion_tokens", about.get("attend_to_mask_tokens"))
    return found | {
        "query_length": None,
        "query_expansion": {"strategy": "fixed", "attend": False if attend is None else attend, "length": found.get("query_length") or EXPANDED},
    }


def _modules(folder: Folder) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """The folders of the Dense modules, and the configuration of MultiVectorMask; empty without it."""
    kinds, native = [last_part(kind) for kind in folder.types], folder.about.get("model_type") == "MultiVectorEncoder"
    dense = list(takewhile(lambda module: last_part(module[0]) == "Dense", folder.modules[1:]))
    rest = kinds[1 + len(dense) :]
    ordered = kinds[0] == "Transformer" and set(rest) <= {MASK, "Normalize"} and len(set(rest)) == len(rest)
    if not ordered or not all(KNOWN_LATE.fullmatch(kind) for kind in folder.types):
        raise UserError(
            f"{folder.path / 'modules.json'}: of a late-interaction model, a Transformer, then Dense modules, {MASK} and Normalize are known, not {', '.join(folder.types)}"
        )
    if native and len(rest) < 2:
        raise UserError(f"{folder.path / 'modules.json'}: {MASK} and Normalize must follow, or token vectors are no unit vectors; save the model with both")
    if not native and not dense:
        raise UserError(f"{folder.path / 'modules.json'}: names no Dense module, and a late-interaction model of this layout has a trained projection")
    configs = {last_part(kind): folder.module_config(path) for kind, path in folder.modules[1 + len(dense) :]}
    for kind, path in folder.modules[1:]:
        only_known(folder.module_config(path), f"{path}/config.json", last_part(kind), folder.name, {MASK: MASK_KEYS}.get(last_part(kind)))
    for _, path in dense:
        dense_activation(folder.module_config(path), folder.path / path, folder.name, TOKENS)
    normalize = configs.get("Normalize", {"module_input_name": TOKENS})
    if [normalize.get("module_input_name"), normalize.get("module_output_name") or TOKENS] != [TOKENS, TOKENS]:
        raise UserError(f"model {folder.name!r}: its Normalize maps something else than {TOKENS}, which is not computed here")
    if configs.get(MASK, {}).get("keep_only_token_ids"):
        raise UserError(f"model {folder.name!r}: {MASK} keeps only some tokens (keep_only_token_ids), as models of images do, which is not computed here")
    return tuple(folder.path / path for _, path in dense), configs.get(MASK, {})


def _expansion(folder: Folder, given: object) -> Expansion | None:
    if given is None:
        return None
    value = as_dict(given)
    length, token = _count(folder, value.get("length"), "query_expansion: length"), value.get("token")
    good = value.get("strategy") in ("fixed", "min") and isinstance(value.get("attend", False), bool) and isinstance(token, str | None)
    if not good or length is None or value.keys() - {"strategy", "attend", "token", "length"}:
        raise UserError(f"model {folder.name!r}: query_expansion {given!r} is not understood; it has a strategy (fixed or min), attend, token and length")
    return Expansion(length, value["strategy"] == "fixed", value.get("attend", False), token)


def _count(folder: Folder, value: object, key: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"model {folder.name!r}: {key} must be a whole number of at least 1, not {value!r}")
    return value


def _text(folder: Folder, value: object, key: str) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"model {folder.name!r}: {key} must be a string, not {value!r}")
    return value or ""


def _words(folder: Folder, value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"model {folder.name!r}: {key} must be a list of strings, not {value!r}")
    return tuple(value)
