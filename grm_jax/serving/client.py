"""A client of the server, for any process: no JAX, no FastAPI.

    client = JudgeClient("http://127.0.0.1:8000")
    verdict = client.judge("What is 2+2?", ["4", "5"], k=8)      # a dict, as /v1/judge answers
    verdict = await client.ajudge("What is 2+2?", ["4", "5"], k=8)

What may pass is asked again: a lost connection, 429, 502, 503. Between two tries it waits as long
as the server says (Retry-After), or 0.5, 1, 2, .. 30 seconds with jitter, until the deadline. The
server answers equal requests once, so asking again costs nothing. Any other 4xx or 5xx is raised
at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

_PASSES = (429, 502, 503)
_LONGEST_WAIT = 30.0
_CONNECT_SECONDS = 10.0


class JudgeError(Exception):
    """No verdict. `status`: of the HTTP reply, None where there was none; `kind`: the server's name
    for it."""

    def __init__(self, message: str, status: int | None = None, kind: str = ""):
        super().__init__(message)
        self.status = status
        self.kind = kind

    @property
    def about_setup(self) -> bool:
        """Whether every request would fail like this: a wrong token, path or route."""
        return self.status in (401, 403, 404, 405, 415)


class JudgeRefused(JudgeError):
    """The server does not take the request; the same one is refused again."""


class JudgeUnavailable(JudgeError):
    """The server was not there, was busy, or failed, until the deadline."""


class JudgeClient:
    """Requests verdicts, and asks again where that may help.

    Args:
      url: of the server, such as "http://127.0.0.1:8000".
      token: what the server was started with, if with one.
      timeout: seconds that one verdict may take, all tries together.

    It may be pickled, and used from several threads and event loops.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            url = f"http://{url}"
        self.url = url.rstrip("/")
        self.token = token
        self.timeout = timeout
        self._open: httpx.Client | None = None
        self._open_async: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "token": self.token, "timeout": self.timeout}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["url"], token=state["token"], timeout=state["timeout"])

    def judge(
        self, query: str | Sequence[Any], responses: Sequence[Any], **options: Any
    ) -> dict[str, Any]:
        """The verdict on one query's responses, as JSON.

        Args:
          options: what /v1/judge takes: k, seed, criteria, reference, principles, method, ..

        Raises JudgeRefused, JudgeUnavailable. A verdict without numbers has a `failure`.
        """
        return self.post("/v1/judge", {"query": query, "responses": responses, **options})

    async def ajudge(
        self, query: str | Sequence[Any], responses: Sequence[Any], **options: Any
    ) -> dict[str, Any]:
        """`judge`, without blocking the event loop."""
        return await self.apost("/v1/judge", {"query": query, "responses": responses, **options})

    def rollout(self, query: str | Sequence[Any], response: Any, **options: Any) -> dict[str, Any]:
        """One response's share of its group's verdict; the server puts groups together by prompt.

        Args:
          options: what /v1/rollout takes: group_size, window, scope, and those of `judge`.

        Raises as `judge` does; JudgeRefused also for a judgement that failed.
        """
        return self.post("/v1/rollout", {"query": query, "response": response, **options})

    async def arollout(
        self, query: str | Sequence[Any], response: Any, **options: Any
    ) -> dict[str, Any]:
        """`rollout`, without blocking the event loop."""
        return await self.apost("/v1/rollout", {"query": query, "response": response, **options})

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a route answers."""
        tries = _Tries(self.timeout)
        while True:
            try:
                reply = self._client().post(path, json=tries.body(path, body), timeout=tries.times)
            except httpx.TransportError as error:
                wait = tries.after_error(error)
            else:
                if reply.status_code not in _PASSES:
                    return _read(reply)
                wait = tries.after_reply(reply)
            time.sleep(wait)

    async def apost(self, path: str, body: Mapping[str, Any]) -> Any:
        """`post`, without blocking the event loop."""
        tries = _Tries(self.timeout)
        while True:
            try:
                client = self._async_client()
                reply = await client.post(path, json=tries.body(path, body), timeout=tries.times)
            except httpx.TransportError as error:
                wait = tries.after_error(error)
            else:
                if reply.status_code not in _PASSES:
                    return _read(reply)
                wait = tries.after_reply(reply)
            await asyncio.sleep(wait)

    def close(self) -> None:
        """Close connections. They open again when there is need."""
        if self._open is not None:
            self._open.close()
            self._open = None

    async def aclose(self) -> None:
        """Close this event loop's connections."""
        if self._open_async is not None:
            await self._open_async[1].aclose()
            self._open_async = None

    def _client(self) -> httpx.Client:
        if self._open is None:
            self._open = httpx.Client(**self._settings())
        return self._open

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._open_async is None or self._open_async[0] is not loop:
            self._open_async = loop, httpx.AsyncClient(**self._settings())
        return self._open_async[1]

    def _settings(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return {"base_url": self.url, "headers": headers, "limits": limits}


class _Tries:
    """When to try again, and when to give up."""

    def __init__(self, timeout: float):
        self._ends = time.monotonic() + timeout
        self._timeout = timeout
        self._count = 0

    @property
    def left(self) -> float:
        return max(self._ends - time.monotonic(), 0.001)

    @property
    def times(self) -> httpx.Timeout:
        return httpx.Timeout(self.left, connect=min(self.left, _CONNECT_SECONDS), pool=None)

    def body(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """With the time that is left, so that the server gives up what nobody waits for."""
        name = {"/v1/judge": "deadline", "/v1/rollout": "timeout"}.get(path)
        return {**({} if name is None else {name: round(self.left, 3)}), **body}

    def after_error(self, error: httpx.TransportError) -> float:
        """Seconds to wait after a lost connection. Raises JudgeUnavailable."""
        what = f"{type(error).__name__} {error}".strip()
        if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)):
            raise JudgeUnavailable(f"no verdict within {self._timeout:g} s ({what})") from error
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError)):
            raise JudgeUnavailable(what, 404) from error
        return self._wait(what, None, None, "")

    def after_reply(self, reply: httpx.Response) -> float:
        """Seconds to wait after a reply that may pass. Raises JudgeUnavailable."""
        kind, message = _error(reply)
        try:
            said = float(reply.headers.get("retry-after", ""))
        except ValueError:
            said = None
        return self._wait(message, said, reply.status_code, kind)

    def _wait(self, what: str, said: float | None, status: int | None, kind: str) -> float:
        wait = min(0.5 * 2**self._count, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
        wait = max(wait, said or 0.0)
        self._count += 1
        if time.monotonic() + wait >= self._ends:
            raise JudgeUnavailable(
                f"no verdict within {self._timeout:g} s and {self._count} tries; the last: {what}",
                status, kind,
            )  # fmt: skip
        return wait


def _read(reply: httpx.Response) -> Any:
    if reply.is_success:
        return reply.json()
    kind, message = _error(reply)
    refused = 400 <= reply.status_code < 500
    raise (JudgeRefused if refused else JudgeUnavailable)(message, reply.status_code, kind)


def _error(reply: httpx.Response) -> tuple[str, str]:
    """(kind, message) of an error."""
    try:
        error = reply.json()["error"]
        return str(error["type"]), f"{reply.status_code}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return "", f"{reply.status_code}: {reply.text[:200]}"
