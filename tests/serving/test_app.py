"""The native routes: what they answer, as JSON and as events, and to whom."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time

import httpx
import pytest
from fakes import FakeSession

from grm_jax.judge.request import OPTIONS, TEXTS, JudgeRequest
from grm_jax.serving import schemas
from grm_jax.serving.limits import Limits

QUESTION = {"query": "q", "responses": ["score=3", "score=8", "score=5"], "k": 3}


def events(text: str) -> list[tuple[str, dict]]:
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    return [(name, json.loads(data)) for name, data in found]


def test_a_verdict_is_what_the_judge_says(client, session):
    reply = client.post("/v1/judge", json=QUESTION)
    assert reply.status_code == 200
    said = reply.json()
    expected = session.verdict(JudgeRequest.from_json(QUESTION)).to_json()
    assert said == json.loads(json.dumps(expected))
    assert said["winner"] == 1 and said["scores"][1] == 8
    schemas.VerdictReply.model_validate(said)


def test_every_option_reaches_the_judge(client, session):
    texts = {
        "query": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
        ],
        "responses": ["a", [{"role": "assistant", "content": "b", "name": None}]],
        "reference": "r", "principles": ["p"], "criteria": ["c", "d"],
    }  # fmt: skip
    options = {
        "k": 5, "seed": 7, "temperature": 0.25, "max_new_tokens": 99, "order": "random",
        "rating": True, "method": "guided", "k_meta": 2, "expected": True, "scalar_weight": 0.1,
        "adaptive": 0.01, "threshold": 0.5, "at_once": 4,
    }  # fmt: skip
    assert set(options) == set(OPTIONS) and set(texts) == set(TEXTS)
    reply = client.post("/v1/judge", json=texts | options)
    assert reply.status_code == 200, reply.text
    request = session.requests[-1]
    assert {name: getattr(request.options, name) for name in OPTIONS} == options
    assert request.record.responses == ("a", "b")
    assert request.record.principles == ("p", "c", "d")
    assert [turn["role"] for turn in request.record.turns] == ["system", "user"]


def test_the_schema_has_the_fields_of_a_request():
    named = set(schemas.JudgeBody.model_fields) - set(schemas.OF_THE_ROUTE)
    assert named == {*TEXTS, *OPTIONS}


def test_the_servers_defaults_hold_where_a_request_does_not_say(serve):
    session = FakeSession()
    client = serve(session, defaults={"k": 3, "temperature": 0.7})
    for body in (QUESTION | {"k": None}, QUESTION | {"k": 5, "temperature": 0}):
        assert client.post("/v1/judge", json=body).status_code == 200
    asked = [(r.options.k, r.options.temperature) for r in session.requests]
    assert asked == [(3, 0.7), (5, 0)]


def test_a_whole_number_may_be_written_with_a_point(client, session):
    assert client.post("/v1/judge", json=QUESTION | {"k": 4.0, "seed": 2e3}).status_code == 200
    options = session.requests[-1].options
    assert (options.k, options.seed) == (4, 2000) and type(options.k) is int


def test_critiques_can_be_left_out(client):
    assert "critiques" not in client.post("/v1/judge", json=QUESTION | {"critiques": False}).json()


def test_a_failure_has_no_numbers(client):
    said = client.post("/v1/judge", json=QUESTION | {"responses": ["unreadable", "b"]}).json()
    assert said["failure"] == "no_box" and said["failures"] == {"no_box": 3}
    assert said["scores"] == said["rewards"] == said["best"] == [] and said["winner"] is None
    schemas.VerdictReply.model_validate(said)


@pytest.mark.parametrize("how", ["field", "header"])
def test_events_are_progress_and_the_verdict(client, session, how):
    if how == "field":
        reply = client.post("/v1/judge", json=QUESTION | {"stream": True})
    else:
        reply = client.post("/v1/judge", json=QUESTION, headers={"Accept": "text/event-stream"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *progress, (name, verdict) = events(reply.text)
    assert progress and all(one == "progress" for one, _ in progress)
    assert set(progress[0][1]) == {"state", "seconds", "finished", "k", "samples"}
    assert name == "verdict"
    assert verdict == json.loads(
        json.dumps(session.verdict(JudgeRequest.from_json(QUESTION)).to_json())
    )


def test_an_error_of_the_judge_is_an_event_or_a_status(client):
    body = QUESTION | {"query": "too long"}
    reply = client.post("/v1/judge", json=body)
    assert reply.status_code == 400 and "leave room" in reply.json()["error"]["message"]
    *_, (name, said) = events(client.post("/v1/judge", json=body | {"stream": True}).text)
    assert name == "error" and "leave room" in said["error"]["message"]


def test_what_is_refused_at_once_is_a_status_in_a_stream_too(serve):
    client = serve(FakeSession(), limits=Limits(k=2))
    reply = client.post("/v1/judge", json=QUESTION | {"stream": True})
    assert reply.status_code == 400 and "at most 2" in reply.json()["error"]["message"]


def test_a_deadline_is_answered_with_504(client):
    reply = client.post("/v1/judge", json=QUESTION | {"query": "never", "deadline": 0.1})
    assert reply.status_code == 504
    assert reply.json()["error"]["type"] == "deadline_exceeded"


def test_a_full_queue_is_answered_with_429_and_when_to_come_back(serve):
    session = FakeSession()
    client = serve(session, limits=Limits(queue=3))
    session.gate.clear()
    try:
        with client.stream("POST", "/v1/judge", json=QUESTION | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            reply = client.post("/v1/judge", json=QUESTION | {"seed": 1})
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "overloaded"
    finally:
        session.gate.set()


def test_a_client_that_hangs_up_cancels_its_work(client, session):
    for stream in (False, True):
        before = len(session.cancelled)
        with pytest.raises(httpx.ReadTimeout):
            body = QUESTION | {"query": "never", "stream": stream}
            client.post("/v1/judge", json=body, timeout=0.3)
        for _ in range(200):
            if len(session.cancelled) > before:
                break
            client.get("/health")
        assert len(session.cancelled) == before + 1


def test_health_and_readiness(client):
    assert client.get("/health").json() == {"status": "ok"}
    said = client.get("/ready").json()
    assert said["model"] == "fake" and said["guided"] and said["scalar"] and said["k"] == 8
    assert said["limits"]["max_new_tokens"] == 1024
    schemas.ReadyReply.model_validate(said)


def test_an_error_of_the_program_makes_it_unhealthy(serve):
    client = serve(FakeSession())
    reply = client.post("/v1/judge", json=QUESTION | {"query": "explode"})
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "engine_failed"
    assert "RuntimeError" not in reply.text
    assert client.get("/health").status_code == 500
    assert client.get("/ready").status_code == 503
    assert client.post("/v1/judge", json=QUESTION).status_code == 500


def test_metrics_count_requests_samples_and_failures(client):
    client.post("/v1/judge", json=QUESTION)
    client.post("/v1/judge", json=QUESTION)
    client.post("/v1/judge", json=QUESTION | {"responses": ["unreadable"]})
    client.post("/v1/judge", json={})
    client.get("/no/such/path/7")
    text = client.get("/metrics").text
    for line in (
        'grm_requests_total{method="POST",route="/v1/judge",status="200"} 3.0',
        'grm_requests_total{method="POST",route="/v1/judge",status="422"} 1.0',
        'grm_requests_total{method="any",route="unmatched",status="404"} 1.0',
        'grm_jobs_total{ended="cached"} 1.0',
        'grm_jobs_total{ended="finished"} 2.0',
        "grm_samples_total 6.0",
        'grm_critique_failures_total{failure="no_box"} 3.0',
        "grm_ready 1.0",
        "grm_pending_samples 0.0",
    ):
        assert line in text.splitlines(), (line, text)


def test_metrics_show_the_rollouts_that_wait_for_their_group(client):
    def waiting() -> float:
        (line,) = re.findall(r"^grm_waiting_rollouts .*", client.get("/metrics").text, re.MULTILINE)
        return float(line.split()[1])

    rollout = {"query": "q", "group_size": 3, "window": 20}
    assert waiting() == 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sent = []
        for i in range(3):
            body = rollout | {"response": f"score={i + 3}"}
            sent.append(pool.submit(client.post, "/v1/rollout", json=body))
            until = time.monotonic() + 5
            while i < 2 and waiting() != i + 1:
                assert time.monotonic() < until
                time.sleep(0.01)
        assert [one.result().json()["group_size"] for one in sent] == [3, 3, 3]
    assert waiting() == 0


def test_replies_carry_headers_that_keep_browsers_safe(client):
    for reply in (client.get("/health"), client.post("/v1/judge", content=b"x"), client.get("/")):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert "server" not in reply.headers
    policy = client.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy


def test_texts_are_logged_only_if_asked(serve, logged):
    secret = {"query": "sesame street", "responses": ["open sesame"], "k": 1}
    serve(FakeSession()).post("/v1/judge", json=secret)
    assert "sesame" not in logged("POST /v1/judge 200")
    serve(FakeSession(), log_texts=True).post("/v1/judge", json=secret)
    assert "sesame street" in logged("open sesame")


def test_a_path_can_not_write_lines_into_the_log(client, logged):
    client.get("/a%0aGET%20/forged%20200")
    assert "\nGET /forged" not in logged("forged")


@pytest.fixture
def logged(caplog):
    """(words) -> the log of this package, once it has the words: a line follows its reply."""
    caplog.set_level("INFO", logger="grm_jax")

    def wait(words: str) -> str:
        for _ in range(500):
            lines = [r.getMessage() for r in caplog.records if r.name.startswith("grm_jax")]
            if words in "\n".join(lines):
                return "\n".join(lines)
            time.sleep(0.01)
        raise AssertionError(lines)

    return wait


class TestToken:
    @pytest.fixture
    def guarded(self, serve):
        return serve(FakeSession(), token="s3cret")

    @pytest.mark.parametrize(
        "header",
        [None, "", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret",
         "Bearer S3CRET", "Bearer \xe9"],
    )  # fmt: skip
    def test_without_it_nothing_is_told(self, guarded, header):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in (("POST", "/v1/judge"), ("GET", "/metrics"), ("GET", "/no/such")):
            reply = guarded.request(method, path, headers=headers, json=QUESTION)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["type"] == "unauthorized"

    @pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret"])
    def test_with_it_all_is(self, guarded, header):
        headers = {"Authorization": header}
        assert guarded.post("/v1/judge", json=QUESTION, headers=headers).status_code == 200
        assert guarded.get("/metrics", headers=headers).status_code == 200

    def test_health_and_the_page_need_none(self, guarded):
        for path in ("/", "/page/page.js", "/page/page.css", "/health", "/ready", "/openapi.json"):
            assert guarded.get(path).status_code == 200, path

    def test_other_paths_below_the_page_do(self, guarded):
        for path in ("/page/../metrics", "/page/..%2fmetrics", "/page/%2e%2e/metrics"):
            reply = guarded.get(httpx.URL(str(guarded.base_url) + path))
            assert reply.status_code in (401, 404), path


class TestHosts:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8000", "LOCALHOST:1"])
    def test_its_own_names(self, serve, host):
        client = serve(FakeSession(), hosts=("localhost", "127.0.0.1", "[::1]"))
        assert client.get("/ready", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "localhost@evil", "", "127.0.0.1.x:80"]
    )
    def test_names_of_others(self, serve, host):
        client = serve(FakeSession(), hosts=("localhost", "127.0.0.1", "[::1]"))
        reply = client.get("/ready", headers={"Host": host})
        assert reply.status_code == 403 and "--hosts" in reply.json()["error"]["message"]


def test_the_groups_of_a_request_count_as_its_critiques(serve):
    """A request can not ask for more by having its responses read a few at a time."""
    session = FakeSession()
    client = serve(session, limits=Limits(k=12))
    body = {"query": "q", "responses": ["a", "b", "c", "d", "e"], "k": 4, "at_once": 2}
    assert client.post("/v1/judge", json=body).status_code == 200
    assert session.requests[-1].samples == 12
    reply = client.post("/v1/judge", json=body | {"k": 5})
    assert reply.status_code == 400
    assert "k 5 of 3 groups (at_once 2): 15 critiques" in reply.text
    assert client.post("/v1/judge", json=body | {"k": 5, "at_once": None}).status_code == 200
