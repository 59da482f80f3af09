"""What runs where, by simulation: every sample once, nothing shared that must not be."""

from __future__ import annotations

import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request, Scheduler, Shape


def scheduler_of(requests, shape: Shape, shards: int = 1, **settings) -> Scheduler:
    scheduler = Scheduler(shape, shards, **settings)
    for request in requests:
        scheduler.add(request, SamplingConfig())
    return scheduler


@st.composite
def problems(draw):
    size = draw(st.sampled_from([2, 4]))
    heads = [tuple(range(i, i + size * draw(st.integers(0, 2)))) for i in (100, 200)]
    requests = []
    for i in range(draw(st.integers(1, 12))):
        head = draw(st.sampled_from(heads))
        prompt = (*head, *range(1000 * i, 1000 * i + draw(st.integers(1, 2 * size))))
        # Two requests an example, as with two orders of its responses.
        samples = range(10 * (i % 2), 10 * (i % 2) + draw(st.integers(1, 7)))
        requests.append(Request(f"r{i // 2}", prompt, tuple(samples)))
    deepest = max(-(-len(r.prompt) // size) for r in requests)
    shape = Shape(
        lanes=draw(st.integers(1, 6)),
        pages=deepest + draw(st.integers(0, 6)),
        page=size,
        readers=draw(st.integers(1, 5)),
        depth=deepest,
    )
    return requests, shape


@given(
    problems(),
    st.integers(1, 2),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(0, 99),
)
def test_every_sample_runs_once_and_memory_is_never_shared_wrongly(
    problem, shards, share, together, seed
):
    requests, shape = problem
    rng = random.Random(seed)
    scheduler = scheduler_of(requests, shape, shards, share=share, together=together)
    memory: dict[tuple[int, int], tuple[int, ...]] = {}  # page -> the prefix that it completes
    seen = collections.Counter()
    while not scheduler.idle:
        pages, admissions = scheduler.fill()
        for prompt, place in sorted(pages, key=lambda p: p[1]):
            page = prompt.pages[place]
            in_use = {
                (a.shard, p.index) for a in scheduler.running.values() for p in a.prompt.pages
            } - {(a.shard, p.index) for a in admissions for p in a.prompt.pages}
            assert (page.shard, page.index) not in in_use
            memory[page.shard, page.index] = prompt.request.prompt[: page.start + len(page.tokens)]
        for a in admissions:
            seen[a.prompt.request.example_id, a.sample] += 1
        readers = collections.Counter()
        lanes = collections.Counter()
        for (shard, lane), a in scheduler.running.items():
            lanes[shard, lane] += 1
            prompt = a.prompt.request.prompt
            for m, (page, rank) in enumerate(zip(a.prompt.pages, a.readers, strict=True)):
                readers[shard, page.index, rank] += 1
                assert 0 <= rank < shape.readers and 0 <= page.index < shape.pages
                assert memory[shard, page.index] == prompt[: (m + 1) * shape.page]
            assert lane < shape.lanes
        assert set(readers.values()) <= {1} and set(lanes.values()) <= {1}
        at_once = collections.Counter(
            a.prompt.request.example_id for a in scheduler.running.values()
        )
        assert together is None or max(at_once.values()) <= together
        # No lane stays free while a sample waits, if memory allows: something must run.
        assert scheduler.running
        for shard, lane in rng.sample(
            sorted(scheduler.running), rng.randint(1, len(scheduler.running))
        ):
            scheduler.retire(shard, lane)
    assert seen == {(r.example_id, s): 1 for r in requests for s in r.samples}


def test_a_free_lane_is_filled_at_once():
    requests = [Request(f"r{i}", (1, i), (0, 1, 2)) for i in range(4)]
    scheduler = scheduler_of(requests, Shape(lanes=4, pages=4, page=2, readers=4, depth=1))
    scheduler.fill()
    assert len(scheduler.running) == 4  # three of r0, one of r1
    scheduler.retire(0, 0)
    pages, admissions = scheduler.fill()
    assert not pages and [a.prompt.request.example_id for a in admissions] == ["r1"]


def test_shards_share_the_work():
    requests = [Request(f"r{i}", (1, i), (0, 1)) for i in range(4)]
    scheduler = scheduler_of(requests, Shape(lanes=4, pages=2, page=2, readers=2, depth=1), 2)
    _, admissions = scheduler.fill()
    assert collections.Counter(a.shard for a in admissions) == {0: 4, 1: 4}


@pytest.mark.parametrize("share", [True, False])
def test_common_beginnings_are_computed_once(share):
    """The page of the last token is a prompt's own, even where the whole prompt is known."""
    requests = [
        Request(f"r{i}", (1, 2, 3, 4, *end), (0,)) for i, end in enumerate([(5,), (6,), ()])
    ]
    shape = Shape(lanes=4, pages=9, page=2, readers=4, depth=3)
    pages, _ = scheduler_of(requests, shape, share=share).fill()
    assert len(pages) == (3 + 1 + 1 if share else 3 + 3 + 2)


def test_dropped_samples_are_counted():
    unwanted = {"r1"}
    requests = [Request(f"r{i}", (1, i), (0, 1, 2)) for i in range(3)]
    scheduler = scheduler_of(
        requests,
        Shape(lanes=2, pages=2, page=2, readers=2, depth=1),
        wanted=lambda r: r.example_id not in unwanted,
    )
    begun = []
    while not scheduler.idle:
        _, admissions = scheduler.fill()
        begun += [a.prompt.request.example_id for a in admissions]
        unwanted.add("r0")
        for at in list(scheduler.running):
            scheduler.retire(*at)
    assert begun == ["r0", "r0", "r2", "r2", "r2"]
    assert scheduler.dropped == 1 + 3


def test_none_waits_for_ever():
    """A prompt of all pages begins, though small ones that came later would fit at every moment."""
    shape = Shape(lanes=4, pages=4, page=2, readers=1, depth=4)
    scheduler = scheduler_of([Request(f"early {i}", (1, i), (0,)) for i in range(3)], shape)
    rng, begun = random.Random(0), []
    for turn in range(20):
        scheduler.add(Request(f"late {turn}", (1, 2), (0,)), SamplingConfig())
        if turn == 1:
            scheduler.add(Request("large", tuple(range(8)), (0, 1)), SamplingConfig())
        _, admissions = scheduler.fill()
        begun += [a.prompt.request.example_id for a in admissions]
        scheduler.retire(*rng.choice(sorted(scheduler.running)))
    added = [f"early {i}" for i in range(3)] + ["late 0", "late 1", "large", "large", "late 2"]
    assert begun[:8] == added


def test_a_cancelled_example_frees_what_it_has():
    shape = Shape(lanes=2, pages=3, page=2, readers=1, depth=2)
    names = ("a", "b", "a", "c")
    queue = [Request(name, (1, 2, i), (i,)) for i, name in enumerate(names)]
    scheduler = scheduler_of(queue, shape)
    _, admissions = scheduler.fill()
    assert [a.prompt.request.example_id for a in admissions] == ["a"]  # two pages each
    scheduler.cancel("a")
    assert not scheduler.running and scheduler.dropped == 1
    _, admissions = scheduler.fill()
    assert [a.prompt.request.example_id for a in admissions] == ["b"]
    scheduler.cancel("b")
    scheduler.cancel("c")
    assert scheduler.idle and scheduler.dropped == 2
    scheduler.add(Request("a", (1, 2, 3), (0,)), SamplingConfig())
    assert len(scheduler.fill()[1]) == 1
