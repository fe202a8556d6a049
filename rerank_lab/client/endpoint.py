"""The client of a server that speaks the v3 reranker API. An evaluation uses it as one more row; replay uses it too."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from rerank_lab.client.v3 import KEY, TIMEOUT, V3
from rerank_lab.datasets.runs import LARGEST_SCORE
from rerank_lab.errors import ModelError, UserError
from rerank_lab.methods import Method
from rerank_lab.methods.pool import Flops
from rerank_lab.reranker import Ranking

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)
URL_PATTERN = r"(?P<address>https?://(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?(?:/[\w.~%+/-]*)?)"
PATIENCE, PAUSE = 60.0, 0.5
MOST_LEVELS = 100  # an answer with more levels is not taken for JSON: comparing and printing recurse
RESUME_HINT = "the same command with --resume goes on from here"


class NoAnswer(ModelError):
    """No answer came: no connection, a connection that broke, or a time-out."""


def check_address(url: str, place: str) -> str:
    """Checks the address of a server. Returns it without a slash at its end.

    Args:
        url: http(s)://host:port, with a path if the server is behind one.
        place: the argument or option that gave it, for the message.

    Raises:
        UserError: it is not an address. The message does not repeat an address that may hold a password.
    """
    found = re.fullmatch(URL_PATTERN, url)
    if found is None or int(found["port"] or 0) > 65535:
        raise UserError(address_wanted(url, place))
    return url.rstrip("/")


def address_wanted(url: str, place: str) -> str:
    """The error message about a wrong address."""
    if is_secret(url):
        return f"{place}: an address is http(s)://host:port[/path], without user, query or fragment; the key comes from {KEY}"
    return f"{place}: {url!r} is no http(s)://host:port[/path]"


def is_secret(url: str) -> bool:
    """Whether an address may hold a password or a key."""
    return any(character in url for character in "@?#")


def key_from(*names: str) -> str | None:
    """The key in the first of these environment variables that is set; None: none is set.

    Raises:
        UserError: no header can carry the key. The message does not repeat it.
    """
    for name in names:
        if key := os.environ.get(name, "").strip():
            if not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(f"{name} holds white space or characters beyond ASCII, which no header carries")
            return key
    return None


class RemoteServer:
    """A server that is asked over HTTP. Connections are kept alive, and threads may share it.

    Args:
        url: as check_address returns it.
        key: sent as `Authorization: Bearer` and removed from every message; None: no key is sent.
        timeout: the most seconds for connecting, and between two bytes.
        patience: the most seconds that one request may wait after 429 and 503.

    Raises:
        UserError: httpx is not installed, or it does not accept the address.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = TIMEOUT, patience: float = PATIENCE):
        try:
            import httpx
        except ImportError:
            raise UserError("asking a server needs httpx: pip install 'rerank_lab[server]'") from None
        self.url, self.patience, self._key, self._waited = url, patience, key, False
        self._dropped, self._failed = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError), httpx.HTTPError
        self._invalid = httpx.InvalidURL
        local = re.match(r"https?://(127\.[\d.]+|localhost|\[::1\])(:|/|$)", url) is not None
        try:
            self.client = httpx.Client(
                headers={"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"}),
                timeout=timeout,
                limits=httpx.Limits(max_connections=None, keepalive_expiry=30),
                trust_env=not local,  # a proxy cannot reach this machine's loopback
            )
            httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{url}: {error}") from None

    def post(self, path: str, body: Any) -> httpx.Response:
        """Sends JSON and waits for the answer, of any status.

        If a connection breaks, the request is sent once more, because a server may close an idle connection at any time.
        After 429 and 503 the request is repeated: after the time in Retry-After (at least PAUSE), or after PAUSE seconds, twice as long
        each time. If that would take more than `patience` seconds in all, the answer is returned.

        Raises:
            NoAnswer: no answer came; the message says why. UserError: no address can have this path.
        """
        content = json.dumps(body).encode()  # ASCII, so that half of a surrogate pair is sent as it was recorded
        waited, pause, again = 0.0, PAUSE, True
        while True:
            try:
                answer = self.client.post(self.url + path, content=content)
            except self._failed as error:
                if again and isinstance(error, self._dropped):
                    again = False
                    continue
                raise NoAnswer(f"{self.url} does not answer: {self.clean(str(error)) or type(error).__name__}") from None
            except self._invalid as error:
                raise UserError(f"path {self.clean(path)!r}: {error}") from None
            if answer.status_code not in (429, 503):
                return answer
            told = retry_after(answer.headers.get("retry-after"))
            wait = pause if told is None else max(told, PAUSE)
            if waited + wait > self.patience:
                return answer
            if not self._waited:
                self._waited = True
                log.warning("%s answers %d: asked again, for at most %g s a request; its times include that", self.url, answer.status_code, self.patience)
            time.sleep(wait)
            waited, pause = waited + wait, 2 * pause

    def body(self, answer: httpx.Response) -> Any:
        """The JSON of an answer, or its text if it is not JSON. The key is removed from errors, in case the server repeats it."""
        text = answer.content.decode("utf-8", "replace")  # JSON is always UTF-8; a charset in the header may be wrong
        if self._key and answer.status_code != 200:
            text = text.replace(self._key, "(the key)")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return found if _shallow(found) else text

    def error_text(self, answer: httpx.Response) -> str:
        """The message in the body of an error, as one line of at most 300 characters."""
        body = self.body(answer)
        detail = body.get("detail", body) if isinstance(body, dict) else body
        if isinstance(detail, list) and all(isinstance(e, dict) and isinstance(e.get("loc"), list) for e in detail):
            detail = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e.get('msg')}" for e in detail)
        return self.clean(detail if isinstance(detail, str) else json.dumps(detail)) or "nothing"

    def clean(self, text: str) -> str:
        """Makes a server's text one short line, without the key and without control characters."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        text = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
        return text if len(text) <= 300 else f"{text[:299]}…"

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [child for x in level if isinstance(x, (dict, list)) for child in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return True
    return False


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None: the header is missing, wrong or in the past."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if seconds > 0 else None


class Endpoint:
    """A method that a v3 server runs, in place of a Reranker in an evaluation.

    The server does not tell FLOPs, phases, memory, truncated documents and raw scores. So a Ranking has no phases, FLOPs of 0 that
    mean nothing, and relevance scores in place of raw ones.

    Args:
        url: as check_address returns it.
        method: its name and its stage1_top_k are sent.
        model: sent as `model`. The method standard does not use it, but v3 requires it.
        model_cross: sent as `model_cross`; None: not sent.
        max_tokens_per_doc: sent as such.
        key, timeout, patience: see RemoteServer.
    """

    # Limits and caches of the server's models are unknown here.
    uses_cache, token_limit = False, None

    def __init__(
        self, url: str, method: Method, *, model: str, model_cross: str | None = None, max_tokens_per_doc: int = 512,
        key: str | None = None, timeout: float = TIMEOUT, patience: float = PATIENCE,
    ):  # fmt: skip
        self.method, self.server = method, RemoteServer(url, key, timeout=timeout, patience=patience)
        self.fixed = {"model": model, "method": method.name} | sent_settings(method, max_tokens_per_doc)
        self.fixed |= {} if model_cross is None else {"model_cross": model_cross}

    def check(self) -> None:
        """Sends one tiny request, so that errors show before anything is encoded.

        Raises:
            UserError: no server answers there. UserError and ModelError: as for `score`.
        """
        try:
            self.score("dot product of two arrays", ["Inner product of two vectors."])
        except NoAnswer as error:
            raise UserError(f"{error}; start the server or correct the address") from None

    def score(self, query: str, texts: Sequence[str], *, first_stage: Sequence[float] | None = None) -> Ranking:
        """Asks the server for a ranking and keeps its order; first_stage is not used.

        Raises:
            UserError: status 401, 403, 404, 413 or 422: key, address, model or request are wrong. The message has the server's own.
            ModelError: no answer, another status, or an answer that is no v3 ranking of these documents.
        """
        try:
            answer = self.server.post(V3, self.fixed | {"query": query, "documents": list(texts)})
        except NoAnswer as error:
            raise NoAnswer(f"{error}; {RESUME_HINT}") from None
        if answer.status_code != 200:
            self._refused(answer)
        found = self._read(answer, len(texts))
        scores = torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")
        return Ranking(list(found), scores.float(), scores, {}, Flops(), 0)

    def close(self) -> None:
        """Closes the connections."""
        self.server.close()

    def _refused(self, answer: httpx.Response) -> NoReturn:
        status, model, cross = answer.status_code, self.fixed["model"], self.fixed.get("model_cross")
        remedies = {
            401: f"put its key into {KEY}",
            403: f"put a key that may do this into {KEY}",
            404: f"the address is what stands before {V3}, and the server must know {model!r}" + (f" and {cross!r}" if cross else ""),
            413: "fewer or shorter documents (--top-k), or a server that takes more",
            422: "the server takes other requests than v3's, or fewer documents (--top-k)",
        }
        said = f"{self.server.url} answers {status} to method {self.method.name}: {self.server.error_text(answer)}"
        if status in remedies:
            raise UserError(f"{said}; {remedies[status]}")
        if "location" in answer.headers:
            raise UserError(f"{said}; it sends on to {self.server.clean(answer.headers['location'])}: give the address that answers itself")
        waited = f"; asked again for {self.server.patience:g} s at most" if status in (429, 503) else ""
        raise ModelError(f"{said}{waited}; {RESUME_HINT}")

    def _read(self, answer: httpx.Response, count: int) -> dict[int, float]:
        """Index → relevance score, in the server's order. Raises ModelError unless it is a v3 ranking of `count` documents."""
        body = self.server.body(answer)
        if isinstance(body, str):
            self._broken(f"no JSON but {self.server.clean(body)[:60]!r}")
        results, meta = (body.get("results"), body.get("meta")) if isinstance(body, dict) else (None, None)
        if not isinstance(results, list):
            self._broken("no list under 'results'")
        if isinstance(meta, dict) and meta.get("method", self.method.name) != self.method.name:
            self._broken(f"meta.method {self.server.clean(repr(meta['method']))}")
        found: dict[int, float] = {}
        last = math.inf
        for place, result in enumerate(results):
            index, score = (result.get("index"), result.get("relevance_score")) if isinstance(result, dict) else (None, None)
            where = f"results[{place}]"
            if type(index) is not int or not 0 <= index < count:
                self._broken(f"{where}.index {self.server.clean(repr(index))}, where 0 to {count - 1} were sent")
            if index in found:
                self._broken(f"{where}.index {index}, which stands there twice")
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= LARGEST_SCORE:
                self._broken(f"{where}.relevance_score {self.server.clean(repr(score))}, which is no finite number")
            if score > last:
                self._broken(f"{where} above {last!r}, the score before it, with {score!r}")
            found[index] = last = float(score)
        due = min(count, self.fixed.get("stage1_top_k", count))
        if len(found) != due:
            missing = [i for i in range(count) if i not in found]
            which = f"; missing: {', '.join(map(str, missing[:5]))}{' …' if len(missing) > 5 else ''}" if due == count else ""
            self._broken(f"{len(found)} results where {due} are due{which}")
        return found

    def _broken(self, what: str) -> NoReturn:
        raise ModelError(f"{self.server.url} answers method {self.method.name} with {what}; that is no v3 ranking, so there is nothing to evaluate")


def sent_settings(method: Method, max_tokens_per_doc: int) -> dict[str, Any]:
    """The settings that a v3 request can carry: the token limit, and stage1_top_k if the method has it."""
    return {k: v for k, v in method.settings().items() if k == "stage1_top_k"} | {"max_tokens_per_doc": max_tokens_per_doc}
