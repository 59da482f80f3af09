"""The command: its options, what it says without a model or without the extra, and its end."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from grm_jax import serve
from grm_jax.errors import UserError
from grm_jax.serve import Arguments

HERE = Path(__file__).parent
COMMITTED = Path(serve.__file__).parent / "serving" / "openapi.json"


def test_the_committed_openapi_document_is_that_of_the_code():
    assert COMMITTED.read_text(encoding="utf-8") == serve.document(), (
        f"python -m grm_jax.serve --openapi {COMMITTED}"
    )


def test_the_document_is_written_without_a_model(tmp_path):
    assert serve.serve(Arguments(openapi=tmp_path / "o.json")) == 0
    assert (tmp_path / "o.json").read_text(encoding="utf-8") == serve.document()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--model"),
        ({"port": -1}, "--port"),
        ({"port": 70000}, "--port"),
        ({"k": 0}, "--k 0"),
        ({"k": 500}, "--limits.k"),
        ({"samples": 0}, "--samples"),
        ({"at_once": 1}, "--at-once 1: give 2 or more"),
        ({"at_once": 257}, "--at-once 257: give at most 256"),
        ({"drain": float("nan")}, "--drain"),
        ({"temperature": -1.0}, "--temperature"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    model = {"model": "m"} if options else {}
    with pytest.raises(UserError, match=said):
        serve.check(Arguments(**model, **options))


def test_options_of_the_server_hold_where_a_request_does_not_say():
    assert serve.defaults(Arguments(model="m")) == {"k": 8}
    said = serve.defaults(Arguments(model="m", k=2, temperature=0.0, at_once=4))
    assert said == {"k": 2, "temperature": 0.0, "at_once": 4}


def test_limits_out_of_range_are_named():
    from grm_jax.serving.limits import Limits

    with pytest.raises(UserError, match=r"--limits\.body-bytes 0"):
        Limits(body_bytes=0)


@pytest.mark.parametrize("text", ["", " \n", "two words", "caf\u00e9", "a\nb"])
def test_a_token_is_one_word(tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="--token-file"):
        serve.read_token(tmp_path / "token")


def test_a_token_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    assert serve.read_token(None) is None
    monkeypatch.setenv(serve.TOKEN, "")
    with pytest.raises(UserError, match=serve.TOKEN):  # not: without one
        serve.read_token(None)
    monkeypatch.setenv(serve.TOKEN, "env")
    assert serve.read_token(None) == "env"
    (tmp_path / "token").write_text("file\n", encoding="utf-8")
    assert serve.read_token(tmp_path / "token") == "file"


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            serve.listen("127.0.0.1", port)


def test_by_default_only_this_machine_can_connect_and_by_its_own_names():
    args = Arguments(model="m")
    assert args.host == "127.0.0.1"
    assert serve.hosts(args) == ("localhost", "127.0.0.1", "[::1]")
    assert "judge.lan" in (serve.hosts(dataclasses.replace(args, hosts=("Judge.lan",))) or ())
    assert serve.hosts(dataclasses.replace(args, host="0.0.0.0")) is None


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip


def test_help_needs_neither_jax_nor_the_extra():
    code = (
        "import sys\n"
        "from grm_jax.serve import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code, "
        "{'jax', 'fastapi', 'uvicorn', 'numpy'} & set(sys.modules))\n"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout + done.stderr
    assert "--token-file" in done.stdout


def test_without_the_extra_one_line_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"  # importing it raises ModuleNotFoundError
        "from grm_jax.serve import main\n"
        "main(['--model', 'm'])\n"
    )
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "serve: the server needs fastapi, which is not installed: pip install 'grm_jax[serve]'"
    )


def test_the_package_is_imported_without_the_extra():
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "import grm_jax, grm_jax.serving.service, grm_jax.serving.limits, grm_jax.serve\n"
    )
    assert python(code).returncode == 0


SERVER = """
import logging, sys
sys.path.insert(0, {here!r})
from fakes import FakeSession
from grm_jax import serve
session = FakeSession(slots=1, seconds={seconds})
serve.opener = lambda args: session.open
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("grm_jax").setLevel("INFO")
serve.main(["--model", "m", "--port", "0", "--drain", "{drain}"])
"""


class Process:
    """A server with a fake session in a process of its own."""

    def __init__(self, seconds: float = 0.0, drain: float = 20):
        code = SERVER.format(here=str(HERE), seconds=seconds, drain=drain)
        self.process = subprocess.Popen(
            [sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True
        )
        self.line = ""
        assert self.process.stdout is not None
        while "serving" not in self.line:
            self.line = self.process.stdout.readline()
            assert self.line, "the server ended"
        self.url = self.line.split()[-1]

    def end(self) -> int:
        assert self.process.stdout is not None
        try:
            self.log = self.process.stdout.read()
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


def test_one_line_says_where_it_serves():
    server = Process()
    assert httpx.get(server.url + "/ready").json()["model"] == "fake"
    assert server.line.startswith("serving fake at http://127.0.0.1:")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def ask(url: str, k: int):
    body = {"query": "q", "responses": ["a", "b"], "k": k}
    return httpx.post(url + "/v1/judge", json=body, timeout=30)


def test_sigterm_ends_what_runs_refuses_what_is_new_and_exits_0():
    import concurrent.futures

    server = Process(seconds=0.1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(ask, server.url, 20)  # two seconds
        while "grm_pending_samples 20.0" not in httpx.get(server.url + "/metrics").text:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        while (new := ask(server.url, 1)).status_code == 200:
            time.sleep(0.02)
        assert new.status_code == 503 and new.headers["retry-after"]
        assert "stopping" in new.json()["error"]["message"]
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/health").status_code == 200
        assert running.result().status_code == 200
    assert server.end() == 0


def test_draining_has_an_end():
    import concurrent.futures

    server = Process(seconds=0.1, drain=0.5)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(ask, server.url, 100)
        while "grm_pending_samples 100.0" not in httpx.get(server.url + "/metrics").text:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 503
    assert server.end() == 0
    assert "did not end within 0.5 seconds" in server.log


def test_ctrl_c_drains_too_and_exits_130():
    server = Process()
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130


def test_a_second_signal_ends_it_at_once():
    import concurrent.futures

    server = Process(seconds=0.1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(ask, server.url, 128)
        while "grm_pending_samples 128.0" not in httpx.get(server.url + "/metrics").text:
            time.sleep(0.02)
        for number in (signal.SIGTERM, signal.SIGTERM):
            server.process.send_signal(number)
            time.sleep(0.3)
        assert server.process.wait(5) == 128 + signal.SIGTERM
        with pytest.raises(httpx.HTTPError):
            running.result()
    server.end()


def test_a_model_that_can_not_be_loaded_is_one_line_and_exits_1():
    code = (
        "from grm_jax import serve\n"
        "from grm_jax.errors import UserError\n"
        "def refuse(): raise UserError('there is no model in m')\n"
        "serve.opener = lambda args: refuse\n"
        "serve.main(['--model', 'm', '--port', '0'])\n"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (1, "serve: there is no model in m\n")
