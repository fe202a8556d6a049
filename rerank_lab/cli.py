"""What every command does at its edges: options, a terminal of any encoding, streams that are closed, full or no longer read. Imports no torch."""

from __future__ import annotations

import argparse
import codecs
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rerank_kernels.names import BACKENDS
from rerank_lab.errors import UserError
from rerank_lab.files import expanded
from rerank_lab.models.runtimes import PRECISIONS, RUNTIMES

# What a terminal shows whose encoding lacks a character of ours; a minus must not become a question mark.
PLAIN = {
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "…": "...", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "≥": ">=", "≤": "<=",
    "±": "+-", "µ": "u", "→": "->", "←": "<-", "∞": "inf", "Σ": "sum", "√": "sqrt", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
ERRORS = "rerank_lab"  # the name of the handler
BROKEN_PIPE = 141  # as a shell says it of a tool that nobody reads any more: 128 and the number of SIGPIPE
INTERRUPTED = 130  # the same of SIGINT
SUBSPACE = "token projection V for --model (experiments/training/fit_subspace.py); default: the shipped one, or none"


class Unwritable(Exception):
    """stdout takes no more. No OSError, so that nothing on the way takes it for one of its own files."""

    def __init__(self, reason: OSError):
        super().__init__(reason.strerror or str(reason))
        self.reason = reason


class _Out(io.TextIOWrapper):
    """stdout, whose end is told from other errors."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise Unwritable(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise Unwritable(error) from None


class _Beside(io.TextIOWrapper):
    """stderr, which never ends the work: what it does not take is not said."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def run(main: Callable[[], int | None], name: str = "rerank_lab") -> int:
    """Runs a command and gives its exit code: its own; 130 after Ctrl-C; 141 where a reader of stdout has gone; 1, with the reason, where stdout cannot be written.

    Args:
        main: reads sys.argv, prints, and gives an exit code; it may raise SystemExit, as argparse does.
        name: what stands before the reason.
    """
    codecs.register_error(ERRORS, plain)
    _occupy()
    sys.stdout, sys.stderr = _stream(sys.stdout, 1, _Out), _stream(sys.stderr, 2, _Beside)
    try:
        try:
            code = main() or 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = 1 if isinstance(end.code, str) else int(end.code or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # most commands say more; this one came while they were being loaded
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Unwritable as error:
        _to_nowhere(1)
        if isinstance(error.reason, BrokenPipeError):
            return BROKEN_PIPE
        print(f"{name}: failed: stdout: {error}", file=sys.stderr)
        return 1


@dataclass(frozen=True)
class MachineSettings:
    """Where models run, and in what arithmetic.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        kernels: one of rerank_kernels.BACKENDS.
        runtime: "auto" or one of RUNTIMES.
        precision: one of PRECISIONS.
        threads: of the CPU; None: as many as torch takes.
    """

    device: str = "auto"
    kernels: str = "auto"
    runtime: str = "auto"
    precision: str = "fp32"
    threads: int | None = None


def machine_options(group: argparse._ArgumentGroup) -> None:
    """The options of Machine, for every command that runs models."""
    group.add_argument("--device", default=MachineSettings.device, help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument(
        "--kernels",
        choices=BACKENDS,
        default=MachineSettings.kernels,
        help="which implementation of the operators runs; auto: triton on CUDA, cpu on the CPU (default: auto)",
    )
    group.add_argument(
        "--runtime",
        choices=("auto", *RUNTIMES),
        default=MachineSettings.runtime,
        metavar="NAME",
        help=f"what runs the transformers: {', '.join(RUNTIMES)}, or auto: torch, or what computes in --precision (default: auto)",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default=MachineSettings.precision, help="of the transformers; bf16 where the processor has it (default: fp32)"
    )
    group.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")


def place_of(value: str) -> str:
    """A file, folder or name as an option gives it, with ~ put in full; "--name=~/x" reaches us as it is, and so does a TOML file's."""
    try:
        return expanded(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named_place(value: str) -> str:
    """NAME=PLACE with the place in full."""
    name, equals, rest = value.partition("=")
    return f"{name}{equals}{place_of(rest)}"


def path_of(value: str) -> Path:
    """The same as a Path."""
    return Path(place_of(value))


def count(value: str) -> int:
    """A whole number of at least 1."""
    number = natural(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return number


def natural(value: str) -> int:
    """A whole number of at least 0."""
    if not value.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {value!r}")
    return int(value)


def weight(value: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, not {value!r}")
    return number


def positive(value: str) -> float:
    """A number above 0."""
    if (number := weight(value)) == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {value!r}")
    return number


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler: characters that an encoding lacks, in letters that each has; of a file's name the bytes that it was given as."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):
        return bytes(ord(character) - 0xDC00 for character in text), error.end
    return "".join(PLAIN.get(character, "?") for character in text), error.end


def _occupy() -> None:
    """Takes the numbers of closed streams, lest a file that is opened later get one, and all that is printed. What writes there hears that it cannot."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY), True)


def _stream(stream: TextIO | None, number: int, kind: type[io.TextIOWrapper]) -> Any:
    if stream is None:  # closed when Python started
        raw = io.FileIO(number, "w", closefd=False)
        return kind(io.BufferedWriter(raw), "utf-8", ERRORS, line_buffering=number == 2)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return kind(stream.buffer, stream.encoding, ERRORS, line_buffering=stream.line_buffering, write_through=stream.write_through)


def _to_nowhere(number: int) -> None:
    """What is still held for a stream goes nowhere, so that the interpreter's end does not fail on it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
