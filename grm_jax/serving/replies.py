"""Errors as JSON, the same for every route: {"error": {"type", "message", "field"?}}.

OpenAI's clients read the same two fields.
"""

from __future__ import annotations

import http
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from grm_jax.data.rows import DataError
from grm_jax.errors import UserError
from grm_jax.serving.problems import ServiceProblem

INVALID = "invalid_request_error"
_NAME = re.compile(r"(?!(?:str|int|float|bool|dict)\Z)(?:[A-Za-z_]\w*|\d+)", re.ASCII)


def error_body(kind: str, message: str, field: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    said = {"type": kind, "message": message}
    return {"error": said | ({"field": field} if field else {})}


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a user's mistake or a service's problem."""
    if isinstance(error, ServiceProblem):
        return error.status, error_body(error.kind, str(error))
    field = error.field if isinstance(error, DataError) else None
    return 400, error_body(INVALID, str(error), field)


def handle_errors(app: FastAPI) -> None:
    """Make the application answer errors in this form."""

    @app.exception_handler(UserError)
    @app.exception_handler(ServiceProblem)
    async def known(request: Request, error: Exception) -> JSONResponse:
        del request
        status, body = error_of(error)
        after = getattr(error, "retry_after", None)
        return JSONResponse(body, status, {} if after is None else {"Retry-After": str(after)})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        field, message = _first(error.errors())
        return JSONResponse(error_body(INVALID, message, field), 422)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        kind = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message = str(error.detail)
        if error.status_code == 404:
            message = "no such path; /openapi.json lists them"
        elif error.status_code == 405:
            message = f"{request.method} is not what this path takes; see /openapi.json"
        return JSONResponse(error_body(kind, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        del request, error  # its traceback is logged by the server
        return JSONResponse(
            error_body("internal_error", "an error of the server; see its log"), 500
        )


def _first(errors: Any) -> tuple[str | None, str]:
    """Field and message of a validation error; without what was sent, which may be long."""
    said: dict[str, list[str]] = {}
    for error in errors:
        # After "body": names and positions, and between them the alternatives of a union.
        place = [str(part) for part in error["loc"][1:] if _NAME.fullmatch(str(part))]
        messages = said.setdefault(".".join(place)[:200], [])
        if error["msg"] not in messages:
            messages.append(error["msg"])
    # Of the alternatives of a union, the ones that found more of it right.
    said = {f: m for f, m in said.items() if not any(o.startswith(f"{f}.") for o in said)}
    shown = [f"{field or 'the body'}: {', or '.join(m[:3])}" for field, m in list(said.items())[:3]]
    more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
    return next(iter(said)) or None, ("; ".join(shown) + more)[:1000]
