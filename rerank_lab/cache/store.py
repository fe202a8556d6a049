"""A folder that several machines share: a path (local disk, NFS), or a URL that fsspec knows (s3://, gs://, ftp:// …) with a copy here of what was read.

A file is written under a temporary name and renamed, and is never changed after that; so a copy that is here is good for ever.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rerank_lab.errors import UserError
from rerank_lab.files import expanded, write_atomically

MIRROR = "RERANK_LAB_MIRROR"  # where copies are kept: a folder on a disk of this machine


def is_url(place: str | Path) -> bool:
    """Whether a place is reached by fsspec; file:// is a path like any other."""
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme not in ("file", "local")


def folder_of(place: str) -> Path:
    """The folder that a place names which is no URL."""
    return Path(expanded(place.partition("://")[2] or place))


class Store:
    """The files of one shared folder.

    Args:
        place: a path, or a URL of a file system that fsspec has (its package installed).

    Attributes:
        folder: where its files are read from and first written to: itself, or the copy here.
        shown: the place for messages, without a password that its URL may hold.

    Raises:
        UserError: a URL that fsspec does not know, or that cannot be opened.
    """

    def __init__(self, place: str | Path):
        self.place = expanded(str(place))
        self.shown = re.sub(r"(://)[^/@]*@", r"\1", self.place)
        self._fs: Any = None
        self._root = ""
        if not is_url(place):
            self.folder = folder_of(self.place)
            return
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.place)
        except Exception as error:  # each file system raises of its own kind
            raise UserError(f"{self.shown}: fsspec cannot open it: {str(error).partition(chr(10))[0]}") from error
        mirrors = Path(expanded(os.environ.get(MIRROR, "")) or Path(tempfile.gettempdir()) / f"rerank_lab-{os.getuid() if hasattr(os, 'getuid') else 0}")
        self.folder = mirrors / hashlib.sha256(self.place.encode()).hexdigest()[:24]

    @property
    def remote(self) -> bool:
        """Whether the files lie elsewhere, and `folder` holds copies."""
        return self._fs is not None

    def child(self, name: str) -> Store:
        """The store of a folder inside."""
        return Store(f"{self.place.rstrip('/')}/{name}" if self.remote else self.folder / name)

    def names(self) -> dict[str, int]:
        """Names of its files with their bytes; nothing where there is no such folder yet."""
        if not self.remote:
            return {p.name: p.stat().st_size for p in self.folder.iterdir() if p.is_file()} if self.folder.is_dir() else {}
        with suppress(FileNotFoundError), self._speaking("cannot be listed"):
            self._fs.invalidate_cache(self._root)
            return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in self._fs.ls(self._root, detail=True) if entry["type"] == "file"}
        return {}

    def fetch(self, name: str) -> Path:
        """A file's path here, copied from elsewhere where it is not here yet.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        path = self.folder / name
        if self.remote and not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
            try:
                with self._speaking(f"{name} cannot be read"):
                    self._fs.get_file(f"{self._root}/{name}", str(temporary))
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return path

    def head(self, name: str, size: int, start: int = 0) -> bytes:
        """A part of a file, not all of it."""
        if self.remote and not (self.folder / name).exists():
            with self._speaking(f"{name} cannot be read"):
                return bytes(self._fs.cat_file(f"{self._root}/{name}", start=start, end=start + size))
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def publish(self, name: str) -> None:
        """Puts a file that was written to `folder` where others see it, whole or not at all."""
        if self.remote:
            temporary = f"{self._root}/{uuid.uuid4().hex}.tmp"
            try:
                with self._speaking(f"{name} cannot be written"):
                    self._fs.makedirs(self._root, exist_ok=True)
                    self._fs.put_file(str(self.folder / name), temporary)
                    self._fs.mv(temporary, f"{self._root}/{name}")
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(temporary)
                raise

    def write(self, name: str, content: bytes) -> None:
        """Writes a whole file."""
        write_atomically(self.folder / name, content)
        self.publish(name)

    def remove(self, name: str) -> None:
        """Deletes a file here and elsewhere; one that is gone already is fine."""
        (self.folder / name).unlink(missing_ok=True)
        if self.remote:
            with suppress(OSError), self._speaking(f"{name} cannot be deleted"):
                self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Each file system raises of its own kind; here it is OSError, with the place."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{what} ({type(error).__name__}: {str(error).partition(chr(10))[0]})", self.shown) from error
