"""A service with a fake session, on the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from fakes import FakeSession, running

from grm_jax.serving.service import Service


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
