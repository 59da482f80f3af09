"""The client: what it asks again, how long it waits, when it gives up. Against scripted replies."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys

import httpx
import pytest

from grm_jax.serving import client as module
from grm_jax.serving.client import JudgeClient, JudgeRefused, JudgeUnavailable

BUSY = {"error": {"type": "overloaded", "message": "too much waits"}}


class Clock:
    """Time that passes in sleeps alone."""

    def __init__(self, monkeypatch):
        self.now, self.waits = 100.0, []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", self.sleep)
        monkeypatch.setattr(module.asyncio, "sleep", self.asleep)
        monkeypatch.setattr(module.random, "uniform", lambda low, high: high)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(params=["sync", "async"])
def ask(request, monkeypatch):
    """(replies, **settings of the client) -> (a function that judges, the requests that came)."""

    def make(*replies, **settings):
        came: list[httpx.Request] = []
        script = list(replies)

        def answer(asked: httpx.Request) -> httpx.Response:
            came.append(asked)
            reply = script.pop(0) if len(script) > 1 else script[0]
            if isinstance(reply, Exception):
                raise reply
            status, body, *headers = reply
            return httpx.Response(status, json=body, headers=headers[0] if headers else None)

        own = JudgeClient._settings

        def with_transport(self):
            return own(self) | {"transport": httpx.MockTransport(answer)}

        monkeypatch.setattr(JudgeClient, "_settings", with_transport)
        client = JudgeClient("127.0.0.1:8000/", **settings)

        def call(query="q", responses=("a", "b"), **options):
            if request.param == "sync":
                return client.judge(query, responses, **options)
            return asyncio.run(client.ajudge(query, responses, **options))

        return call, came

    return make


def test_a_verdict_comes_as_json_and_options_go_along(ask, clock):
    judge, came = ask((200, {"scores": [1.0, 2.0]}), token="secret")
    assert judge(k=4, criteria="short") == {"scores": [1.0, 2.0]}
    assert str(came[0].url) == "http://127.0.0.1:8000/v1/judge"
    assert came[0].headers["authorization"] == "Bearer secret"
    assert json.loads(came[0].content) == {
        "query": "q", "responses": ["a", "b"], "k": 4, "criteria": "short", "deadline": 600.0,
    }  # fmt: skip


@pytest.mark.parametrize("status", [429, 502, 503])
def test_what_passes_is_asked_again_with_growing_waits(ask, clock, status):
    judge, came = ask(*[(status, BUSY)] * 8, (200, {"scores": []}))
    judge()
    assert clock.waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    # The server is told how long it still has.
    assert json.loads(came[-1].content)["deadline"] == pytest.approx(600 - sum(clock.waits))


def test_the_server_says_how_long_to_wait(ask, clock):
    judge, _ = ask(
        (503, BUSY, {"Retry-After": "7"}), (429, BUSY, {"Retry-After": "soon"}), (200, {})
    )
    judge()
    assert clock.waits == [7, 1]


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.RemoteProtocolError("cut"), httpx.ReadError("x")]
)
def test_a_lost_connection_is_tried_again(ask, clock, error):
    judge, came = ask(error, error, (200, {"scores": []}))
    judge()
    assert len(came) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_other_refusals_are_raised_at_once(ask, clock, status):
    judge, came = ask((status, {"error": {"type": "invalid_request_error", "message": "k: 0"}}))
    with pytest.raises(JudgeRefused, match="k: 0") as found:
        judge()
    assert len(came) == 1 and not clock.waits
    assert (found.value.status, found.value.kind) == (status, "invalid_request_error")
    assert found.value.about_setup == (status in (401, 404))


@pytest.mark.parametrize("status", [500, 504])
def test_a_broken_or_late_server_is_no_refusal(ask, clock, status):
    judge, came = ask((status, BUSY))
    with pytest.raises(JudgeUnavailable):
        judge()
    assert len(came) == 1


def test_it_gives_up_before_its_deadline_and_says_what_it_last_heard(ask, clock):
    judge, came = ask((503, BUSY), timeout=10.0)
    with pytest.raises(JudgeUnavailable, match=r"within 10 s and 5 tries.*too much waits") as found:
        judge()
    assert clock.waits == [0.5, 1, 2, 4] and len(came) == 5
    assert found.value.status == 503


def test_a_reply_that_never_comes_is_not_waited_for_twice(ask, clock):
    judge, came = ask(httpx.ReadTimeout("slow"), timeout=10.0)
    with pytest.raises(JudgeUnavailable, match="no verdict within 10 s"):
        judge()
    assert len(came) == 1


def test_an_error_of_something_else_on_the_way_is_shown(ask, clock):
    judge, _ = ask((404, "a page of a proxy"))
    with pytest.raises(JudgeRefused, match=r"404: .*a page of a proxy"):
        judge()


def test_it_can_be_pickled_with_open_connections():
    client = JudgeClient("http://h:1", token="t", timeout=3)
    client._client()
    copy = pickle.loads(pickle.dumps(client))
    assert (copy.url, copy.token, copy.timeout, copy._open) == ("http://h:1", "t", 3, None)


def test_it_works_from_one_event_loop_after_another(ask, clock):
    judge, came = ask((200, {}))
    judge()
    judge()
    assert len(came) == 2


def test_clients_and_adapters_import_no_jax_and_no_server():
    names = ("client", *(f"adapters.{name}" for name in (
        "trl", "verl", "openrlhf", "slime", "verifiers", "nemo_gym")))  # fmt: skip
    code = "\n".join(f"import grm_jax.serving.{name}" for name in names)
    code += "\nimport sys; print(sorted({'jax', 'flax', 'fastapi', 'torch'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
