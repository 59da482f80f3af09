"""Rollouts that arrive alone: who is judged with whom, when, and what each gets. On a clock that
jumps, so that windows of seconds take no time."""

from __future__ import annotations

import asyncio
import dataclasses
import selectors
from collections import Counter

import pytest
from fakes import SCALE
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import Judgement, Verdict, decide
from grm_jax.serving.groups import GroupOptions, Groups, Share
from grm_jax.serving.problems import DeadlineExceeded, JudgementFailed, Overloaded, Unavailable


class _Jumping(selectors.DefaultSelector):
    """Waits for nothing: time goes on to when the next thing happens."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everybody waits, and nothing will happen"
        self.now += max(timeout, 0)
        return super().select(0)


class _FakeTime(asyncio.SelectorEventLoop):
    def __init__(self):
        self.clock = _Jumping()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def run(scenario):
    with asyncio.Runner(loop_factory=_FakeTime) as runner:
        return runner.run(scenario())


class Judge:
    """Scores a response by its length; takes `seconds` a group."""

    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds
        self.asked: list[tuple[float, tuple[str, ...]]] = []
        self.ended = 0
        self.error: Exception | None = None

    async def __call__(self, request: JudgeRequest) -> Verdict:
        responses = request.record.responses
        self.asked.append((asyncio.get_running_loop().time(), responses))
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.ended += 1
        failed = "unreadable" in responses
        row = Judgement(
            example_id=request.record.id, sample=0, order=tuple(range(len(responses))),
            scores=None if failed else tuple(float(1 + len(text) % 10) for text in responses),
            failure="no_box" if failed else None, finish_reason="stop", tokens=1, text="",
        )  # fmt: skip
        return decide(request, [row], scale=SCALE)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return [responses for _, responses in self.asked]


def ask(response: str, query: str = "q", **options) -> JudgeRequest:
    return JudgeRequest.make(query, [response], options=ScoreOptions(k=1, rating=True, **options))


def now() -> float:
    return asyncio.get_running_loop().time()


async def at(time: float, call):
    await asyncio.sleep(time - now())
    return await call


def test_a_full_group_is_judged_at_once_and_each_gets_its_own_score():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=100, size=3))
        shares = await asyncio.gather(
            *(groups.score(ask(text), seconds=9) for text in ("bbb", "a", "cc"))
        )
        assert now() == pytest.approx(0.5)
        return shares

    shares = run(scenario)
    assert judge.groups == [("a", "bbb", "cc")]
    assert [share.score for share in shares] == [4.0, 2.0, 3.0]
    assert [share.rank for share in shares] == [1.0, 0.0, 0.5]
    assert {share.size for share in shares} == {3}


def test_a_partial_group_is_judged_when_the_window_of_its_first_member_ends():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=2, size=8))
        await asyncio.gather(
            at(0, groups.score(ask("a"), seconds=9)),
            at(1.9, groups.score(ask("b"), seconds=9)),
            at(2.1, groups.score(ask("late"), seconds=9)),
        )

    run(scenario)
    assert judge.asked == [(pytest.approx(2), ("a", "b")), (pytest.approx(4.1), ("late",))]


def test_without_a_window_every_rollout_is_judged_alone():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=0))
        await groups.score(ask("a"), seconds=9)
        await groups.score(ask("b"), seconds=9)

    run(scenario)
    assert judge.groups == [("a",), ("b",)]


def test_equal_responses_have_a_place_each():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=9, size=4))
        asked = (groups.score(ask(text), seconds=20) for text in ("same", "same", "same", "x"))
        return await asyncio.gather(*asked)

    shares = run(scenario)
    assert judge.groups == [("same", "same", "same", "x")]
    assert sorted(share.index for share in shares) == [0, 1, 2, 3]


def test_what_differs_in_prompt_options_reference_or_scope_is_no_group():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1))
        reference = JudgeRequest.make("q", ["a"], reference="r", options=ask("a").options)
        criteria = JudgeRequest.make("q", ["a"], criteria="c", options=ask("a").options)
        requests = [ask("a"), ask("b"), ask("a", "other"), ask("a", seed=1), reference, criteria]
        await asyncio.gather(
            *(groups.score(request, seconds=9) for request in requests),
            groups.score(ask("a"), seconds=9, scope="task 2"),
        )

    run(scenario)
    assert sorted(map(len, judge.groups)) == [1, 1, 1, 1, 1, 2]


def test_arrival_order_says_nothing():
    verdicts = []
    for order in ("abc", "cab"):

        async def scenario(order=order):
            groups = Groups(Judge(), GroupOptions(window=1))
            shares = await asyncio.gather(*(groups.score(ask(t), seconds=9) for t in order))
            return shares[0].verdict

        verdicts.append(run(scenario))
    assert verdicts[0] == verdicts[1]


def test_members_say_how_large_their_group_is_and_how_long_they_wait():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=50), most=4)
        await asyncio.gather(
            groups.score(ask("a"), seconds=99, size=2),
            groups.score(ask("b"), seconds=99, size=2),
        )
        assert now() == pytest.approx(0.5)
        await asyncio.gather(
            groups.score(ask("a", "q2"), seconds=99),
            groups.score(ask("b", "q2"), seconds=99, window=3),
        )
        assert now() == pytest.approx(4.0)
        await asyncio.gather(*(groups.score(ask("x", "q3"), seconds=99, size=99) for _ in range(4)))
        assert now() == pytest.approx(4.5)  # no group is larger than what the judge takes

    run(scenario)
    assert list(map(len, judge.groups)) == [2, 2, 4]


def test_a_client_that_goes_away_leaves_its_group():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=2, size=3))
        gone = asyncio.ensure_future(groups.score(ask("gone"), seconds=9))
        stays = asyncio.ensure_future(groups.score(ask("stays"), seconds=9))
        await asyncio.sleep(1)
        gone.cancel()
        share = await stays
        assert now() == pytest.approx(2.5)
        return share

    assert run(scenario).size == 1
    assert judge.groups == [("stays",)]


def test_a_group_that_all_have_left_is_not_judged():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=2))
        gone = asyncio.ensure_future(groups.score(ask("gone"), seconds=9))
        await asyncio.sleep(1)
        gone.cancel()
        await asyncio.sleep(10)
        assert groups.waiting == 0

    run(scenario)
    assert not judge.asked


def test_who_comes_back_finds_its_place_in_the_running_group():
    judge = Judge(seconds=10)

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1, size=2))
        first = asyncio.ensure_future(groups.score(ask("a"), seconds=99))
        gone = asyncio.ensure_future(groups.score(ask("bb"), seconds=99))
        await asyncio.sleep(5)
        gone.cancel()
        await asyncio.sleep(1)
        again = await groups.score(ask("bb"), seconds=99)
        assert now() == pytest.approx(10)
        assert (await first).verdict is again.verdict
        return again

    assert run(scenario).score == 3.0
    assert len(judge.asked) == 1


def test_who_comes_back_later_gets_the_score_of_its_group_once():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1, size=2), keep=60)
        first = asyncio.ensure_future(groups.score(ask("a"), seconds=99))
        gone = asyncio.ensure_future(groups.score(ask("bb"), seconds=99))
        await asyncio.sleep(0.2)
        gone.cancel()
        share = await first
        await asyncio.sleep(30)
        again = await groups.score(ask("bb"), seconds=99)
        assert again == Share(share.verdict, 1)
        other = await groups.score(ask("bb"), seconds=99)  # not a second time
        assert other.size == 1

    run(scenario)
    assert judge.groups == [("a", "bb"), ("bb",)]


def test_a_place_is_not_kept_for_ever():
    judge = Judge()

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1, size=2), keep=60)
        first = asyncio.ensure_future(groups.score(ask("a"), seconds=99))
        gone = asyncio.ensure_future(groups.score(ask("bb"), seconds=99))
        await asyncio.sleep(0.2)
        gone.cancel()
        await first
        await asyncio.sleep(61)
        assert (await groups.score(ask("bb"), seconds=99)).size == 1

    run(scenario)


def test_work_that_nobody_comes_back_for_is_given_up():
    judge = Judge(seconds=1000)

    async def scenario():
        groups = Groups(judge, GroupOptions(window=0), keep=60)
        gone = asyncio.ensure_future(groups.score(ask("a"), seconds=9999))
        await asyncio.sleep(1)
        gone.cancel()
        await asyncio.sleep(2000)

    run(scenario)
    assert len(judge.asked) == 1 and judge.ended == 0


def test_a_rollout_is_given_up_at_its_deadline_and_its_work_is_not_lost():
    judge = Judge(seconds=10)

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1, size=1))
        with pytest.raises(DeadlineExceeded) as found:
            await groups.score(ask("a"), seconds=4)
        assert now() == pytest.approx(4) and found.value.retry_after == 1
        await asyncio.sleep(1)
        await groups.score(ask("a"), seconds=99)
        assert now() == pytest.approx(10)

    run(scenario)
    assert len(judge.asked) == 1


@pytest.mark.parametrize("error", [Overloaded("full", 3), UserError("too long"), KeyError("bug")])
def test_an_error_reaches_every_member_and_leaves_nothing(error):
    judge = Judge()
    judge.error = error

    async def scenario():
        groups = Groups(judge, GroupOptions(window=1, size=2))
        found = await asyncio.gather(
            *(groups.score(ask(text), seconds=9) for text in "ab"), return_exceptions=True
        )
        assert found == [error, error]
        judge.error = None
        await asyncio.gather(*(groups.score(ask(text), seconds=9) for text in "ab"))

    run(scenario)
    assert judge.groups == [("a", "b"), ("a", "b")]


def test_a_failed_judgement_is_no_share():
    async def scenario():
        groups = Groups(Judge(), GroupOptions(window=1, size=2))
        return await asyncio.gather(
            *(groups.score(ask(text), seconds=9) for text in ("a", "unreadable")),
            return_exceptions=True,
        )

    found = run(scenario)
    assert all(isinstance(error, JudgementFailed) for error in found)
    assert "no_box: 1" in str(found[0])


def test_a_group_that_is_given_up_tells_who_comes_back_just_then():
    judge = Judge(seconds=1000)

    async def scenario():
        groups = Groups(judge, GroupOptions(window=0))
        waiting = asyncio.ensure_future(groups.score(ask("a"), seconds=9999))
        await asyncio.sleep(1)
        for group in next(iter(groups._closed.values())):
            group.task.cancel()  # pyright: ignore
        with pytest.raises(Unavailable):
            await waiting

    run(scenario)


@pytest.mark.parametrize("options", [{"window": -1.0}, {"window": float("nan")}, {"size": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match="--groups"):
        GroupOptions(**options)


@dataclasses.dataclass(frozen=True)
class Arrival:
    time: float
    prompt: str
    response: str
    leaves_after: float | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        time=st.floats(0, 10),
        prompt=st.sampled_from("pq"),
        response=st.sampled_from(["", "a", "bb", "ccc", "dddd"]),
        leaves_after=st.none() | st.floats(0, 4),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(arrivals=ARRIVALS, size=st.none() | st.integers(1, 6), window=st.floats(0, 3))
def test_whoever_comes_and_goes(arrivals: list[Arrival], size: int | None, window: float):
    judge = Judge(seconds=0.5)
    got: list[tuple[Arrival, Share, float]] = []

    async def client(groups: Groups, arrival: Arrival) -> None:
        await asyncio.sleep(arrival.time)
        call = groups.score(ask(arrival.response, arrival.prompt), seconds=100)
        try:
            share = await asyncio.wait_for(call, arrival.leaves_after)
        except TimeoutError:
            return
        got.append((arrival, share, now() - arrival.time))

    async def scenario():
        groups = Groups(judge, GroupOptions(window, size), most=6)
        await asyncio.gather(*(client(groups, arrival) for arrival in arrivals))
        assert groups.waiting == 0

    run(scenario)
    stayed = [arrival for arrival in arrivals if arrival.leaves_after is None]
    answered = Counter(id(arrival) for arrival, _, _ in got)
    assert all(answered[id(arrival)] == 1 for arrival in stayed)  # each once, none lost
    for arrival, share, seconds in got:
        # Its own score, and never later than its window and the judge's time.
        assert share.score == 1 + len(arrival.response) % 10
        assert seconds <= window + 0.5 + 1e-6
        assert 1 <= share.size <= (size or 6)
    # Nothing was judged that nobody sent, and no more often than it was sent.
    sent = Counter(arrival.response for arrival in arrivals)
    judged = Counter(response for responses in judge.groups for response in responses)
    assert judged <= sent
    # Nobody has another's place.
    places = Counter((id(share.verdict), share.index) for _, share, _ in got)
    assert max(places.values(), default=1) == 1
