"""A folder that several machines share: a path (local disk, NFS), or a URL that fsspec knows (s3://, gs://, ftp:// …) with local copies of the files.

A file is written under a temporary name, renamed, and never changed again. So a local copy never becomes outdated.
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

MIRROR = "RERANK_LAB_MIRROR"  # environment variable with the folder for local copies


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL for fsspec. file:// counts as a path."""
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme not in ("file", "local")


def folder_of(place: str) -> Path:
    """The folder of a place that is a path or a file:// URL."""
    return Path(expanded(place.partition("://")[2] or place))


class Store:
    """The files of one shared folder.

    Args:
        place: a path, or a URL for fsspec. The package of its file system must be installed.

    Attributes:
        folder: the local folder that files are read from and written to first: the shared folder itself, or the local copy.
        shown: the place for messages, without the password that a URL may hold.

    Raises:
        UserError: fsspec does not know the URL or cannot open it.
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
        except Exception as error:  # each file system raises errors of its own
            raise UserError(f"{self.shown}: fsspec cannot open it: {str(error).partition(chr(10))[0]}") from error
        mirrors = Path(expanded(os.environ.get(MIRROR, "")) or Path(tempfile.gettempdir()) / f"rerank_lab-{os.getuid() if hasattr(os, 'getuid') else 0}")
        self.folder = mirrors / hashlib.sha256(self.place.encode()).hexdigest()[:24]

    @property
    def remote(self) -> bool:
        """Whether the files are behind a URL, and `folder` holds copies."""
        return self._fs is not None

    def child(self, name: str) -> Store:
        """The Store of a folder inside this one."""
        return Store(f"{self.place.rstrip('/')}/{name}" if self.remote else self.folder / name)

    def names(self) -> dict[str, int]:
        """File name → bytes; empty if the folder does not exist yet.

        Raises:
            OSError: the folder cannot be listed.
        """
        if not self.remote:
            return {p.name: p.stat().st_size for p in self.folder.iterdir() if p.is_file()} if self.folder.is_dir() else {}
        with suppress(FileNotFoundError), self._as_os_error("cannot be listed"):
            self._fs.invalidate_cache(self._root)
            return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in self._fs.ls(self._root, detail=True) if entry["type"] == "file"}
        return {}

    def fetch(self, name: str) -> Path:
        """The local path of a file, which is copied here first if needed.

        Raises:
            OSError: the file does not exist or cannot be read.
        """
        path = self.folder / name
        if self.remote and not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
            try:
                with self._as_os_error(f"{name} cannot be read"):
                    self._fs.get_file(f"{self._root}/{name}", str(temporary))
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return path

    def head(self, name: str, size: int, start: int = 0) -> bytes:
        """`size` bytes of a file from `start` on, without copying the whole file.

        Raises:
            OSError: the file does not exist or cannot be read.
        """
        if self.remote and not (self.folder / name).exists():
            with self._as_os_error(f"{name} cannot be read"):
                return bytes(self._fs.cat_file(f"{self._root}/{name}", start=start, end=start + size))
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def publish(self, name: str) -> None:
        """Copies a file from `folder` to the shared folder, where others see it whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        if self.remote:
            temporary = f"{self._root}/{uuid.uuid4().hex}.tmp"
            try:
                with self._as_os_error(f"{name} cannot be written"):
                    self._fs.makedirs(self._root, exist_ok=True)
                    self._fs.put_file(str(self.folder / name), temporary)
                    self._fs.mv(temporary, f"{self._root}/{name}")
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(temporary)
                raise

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and publishes it.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(self.folder / name, content)
        self.publish(name)

    def write_once(self, name: str, content: bytes) -> None:
        """`write`, unless the file is in `folder` already."""
        if not (self.folder / name).is_file():
            self.write(name, content)

    def remove(self, name: str) -> None:
        """Deletes a file in `folder` and in the shared folder. Does nothing if it does not exist."""
        (self.folder / name).unlink(missing_ok=True)
        if self.remote:
            with suppress(OSError), self._as_os_error(f"{name} cannot be deleted"):
                self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _as_os_error(self, what: str) -> Iterator[None]:
        """Turns the errors of any file system into OSError, with the place."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{what} ({type(error).__name__}: {str(error).partition(chr(10))[0]})", self.shown) from error
