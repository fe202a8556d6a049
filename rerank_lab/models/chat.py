"""A query and a document as one sequence of tokens, through a chat template that the checkpoint carries, as sentence-transformers does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from rerank_lab.errors import UserError
from rerank_lab.models.base import Overrides
from rerank_lab.models.forward import encodings
from rerank_lab.models.tasks import ChatSettings

# A template that looks into a content takes it as a list of parts, otherwise as a string.
LOOKS_INSIDE = ("content[0]", ".type", "'type'", '"type"', "message.content[")
Message = dict[str, object]


class Prompted(NamedTuple):
    """What a model reads of a query and a document.

    Attributes:
        ids: L, int64.
        cut: whether the query or the document was cut.
    """

    ids: np.ndarray
    cut: bool


def shortened(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, side: str) -> Iterator[tuple[str, bool]]:
    """Cuts texts to their first max_tokens tokens, or to the last if `side` is "left". Yields each text, and whether it was cut."""
    for text, encoding in zip(texts, encodings(tokenizer, texts)):
        if len(encoding) <= max_tokens:
            yield text, False
        elif side == "left":
            yield text[encoding.offsets[len(encoding) - max_tokens][0] :], True
        else:
            yield text[: encoding.offsets[max_tokens - 1][1]], True


class ChatTemplate:
    """Makes sequences of tokens by the chat template of a tokenizer, which has places for the roles `query` and `document`.

    A sequence that is too long is cut, and the end of the template is written over its last tokens, because a model of this
    kind reads its answer off them.

    Args:
        settings: of the checkpoint.
        tokenizer: of transformers, with the template.
        fast: the Tokenizer inside, without padding and truncation.
        instruction: the message of the role `system`; "" for none.
        limit: tokens of a sequence.
        name: of the model, for messages.

    Raises:
        UserError: the template has no place for query and document, or leaves no room for them.
    """

    def __init__(self, settings: ChatSettings, tokenizer: Any, fast: Tokenizer, instruction: str, limit: int, name: str):
        self.tokenizer, self.fast, self.instruction, self.name = tokenizer, fast, instruction, name
        self.arguments, self.length, self.side = dict(settings.arguments), limit, str(tokenizer.truncation_side)
        template = tokenizer.chat_template
        looks = isinstance(template, str) and any(part in template for part in LOOKS_INSIDE)
        self.structured = settings.format == "structured" or (settings.format == "auto" and (looks or not isinstance(template, str)))
        plain = self._probed("alpha", "bravo")
        if lost := [role for role, pair in (("query", ("charlie", "bravo")), ("document", ("alpha", "foxtrot"))) if self._probed(*pair) == plain]:
            raise UserError(
                f"model {name!r}: its chat template has no place for {' and '.join(lost)} (roles of its messages), so it says nothing of how the model reads a pair; "
                "put a chat_template.jinja that has both beside the model"
            )
        self.end = self._end()
        self.limit = limit - len(self._ids(*self.render("", [""])))  # tokens of query and document together
        if self.limit < 1:
            raise UserError(f"model {name!r}: a limit of {limit} tokens leaves none for the text")

    def has_place_for_instruction(self) -> bool:
        """Whether a message of the role `system` changes what the model reads."""
        return len({self._probed("alpha", "bravo", instruction) for instruction in ("golf", "hotel india")}) > 1

    def check(self, asked: Overrides) -> None:
        """Refuses an instruction that is asked for and that the template has no place for."""
        if asked.instruction is not None and not self.has_place_for_instruction():
            raise UserError(f"model {self.name!r} takes no instruction: its chat template has no place for one")

    def render(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[str]:
        """The text that the model reads, for each document."""
        told = self.instruction if instruction is None else instruction
        before: list[Message] = [self._message("system", told)] if told else []
        before.append(self._message("query", query))
        conversations = [[*before, self._message("document", text)] for text in documents]
        found: list[str] = self.tokenizer.apply_chat_template(conversations, tokenize=False, **self.arguments) if conversations else []
        return found

    def sequences(self, query: str, documents: Sequence[str], max_tokens: int) -> list[Prompted]:
        """The query with each of N documents, each of which is cut to max_tokens tokens before it enters the template."""
        kept = list(shortened(self.fast, documents, max_tokens, self.side))
        rendered = self.render(query, [text for text, _ in kept])
        return [self._cut(encoding, was_cut) for encoding, (_, was_cut) in zip(encodings(self.fast, rendered), kept)]

    def _cut(self, encoding: Encoding, was_cut: bool) -> Prompted:
        too_long = len(encoding) > self.length
        encoding.truncate(self.length, direction=self.side)
        ids = np.array(encoding.ids, dtype=np.int64)
        if too_long and self.end:
            ids[-len(self.end) :] = self.end[-len(ids) :]
        return Prompted(ids, was_cut or too_long)

    def _message(self, role: str, text: str) -> Message:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}

    def _ids(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False).ids)

    def _probed(self, query: str, document: str, instruction: str | None = None) -> str:
        try:
            return self.render(query, [document], instruction)[0]
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"model {self.name!r}: its chat template takes no query and document ({type(error).__name__}: {' '.join(str(error).split()):.200}); "
                "put a chat_template.jinja that takes these roles beside the model"
            ) from error

    def _end(self) -> list[int]:
        """The tokens after query and document: those that two different pairs have in common at their ends."""
        first, second = (self._ids(*self.render(filler, [filler])) for filler in ("0", "1 2 3 4"))
        same = next((n for n, (a, b) in enumerate(zip(reversed(first), reversed(second))) if a != b), 0)
        return first[len(first) - same :]
