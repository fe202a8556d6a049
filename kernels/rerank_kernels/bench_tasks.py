"""What a file declares that `bench` times: tasks. It imports none of our operators, so that a peer's process needs none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

Call = Callable[[], Any]


class Task(ABC):
    """One operator's work at one size, and all who can do it. It travels to the processes of other libraries.

    Attributes:
        ours: names of our own contenders. All others are measured against the first.
        unlike: those of ours that compute something else; their results are not compared.
        peers: names of other libraries in bench_peers.PEERS that do the work on the CPU.
        matrix: name of the tensor that has to be read once, whoever does the work.
        tolerance: of a result's distance from ours, on the CPU.
    """

    ours: ClassVar[tuple[str, ...]]
    unlike: ClassVar[tuple[str, ...]] = ()
    peers: ClassVar[tuple[str, ...]] = ()
    matrix: ClassVar[str]
    tolerance: ClassVar[float]

    @property
    @abstractmethod
    def products(self) -> int:
        """How many products each number of the matrix is part of."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Arguments by name, made anew from a seed, on the CPU."""

    @abstractmethod
    def title(self, x: dict[str, Tensor]) -> str:
        """What stands above the task's rows; x: its tensors, as they are timed."""

    @abstractmethod
    def on_cpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        """Contenders on the CPU that need no other library, ours first."""

    @abstractmethod
    def on_gpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        """Contenders on a GPU that need no other library, ours first; x: tensors in fp16."""

    def peers_on_gpu(self, x: dict[str, Tensor]) -> dict[str, Call]:
        """Other libraries on a GPU, by their names in bench_peers.PEERS. A call imports the library."""
        return {}

    def peer(self, name: str, module: Any, threads: int) -> Call:
        """The call of one of `peers`, in that peer's process.

        Args:
            name: of the peer.
            module: the library's, imported.
            threads: that it may use.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how {name} does it")
