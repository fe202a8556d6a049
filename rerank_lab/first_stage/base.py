"""What every first stage is, and what it is made of. Imports nothing that is slow to load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rerank_lab.files import Json

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from rerank_lab.datasets.dataset import Dataset
    from rerank_lab.datasets.runs import Run

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
TopK: TypeAlias = "tuple[Tensor, Tensor]"  # of B queries: the K highest values, B × K, never rising, and the places of their documents
QUERY_BATCH = 64


@dataclass(frozen=True)
class Context:
    """What a first stage may use.

    Attributes:
        dataset: the collection.
        nearest: document ids, texts of queries and K → the K nearest of these documents by the model's pooled vectors, in batches of QUERY_BATCH
            queries; places count the ids. The work is done where the evaluation's work is done, here or on a cluster.
        progress: wraps an iterable in a progress bar with a title.
    """

    dataset: Dataset
    nearest: Callable[[Sequence[str], Sequence[str], int], list[TopK]]
    progress: Progress


class FirstStage(Protocol):
    """What finds candidates. It is made of a Context and of what stands behind its name (--candidates NAME:ARGUMENT), "" where nothing does.

    Attributes:
        notes: what a reader of results should know; complete after `search`.
    """

    notes: list[str]

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """Candidates of each query.

        Args:
            queries: id → text, none of them blank.
            k: documents a query at most.

        Returns:
            documents with the scores that they were ranked by; a query without any may be absent.
        """

    def about(self) -> dict[str, Json]:
        """What results say of it beside its name, as JSON has it: parameters, files, hashes. Asked after `search`."""
