"""Reads the JSON files of a causal reranker before any weight is loaded: which prompt it reads, with which instruction, and what it answers with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from rerank_lab.errors import UserError
from rerank_lab.models.base import Overrides
from rerank_lab.models.checkpoint import Checkpoint, read_module, read_scorer
from rerank_lab.models.families import CAUSAL, SAID, family
from rerank_lab.models.folder import Folder, last_part
from rerank_lab.models.tasks import chat_template
from rerank_lab.models.templates import TEMPLATES, Template, template_of


@dataclass(frozen=True)
class CausalCheckpoint:
    """How the causal reranker in a folder is scored.

    Attributes:
        scorer: what it has in common with other scorers of pairs: its place, its limit, its chat template.
        instruction: the task that the model is told; "" for none.
        template: its family's prompt; None: it reads by its own chat template.
        yes, no: the tokens that it answers with, of a folder that names them; None: the words yes and no.
    """

    scorer: Checkpoint
    instruction: str
    template: Template | None = None
    yes: int | None = None
    no: int | None = None

    def overridden(self, asked: Overrides) -> CausalCheckpoint:
        """The same with the instruction that a person asks for.

        Raises:
            UserError: something else is asked for.
        """
        if odd := [name for name in ("query_prompt", "document_prompt", "truncate_dim") if getattr(asked, name) is not None]:
            raise UserError(f"model {self.scorer.name!r} takes no {odd[0]}: it is a {CAUSAL} without one")
        return self if asked.instruction is None else replace(self, instruction=asked.instruction)

    def answers(self, tokenizer: Tokenizer) -> tuple[int, int | None]:
        """The tokens yes and no.

        Raises:
            UserError: the vocabulary does not have them.
        """
        if self.yes is not None:
            return self.yes, self.no
        words = ("yes", "no") if self.template is None else (self.template.yes, self.template.no)
        found = [tokenizer.encode(word, add_special_tokens=False).ids for word in words if word is not None]
        if any(len(ids) != 1 for ids in found):
            family = "its kind" if self.template is None else self.template.family
            raise UserError(f"model {self.scorer.name!r} has no token for each of {', '.join(filter(None, words))}, with which models of {family} answer")
        return int(found[0][0]), int(found[1][0]) if len(found) > 1 else None

    def reading(self) -> str:
        """As Scorer.reading."""
        said = {"prompt": "its own chat template" if self.template is None else self.template.family}
        return json.dumps(said | {"instruction": self.instruction}, ensure_ascii=False)


def read_causal(folder: Folder) -> CausalCheckpoint:
    """Reads a folder's JSON files. No weight is loaded.

    Raises:
        UserError: its prompt is not known, or the folder has something that is not supported.
    """
    scorer, kinds = read_scorer(folder, CAUSAL), [last_part(kind) for kind in folder.types]
    if kinds and kinds != ["Transformer", "LogitScore"]:
        raise UserError(
            f"{folder.path / 'modules.json'}: of a causal reranker a Transformer and a LogitScore of sentence-transformers are known, not {', '.join(kinds)}"
        )
    if kinds:
        path = folder.modules[1][1]
        head = read_module(folder, path, "LogitScore")
        yes, no = head.get("true_token_id"), head.get("false_token_id")
        if not _token(yes) or not (no is None or _token(no)) or head.get("module_input_name", "causal_logits") != "causal_logits":
            raise UserError(f"model {folder.name!r}: {folder.path / path / 'config.json'} must name true_token_id and false_token_id, tokens of its vocabulary")
        if scorer.chat is None:
            raise UserError(f"model {folder.name!r} is a causal reranker that reads its pairs as two plain texts (modality_config), which is not done here")
        return CausalCheckpoint(scorer, scorer.pair_prompt, yes=yes, no=no)
    if scorer.chat is not None and all(role in chat_template(folder.root) for role in ("query", "document")):
        return CausalCheckpoint(scorer, scorer.pair_prompt)  # as sentence-transformers takes a language model without modules.json
    if (template := template_of(folder)) is None:
        said = SAID[CAUSAL].format(sign=family(folder)[1])
        raise UserError(
            f"model {folder.name!r} is {said}, and its prompt is not known here; known by their names are {', '.join(one.family for one in TEMPLATES)}, "
            "and a folder of sentence-transformers with LogitScore carries its own"
        )
    return CausalCheckpoint(replace(scorer, chat=None), template.instruction, template)


def _token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
