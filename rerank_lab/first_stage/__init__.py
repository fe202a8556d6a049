"""The registry of first stages. To add one, write a file here, a line in FIRST_STAGES, and a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from rerank_lab.errors import UserError
from rerank_lab.files import expanded
from rerank_lab.first_stage.base import Context, FirstStage

__all__ = ["FIRST_STAGES", "Context", "FirstStage", "FirstStageKind", "file_of", "find", "usages"]
FILE = "FILE"


@dataclass(frozen=True)
class FirstStageKind:
    """A kind of first stage, as --candidates names it: NAME, or NAME:ARGUMENT.

    Attributes:
        name: what the user types.
        argument: what follows the colon, in capitals for --help; None: there is no argument. FILE means a file; the stage's
            `about` then has the file's SHA-256 as file_sha256.
        help: a short description for --help.
        implementation: MODULE:CLASS of the FirstStage. The module is imported on first use.
        pooled: whether it searches by pooled vectors of --model.
    """

    name: str
    argument: str | None
    help: str
    implementation: str
    pooled: bool = False

    @property
    def usage(self) -> str:
        """How --candidates names it: dense, run:FILE."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    def make(self, context: Context, argument: str) -> FirstStage:
        """A first stage of this kind."""
        module, _, name = self.implementation.partition(":")
        return cast(Callable[[Context, str], FirstStage], getattr(import_module(module), name))(context, argument)


FIRST_STAGES = {
    stage.name: stage
    for stage in [
        FirstStageKind("bm25", None, "words in common", "rerank_lab.first_stage.bm25:BM25Stage"),
        FirstStageKind("dense", None, "nearest by --model's pooled vectors", "rerank_lab.first_stage.dense:DenseStage", pooled=True),
        FirstStageKind("splade", "MODEL", "a sparse encoder's words in common", "rerank_lab.first_stage.splade:SpladeStage"),
        FirstStageKind("run", FILE, "a TREC run, Parquet, or JSON as of ranx and MTEB", "rerank_lab.first_stage.from_run:RunStage"),
    ]
}


def usages(separator: str, *, pooled: bool = True) -> str:
    """The usage of every first stage, joined by a separator; pooled=False leaves out those that search by pooled vectors."""
    return separator.join(stage.usage for stage in FIRST_STAGES.values() if pooled or not stage.pooled)


def find(source: str) -> tuple[FirstStageKind, str]:
    """The kind of first stage that NAME or NAME:ARGUMENT means, and the argument with ~ expanded ("" without an argument).

    Raises:
        UserError: the name is unknown, an argument is missing, or there is one too many.
    """
    name, _, argument = source.partition(":")
    stage = FIRST_STAGES.get(name)
    if stage is None or bool(argument) != (stage.argument is not None):
        raise UserError(f"candidates {source!r} are not known; valid: {usages(', ')}")
    return stage, expanded(argument)


def file_of(source: str) -> Path | None:
    """The file that a first stage reads its candidates from; None if it reads no file.

    Raises:
        UserError: as `find`.
    """
    stage, argument = find(source)
    return Path(argument) if stage.argument == FILE else None
