"""The routes of the server: bytes in, bytes out. contract.py and clients.py know what the bytes mean."""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import re
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rerank_lab.errors import UserError
from rerank_lab.methods import METHODS, settings_of
from rerank_lab.reranker import Ranking
from rerank_lab.server import clients, contract, openapi, wire
from rerank_lab.server.contract import Call, Refusal
from rerank_lab.server.scheduler import Job
from rerank_lab.server.service import REQUEST, Service, without_message

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("page.html")
POLICY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:;"
    " base-uri {base}; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LINGER = 5.0  # seconds for reading the rest of a body that was refused
SEND_PIECE = 1 << 16  # bytes of an answer that the connection gets at once; the rest waits here until the client has read them
CLIENT_LEFT = 499  # status in logs and metrics if the client has left; nobody receives it

Parse = Callable[[Any], Call]
Render = Callable[[Call, Ranking], bytes]


def create_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application."""
    about = {"title": "rerank_lab", "version": version("rerank_lab"), "description": openapi.description()}
    app = FastAPIOffline(None, None, static_url="/docs-assets", redirect_slashes=False, **about)
    known, prefix = openapi.ServerContract(service), service.settings.prefix

    def post(path: str, parse: Parse, render: Render, name: str) -> None:
        async def route(request: Request) -> Response:
            return await _respond(service, request, parse, render)

        app.post(path, name=name, openapi_extra=known.operation(name), responses=known.responses(name), status_code=200)(route)

    post("/api/v3/inference/reranker", lambda data: _v3(service, data), contract.answer, "rerank_v3")
    post("/v2/rerank", lambda data: clients.read_client(service, data), clients.answer_v2, "rerank_v2")
    post("/v1/rerank", lambda data: clients.read_client(service, data), clients.answer_v1, "rerank_v1")
    post("/rerank", lambda data: clients.read_any(service, data), clients.answer_any, "rerank")

    @app.get("/health", responses=known.responses("health"))
    async def health() -> dict[str, str]:
        """Liveness: the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=known.responses("ready"))
    async def ready() -> dict[str, str]:
        """Readiness: the models are warm and the server is not about to stop."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", responses=known.responses("metrics"), response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        if service.fleet is not None:
            service.metrics.cache_bytes.set(sum(cache.held_bytes for cache in service.fleet.caches.values()))
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/api/v3/models", responses=known.responses("models"))
    async def models() -> JSONResponse:
        """Ids with their roles, dimensions, token limits and score scales."""
        return JSONResponse({"models": service.models()})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = page_text()
        if prefix:  # relative links work even if the page's address lacks its last slash
            text = text.replace("<head>", f'<head>\n<base href="{prefix}/">', 1)
        return HTMLResponse(text, headers={name: value.replace("{base}", "'self'" if prefix else "'none'") for name, value in POLICY.items()})

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        here = "../" if request.scope["raw_path"].endswith(b"/") else ""  # relative, so that it works behind any prefix
        assets = f"{here}docs-assets"
        return get_swagger_ui_html(
            openapi_url=f"{here}openapi.json", title=app.title, swagger_js_url=f"{assets}/swagger-ui-bundle.js", swagger_css_url=f"{assets}/swagger-ui.css",
            swagger_favicon_url=f"{assets}/favicon.png",
        )  # fmt: skip

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"detail": refusal.detail}, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    app.openapi = known.document(app)  # type: ignore[method-assign]
    if prefix in {getattr(route, "path", None) for route in app.routes}:
        raise UserError(f"--root-path {prefix}: the server has a route of that name itself; let the proxy show it elsewhere, such as under {prefix}-server")
    origins = service.settings.origins

    def around(answering: ASGIApp) -> ASGIApp:
        return wire.Origins(answering, origins) if origins else answering

    return ObservingMiddleware(around(app), service, {route.path for route in app.routes if hasattr(route, "path")}, around)


def page_text() -> str:
    """The page for people, with facts about the methods filled in."""
    methods = [
        {"name": name, "about": kind.about, "roles": kind.roles, "optional_cross": kind.optional_cross, "settings": [*settings_of(kind)]}
        for name, kind in METHODS.items()
    ]
    known = {
        "{{count}}": openapi.count_in_words(len(methods), "method"),
        "{{first}}": html.escape(next(iter(METHODS))),
        "{{methods}}": orjson.dumps(methods).decode().replace("<", "\\u003c"),  # no "<", which could end the script element
    }
    text = PAGE.read_text(encoding="utf-8")
    for place, value in known.items():
        text = text.replace(place, value)
    return text


def _v3(service: Service, data: Any) -> Call:
    return contract.validate(contract.RerankRequest, data, service.settings.max_documents).call(data)


async def _respond(service: Service, request: Request, parse: Parse, render: Render) -> Response:
    """Answers a request. The contract gives the order of checks: token, size, schema, ids, roles."""
    started = time.perf_counter()
    service.authorize(request.headers.get("authorization"))
    service.check_ready()
    call = None
    try:
        call, ranking, job = await asyncio.wait_for(_work(service, request, parse), service.settings.timeout)
    except (TimeoutError, asyncio.TimeoutError):
        service.metrics.dropped.labels("deadline").inc()
        raise Refusal(504, f"No answer within {service.settings.timeout:g} s.") from None
    except ClientDisconnect:
        service.metrics.dropped.labels("disconnect").inc()
        return Response(status_code=CLIENT_LEFT)
    finally:
        if call is None:
            _hold(service, request, 0)
    body = render(call, ranking)
    _hold(service, request, max(len(body), request.scope["held"][0]))
    spent = {"queue": job.waiting or 0.0, "model": job.model, "score": job.scoring, "total": time.perf_counter() - started}
    timing = ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in spent.items())
    return Response(body, media_type="application/json", headers={"Server-Timing": timing})


async def _work(service: Service, request: Request, parse: Parse) -> tuple[Call, Ranking, Job]:
    call = parse(contract.read(await _body(service, request)))
    ranking = asyncio.ensure_future(service.rank(call))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({ranking, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not ranking.done():
            raise ClientDisconnect
        return call, *ranking.result()
    finally:
        for task in (ranking, gone):
            task.cancel()
        with contextlib.suppress(BaseException):
            await gone


async def _body(service: Service, request: Request) -> bytes:
    """Reads the body, and refuses it as soon as it is known to be too large."""
    most = service.settings.max_body
    too_large = Refusal(413, f"The body may hold {most} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    gunzip = wire.Gunzip() if wire.encoding(request.headers) else None
    chunks, came, size = [], 0, 0
    async for chunk in request.stream():
        came += len(chunk)
        for piece in (chunk,) if gunzip is None or came > most else gunzip.pieces(chunk):
            size += len(piece)
            _hold(service, request, size)
            if max(came, size) > most or (gunzip is not None and size > wire.FREE + wire.FOLDS * came):
                raise too_large
            if service.body_bytes > 4 * most:
                service.metrics.dropped.labels("queue_full").inc()
                raise Refusal(429, "Bodies in memory take all that they may; try again later.", {"Retry-After": "1"})
            chunks.append(piece)
    if gunzip is not None:
        gunzip.end()
    return b"".join(chunks)


def _hold(service: Service, request: Request, size: int) -> None:
    """Counts the bytes that a request holds in memory: first its body, then its answer until the client has read it."""
    held: list[int] = request.scope["held"]
    service.body_bytes += size - held[0]
    held[0] = size


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Unread(Exception):
    """Raised if the client has not read its answer in time."""


class ObservingMiddleware:
    """The outermost middleware. It gives requests their ids, writes a log line and counters for each, and makes sure that each is answered.

    Args:
        app: the routes.
        service: has the counters.
        routes: paths of the routes; requests are counted by them.
        around: wraps an answer that is made here in the same middleware as the routes.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: set[str], around: Callable[[ASGIApp], ASGIApp]):
        self.app, self.service, self.routes, self.around = app, service, routes, around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, started, status, unread, whole = self.service, time.perf_counter(), 0, True, False
        named = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = named if re.fullmatch(rb"[!-~]{1,128}", named) else uuid.uuid4().hex.encode()

        async def reading() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body"))
            return message

        async def observed(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                await send(message)
                return
            try:
                await asyncio.wait_for(self._pieces(scope, send, message), service.settings.timeout)
            except (TimeoutError, asyncio.TimeoutError):
                raise Unread from None
            if not message.get("more_body"):
                whole = True
                if unread and scope["method"] == "POST" and service.state != "draining":
                    # If the connection were closed while the client still sends, the answer would be lost.
                    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(self._discard(reading), LINGER)
                await send({"type": "http.response.body", "body": b""})

        REQUEST.set(request_id.decode())
        scope["held"], prefix, path = [0], service.settings.prefix, scope["path"]
        if path not in self.routes:
            path = wire.route(path, prefix, self.routes)
        # Routes see HEAD as GET. The connection's own scope still says HEAD, so it does not send the body.
        scope_of_route = {**scope, "root_path": prefix, "path": prefix + path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        counts = int(service.state != "draining")  # later requests are refused, and the shutdown does not wait for them
        service.in_flight += counts
        try:
            await self.app(scope_of_route, reading, observed)
        except Unread:
            service.metrics.dropped.labels("deadline").inc()
            log.warning("request %s: its answer was not read within %g s", request_id.decode(), service.settings.timeout)
            scope["state"]["transport"].abort()
            await asyncio.sleep(0)  # lets uvicorn notice
        except asyncio.CancelledError:  # the server was told twice to stop
            service.cut += not whole
            if not status:
                await self.around(JSONResponse({"detail": "The server stops."}, 503, {"Retry-After": "5"}))(scope, reading, observed)
        except Exception as error:  # noqa: BLE001 - every request gets an answer
            log.error("request %s failed: %s", request_id.decode(), without_message(error))
            if not status:
                await self.around(JSONResponse({"detail": "The server failed; its log says why."}, 500))(scope, reading, observed)
        finally:
            service.in_flight -= counts
            service.body_bytes -= scope["held"][0]
            route = path if path in self.routes else "other"
            seconds = time.perf_counter() - started
            service.metrics.requests.labels(route, str(status)).inc()
            service.metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s %d %.1f ms request %s", scope["method"], route, status, 1000 * seconds, request_id.decode())

    @staticmethod
    async def _pieces(scope: Scope, send: Send, message: Message) -> None:
        """Sends a part of an answer in pieces, each when the client has read most of the earlier ones. Returns when the last one has been sent."""
        body, transport = message.get("body", b""), scope["state"]["transport"]
        for start in range(0, len(body), SEND_PIECE):
            await send({"type": "http.response.body", "body": body[start : start + SEND_PIECE], "more_body": True})
        while transport.get_write_buffer_size() and not transport.is_closing():
            await asyncio.sleep(0.02)

    @staticmethod
    async def _discard(receive: Receive) -> None:
        while (await receive()).get("more_body"):
            pass
