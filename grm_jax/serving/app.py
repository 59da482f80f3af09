"""The FastAPI application of a `Service`: native routes, wire protocols, the page, errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse

import grm_jax
from grm_jax.serving import native, protocols
from grm_jax.serving.groups import GroupOptions, Groups
from grm_jax.serving.guard import Guard
from grm_jax.serving.metrics import RequestMetrics
from grm_jax.serving.replies import handle_errors
from grm_jax.serving.service import Service

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
}


def create_app(
    service: Service,
    *,
    groups: GroupOptions = GroupOptions(),
    token: str | None = None,
    hosts: Collection[str] | None = None,
    body_seconds: float = 30.0,
    log_texts: bool = False,
    drain_seconds: float = 0.0,
) -> FastAPI:
    """The application. It starts the service, and drains it at the end if nobody did before.

    Args:
      groups: how rollouts that arrive alone are put together.
      token, hosts, body_seconds, log_texts: see `Guard`.
      drain_seconds: how long what runs may take at the end.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.start()
        yield
        await service.drain(drain_seconds)

    app = FastAPI(
        title="grm_jax",
        summary="A generative reward model that judges any number of responses to a query",
        version=grm_jax.__version__,
        lifespan=lifespan,
        docs_url=None,  # its scripts come from another server
        redoc_url=None,
        redirect_slashes=False,
    )
    coalesced = Groups(service.judge, groups, most=service.limits.responses)
    metrics = RequestMetrics(service, coalesced)
    app.include_router(native.router(service, metrics), tags=["native"])
    for router in protocols.routers(service, coalesced):
        app.include_router(router)
    app.include_router(_page())
    handle_errors(app)
    app.add_middleware(
        Guard,
        limits=service.limits,
        metrics=metrics,
        token=token,
        hosts=hosts,
        body_seconds=body_seconds,
        log_texts=log_texts,
    )
    return app


def _page() -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    def file(name: str, kind: str) -> FileResponse:
        return FileResponse(PAGE / name, media_type=kind, headers=PAGE_HEADERS)

    @routes.get("/")
    async def page() -> FileResponse:
        return file("index.html", "text/html")

    for name, kind in PAGE_FILES.items():
        routes.add_api_route(
            f"/page/{name}", lambda name=name, kind=kind: file(name, kind), methods=["GET"]
        )
    return routes
