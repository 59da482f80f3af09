"""The engine's thread: what is shared, refused, given up, cancelled, and what an error leaves."""

from __future__ import annotations

import asyncio
import time

import pytest
from fakes import FakeSession

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import ScalarScores
from grm_jax.serving.limits import Limits
from grm_jax.serving.problems import DeadlineExceeded, EngineFailed, Overloaded, Unavailable
from grm_jax.serving.service import Chat, Progress


def ask(query: str = "q", *responses: str, **options) -> JudgeRequest:
    return JudgeRequest.make(query, responses or ("a", "b"), options=ScoreOptions(**options))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_each_request_gets_its_own_verdict(session, with_service):
    requests = [ask(f"query {i}", *"abcdefg"[: 1 + i % 5], seed=i) for i in range(100)]

    async def scenario(service):
        return await asyncio.gather(*map(service.judge, requests))

    verdicts = with_service(session, scenario)
    assert verdicts == [session.verdict(request) for request in requests]


def test_equal_requests_in_flight_cost_one_and_finished_ones_none(session, with_service):
    async def scenario(service):
        together = await asyncio.gather(*(service.judge(ask()) for _ in range(5)))
        later = await service.judge(ask())
        other = await service.judge(ask(seed=1))
        assert service.stats.shared == 4 and service.stats.cached == 1
        return [*together, later, other]

    verdicts = with_service(session, scenario)
    assert len(session.requests) == 2
    assert all(verdict == verdicts[0] for verdict in verdicts[:6])
    assert verdicts[6] != verdicts[0]


def test_the_cache_of_finished_answers_is_bounded(session, with_service):
    async def scenario(service):
        for i in (0, 1, 2, 2, 1, 0):
            await service.judge(ask(str(i)))

    with_service(session, scenario, cache=2)
    assert [r.record.turns[0]["content"] for r in session.requests] == ["0", "1", "2", "0"]


def test_what_the_session_refuses_is_the_clients_error_and_the_engine_goes_on(
    session, with_service
):
    async def scenario(service):
        with pytest.raises(UserError, match="leave room"):
            await service.judge(ask("too long"))
        with pytest.raises(UserError, match="at most 3"):
            await service.judge(ask("q", "a", "b", "c", "d"))
        with pytest.raises(UserError, match="k: 9; this server takes at most 8"):
            await service.judge(ask(k=9))
        with pytest.raises(UserError, match="n: 9"):
            await service.chat(Chat((("user", "hi"),), n=9))
        with pytest.raises(UserError, match="max_new_tokens: 2000"):
            await service.judge(ask(max_new_tokens=2000))
        assert service.ready and service.pending == service.jobs == 0
        return await service.judge(ask())

    assert with_service(session, scenario, limits=Limits(responses=3, k=8)).failure is None


def test_a_full_queue_refuses_and_says_when_to_come_back(with_service):
    session = FakeSession(slots=8, seconds=0.05)  # 160 samples a second

    async def scenario(service):
        await service.judge(ask("measure"))
        session.gate.clear()
        waiting = [asyncio.ensure_future(service.judge(ask(str(i), k=80))) for i in range(5)]
        await until(lambda: service.pending == 400)
        with pytest.raises(Overloaded) as found:
            await service.judge(ask("one more", k=100))
        assert service.stats.refused == 1
        session.gate.set()
        await asyncio.gather(*waiting)
        await service.judge(ask("one more", k=100))
        return found.value.retry_after

    # Until 100 of the 500 samples are gone: 100 / 160 seconds, at least a whole one.
    assert with_service(session, scenario, limits=Limits(queue=400)) == 1


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits(session, with_service):
    async def scenario(service):
        return await service.judge(ask(k=100))

    assert with_service(session, scenario, limits=Limits(queue=10)).failure is None


def test_retry_after_grows_with_what_waits(with_service):
    session = FakeSession(slots=1, seconds=0.02)  # 50 samples a second

    async def scenario(service):
        await service.judge(ask("measure", k=20))
        session.gate.clear()
        waiting = asyncio.ensure_future(service.judge(ask("first", k=100)))
        await until(lambda: service.pending == 100)
        with pytest.raises(Overloaded) as found:
            await service.judge(ask("second", k=100))
        waiting.cancel()
        return found.value.retry_after

    assert with_service(session, scenario, limits=Limits(queue=100)) in (2, 3, 4)


def test_at_its_deadline_a_request_is_given_up_and_cancelled(session, with_service):
    async def scenario(service):
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.1 seconds"):
            await service.judge(ask("never"), deadline=0.1)
        assert time.monotonic() - started < 2
        await until(lambda: session.cancelled)
        assert service.stats.expired == 1 and service.pending == service.jobs == 0

    with_service(session, scenario)


def test_a_deadline_is_no_longer_than_the_limit(session, with_service):
    async def scenario(service):
        with pytest.raises(DeadlineExceeded, match=r"0\.05 seconds"):
            await service.judge(ask("never"), deadline=1000)

    with_service(session, scenario, limits=Limits(deadline=0.05))


def test_shared_work_is_cancelled_when_its_last_client_has_gone(session, with_service):
    async def scenario(service):
        session.gate.clear()
        one, two = (asyncio.ensure_future(service.judge(ask())) for _ in range(2))
        await until(lambda: session.requests)
        one.cancel()
        await asyncio.sleep(0.02)
        assert not session.cancelled
        two.cancel()
        await until(lambda: session.cancelled)
        session.gate.set()
        again = await service.judge(ask())  # the cancelled one left nothing behind
        assert again == session.verdict(ask())
        assert service.stats.cancelled == 2

    with_service(session, scenario)


def test_chats_and_scalars_run_beside_verdicts(session, with_service):
    async def scenario(service):
        return await asyncio.gather(
            service.judge(ask("q", "score=3", "score=8")),
            service.chat(Chat((("user", "hello"),), n=2, seed=7, temperature=0.5)),
            service.scalar([{"role": "user", "content": "q"}], ["score=4", "score=9"]),
        )

    verdict, completions, scalars = with_service(session, scenario)
    assert verdict.winner == 1
    assert [c.text for c in completions] == ["hello [7.0 at 0.5]", "hello [7.1 at 0.5]"]
    assert scalars == ScalarScores((1.0, 3.5), 4)


def test_a_missing_scalar_rm_is_the_clients_error(with_service):
    async def scenario(service):
        with pytest.raises(UserError, match="no scalar RM"):
            await service.scalar([{"role": "user", "content": "q"}], ["a"])

    with_service(FakeSession(scalar=False), scenario)


def test_an_error_of_the_program_fails_what_waits_and_ends_readiness(session, with_service, caplog):
    async def scenario(service):
        session.gate.clear()
        waiting = [
            asyncio.ensure_future(service.judge(ask(text))) for text in ("first", "explode", "last")
        ]
        await until(lambda: len(session.requests) == 3)
        session.gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(result, EngineFailed) for result in results)
        await until(lambda: not service.ready)
        assert not service.alive and service.jobs == 0
        with pytest.raises(EngineFailed):
            await service.judge(ask("afterwards"))

    with_service(session, scenario)
    assert "an error of the program" in caplog.text and "Traceback" in caplog.text


def test_a_model_that_can_not_be_loaded_is_reported_to_who_waits_for_it():
    from grm_jax.serving.service import Service

    def refuse():
        raise UserError("no model there")

    async def scenario():
        service = Service(refuse)
        service.start()
        with pytest.raises(UserError, match="no model there"):
            await service.opened()
        assert not service.ready

    asyncio.run(scenario())


def test_until_the_model_is_loaded_requests_are_told_to_come_back(session):
    import threading

    from grm_jax.serving.service import Service

    loaded = threading.Event()

    def slowly():
        loaded.wait(10)
        return session.open()

    async def scenario():
        service = Service(slowly)
        service.start()
        assert not service.ready
        with pytest.raises(Unavailable) as found:
            await service.judge(ask())
        assert found.value.retry_after
        loaded.set()
        await service.opened()
        await service.judge(ask())
        await service.drain(1)

    asyncio.run(scenario())


def test_draining_refuses_new_requests_and_ends_the_running_ones(session, with_service):
    async def scenario(service):
        session.gate.clear()
        running = asyncio.ensure_future(service.judge(ask("running")))
        await until(lambda: session.requests)
        drain = asyncio.ensure_future(service.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            await service.judge(ask("new"))
        assert not drain.done()
        session.gate.set()
        assert await drain
        return await running

    assert with_service(session, scenario) == session.verdict(ask("running"))


def test_draining_gives_up_after_its_time(session, with_service):
    async def scenario(service):
        running = asyncio.ensure_future(service.judge(ask("never")))
        await until(lambda: session.requests)
        assert not await service.drain(0.05)
        with pytest.raises(Unavailable):
            await running

    with_service(session, scenario)


def test_progress_comes_before_the_verdict(session, with_service):
    async def scenario(service):
        session.gate.clear()
        found = []
        async for event in service.judge_events(ask(k=4), every=0.01):
            found.append(event)
            if len(found) == 3:
                session.gate.set()
        return found

    *progress, verdict = with_service(session, scenario)
    assert all(isinstance(event, Progress) for event in progress)
    assert [event.samples for event in progress[:3]] == [4, 4, 4]
    assert progress[0].state == "waiting" and progress[2].state == "running"
    assert verdict == session.verdict(ask(k=4))


def test_progress_says_how_many_samples_of_the_request_have_ended(with_service):
    """Those of its own alone, whatever else runs, and whoever else asks for the same."""
    session = FakeSession(slots=3, seconds=0.05)

    async def scenario(service):
        other = asyncio.ensure_future(service.judge(ask("other", k=3)))
        await until(lambda: session.requests)
        found = [
            asyncio.ensure_future(collect(service.judge_events(ask(k=7), every=0.01)))
            for _ in range(2)
        ]
        await other
        return [await one for one in found]

    async def collect(events):
        return [event async for event in events]

    for *progress, verdict in with_service(session, scenario):
        assert [event.k for event in progress] == [7] * len(progress)
        assert list(dict.fromkeys(event.finished for event in progress)) == [0, 3, 6]
        assert verdict.usage.samples == 7


def test_who_stops_listening_to_progress_cancels_the_work(session, with_service):
    async def scenario(service):
        events = service.judge_events(ask("never"), every=0.01)
        await anext(events)
        await events.aclose()
        await until(lambda: session.cancelled)

    with_service(session, scenario)
