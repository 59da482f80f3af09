"""A server's process: from its socket to its exit status. The only file that knows uvicorn.

SIGTERM or Ctrl-C ─► new requests get 503 ─► what runs ends, or its time is over ─► exit
a second one      ─► exit at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from grm_jax import stopping
from grm_jax.errors import UserError
from grm_jax.serving.service import Service

log = logging.getLogger(__name__)
HEAD_SECONDS = 10.0
HEAD_BYTES = 32 * 2**10
_WRITING_SECONDS = 10  # for replies whose request has ended
_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose patience with the head of a request has an end.

    uvicorn waits for ever for a client that sends its head byte by byte, and so any client could
    hold all connections.
    """

    head_seconds = HEAD_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None and not self.transport.is_closing():
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.write(_TIMEOUT)
            self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run` has handlers of its own


def make_server(app: FastAPI, connections: int = 1024) -> uvicorn.Server:
    """A server that is not yet started."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=_WRITING_SECONDS,
    )
    return _Server(config)


def run(
    app: FastAPI,
    service: Service,
    listener: socket.socket,
    *,
    drain_seconds: float,
    connections: int = 1024,
) -> int:
    """Serve until a signal; the exit status.

    Raises UserError for a model that can not be loaded.
    """
    status = asyncio.run(_run(make_server(app, connections), service, listener, drain_seconds))
    if service.working:
        # A thread inside a compiled program can not be ended, and must not see Python go.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


async def _run(
    server: uvicorn.Server, service: Service, listener: socket.socket, drain_seconds: float
) -> int:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if asked.done():
            os._exit(128 + number)
        asked.set_result(number)
        log.info("%s: ending what runs", signal.Signals(number).name)

    for number in stopping.SIGNALS:
        loop.add_signal_handler(number, stop, number)
    service.start()
    opened = asyncio.ensure_future(service.opened())
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        await asyncio.wait((opened, asked, serving), return_when=asyncio.FIRST_COMPLETED)
        if opened.done() and not opened.exception():
            log.info("serving %s at %s", service.served.model, url(listener))
            await asyncio.wait((asked, serving), return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not await service.drain(drain_seconds):
            log.warning("some requests did not end within %g seconds", drain_seconds)
    finally:
        server.should_exit = True
        await serving
        opened.cancel()
    if opened.done() and not opened.cancelled() and (error := opened.exception()):
        if isinstance(error, UserError | OSError):
            raise error
        return 1  # its traceback is in the log
    if not asked.done():
        return 1  # the server ended by itself: its log says why
    return stopping.exit_code(asked.result() == signal.SIGTERM)


def url(listener: socket.socket) -> str:
    """Where clients find the server."""
    host, port = map(str, listener.getsockname()[:2])
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
