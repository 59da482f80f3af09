"""Serve a judge over HTTP, to any number of clients: their requests are batched together.

    python -m grm_jax.serve --model RUN
    python -m grm_jax.serve --model RUN --meta RUN --scalar RUN --port 5000 --token-file token.txt
    curl localhost:8000/v1/judge -H 'Content-Type: application/json' \\
      -d '{"query": "What is 2 + 3?", "responses": ["5", "6"], "k": 8}'

http://localhost:8000 is a page to paste texts into; /openapi.json lists the routes, /metrics is for
Prometheus. Only this machine can connect unless --host says otherwise. SIGTERM and Ctrl-C stop
taking requests, end those that run, and leave. Exit status: 0 (also when stopped by SIGTERM), 1 for
what can be mended (one line says how), 2 for wrong arguments, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which would be done twice
    from grm_jax.parallel.host import use_huge_pages

    use_huge_pages()

import dataclasses
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from grm_jax import stopping
from grm_jax.errors import UserError, describe
from grm_jax.judge.request import MOST_RESPONSES
from grm_jax.model.options import ComputeDtype
from grm_jax.output import surviving
from grm_jax.parallel.options import MeshConfig
from grm_jax.serving.groups import GroupOptions
from grm_jax.serving.limits import Limits

if TYPE_CHECKING:
    from grm_jax.serving.engine import Session
    from grm_jax.serving.service import Served

log = logging.getLogger("grm_jax")
TOKEN = "GRM_SERVE_TOKEN"
EXTRA = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")
MAX_PROMPT_TOKENS = 8192
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST = {
    "port": 0, "k": 1, "samples": 1, "max_prompt_tokens": 1, "max_new_tokens": 1, "score_tokens": 1,
    "cache": 0, "connections": 1, "at_once": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How a judge is served."""

    model: str | None = None
    """Generative reward model: a run directory, a model directory, a Hugging Face one or a repo id
    of the hub."""
    meta: str | None = None
    """Meta RM that guides the votes."""
    scalar: str | None = None
    """Scalar RM beside it."""
    name: str | None = None
    """What clients call the model. Default: the last part of --model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine. Give a token then."""
    port: int = 8000
    """0: any free one, which the first line names."""
    token_file: Path | None = None
    """File with the token that clients must send as `Authorization: Bearer TOKEN`. Default: what
    the environment variable GRM_SERVE_TOKEN says; without it, none."""
    hosts: tuple[str, ...] = ()
    """Names by which clients may address the server besides localhost. Default: any, unless it
    listens at the loopback alone."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 8
    """Critiques where a request does not say."""
    temperature: float | None = None
    """Of the critiques where a request does not say; default: the judge's own."""
    at_once: int | None = None
    """Most responses that a critique reads where a request does not say; more are dealt into
    groups, anew for each critique. Default: all of them."""
    samples: int = 256
    """Samples that are drawn at once, of all requests together."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt, for which memory is planned. Default: as many as the model's
    positions allow, at most 8192."""
    max_new_tokens: int | None = None
    """Length limit of a critique, in tokens; default: the judge's own, else 1024."""
    expected: bool = False
    """Answer requests for expected scores, too, at the price of some speed for all."""
    limits: Limits = Limits()
    """What one request may ask for."""
    groups: GroupOptions = GroupOptions()
    """How rollouts that clients send one by one are put together."""
    cache: int = 1024
    """Finished answers that are kept for clients that ask the same again; 0: none."""
    connections: int = 1024
    """Connections at once; what comes beyond is answered with status 503."""
    drain: float = 120.0
    """Seconds that running requests get to end when the server is stopped."""
    log_texts: bool = False
    """Log what clients send. Without it no text is logged."""
    mesh: MeshConfig = MeshConfig()
    """How a model uses the devices, as in training: `--mesh.tensor 2` splits it over two."""
    compute_dtype: ComputeDtype = "auto"
    """The dtype that models are computed in. auto: the checkpoint's own, unless it is bfloat16 and
    this is a CPU that is not at least 1.5 times as fast in it."""
    score_tokens: int | None = None
    """Most tokens of critiques that the meta RM scores at once on a device. Default: as many as
    the judge computes of its prompts (8192, or as trained)."""
    warm_up: bool = True
    """Compile the programs that requests need before the server is ready, instead of while its
    first requests wait."""
    openapi: Path | None = None
    """Write the OpenAPI document there, and serve nothing."""


def serve(args: Arguments) -> int:
    """Serve until a signal; the exit status. See `Arguments`.

    Raises UserError and OSError, with a message for the user.
    """
    check(args)
    try:
        from grm_jax.serving.app import create_app
        from grm_jax.serving.running import run
        from grm_jax.serving.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        raise UserError(
            f"the server needs {error.name}, which is not installed: pip install 'grm_jax[serve]'"
        ) from None
    if args.openapi is not None:
        args.openapi.write_text(document(), encoding="utf-8")
        return 0
    token = read_token(args.token_file)
    listener = listen(args.host, args.port)
    with listener:
        # In the main thread, so that what it finds wrong is said before anything is loaded.
        open_session = opener(args)
        service = Service(
            open_session, limits=args.limits, defaults=defaults(args), cache=args.cache
        )
        app = create_app(
            service,
            groups=args.groups,
            token=token,
            hosts=hosts(args),
            log_texts=args.log_texts,
        )
        return run(app, service, listener, drain_seconds=args.drain, connections=args.connections)


def defaults(args: Arguments) -> dict[str, Any]:
    """The options of requests that do not say."""
    said = {name: getattr(args, name) for name in ("k", "temperature", "at_once")}
    return {name: value for name, value in said.items() if value is not None}


def check(args: Arguments) -> None:
    """Raise UserError for options that are missing or out of range."""
    if args.model is None and args.openapi is None:
        raise UserError("give --model: the judge that is served")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if args.at_once is not None and args.at_once > MOST_RESPONSES:
        raise UserError(f"--at-once {args.at_once}: give at most {MOST_RESPONSES}")
    if args.port > 65535:
        raise UserError(f"--port {args.port}: give 0 to 65535")
    for name in ("drain", "temperature"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} {value}: give 0 or more")
    if args.k > args.limits.k:
        raise UserError(f"--k {args.k} is beyond --limits.k {args.limits.k}")


def hosts(args: Arguments) -> tuple[str, ...] | None:
    """Names that requests may address the server by; None: any."""
    if args.host not in LOOPBACK and not args.hosts:
        return None
    from grm_jax.serving.guard import LOOPBACK as names

    return (*names, *(name.lower() for name in args.hosts))


def read_token(file: Path | None) -> str | None:
    """The token of the file, or of the environment. Raises UserError for an empty one."""
    if file is not None:
        token = file.read_text(encoding="utf-8").strip()
        where = f"--token-file {file}"
    else:
        found = os.environ.get(TOKEN)
        if found is None:
            return None
        token, where = found.strip(), TOKEN
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{where}: give one word of printable ASCII characters")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; give another one (--port 0: "
            "any that is free)"
        ) from None


def document() -> str:
    """The OpenAPI document, as JSON."""
    from grm_jax.serving.app import create_app
    from grm_jax.serving.service import Service

    def nothing() -> tuple[Session, Served]:
        raise AssertionError("a document needs no model")

    schema = create_app(Service(nothing)).openapi()
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def opener(args: Arguments) -> Callable[[], tuple[Session, Served]]:
    """What loads the judge and makes its session, in the engine's thread."""
    # Only here, so that wrong arguments and --help need no JAX.
    from grm_jax.judge.judge import Judge
    from grm_jax.judge.request import ScoreOptions
    from grm_jax.judge.session import JudgeSession
    from grm_jax.metrics import setup_logging
    from grm_jax.serving.service import Served
    from grm_jax.train import setup_mesh

    assert args.model is not None
    model, mesh = args.model, setup_mesh(args.mesh)
    setup_logging()

    def open_session() -> tuple[Session, Served]:
        judge = Judge.load(
            model, args.meta, args.scalar, mesh=mesh, score_tokens=args.score_tokens,
            compute_dtype=args.compute_dtype,
        )  # fmt: skip
        new = args.max_new_tokens or judge.defaults.max_new_tokens
        most = judge.model.max_position - new
        longest = args.max_prompt_tokens or min(MAX_PROMPT_TOKENS, most)
        if longest > most or most < 1:
            raise UserError(
                f"--max-prompt-tokens {longest:,} and --max-new-tokens {new:,} are together more "
                f"than the model's {judge.model.max_position:,} positions"
            )
        session = JudgeSession(
            judge, longest_prompt=longest, max_new_tokens=new, samples=args.samples,
            expected=args.expected,
        )  # fmt: skip
        if args.warm_up:
            started = time.perf_counter()
            session.warm_up()
            log.info("warm-up          %.1f s", time.perf_counter() - started)
        prompts = judge.prompts(ScoreOptions())
        served = Served(
            model=args.name or Path(model).name,
            fingerprint=judge.fingerprint,
            guided=judge.guided,
            scalar=judge.has_scalar,
            scale=prompts.many.scale,
            single_scale=prompts.single.scale,
            longest_prompt=longest,
            max_new_tokens=new,
            temperature=judge.defaults.temperature,
        )
        return session, served

    return open_session


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring for the exit status."""
    with surviving(), stopping.handled():
        try:
            args = tyro.cli(
                Arguments, args=argv, prog="python -m grm_jax.serve", description=__doc__
            )
            sys.exit(serve(args))
        except KeyboardInterrupt as signal:
            print("serve: stopped", file=sys.stderr)
            sys.exit(stopping.exit_code(stopping.terminated(signal)))
        except (UserError, OSError) as error:
            sys.exit(f"serve: {describe(error)}")


if __name__ == "__main__":
    main()
