"""The prompts of a checkpoint: those that its folder has, and those that its family is known to want."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tokenizers import Tokenizer

from rerank_lab.errors import UserError
from rerank_lab.models.folder import ABOUT, Folder


def side_prompts(folder: Folder) -> tuple[str, str, tuple[str, ...]]:
    """The prompts of queries and documents, as encode_query and encode_document of sentence-transformers choose them, and what is to be said of others.

    Raises:
        UserError: config_sentence_transformers.json holds no prompts where it should.
    """
    prompts, chosen = prompts_of(folder), folder.about.get("default_prompt_name")
    unused = {key for key in ("passage", "corpus", chosen) if key not in ("query", "document") and prompts.get(key or "")}
    said = (
        f"its prompts called {', '.join(sorted(map(str, unused)))} are not used: queries get the one called query and documents the one called document, as "
        "sentence-transformers' encode_query and encode_document have it; rename them in config_sentence_transformers.json if they are meant"
    )
    return prompts.get("query", ""), prompts.get("document", ""), (said,) if unused else ()


def prompts_of(folder: Folder) -> dict[str, str]:
    """The prompts in config_sentence_transformers.json, by name.

    Raises:
        UserError: they are no strings, or default_prompt_name is none of them.
    """
    prompts, chosen = folder.about.get("prompts") or {}, folder.about.get("default_prompt_name")
    place = folder.path / ABOUT
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{place}: prompts must be an object of strings")
    if not isinstance(chosen, str | None):
        raise UserError(f"{place}: default_prompt_name must be the name of a prompt, not {chosen!r}")
    if chosen is not None and chosen not in ("query", "document") and chosen not in prompts:
        raise UserError(f"{place}: default_prompt_name {chosen!r} is none of its prompts ({', '.join(prompts) or 'it has none'})")
    return {key: text or "" for key, text in prompts.items()}


@dataclass(frozen=True)
class CardPrompts:
    """The prompts that the authors of a family give in the model's card.

    Attributes:
        family: its name.
        query, document: the prompts; "" for none.
    """

    family: str
    query: str
    document: str = ""

    @property
    def note(self) -> str:
        """What to say where a model of the family gets none."""
        flags = [f"--{side}-prompt {_in_shell(text)}" for side, text in (("query", self.query), ("document", self.document)) if text]
        return f"its folder has no prompts, and models of its family ({self.family}) were trained with some: give {' '.join(flags)}"


SEARCH, WEB = (
    "Represent this sentence for searching relevant passages: ",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\n",
)
# Patterns of a model's name, the owner left out. The first that is found counts.
CARDS = [
    (re.compile(r"\be5-.*instruct|gte-qwen2-.*instruct|sfr-embedding", re.IGNORECASE), CardPrompts("instructed embeddings", f"{WEB}Query: ")),
    (re.compile(r"\be5-(small|base|large)", re.IGNORECASE), CardPrompts("e5", "query: ", "passage: ")),
    (re.compile(r"\bbge-(small|base|large)-en", re.IGNORECASE), CardPrompts("bge", SEARCH)),
    (re.compile(r"\bbge-(small|base|large)-zh", re.IGNORECASE), CardPrompts("bge", "为这个句子生成表示以用于检索相关文章：")),
    (re.compile(r"nomic-embed|modernbert-embed", re.IGNORECASE), CardPrompts("nomic-embed", "search_query: ", "search_document: ")),
    (re.compile(r"mxbai-embed", re.IGNORECASE), CardPrompts("mxbai-embed", SEARCH)),
    (re.compile(r"arctic-embed-.*v2", re.IGNORECASE), CardPrompts("arctic-embed v2", "query: ")),
    (re.compile(r"arctic-embed", re.IGNORECASE), CardPrompts("arctic-embed", SEARCH)),
    (re.compile(r"uae-large", re.IGNORECASE), CardPrompts("UAE", SEARCH)),
    (re.compile(r"qwen3-embedding", re.IGNORECASE), CardPrompts("Qwen3-Embedding", f"{WEB}Query:")),
    (re.compile(r"embeddinggemma", re.IGNORECASE), CardPrompts("EmbeddingGemma", "task: search result | query: ", "title: none | text: ")),
    (
        re.compile(r"\binstructor-(base|large|xl)", re.IGNORECASE),
        CardPrompts("instructor", "Represent the question for retrieving supporting documents: ", "Represent the document for retrieval: "),
    ),
]


def card_prompts(folder: Folder) -> CardPrompts | None:
    """The prompts that a model's family is known to want, by the model's name, its folder's name or the name that its config.json has kept."""
    path = folder.path.resolve()
    places = [folder.name, path.name, path.parent.parent.name if path.parent.name == "snapshots" else "", str(folder.config.get("_name_or_path") or "")]
    names = [re.split(r"[/\\]|--", place.rstrip("/"))[-1].replace("_", "-") for place in places]
    return next((prompts for pattern, prompts in CARDS if any(pattern.search(name) for name in names)), None)


def check_room(name: str, tokenizer: Tokenizer, prompt: str, kind: str, limit: int) -> None:
    """Refuses a prompt that leaves no token of a text within the limit: all texts would be the same.

    Args:
        name: of the model, for messages.
        tokenizer: of the model, without padding and truncation.
        prompt: put before texts of this kind, "query" or "document".
        limit: tokens of prompt and text that are read.
    """
    if prompt and (taken := len(tokenizer.encode(prompt.rstrip(), add_special_tokens=False))) >= limit:
        raise UserError(
            f"model {name!r}: its {kind} prompt takes {taken} tokens, and {limit} are read of prompt and text together; a shorter one, or a higher max_tokens_per_doc"
        )


def _in_shell(text: str) -> str:
    """A text as a word of a shell's command, on one line."""
    return "$" + repr(text) if "\n" in text else shlex.quote(text)
