"""What a connection may do before a request has begun: be silent, or send what is no HTTP."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson
from uvicorn.protocols.http.auto import AutoHTTPProtocol


def guarded(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, whose connections are closed where the head of a request is not there in time, and whose 400 is the contract's.

    Requests find in their state, under `abort`, what ends their connection with all that has not been sent.

    Args:
        seconds: that a head may take; it may have twice as many where another request was before it.
    """

    class Guarded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state: dict[str, Any] = {**self.app_state, "abort": transport.abort}
            self._look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            body = orjson.dumps({"detail": msg})
            head = ["HTTP/1.1 400 Bad Request", "Content-Type: application/json", f"Content-Length: {len(body)}"]
            head += [f"X-Request-ID: {uuid.uuid4().hex}", "Connection: close", "", ""]
            self.transport.write("\r\n".join(head).encode() + body)
            self.transport.close()

        def _look_again(self) -> None:
            self._watch = self.loop.call_later(seconds, self._look, self.cycle)

        def _look(self, before: Any) -> None:
            """Ends what has stood still since the last look; what is idle after an answer has uvicorn's timer."""
            idle = self.cycle is None or self.cycle.response_complete
            if self.cycle is before and idle and self.timeout_keep_alive_task is None:
                self.transport.abort()
            else:
                self._look_again()

    return Guarded
