"""The prompts of causal rerankers whose checkpoints do not carry them, as their authors publish them.

To add a family, add a Template to TEMPLATES, and its formula to experiments/references/causal.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rerank_lab.errors import UserError
from rerank_lab.models.chat import Prompted, shortened
from rerank_lab.models.folder import Folder
from rerank_lab.models.forward import encodings


@dataclass(frozen=True)
class Template:
    """The prompt of a family.

    The pieces are tokenised one by one: `before`, query, "\\n", document, each of `after`; or query and document as one text
    if they are `joined`. {instruction} in a piece is the task.

    Attributes:
        family: what messages call it.
        architecture, named: by which a checkpoint is recognised, config.json's architecture and a pattern of the model's name.
        source: where the authors publish it.
        yes, no: the score is the logit of the first less that of the second; no = None: the first alone.
        before, query, document, after: the pieces.
        instructed: in place of `query` if there is an instruction; "": the same.
        instruction: the family's own.
        joined: whether query and document are one text, which is cut at the end.
        room: (tokens of `before`, of `after`) → tokens of query and document at most.
        query_limit, document_limit: tokens of each before they are put together; 0: no limit.
        starts: whether the tokenizer's first special token (BOS) stands before everything.
    """

    family: str
    architecture: str
    named: re.Pattern[str]
    source: str
    yes: str
    no: str | None
    before: str
    query: str
    document: str
    after: tuple[str, ...]
    room: Callable[[int, int], int]
    instructed: str = ""
    instruction: str = ""
    joined: bool = False
    query_limit: int = 0
    document_limit: int = 0
    starts: bool = False


MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document pair, carefully analyze the semantic "
    "relationship between them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
TEMPLATES = (
    Template(
        "Qwen3-Reranker",
        "Qwen3ForCausalLM",
        re.compile(r"qwen3[-_.]?reranker", re.IGNORECASE),
        "https://huggingface.co/Qwen/Qwen3-Reranker-0.6B",
        "yes",
        "no",
        before='<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
        "<|im_end|>\n<|im_start|>user\n",
        query="<Instruct>: {instruction}\n<Query>: {query}",
        document="<Document>: {document}",
        after=("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",),
        room=lambda before, after: 8192 - before - after,
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        joined=True,
    ),
    Template(
        "mxbai-rerank-v2",
        "Qwen2ForCausalLM",
        re.compile(r"mxbai[-_.]?rerank", re.IGNORECASE),
        "https://github.com/mixedbread-ai/mxbai-rerank",
        "1",
        "0",
        before="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        query="query: {query}",
        instructed="instruction: {instruction}\nquery: {query}",
        document="document: {document}",
        after=(
            "\n",
            MXBAI_TASK,
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        room=lambda before, after: 8192,
        query_limit=8192 * 3 // 4,
    ),
    Template(
        "bge-reranker-v2-gemma",
        "GemmaForCausalLM",
        re.compile(r"bge[-_.]?reranker[-_.]?v2[-_.]?gemma", re.IGNORECASE),
        "https://github.com/FlagOpen/FlagEmbedding",
        "Yes",
        None,
        before="",
        query="A: {query}",
        document="B: {document}",
        after=("\n", "{instruction}"),
        room=lambda before, after: 512 + after - before,
        instruction="Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a prediction of either 'Yes' or 'No'.",
        query_limit=512 * 3 // 4,
        document_limit=512,
        starts=True,
    ),
)


def template_of(folder: Folder) -> Template | None:
    """The template of a checkpoint's family, by its architecture and its name; None: it is not known."""
    names = [folder.name.rstrip("/").rpartition("/")[2], folder.path.name, str(folder.config.get("_name_or_path", "")).rpartition("/")[2]]
    if folder.path.parent.name == "snapshots":  # of the hub's own folder
        names.append(folder.path.parent.parent.name)
    return next((one for one in TEMPLATES if one.architecture == folder.architecture and any(map(one.named.search, names))), None)


class TemplatePrompt:
    """Makes sequences of tokens by a family's template.

    Args:
        template: of the family.
        tokenizer: of transformers.
        fast: the Tokenizer inside, without padding and truncation.
        instruction: the task; "" for none.
        positions: tokens of a sequence at most, by the model's positions and its tokenizer.
        name: of the model, for messages.

    Attributes:
        limit: tokens of query and document together.

    Raises:
        UserError: the template leaves no room for query and document.
    """

    def __init__(self, template: Template, tokenizer: Any, fast: Tokenizer, instruction: str, positions: int, name: str):
        self.template, self.fast, self.instruction, self.side = template, fast, instruction, str(tokenizer.truncation_side)
        first = [tokenizer.bos_token_id] if template.starts and tokenizer.bos_token_id not in (None, tokenizer.pad_token_id) else []
        self.before = [*first, *self._ids(template.before)]
        self.after = [n for piece in template.after for n in self._ids(piece.format(instruction=instruction))]
        self.between = self._ids("\n")
        self.limit = min(template.room(len(self.before), len(self.after)), positions - len(self.before) - len(self.after))
        if self.limit < 1:
            raise UserError(f"model {name!r}: a limit of {positions} tokens leaves none for the text")
        # A second tokenizer: truncation is a state of the tokenizer. A text as a whole gets the tokenizer's special tokens, if it has any.
        self.whole = Tokenizer.from_str(fast.to_str())
        self.whole.enable_truncation(self.limit, direction=self.side)
        self.specials: int = self.whole.num_special_tokens_to_add(False)

    def sequences(self, query: str, documents: Sequence[str], max_tokens: int) -> list[Prompted]:
        """The query with each of N documents, each of which is cut to max_tokens tokens before it enters the template."""
        kept = list(shortened(self.fast, documents, max_tokens, self.side))
        texts = [self.template.document.format(document=text) for text, _ in kept]
        form = (self.template.instructed if self.instruction else "") or self.template.query
        asked = form.format(instruction=self.instruction, query=query)
        bodies = self._joined(asked, texts) if self.template.joined else self._apart(asked, texts)
        return [
            Prompted(np.array([*self.before, *ids, *self.after], dtype=np.int64), was_cut or too_long) for (ids, too_long), (_, was_cut) in zip(bodies, kept)
        ]

    def _joined(self, query: str, documents: Sequence[str]) -> list[tuple[list[int], bool]]:
        found = []
        for encoding in encodings(self.fast, [f"{query}\n{text}" for text in documents]):
            whole = self.whole.post_process(encoding)
            found.append((list(whole.ids), len(whole) < len(encoding) + self.specials))
        return found

    def _apart(self, query: str, documents: Sequence[str]) -> list[tuple[list[int], bool]]:
        asked, found = self._ids(query), []
        own = asked[: self.template.query_limit or None]
        for encoding in encodings(self.fast, documents):
            ids = encoding.ids[: self.template.document_limit or None]
            whole = [*own, *self.between, *ids]
            found.append((whole[: self.limit], len(own) < len(asked) or len(ids) < len(encoding) or len(whole) > self.limit))
        return found

    def _ids(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False).ids)
