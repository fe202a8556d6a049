"""Keeps Ray quiet: its output goes to the log, what it writes past Python is dropped, and its errors become one sentence."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("rerank_lab")


@contextmanager
def without_stderr() -> Iterator[None]:
    """Drops everything that is written to file descriptor 2, also by libraries that bypass Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class LogWriter(io.TextIOBase):
    """A text stream that writes each line to the log."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.info("ray: %s", line.strip())
        return len(text)


def short(error: BaseException) -> str:
    """Shortens one of Ray's errors, which can fill a page: the last line if code on a worker failed, otherwise the first line."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return (lines[-1 if "Traceback" in str(error) or "ray::" in str(error) else 0] if lines else type(error).__name__)[:200]
