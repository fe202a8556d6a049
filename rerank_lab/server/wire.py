"""Forms in which a request may arrive: its target, the encoding of its body, the origin of its web page."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterator

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from rerank_lab.server.contract import Refusal, invalid

ABSOLUTE_FORM = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*", re.IGNORECASE)
GUNZIP_PIECE = 1 << 16  # bytes of a body that are decompressed at once
FREE, FOLDS = 1 << 20, 100  # a body may decompress to FREE bytes, plus FOLDS times its compressed size; texts need a tenth of that
MEMBERS = 1000  # the most gzip members of one body; each costs time, even if it is empty
GZIP_WITH_HEADER = 16 + zlib.MAX_WBITS


def route(path: str, prefix: str, routes: Collection[str]) -> str:
    """Finds the path of a route.

    Args:
        path: as it came: plain, with a proxy's prefix, with the server's own address in front, or with too many slashes.
        prefix: a proxy may leave it in front of the path.
        routes: paths of routes; such a path is returned as it is, even if it begins with the prefix.
    """
    if not path.startswith("/"):
        address = ABSOLUTE_FORM.match(path)
        if address is None:
            return path
        path = path[address.end() :]
    path = "/" + "/".join(filter(None, path.split("/")))
    if path in routes or not f"{path}/".startswith(f"{prefix}/"):
        return path
    return path[len(prefix) :] or "/"


def encoding(headers: Headers) -> str:
    """The encoding of a body: "gzip", or "" for none.

    Raises:
        Refusal: 415, it has another encoding, or several.
    """
    named = ", ".join(headers.getlist("content-encoding")).strip().lower()
    if named in ("", "identity"):
        return ""
    if named in ("gzip", "x-gzip"):
        return "gzip"
    raise Refusal(415, "Content-Encoding may be gzip or identity, one of them and once.", {"Accept-Encoding": "gzip, identity"})


class Gunzip:
    """Decompresses a gzip body in small pieces, so that the caller can stop before a small body becomes a huge one."""

    def __init__(self) -> None:
        self._member, self._members = zlib.decompressobj(GZIP_WITH_HEADER), 1

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Decompresses a part of the body.

        Raises:
            Refusal: 422, it is not gzip, or has too many members.
        """
        while data:
            if self._member.eof:
                self._member, self._members = zlib.decompressobj(GZIP_WITH_HEADER), self._members + 1
                if self._members > MEMBERS:
                    raise invalid([], f"Input should be at most {MEMBERS} gzip members", "gzip_invalid")
            try:
                piece = self._member.decompress(data, GUNZIP_PIECE)
            except zlib.error:
                raise invalid([], "Input should be valid gzip, as its Content-Encoding says", "gzip_invalid") from None
            data = self._member.unconsumed_tail or self._member.unused_data
            if piece:
                yield piece

    def end(self) -> None:
        """Checks that the body is complete.

        Raises:
            Refusal: 422, it ends too early.
        """
        if not self._member.eof:
            raise invalid([], "Input should be whole gzip, and ends too early", "gzip_invalid")


class Origins(CORSMiddleware):
    """Middleware that lets web pages of these origins send requests, with a key in a header and never with cookies.

    Args:
        app: answers requests.
        origins: as browsers send them; * for all.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        exposed = ("X-Request-ID", "Server-Timing", "Retry-After", "WWW-Authenticate")
        methods = ("GET", "HEAD", "POST")
        super().__init__(app, origins, methods, ("*",), expose_headers=exposed)
        self.allow_private_network = True  # a public page may ask a server in a private network if its origin is allowed

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser's preflight request. A refusal has the contract's form."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")}
        detail = f"{bytes(response.body).decode()}: --cors-origin says which origins may ask, and they may GET, HEAD and POST."
        return JSONResponse({"detail": detail}, response.status_code, headers)
