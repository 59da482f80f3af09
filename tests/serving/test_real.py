"""A model with random weights behind the server: the whole way; the same critiques each time."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from conftest import serving

from grm_jax import serve
from grm_jax.checkpoint import load_arrays  # noqa: F401  (orbax is read once, not in a test)
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.about import About
from grm_jax.judge.request import JudgeDefaults
from grm_jax.judge.session import JudgeSession
from grm_jax.model.params import init_params, param_table
from grm_jax.model.storage import save_model
from grm_jax.sampler.options import EngineConfig
from grm_jax.serving.app import create_app
from grm_jax.serving.service import Service

OPTIONS = {"samples": 32, "max_prompt_tokens": 80, "port": 0}
ASKED = {"query": " sum 1 2", "responses": [" anna", " ben", " carl"], "k": 6, "seed": 3}


@pytest.fixture(scope="module")
def model(small, tmp_path_factory) -> Path:
    """A model's folder."""
    import jax

    tokenizer = build_tokenizer()
    config = small.replace(num_layers=2, vocab_size=tokenizer.vocab_size, max_position=96)
    root = tmp_path_factory.mktemp("serve") / "random"
    save_model(root, config, init_params(param_table(config), jax.random.key(0), "float32"))
    tokenizer.save(root)
    About(
        templates=Templates.load(TemplateConfig("compact", "compact_single", "compact_meta")),
        engine=EngineConfig(max_rows=16, page=16, prefill_tokens=64, chunk=8, min_lanes=8),
        judge=JudgeDefaults(temperature=1.0, max_new_tokens=12),
    ).write(root)
    return root


@pytest.fixture(scope="module")
def client(model):
    arguments = serve.Arguments(model=str(model), **OPTIONS)
    with serving(Service(serve.opener(arguments))) as client:
        yield client


def critiques(reply: httpx.Response) -> list[tuple[str, int]]:
    assert reply.status_code == 200, reply.text
    return [(row["critique"], row["tokens"]) for row in reply.json()["critiques"]]


def test_a_verdict_of_a_real_model(client):
    said = client.post("/v1/judge", json=ASKED).json()
    assert len(said["critiques"]) == 6 and said["usage"]["samples"] == 6
    assert sum(row["tokens"] for row in said["critiques"]) == said["usage"]["sampled_tokens"] > 0
    assert said["judge"] == client.get("/ready").json()["judge"] != ""
    # Random weights write no scores; that is a named failure and no number.
    assert (said["failure"] is None) == bool(said["scores"])


def test_a_server_is_ready_once_it_is_warm(model, monkeypatch, capsys):
    """/ready says no until then; the first request compiles nothing, and no metric counts it."""
    sessions, reached, go_on = [], threading.Event(), threading.Event()
    warm_up = JudgeSession.warm_up

    def slow(session):
        sessions.append(session)
        reached.set()
        assert go_on.wait(60)
        warm_up(session)

    monkeypatch.setattr(JudgeSession, "warm_up", slow)
    service = Service(serve.opener(serve.Arguments(model=str(model), **OPTIONS)))

    async def scenario():
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            service.start()
            await asyncio.to_thread(reached.wait, 60)
            assert (await client.get("/ready")).status_code == 503
            assert (await client.post("/v1/judge", json=ASKED)).status_code == 503
            go_on.set()
            await service.opened()
            assert (await client.get("/ready")).status_code == 200
            metrics = (await client.get("/metrics")).text
            for line in ("grm_samples_total 0.0", "grm_engine_busy_seconds_total 0.0"):
                assert line in metrics
            compiled = len(sessions[0].judge.sampler.programs.compilations)
            assert (await client.post("/v1/judge", json=ASKED)).status_code == 200
            assert len(sessions[0].judge.sampler.programs.compilations) == compiled
            await service.drain(0)

    asyncio.run(scenario())
    assert re.search(r"^warm-up +\d+\.\d s$", capsys.readouterr().out, re.MULTILINE)


def test_without_a_warm_up_programs_are_compiled_with_the_first_requests(model, monkeypatch):
    monkeypatch.setattr(JudgeSession, "warm_up", None)
    session, _ = serve.opener(serve.Arguments(model=str(model), warm_up=False, **OPTIONS))()
    assert session.idle


def test_what_can_not_be_judged_is_a_400(client):
    for changed in (
        {"query": " sum" * 100}, {"max_new_tokens": 13}, {"method": "guided"},
        {"method": "hybrid"}, {"expected": True},
    ):  # fmt: skip
        reply = client.post("/v1/judge", json=ASKED | changed)
        assert reply.status_code == 400 and reply.json()["error"]["message"], changed
    assert client.get("/health").status_code == 200


def mixed(number: int) -> dict:
    """One of many requests of different sizes and settings."""
    return {
        "query": f" sum {number % 7} 2",
        "responses": [" anna", " ben", " carl", " dora"][: 1 + number % 4],
        "k": 1 + number % 5,
        "seed": 100 + number,
        "temperature": (None, 0, 0.5)[number % 3],
        "max_new_tokens": (None, 5)[number % 2],
    }


async def together(url: str, bodies: list[dict]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(client.post("/v1/judge", json=body) for body in bodies))


def test_the_same_request_gets_the_same_critiques_alone_among_others_and_after_a_restart(
    client, model
):
    alone = critiques(client.post("/v1/judge", json=ASKED))
    others = [mixed(number) for number in range(64)]
    # A server of its own, since this one keeps what it has answered.
    arguments = serve.Arguments(model=str(model), **OPTIONS)
    with serving(Service(serve.opener(arguments), cache=0)) as fresh:
        replies = asyncio.run(together(str(fresh.base_url), [*others[:40], ASKED, *others[40:]]))
        assert critiques(replies[40]) == alone
        beside = [critiques(reply) for reply in replies[:40] + replies[41:]]
        for number in (0, 5, 33):
            assert critiques(fresh.post("/v1/judge", json=others[number])) == beside[number]
    process, url = command(model)
    try:
        assert critiques(httpx.post(url + "/v1/judge", json=ASKED, timeout=120)) == alone
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def command(model: Path) -> tuple[subprocess.Popen[str], str]:
    """`python -m grm_jax.serve`, once it serves, and its address."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    process = subprocess.Popen(
        [sys.executable, "-um", "grm_jax.serve", "--model", str(model), *options],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("serving random at "):
        assert line, "the server ended"
    return process, line.split()[-1]


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "grm_jax.serve", "--model", str(tmp_path / "none"), "--port", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("serve: ")
    assert len(done.stderr.splitlines()) == 1 and "none" in done.stderr


def test_options_beyond_the_models_positions_are_one_line(model):
    arguments = serve.Arguments(model=str(model), max_prompt_tokens=96, port=0)
    with pytest.raises(serve.UserError, match=r"--max-prompt-tokens 96 and --max-new-tokens 12"):
        serve.opener(arguments)()


def test_labels_of_a_real_model(client):
    asked = {"query": " sum 1 2", "items": [" anna", " ben 1", [9, 9]], "label_token_ids": [7, 9]}

    def scores(**changed) -> list[float]:
        reply = client.post("/generative_scoring", json=asked | changed)
        assert reply.status_code == 200, reply.text
        return [row["score"] for row in reply.json()["data"]]

    first, second = scores(), scores(label_token_ids=[9, 7])
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx([1.0] * 3)
    whole = scores(apply_softmax=False)
    other = scores(apply_softmax=False, label_token_ids=[9])
    assert first == pytest.approx([a / (a + b) for a, b in zip(whole, other, strict=True)])
    assert scores(items=[" ben 1"]) == [first[1]] and scores(item_first=True) != first
    reply = client.post("/generative_scoring", json=asked | {"label_token_ids": [7, 10**6]})
    assert reply.status_code == 400 and reply.json()["error"]["field"] == "label_token_ids"


def test_events_of_a_real_model(client):
    text = client.post("/v1/judge", json=ASKED | {"stream": True, "seed": 9}).text
    *_, last = [block.split("\n") for block in text.split("\n\n") if block]
    assert last[0] == "event: verdict"
    plain = client.post("/v1/judge", json=ASKED | {"seed": 9})
    assert json.loads(last[1][6:])["critiques"] == plain.json()["critiques"]
