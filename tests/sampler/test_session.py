"""Sessions: requests come and go while others run, each with settings of its own."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from grm_jax.errors import UserError
from grm_jax.model import heads, transformer
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request

ENGINE = EngineConfig(max_rows=64, page=8, prefill_tokens=32, chunk=4, min_lanes=1)
PLAIN = SamplingConfig(max_new_tokens=13)
WATCH = (9, 3, 30)


@pytest.fixture(scope="module")
def sampler(make_sampler):
    """One for all, so that its programs are compiled once."""
    return make_sampler(engine=ENGINE)


@pytest.fixture(scope="module")
def open_session(sampler, params):
    """(sampler, **options) -> a session for the prompts of these tests, with 8 lanes."""

    def start(sampler=sampler, **options):
        return sampler.open(
            params,
            longest_prompt=24,
            max_new_tokens=24,
            samples=8,
            readers=4,
            key=jax.random.key(0),
            **options,
        )

    return start


@pytest.fixture(scope="module")
def reference(make_sampler, draw_samples):
    """(requests, **settings) -> what `Sampler.sample` draws for these alone."""
    return functools.partial(draw_samples, sampler=make_sampler())


def finish(session):
    """Steps until the session is idle: samples by (id, index)."""
    found = {}
    while not session.idle:
        found |= {(s.example_id, s.index): s for s in session.step()}
    return found


def requests(prompts, samples=(0, 1, 2)) -> list[Request]:
    return [Request(name, prompt, tuple(samples)) for name, prompt in prompts.items()]


def test_requests_that_come_late_get_the_samples_of_those_known_before(
    prompts, open_session, reference, same_samples
):
    session, found = open_session(), {}
    assert session.idle and session.step() == []
    for request in requests(prompts):
        session.add(request, PLAIN)
        assert not session.idle
        found |= {(s.example_id, s.index): s for s in session.step()}
    found |= finish(session)
    same_samples(reference(requests(prompts), max_new_tokens=13), found)
    assert session.idle and session.step() == []


SETTINGS = {
    "greedy": {"temperature": 0.0, "max_new_tokens": 17},
    "plain": {"max_new_tokens": 13},
    "sharp": {"temperature": 0.5, "max_new_tokens": 24},
    "filters": {"temperature": 1.5, "top_k": 9, "top_p": 0.7, "min_p": 0.05, "max_new_tokens": 14},
}


@pytest.mark.parametrize("repeatable", [False, True])
def test_each_request_has_its_own_settings(
    repeatable, prompts, open_session, reference, same_samples
):
    """What it gets is what it gets when all requests have these settings."""
    session = open_session(**({"repeatable": True, "watch": WATCH} if repeatable else {}))
    expected = {}
    for name, settings in SETTINGS.items():
        request = Request(name, prompts["long"], (0, 1))
        session.add(request, SamplingConfig(**settings))
        expected |= reference([request], **settings)
    same_samples(expected, finish(session))


def test_without_settings_a_sample_may_be_as_long_as_the_session_allows(prompts, open_session):
    session = open_session()
    session.add(Request("r", prompts["short"], tuple(range(8))))
    found = finish(session).values()
    assert all(len(s.tokens) == 24 for s in found if s.finish_reason == "length")
    assert max(len(s.tokens) for s in found) == 24


def test_what_is_cancelled_makes_room_and_never_comes_back(
    prompts, open_session, sampler, reference, same_samples
):
    session, stats = open_session(), sampler.stats
    before = stats.cancelled, stats.dropped
    other, late = Request("other", prompts["long"], (0, 1)), Request("late", prompts["short"], (0,))
    session.add(other, PLAIN)
    session.add(Request("wrong", prompts["window"], tuple(range(10))))
    session.add(late, PLAIN)

    def running() -> list[str]:
        return [a.prompt.request.example_id for a in session.scheduler.running.values()]

    found = {(s.example_id, s.index): s for s in session.step()}
    assert running().count("wrong") == 4 - sum(name == "wrong" for name, _ in found)
    session.cancel("wrong")
    session.cancel("unknown")
    assert "wrong" not in running() and not session.idle
    assert stats.cancelled - before[0] + stats.dropped - before[1] == 10 - len(found)
    found |= finish(session)
    same_samples(reference([other, late], max_new_tokens=13), found)
    session.add(Request("wrong", prompts["window"], (0,)), PLAIN)  # its name is free again
    assert len(finish(session)) == 1


def test_requests_that_can_not_be_served_are_refused_at_once(prompts, open_session):
    session = open_session()
    with pytest.raises(UserError, match="example a: the prompt has no tokens"):
        session.add(Request("a", (), (0,)))
    with pytest.raises(UserError, match=r"example b: 25 prompt tokens; .* at most 24"):
        session.add(Request("b", (4,) * 25, (0,)))
    with pytest.raises(UserError, match=r"example c: 25 new tokens; .* at most 24"):
        session.add(Request("c", (4,), (0,)), SamplingConfig(max_new_tokens=25))
    with pytest.raises(UserError, match=r"example d: 24 .* 90 new ones .* 96 positions"):
        session.add(Request("d", (4,) * 24, (0,)), SamplingConfig(max_new_tokens=90))
    session.add(Request("e", (4,), (0, 1)))
    for samples in ((1,), (2, 2)):
        with pytest.raises(ValueError, match="example e: two samples with the same index"):
            session.add(Request("e", (4,), samples))
    assert len(finish(session)) == 2


def test_nothing_is_added_while_a_session_drains(prompts, open_session):
    session = open_session()
    session.add(Request("a", prompts["short"], (0,)), PLAIN)
    samples = session.drain()
    session.add(Request("b", prompts["short"], (0,)), SamplingConfig(max_new_tokens=4))
    assert next(samples).example_id == "b"
    with pytest.raises(ValueError, match="until `drain` has ended"):
        session.add(Request("c", prompts["short"], (0,)))
    assert [s.example_id for s in samples] == ["a"]
    session.add(Request("c", prompts["short"], (0, 1, 2)), PLAIN)
    assert len(finish(session)) == 3


def test_a_seed_replaces_the_id(prompts, open_session):
    session = open_session()
    for name, seed in [("a", None), ("b", "a"), ("c", None), ("d", "")]:
        session.add(Request(name, prompts["long"], (0, 1), seed), PLAIN)
    found = {name: s.tokens.tolist() for name, s in finish(session).items()}
    assert found["a", 0] == found["b", 0] and found["a", 1] == found["b", 1]
    assert len({tuple(found[name, 0]) for name in "acd"}) == 3


def crowd(seed: int) -> list[tuple[Request, SamplingConfig]]:
    """64 requests with other prompts and settings."""
    rng = np.random.default_rng(seed)
    return [
        (
            Request(
                f"other {i}",
                tuple(rng.integers(4, 39, rng.integers(1, 25)).tolist()),
                tuple(range(rng.integers(1, 6))),
            ),
            SamplingConfig(
                temperature=float(rng.choice([0.0, 0.5, 1.0])),
                max_new_tokens=int(rng.integers(1, 25)),
                top_k=int(rng.choice([0, 4])),
            ),
        )
        for i in range(64)
    ]


def with_crowd(session, mine, seed: int):
    """The samples of requests that were added to a session one by one, among 64 others."""
    rng, found = np.random.default_rng(seed), {}
    waiting = [*crowd(seed), *mine]
    order = rng.permutation(len(waiting)).tolist()
    while order or not session.idle:
        for place in order[: rng.integers(12)]:
            session.add(*waiting[place])
            order = order[1:]
        found |= {(s.example_id, s.index): s for s in session.step()}
    assert len(found) == sum(len(request.samples) for request, _ in waiting)
    return found


def assert_same_bits(alone, found) -> None:
    for name, sample in alone.items():
        assert found[name].tokens.tolist() == sample.tokens.tolist(), name
        assert found[name].logprobs.tobytes() == sample.logprobs.tobytes(), name
        assert found[name].watched.tobytes() == sample.watched.tobytes(), name


def mine(prompts) -> list[tuple[Request, SamplingConfig]]:
    """Prompts of one to three pages; samples of one chunk and of several, drawn in all ways."""
    settings = [
        {"max_new_tokens": 24},
        {"temperature": 0.0, "max_new_tokens": 11},
        {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 24},
        {"max_new_tokens": 3},
    ]
    return [
        (Request(f"{name} {i}", prompt, (0, 3)), SamplingConfig(**values))
        for name, prompt in (prompts | {"longer": tuple(range(5, 27))}).items()
        for i, values in enumerate(settings)
    ]


def test_a_repeatable_session_gives_the_same_bits_alone_and_in_a_crowd(
    prompts, open_session, make_sampler
):
    """Also when the crowd is another one, and after a restart."""
    options = {"repeatable": True, "watch": WATCH}
    session, alone = open_session(**options), {}
    for request in mine(prompts):
        session.add(*request)
        alone |= finish(session)
    compiled = session.runner.programs.compilations
    before = len(compiled)
    for seed in (0, 1, 2):
        assert_same_bits(alone, with_crowd(session, mine(prompts), seed))
    assert len(compiled) == before, "no program of another size"
    assert {"stash", "prefill"} <= {c.name for c in compiled}
    again = open_session(make_sampler(engine=ENGINE), **options)
    assert_same_bits(alone, with_crowd(again, mine(prompts), 3))


def test_a_warm_session_compiles_nothing_later_and_draws_the_same(
    prompts, open_session, make_sampler
):
    options, requests = {"repeatable": True, "watch": WATCH}, mine(prompts)
    cold, warm = (open_session(make_sampler(engine=ENGINE), **options) for _ in range(2))
    warm.warm_up()
    assert warm.idle and warm.stats.samples == warm.stats.prefill_tokens == 0
    compiled = len(warm.runner.programs.compilations)
    for session in (cold, warm):
        for request in requests:
            session.add(*request)
    assert_same_bits(finish(cold), finish(warm))
    assert len(warm.runner.programs.compilations) == compiled
    assert len(cold.runner.programs.compilations) == compiled, "nothing is compiled in vain"
    with pytest.raises(ValueError, match="repeatable"):
        open_session().warm_up()


def test_watched_tokens_have_the_log_probabilities_of_the_whole_distribution(
    prompts, open_session, reference, model, params, sampler
):
    """At temperature 1 and unfiltered, whatever is drawn; against a teacher-forced forward pass."""

    @functools.partial(jax.jit, static_argnums=1)
    def whole(tokens, config):
        hidden = transformer.encode(params, config, tokens, np.asarray([tokens.shape[1]]))
        return jax.nn.log_softmax(heads.logits(params, config, hidden))[0]

    session = open_session(repeatable=True, watch=WATCH)
    for name, settings in SETTINGS.items():
        session.add(Request(name, prompts["long"], (0, 1)), SamplingConfig(**settings))
    for sample in finish(session).values():
        row = [*prompts["long"], *sample.tokens.tolist()]
        row = np.asarray([row + [0] * (40 - len(row))])  # a causal model does not see the padding
        begin = len(prompts["long"]) - 1
        expected = np.asarray(whole(row, model))[begin : begin + len(sample.tokens)][:, WATCH]
        assert sample.watched.dtype == np.float32
        np.testing.assert_allclose(sample.watched, expected, atol=1e-4)
    request, key = Request("r", prompts["long"], (0,)), jax.random.key(0)
    (one,) = sampler.sample(params, [request], PLAIN, key, watch=WATCH)
    assert one.watched is not None and one.watched.shape == (len(one.tokens), 3)
    (other,) = reference([request], max_new_tokens=13).values()
    assert other.watched is None and other.tokens.tolist() == one.tokens.tolist()
