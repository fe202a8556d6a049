"""The protocol of first stages, and the context that they are made with. Imports nothing that is slow to load."""

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

ProgressBar = Callable[[Iterable[Any], str], Iterable[Any]]  # an iterable and a title → the same items, with a progress bar
TopK: TypeAlias = "tuple[Tensor, Tensor]"  # for B queries: the K highest values (B × K, never rising) and the positions of their documents (B × K)
QUERY_BATCH = 64


@dataclass(frozen=True)
class Context:
    """What a first stage may use.

    Attributes:
        dataset: the collection.
        nearest: document ids, texts of queries, K → the K nearest documents of each query by the model's pooled vectors, a TopK for
            each batch of QUERY_BATCH queries. Positions are into the given ids. It runs where the evaluation runs, here or on a cluster.
        progress: wraps an iterable in a progress bar with a title.
        device: where a model of the first stage's own runs, in this process.
    """

    dataset: Dataset
    nearest: Callable[[Sequence[str], Sequence[str], int], list[TopK]]
    progress: ProgressBar
    device: str = "auto"


class FirstStage(Protocol):
    """Finds candidates. Its class is called with a Context and the ARGUMENT of --candidates NAME:ARGUMENT ("" without one).

    Attributes:
        notes: what a reader of results should know; complete after `search`.
    """

    notes: list[str]

    def search(self, queries: Mapping[str, str], k: int) -> Run:
        """Finds the candidates of each query.

        Args:
            queries: id → text, none of them blank.
            k: how many documents to return for a query at most.

        Returns:
            ranked documents with their scores. Queries without candidates may be absent.
        """

    def about(self) -> dict[str, Json]:
        """Facts for results.json, besides the name: parameters, files, hashes. Called after `search`."""
