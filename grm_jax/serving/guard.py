"""What every request passes before a route sees it, and what every reply carries.

    Host  ►  token  ►  size and time of the body  ►  JSON: UTF-8, nesting  ►  route
                                                                               ▲
                         client hangs up ───────────────────── cancels ────────┘

Plain ASGI, so that it holds for all routes, those of the wire protocols included. What it refuses
is a 4xx with a reason. A body that is too large or too slow is answered before it is there; what
its client still writes is thrown away for a while, then the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from grm_jax.serving.limits import Limits
from grm_jax.serving.metrics import RequestMetrics
from grm_jax.serving.replies import error_body

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Without a token: whether the server is there, and the page, which asks for the token itself.
PUBLIC = ("/", "/health", "/ready", "/openapi.json")
PUBLIC_FOLDER = "/page/"
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
# So much of a refused body is thrown away, so that its client comes to read the reply: a connection
# that is closed with bytes unread is reset, and the reply is lost with it.
DISCARDED_BYTES = 64 * 2**20
DISCARDING_SECONDS = 5.0
_HUNG_UP = 499  # in logs and metrics, as nginx has it; nobody is there to read it
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")


class _Refused(Exception):
    """unread: the client may still be writing the body; its connection is closed."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *headers: tuple[bytes, bytes],
        unread: bool = False,
    ):
        super().__init__(message)
        self.status, self.kind, self.headers, self.unread = status, kind, headers, unread


class _HungUp(Exception):
    pass


class Guard:
    """ASGI middleware; see above.

    Args:
      token: what clients must send as `Authorization: Bearer ...`; None: nothing.
      hosts: the names that a request may address the server by; None: any. With the loopback's
        names alone, no page of another site can reach a server on this machine by a name that its
        owner points here (DNS rebinding).
      body_seconds: until a body must be there.
      log_texts: log bodies, too.
    """

    def __init__(
        self,
        app: Any,
        *,
        limits: Limits,
        metrics: RequestMetrics,
        token: str | None = None,
        hosts: Collection[str] | None = None,
        body_seconds: float = 30.0,
        log_texts: bool = False,
    ):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.token = None if token is None else token.encode()
        self.hosts = hosts
        self.body_seconds = body_seconds
        self.log_texts = log_texts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        started = time.perf_counter()
        status, body = 0, b""

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message.get("headers", ())}
                added = [(name, value) for name, value in HEADERS if name not in own]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            self._check_head(scope)
            body = await self._read(scope, receive)
            if body:
                self._check_json(scope, body)
            await self._run(scope, body, receive, reply)
        except _Refused as refused:
            status = refused.status
            await _send_error(reply, refused, receive)
        except _HungUp:
            status = _HUNG_UP
        finally:
            seconds = time.perf_counter() - started
            self.metrics.add(scope, status, seconds)
            self._log(scope, status or 500, seconds, body)

    def _check_head(self, scope: Message) -> None:
        headers = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = re.sub(r":\d*\Z", "", host)
            if name not in self.hosts:
                raise _Refused(
                    403, "forbidden",
                    f"this server does not answer to the name {name!r:.80}; it does to "
                    f"{', '.join(self.hosts)}, and to others with --hosts",
                )  # fmt: skip
        if self.token is None or _public(scope["path"]):
            return
        given = headers.get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        right = hmac.compare_digest(token.strip(), self.token)
        if scheme.lower() != b"bearer" or not right:
            raise _Refused(
                401, "unauthorized", "send the server's token: Authorization: Bearer TOKEN",
                (b"www-authenticate", b"Bearer"),
            )  # fmt: skip

    async def _read(self, scope: Message, receive: Receive) -> bytes:
        """The whole body."""
        most = self.limits.body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = _Refused(
            413,
            "too_large",
            f"the body has more than {most:,} bytes, the most that is read",
            unread=True,
        )
        if int(said) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise _Refused(
                408,
                "timeout",
                f"the body was not there within {self.body_seconds:g} seconds",
                unread=True,
            ) from None

    def _check_json(self, scope: Message, body: bytes) -> None:
        headers = dict(scope["headers"])
        kind, *parameters = headers.get(b"content-type", b"").decode("latin-1").lower().split(";")
        charset = [part.strip() for part in parameters if "charset" in part]
        if kind.strip() != "application/json" or charset not in ([], ["charset=utf-8"]):
            raise _Refused(
                415, "unsupported_media_type", "send JSON in UTF-8: Content-Type: application/json"
            )
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _Refused(415, "unsupported_media_type", "send the body without compression")
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Refused(
                400, "invalid_json", f"the body is not UTF-8 at byte {error.start}"
            ) from None
        if not shallow(body, self.limits.depth):
            raise _Refused(
                400, "invalid_json",
                f"lists and objects are nested more than {self.limits.depth} deep, or not closed",
            )  # fmt: skip
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except ValueError as error:  # json.JSONDecodeError, and integers of thousands of digits
            raise _Refused(400, "invalid_json", f"the body is not JSON: {error}") from None
        if b"\\u" in body:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise _Refused(
                    400, "invalid_json",
                    "the body has a lone surrogate (\\ud800 to \\udfff): half of a cut emoji is "
                    "not text; remove it, or restore the pair",
                ) from None  # fmt: skip

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """The route, until it has replied or its client has hung up."""
        gone = asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        route = asyncio.ensure_future(self.app(scope, replay, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((route, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not route.done():
                gone.set()
                route.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await route
                raise _HungUp
            await route
        finally:
            route.cancel()
            watcher.cancel()

    def _log(self, scope: Message, status: int, seconds: float, body: bytes) -> None:
        client = (scope.get("client") or ("?",))[0]
        texts = f" {body.decode(errors='replace')!r}" if self.log_texts and body else ""
        log.info(
            "%s %s %s %d %.3f s, %d bytes%s",
            client, scope["method"], ascii(scope["path"])[1:-1][:200], status, seconds, len(body),
            texts,
        )  # fmt: skip


def shallow(body: bytes, depth: int) -> bool:
    """Whether lists and objects of JSON are closed (by either bracket), nested at most so deep.

    A parser that calls itself would run out of stack; here each pass takes off the innermost level.

    >>> shallow(b'{"a": [1, "]]"]}', 2), shallow(b"[[[]]]", 2), shallow(b"[", 9)
    (True, False, False)
    """
    brackets = _STRING.sub(b"", body).translate(_ALIKE, _NOT_BRACKETS)
    for _ in range(depth):
        brackets = brackets.replace(b"[]", b"")
    return not brackets


def _public(path: str) -> bool:
    return path in PUBLIC or path.startswith(PUBLIC_FOLDER)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


async def _send_error(send: Send, refused: _Refused, receive: Receive) -> None:
    body = json.dumps(error_body(refused.kind, str(refused))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *refused.headers,
    ]
    if refused.unread:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": refused.unread})
    if refused.unread:
        await _discard(receive)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Throw away the rest of a body, until it ends, or it is too much or takes too long."""
    left = DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDING_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
