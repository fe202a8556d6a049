"""What all commands share: types of options, exit codes, terminals of any encoding, and streams that are closed, full or no longer read.

Imports no torch.
"""

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
from rerank_lab.files import expanded, valid_text
from rerank_lab.models.runtimes import PRECISIONS, RUNTIMES

# Replacements for characters that a terminal's encoding lacks: a minus must not become a question mark.
PLAIN_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "…": "...", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "≥": ">=", "≤": "<=",
    "±": "+-", "µ": "u", "→": "->", "←": "<-", "∞": "inf", "Σ": "sum", "√": "sqrt", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
ERROR_HANDLER = "rerank_lab"  # under which `plain` is registered with codecs
BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it
INTERRUPTED = 130  # 128 + SIGINT
SUBSPACE = "token projection V for --model (experiments/training/fit_subspace.py); default: the shipped one, or none"


class Unwritable(Exception):
    """stdout cannot be written. Not an OSError, so that code which handles errors of its own files does not catch it."""

    def __init__(self, reason: OSError):
        super().__init__(reason.strerror or str(reason))
        self.reason = reason


class _Stdout(io.TextIOWrapper):
    """stdout that raises Unwritable instead of OSError."""

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


class _Stderr(io.TextIOWrapper):
    """stderr that never ends the work: what cannot be written to it is dropped."""

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
    """Runs a command and returns its exit code.

    Args:
        main: reads sys.argv, prints, and returns an exit code; None is 0. It may raise SystemExit, as argparse does.
        name: prefix of the messages.

    Returns:
        the command's own code; 130 after Ctrl-C; 141 if the reader of stdout has gone; 1, with a message, if stdout cannot
        be written for another reason.
    """
    codecs.register_error(ERROR_HANDLER, plain)
    _reserve_closed_streams()
    sys.stdout, sys.stderr = _stream(sys.stdout, 1, _Stdout), _stream(sys.stderr, 2, _Stderr)
    try:
        try:
            code = main() or 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = 1 if isinstance(end.code, str) else int(end.code or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # while the command was still loading; once it runs it says more itself
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Unwritable as error:
        _discard_output(1)
        if isinstance(error.reason, BrokenPipeError):
            return BROKEN_PIPE
        print(f"{name}: failed: stdout: {error}", file=sys.stderr)
        return 1


@dataclass(frozen=True)
class ComputeOptions:
    """Where models run, and in which precision.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        kernels: one of rerank_kernels.BACKENDS.
        runtime: "auto" or one of RUNTIMES.
        precision: one of PRECISIONS.
        threads: CPU threads; None: torch's choice.
    """

    device: str = "auto"
    kernels: str = "auto"
    runtime: str = "auto"
    precision: str = "fp32"
    threads: int | None = None


def add_compute_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of ComputeOptions, for a command that runs models."""
    group.add_argument("--device", default=ComputeOptions.device, help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument(
        "--kernels",
        choices=BACKENDS,
        default=ComputeOptions.kernels,
        help="which implementation of the operators runs; auto: triton on CUDA, cpu on the CPU (default: auto)",
    )
    group.add_argument(
        "--runtime",
        choices=("auto", *RUNTIMES),
        default=ComputeOptions.runtime,
        metavar="NAME",
        help=f"what runs the transformers: {', '.join(RUNTIMES)}, or auto: torch, or what computes in --precision (default: auto)",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default=ComputeOptions.precision, help="of the transformers; bf16 where the processor has it (default: fp32)"
    )
    group.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")


def place_of(value: str) -> str:
    """An option's file, folder or name with ~ expanded. Shells leave the ~ of "--name=~/x" as it is, and so do TOML files.

    Raises:
        argparse.ArgumentTypeError: there is no such user's home folder.
    """
    try:
        return expanded(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named_place(value: str) -> str:
    """NAME=PLACE with ~ expanded in PLACE."""
    name, equals, rest = value.partition("=")
    return f"{name}{equals}{place_of(rest)}"


def path_of(value: str) -> Path:
    """An option's file or folder as a Path, with ~ expanded."""
    return Path(place_of(value))


def text(value: str) -> str:
    """A text: whole characters, of which a terminal in another encoding may have made halves."""
    if not valid_text(value):
        raise argparse.ArgumentTypeError(f"must be text in the terminal's encoding, not {value!r}")
    return value


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


def non_negative(value: str) -> float:
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
    if (number := non_negative(value)) == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {value!r}")
    return number


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for codecs: replaces characters that the encoding lacks by plain ones. Bytes of a file's name that were no text are written unchanged."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):
        return bytes(ord(character) - 0xDC00 for character in text), error.end
    return "".join(PLAIN_CHARACTERS.get(character, "?") for character in text), error.end


def _reserve_closed_streams() -> None:
    """Opens something under the file descriptors 0 to 2 that are closed.

    Otherwise a file opened later would get such a number, and with it everything that is printed. Writing to the
    placeholder fails.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY), True)


def _stream(stream: TextIO | None, number: int, kind: type[io.TextIOWrapper]) -> Any:
    if stream is None:  # closed when Python started
        raw = io.FileIO(number, "w", closefd=False)
        return kind(io.BufferedWriter(raw), "utf-8", ERROR_HANDLER, line_buffering=number == 2)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return kind(stream.buffer, stream.encoding, ERROR_HANDLER, line_buffering=stream.line_buffering, write_through=stream.write_through)


def _discard_output(number: int) -> None:
    """Points a file descriptor at the null device. What is still buffered goes there, so that the interpreter does not fail on it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
