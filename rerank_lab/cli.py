"""What every command does at its edges: a terminal of any encoding, streams that are closed, full or no longer read. Imports no torch."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

# What a terminal shows whose encoding lacks a character of ours; a minus must not become a question mark.
PLAIN = {
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "…": "...", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "≥": ">=", "≤": "<=",
    "±": "+-", "µ": "u", "→": "->", "←": "<-", "∞": "inf", "Σ": "sum", "√": "sqrt", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
ERRORS = "rerank_lab"  # the name of the handler
BROKEN_PIPE = 141  # as a shell says it of a tool that nobody reads any more: 128 and the number of SIGPIPE


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
    """Runs a command and gives its exit code: its own; 141 where a reader of stdout has gone; 1, with the reason, where stdout cannot be written.

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
    except Unwritable as error:
        _to_nowhere(1)
        if isinstance(error.reason, BrokenPipeError):
            return BROKEN_PIPE
        print(f"{name}: failed: stdout: {error}", file=sys.stderr)
        return 1


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
