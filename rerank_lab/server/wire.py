"""How a request may be written: its target, the encoding of its body, the web page that it comes from."""

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

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*", re.IGNORECASE)
PIECE = 1 << 16  # bytes that come out of a compressed body at once
FREE, FOLDS = 1 << 20, 100  # bytes of a compressed body whatever they came from, and how many times what came it may hold beyond; texts are a tenth of that
MEMBERS = 1000  # gzip files that one body may consist of; each costs time, however little it holds
GZIP_WITH_HEADER = 16 + zlib.MAX_WBITS


def route(path: str, prefix: str, routes: Collection[str]) -> str:
    """A path as the routes have it.

    Args:
        path: as it came: with a proxy's prefix, behind the server's own address, with slashes too many, or plain.
        prefix: what a proxy may leave in front.
        routes: a path that stands here is taken as it is, even where it begins like the prefix.
    """
    if not path.startswith("/"):
        address = ADDRESS.match(path)
        if address is None:
            return path
        path = path[address.end() :]
    path = "/" + "/".join(filter(None, path.split("/")))
    if path in routes or not f"{path}/".startswith(f"{prefix}/"):
        return path
    return path[len(prefix) :] or "/"


def encoding(headers: Headers) -> str:
    """How a body is encoded: "gzip", or "" for not at all.

    Raises:
        Refusal: 415, another encoding, or several.
    """
    named = ", ".join(headers.getlist("content-encoding")).strip().lower()
    if named in ("", "identity"):
        return ""
    if named in ("gzip", "x-gzip"):
        return "gzip"
    raise Refusal(415, "Content-Encoding may be gzip or identity, one of them and once.", {"Accept-Encoding": "gzip, identity"})


class Gunzip:
    """Decodes a gzip body in small pieces, so that whoever takes them can stop long before a small body has become a huge one."""

    def __init__(self) -> None:
        self._member, self._members = zlib.decompressobj(GZIP_WITH_HEADER), 1

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What this part of the body holds.

        Raises:
            Refusal: 422, it is no gzip.
        """
        while data:
            if self._member.eof:
                self._member, self._members = zlib.decompressobj(GZIP_WITH_HEADER), self._members + 1
                if self._members > MEMBERS:
                    raise invalid([], f"Input should be at most {MEMBERS} gzip members", "gzip_invalid")
            try:
                piece = self._member.decompress(data, PIECE)
            except zlib.error:
                raise invalid([], "Input should be valid gzip, as its Content-Encoding says", "gzip_invalid") from None
            data = self._member.unconsumed_tail or self._member.unused_data
            if piece:
                yield piece

    def end(self) -> None:
        """Refuses a body that stopped halfway.

        Raises:
            Refusal: 422.
        """
        if not self._member.eof:
            raise invalid([], "Input should be whole gzip, and ends too early", "gzip_invalid")


class Origins(CORSMiddleware):
    """Lets web pages of these origins ask, with a key in a header and never with cookies.

    Args:
        app: what answers.
        origins: as browsers send them; * for all.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        exposed = ("X-Request-ID", "Server-Timing", "Retry-After", "WWW-Authenticate")
        methods = ("GET", "HEAD", "POST")
        super().__init__(app, origins, methods, ("*",), expose_headers=exposed)
        self.allow_private_network = True  # a public page may ask a server at home, where its origin is named

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks before it sends; a refusal in the contract's shape."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")}
        detail = f"{bytes(response.body).decode()}: --cors-origin says which origins may ask, and they may GET, HEAD and POST."
        return JSONResponse({"detail": detail}, response.status_code, headers)
