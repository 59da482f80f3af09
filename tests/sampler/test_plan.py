"""How much runs at once, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from grm_jax.model.params import count_params, param_table
from grm_jax.sampler import plan as sampler_plan
from grm_jax.sampler.cache import empty_ring
from grm_jax.sampler.options import EngineConfig
from grm_jax.sampler.plan import (
    cache_room,
    decode_weight_bytes,
    joined,
    make_plan,
    open_plan,
    power_of_two,
    step_up,
    token_bytes,
)
from grm_jax.sampler.schedule import Request

ENGINE = EngineConfig(max_rows=32, page=8, chunk=16)


def requests(count: int, samples: int, length: int = 5) -> list[Request]:
    return [Request(str(i), (i,) * length, tuple(range(samples))) for i in range(count)]


def test_a_cpu_keeps_rings_in_float32(small):
    """In bfloat16, that is twice as wide as pages and stash, and is counted."""
    half = small.replace(compute_dtype="bfloat16")
    given = ENGINE, requests(1, 32, 9), 40, 1
    here, elsewhere = (make_plan(half, *given, on_cpu=on_cpu) for on_cpu in (True, False))
    ringed = here.shape.lanes * here.ring
    assert here.shape == elsewhere.shape
    assert here.bytes - elsewhere.bytes == ringed * token_bytes(half)
    for on_cpu, dtype in ((True, "float32"), (False, "bfloat16")):
        ring = empty_ring(half, 1, 2, 4, on_cpu=on_cpu)
        assert {x.dtype for x in jax.tree.leaves(ring.blocks)} == {jnp.dtype(dtype)}
    assert make_plan(small, *given, on_cpu=True).bytes == make_plan(small, *given).bytes


def test_one_prompt_that_fits(small):
    """32 samples of one prompt of two pages: nothing to spare."""
    plan = make_plan(small, ENGINE, requests(1, 32, 9), 40, 1)
    s = plan.shape
    assert (s.lanes, s.pages, s.readers, s.depth) == (32, 2, 32, 2)
    # Two pages of 8, rings of two chunks, a block of 16 for a sample's 33rd to 40th token.
    assert plan.ring == 32 and plan.stash_sizes(32) == (32,)
    assert plan.bytes == (2 * 8 + 32 * 32 + 32 * 16) * token_bytes(small)


def test_the_stash_grows_to_what_the_longest_samples_need(small):
    plan = make_plan(small, ENGINE, requests(1, 8), 100, 1)
    assert plan.stash_sizes(8) == (8, 32, 40)  # five blocks of 16 behind a ring of 32
    assert plan.stash_sizes(2) == (2, 8, 10)
    assert plan.bytes == (8 + 8 * 32 + (32 + 40) * 16) * token_bytes(small)
    short = make_plan(small, ENGINE, requests(1, 8), 5, 1)
    assert (short.chunk, short.ring, short.stash_sizes(8)) == (5, 5, (0,))


def test_a_queue_has_pages_to_spare(small):
    """Half of each prompt's 8 samples at once: 8 prompts in the lanes, half as many that end."""
    plan = make_plan(small, ENGINE, requests(20, 8), 40, 1)
    shape = plan.shape
    assert (shape.lanes, shape.pages, shape.readers) == (32, 16, 4)  # 13, in steps of a third
    assert plan.oversubscription == 2
    batches = make_plan(small, EngineConfig(32, 8, chunk=16, refill=False), requests(20, 8), 40, 1)
    assert (batches.shape.lanes, batches.shape.pages, batches.shape.readers) == (32, 4, 8)
    assert batches.oversubscription == 1


def test_shards_share_the_lanes(small):
    shape = make_plan(small, ENGINE, requests(20, 8), 40, 4).shape
    assert shape.lanes == 8


def test_few_samples_take_few_lanes(small):
    shape = make_plan(small, ENGINE, requests(3, 1), 40, 1).shape
    assert (shape.lanes, shape.pages, shape.readers) == (4, 3, 1)


def test_common_beginnings_have_more_readers(small):
    orders = [Request("a", (1,) * 8 + (i,), (4 * i, 4 * i + 1, 4 * i + 2)) for i in range(4)]
    assert make_plan(small, ENGINE, orders, 40, 1).shape.readers == 16  # for 12
    apart = EngineConfig(max_rows=32, page=8, chunk=16, share=False)
    assert make_plan(small, apart, orders, 40, 1).shape.readers == 4
    # A template that begins all prompts is not what decides.
    examples = [Request(str(i), (1,) * 8 + (i,), (0, 1, 2)) for i in range(4)]
    assert make_plan(small, ENGINE, examples, 40, 1).shape.readers == 4


def test_beginnings_that_an_example_shares_count_once(small):
    """Four orders of 4 samples: two pages that all begin with, and one each."""
    orders = [Request("a", (1,) * 16 + (i,), tuple(range(4 * i, 4 * i + 4))) for i in range(4)]
    assert make_plan(small, ENGINE, orders, 40, 1).shape.pages == 6
    apart = EngineConfig(max_rows=32, page=8, chunk=16, share=False)
    assert make_plan(small, apart, orders, 40, 1).shape.pages == 12


def test_a_cpu_does_not_share_beginnings_with_many_readers(small):
    """They would make the grid of readers of every page as wide."""

    def plan(each: int, on_cpu: bool):
        orders = [
            Request("a", (1,) * 16 + (i,), tuple(range(each * i, each * i + each))) for i in (0, 1)
        ]
        return make_plan(small, ENGINE, orders, 40, 1, on_cpu=on_cpu)

    assert plan(16, True).shape.readers == 16 and not plan(16, True).share
    assert plan(16, False).shape.readers == 32 and plan(16, False).share
    assert plan(8, True).shape.readers == 16 and plan(8, True).share
    assert "common beginnings apart" in str(plan(16, True))


def test_page_counts_are_rounded(small):
    """Or each RL step, with prompts of other lengths, would compile its own programs."""
    found = set()
    for length in range(8, 40):
        some = [*requests(4, 8, 8), Request("long", (7,) * length, tuple(range(8)))]
        found.add(make_plan(small, ENGINE, some, 40, 1).shape.pages)
    assert found <= {4, 6, 8, 12}


def test_with_few_at_once_there_is_room_for_more_prompts(small):
    shape = make_plan(small, ENGINE, requests(40, 32), 40, 1, together=4).shape
    assert shape.readers == 4 and shape.pages >= 16
    assert make_plan(small, ENGINE, requests(1, 32), 40, 1, together=4).shape.lanes == 4


def test_heads_of_a_shard_may_be_split(small):
    whole = make_plan(small, ENGINE, requests(20, 8), 40, 1)
    assert make_plan(small, ENGINE, requests(20, 8), 40, 1, split=2).bytes == whole.bytes // 2


def test_the_budget_lowers_the_lanes(small):
    one = token_bytes(small)
    whole = make_plan(small, ENGINE, requests(20, 8), 40, 1)
    engine = EngineConfig(max_rows=32, page=8, chunk=16, cache_bytes=whole.bytes // 3)
    plan = make_plan(small, engine, requests(20, 8), 40, 1)
    assert plan.bytes <= whole.bytes // 3 and plan.shape.lanes == 8
    engine = EngineConfig(page=8, chunk=16, cache_bytes=8 * one)
    with pytest.raises(ValueError, match=r"one sample needs .* room for .*--max-new-tokens"):
        make_plan(small, engine, requests(20, 8), 40, 1)


def test_a_plan_for_requests_that_are_not_known(small):
    """Room for the longest prompts and samples, in as many lanes as were asked for."""

    def plan(samples=12, readers=4, **options):
        return open_plan(
            small, ENGINE, 1, longest_prompt=40, max_new_tokens=40, samples=samples,
            readers=readers, **options,
        )  # fmt: skip

    shape = plan().shape
    assert (shape.lanes, shape.readers, shape.depth) == (12, 4, 8)
    assert shape.pages >= 3 * 5 + 5
    assert plan(samples=100).shape.lanes == ENGINE.max_rows
    assert plan(readers=100).shape.readers == 12
    fixed = plan(repeatable=True)
    assert fixed.ring == ENGINE.chunk and fixed.stash_sizes(12) == (2 * 12,)
    small_budget = EngineConfig(max_rows=32, page=8, chunk=16, cache_bytes=plan().bytes // 2)
    fewer = open_plan(
        small, small_budget, 1, longest_prompt=40, max_new_tokens=40, samples=12, readers=4
    )
    assert fewer.shape.lanes < 12 and fewer.bytes <= plan().bytes // 2
    with pytest.raises(ValueError, match=r"one sample needs .* room for"):
        open_plan(
            small, EngineConfig(page=8, chunk=16, cache_bytes=100), 1,
            longest_prompt=40, max_new_tokens=40, samples=12, readers=4,
        )  # fmt: skip


def test_a_repeatable_plan_of_known_requests(small):
    usual, fixed = (
        make_plan(small, ENGINE, requests(3, 8), 40, 1, repeatable=repeatable)
        for repeatable in (False, True)
    )
    assert usual.shape == fixed.shape and fixed.repeatable
    assert fixed.ring == ENGINE.chunk and len(fixed.stash_sizes(fixed.shape.lanes)) == 1


def test_what_a_plan_covers(small):
    many = make_plan(small, ENGINE, requests(8, 2), 40, 1)
    few = make_plan(small, ENGINE, requests(4, 2), 40, 1)
    assert many.covers(few) and many.covers(many) and not few.covers(many)
    assert not many.covers(make_plan(small, ENGINE, requests(4, 2), 41, 1)), "longer samples"
    assert not many.covers(make_plan(small, ENGINE, requests(4, 2, 20), 40, 1)), "longer prompts"
    assert not many.covers(make_plan(small, ENGINE, requests(4, 4), 40, 1)), "more readers"
    assert not many.covers(make_plan(small, ENGINE, requests(4, 2), 40, 1, repeatable=True))
    assert many.longest == 8 and make_plan(small, ENGINE, requests(4, 2, 20), 40, 1).longest == 32


def test_two_plans_are_joined_where_that_is_cheap(small):
    a = make_plan(small, ENGINE, requests(8, 2), 40, 1)
    b = make_plan(small, ENGINE, requests(4, 3, 20), 30, 1)
    both = joined(small, ENGINE, b, a)
    assert both.covers(a) and both.covers(b)
    tight = dataclasses.replace(ENGINE, cache_bytes=both.bytes - 1)
    assert joined(small, tight, b, a) == b, "no room for both"
    assert joined(small, dataclasses.replace(ENGINE, cache_bytes=both.bytes), b, a) == both
    wide = make_plan(small, ENGINE, requests(1, 32), 40, 1)  # one page of 32 readers
    long = make_plan(small, ENGINE, requests(32, 1, 16), 40, 1)  # 64 pages of one
    assert joined(small, ENGINE, wide, long) == wide and joined(small, ENGINE, long, wide) == long
    apart = make_plan(small, dataclasses.replace(ENGINE, share=False), requests(8, 2), 40, 1)
    assert joined(small, ENGINE, apart, a) == apart


def test_8_bit_caches_are_smaller(small):
    assert token_bytes(small) == 4 * 2 * 2 * 8 * 4  # layers, k and v, heads, head_dim, float32
    assert token_bytes(small, int8=True) == 4 * 2 * 2 * (8 + 4)


def test_sizes():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]
    assert [step_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_room_is_what_other_things_leave(small, one_device):
    length, free = 100, 1e9
    room = cache_room(small, ENGINE, one_device, length, free)
    weights = 4 * count_params(param_table(small))
    assert decode_weight_bytes(small, one_device) == weights
    assert 0.9 * free - weights - 1e8 < room < 0.9 * free - weights
    assert cache_room(small, ENGINE, one_device, length, 0.0) == 0


def test_a_device_that_tells_limits_the_lanes(make_sampler, monkeypatch):
    sampler = make_sampler(engine=EngineConfig(32, 8, 32, 6))
    assert sampler.budget.within(30).cache_bytes is None, "a CPU tells nothing"
    asked = []
    monkeypatch.setattr(sampler_plan, "free_bytes", lambda mesh: asked.append(mesh) or 1e9)
    sampler = make_sampler(engine=EngineConfig(32, 8, 32, 6))
    assert sampler.budget.within(30) == sampler.budget.within(30)
    assert len(asked) == 1
    sampler.budget.forget()
    assert sampler.budget.within(30) and len(asked) == 2
    assert 0 < (sampler.budget.within(30).cache_bytes or 0) < 0.9e9
    given = make_sampler(engine=EngineConfig(32, 8, 32, 6, cache_bytes=5))
    assert given.budget.within(30).cache_bytes == 5 and len(asked) == 2
