"""What a connection may do before, between and after requests: it may be silent, send something that is not HTTP, or leave."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import h11
import orjson
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol


def guarded(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's h11 protocol with two changes: the time for a request's head is bounded, and a 400 has the contract's form.

    A request finds its connection in its state, under `transport`.

    Args:
        seconds: the most time from the start of the connection, or from the first byte of a later request, to the end of the head.
    """

    class Guarded(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, "transport": transport}
            self._late = self.loop.call_later(seconds, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            behind = len(self.conn.trailing_data[0])
            if self.conn.their_state is not h11.IDLE:
                self._in_time()
                if self.conn.their_state is h11.DONE and behind < HIGH_WATER_LIMIT:
                    self.flow.resume_reading()  # uvicorn stops reading after a request, and would not notice that its client leaves
            elif self._late is None and (behind or self.timeout_keep_alive_task is None) and not self.transport.is_closing():
                self._late = self.loop.call_later(seconds, self.transport.abort)

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                self.transport.abort()
                return
            body = orjson.dumps({"detail": msg})
            head = ["HTTP/1.1 400 Bad Request", "Content-Type: application/json", f"Content-Length: {len(body)}"]
            head += [f"X-Request-ID: {uuid.uuid4().hex}", "Connection: close", "", ""]
            self.transport.write("\r\n".join(head).encode() + body)
            self.transport.close()

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Guarded
