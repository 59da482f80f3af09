"""A service with a fake session: on the test's own event loop, or behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import httpx
from fakes import FakeSession, running

from grm_jax.serving.app import create_app
from grm_jax.serving.running import make_server
from grm_jax.serving.service import Service

_OF_THE_SERVICE = ("limits", "defaults", "cache")


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def with_service():
    """(session, scenario, **options) -> what the coroutine `scenario(service)` returns."""

    def run(
        session: FakeSession, scenario: Callable[[Service], Awaitable[Any]], **options: Any
    ) -> Any:
        async def main() -> Any:
            async with running(session, **options) as service:
                return await asyncio.wait_for(scenario(service), 20)

        return asyncio.run(main())

    return run


@contextlib.contextmanager
def serving(service: Service, **options: Any) -> Iterator[httpx.Client]:
    """A client of a real server on a free port, in a thread; it is stopped at the end."""
    server = make_server(create_app(service, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=120) as client:
                while not service.ready:
                    assert thread.is_alive() and service.alive, "the server did not start"
                    time.sleep(0.002)
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def served(session: FakeSession, **options: Any) -> Iterator[httpx.Client]:
    """The same with a fake session."""
    own = {name: options.pop(name) for name in _OF_THE_SERVICE if name in options}
    with serving(Service(session.open, **own), **options) as client:
        try:
            yield client
        finally:
            session.gate.set()


@pytest.fixture
def serve():
    """(session, **options of the service and of the app) -> a client of a server."""
    with contextlib.ExitStack() as stack:
        yield lambda session, **options: stack.enter_context(served(session, **options))


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeSession, httpx.Client]]:
    """A session and a client of its server, for a module's tests that need no other options."""
    session = FakeSession()
    with served(session, cache=0) as client:
        yield session, client


@pytest.fixture
def client(session, serve) -> httpx.Client:
    return serve(session)
