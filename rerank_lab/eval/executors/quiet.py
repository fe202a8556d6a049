"""What Ray says: in the log instead of on stdout, not at all where it writes past Python, and of its errors a sentence."""

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
    """Nothing reaches file descriptor 2."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Said(io.TextIOBase):
    """What Ray prints, in the log."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.info("ray: %s", line.strip())
        return len(text)


def short(error: BaseException) -> str:
    """What matters of what Ray says, which goes on for a page: its first sentence, or where code of ours failed the last."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return (lines[-1 if "Traceback" in str(error) or "ray::" in str(error) else 0] if lines else type(error).__name__)[:200]
