"""The registry of first stages. A new one is a file here, a line in FIRST_STAGES, and a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from rerank_lab.errors import UserError
from rerank_lab.files import expanded
from rerank_lab.first_stage.base import Context, FirstStage

__all__ = ["FIRST_STAGES", "Context", "Declared", "FirstStage", "file_of", "find", "listed"]
FILE = "FILE"


@dataclass(frozen=True)
class Declared:
    """A first stage as --candidates names it: NAME, or NAME:ARGUMENT.

    Attributes:
        name: what people type.
        argument: what must stand behind the colon, in capitals; None: nothing may. FILE is a file, whose SHA-256 the stage's `about` gives as file_sha256.
        help: what it is, for --help.
        kind: MODULE:CLASS, which is imported when it is used.
    """

    name: str
    argument: str | None
    help: str
    kind: str

    @property
    def usage(self) -> str:
        """How it is written: dense, run:FILE."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    def make(self, context: Context, argument: str) -> FirstStage:
        """The first stage itself."""
        module, _, name = self.kind.partition(":")
        return cast(Callable[[Context, str], FirstStage], getattr(import_module(module), name))(context, argument)


FIRST_STAGES = {
    stage.name: stage
    for stage in [
        Declared("bm25", None, "words in common", "rerank_lab.first_stage.bm25:BM25Stage"),
        Declared("dense", None, "nearest by --model's pooled vectors", "rerank_lab.first_stage.dense:DenseStage"),
        Declared("run", FILE, "a TREC run, Parquet, or JSON as of ranx and MTEB", "rerank_lab.first_stage.from_run:RunStage"),
    ]
}


def listed(separator: str) -> str:
    """How all of them are written."""
    return separator.join(stage.usage for stage in FIRST_STAGES.values())


def find(source: str) -> tuple[Declared, str]:
    """The first stage that NAME or NAME:ARGUMENT means, and its argument with ~ put in full ("" where it takes none).

    Raises:
        UserError: there is none of this name, or its argument is missing or too much.
    """
    name, _, argument = source.partition(":")
    stage = FIRST_STAGES.get(name)
    if stage is None or bool(argument) != (stage.argument is not None):
        raise UserError(f"candidates {source!r} are not known; valid: {listed(', ')}")
    return stage, expanded(argument)


def file_of(source: str) -> Path | None:
    """The file that a first stage reads its candidates from, if it reads one.

    Raises:
        UserError: as `find`.
    """
    stage, argument = find(source)
    return Path(argument) if stage.argument == FILE else None
