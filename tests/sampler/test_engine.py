"""Properties of sampling: sharing, log-probabilities, keyed randomness, stops, shapes, errors."""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax
import numpy as np
import pytest

from grm_jax.data.collate import Example, collate
from grm_jax.model.batch import completion_logprobs
from grm_jax.sampler import engine
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request, at_once


def requests(prompts, samples=(0, 1, 2)) -> list[Request]:
    return [Request(name, prompt, tuple(samples)) for name, prompt in prompts.items()]


@pytest.fixture(scope="module")
def usual(prompts, draw_samples):
    """Three samples of each prompt, as most tests compare with."""
    return draw_samples(requests(prompts))


def test_a_shared_prompt_is_a_repeated_prompt(prompts, usual, draw_samples, same_samples):
    single = [Request(name, prompt, (i,)) for name, prompt in prompts.items() for i in range(3)]
    same_samples(usual, draw_samples(single))


def test_samples_of_one_prompt_differ_and_the_same_seed_repeats(
    prompts, usual, draw_samples, same_samples
):
    for name in prompts:
        texts = {tuple(usual[name, i].tokens.tolist()) for i in range(3)}
        assert len(texts) == 3
    same_samples(usual, draw_samples(requests(prompts)))


def test_another_key_draws_other_tokens(prompts, usual, draw_samples):
    other = draw_samples(requests(prompts), seed=1)
    assert all(usual[name].tokens.tolist() != other[name].tokens.tolist() for name in usual)


def test_another_id_draws_other_tokens(prompts, usual, draw_samples):
    found = draw_samples([Request(f"not {n}", p, (0, 1, 2)) for n, p in prompts.items()])
    for name, index in usual:
        other = found[f"not {name}", index]
        assert usual[name, index].tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows": 2},
        {"max_rows": 4, "chunk": 2},
        {"prefill_tokens": 1},
        {"page": 4},
        {"page": 24, "max_rows": 64},
        {"chunk": 100},
        {"refill": False, "max_rows": 4},
    ],
    ids=str,
)
def test_shapes_do_not_change_tokens(
    change, prompts, usual, draw_samples, make_sampler, base_engine, same_samples
):
    sampler = make_sampler(engine=dataclasses.replace(base_engine, **change))
    same_samples(usual, draw_samples(requests(prompts), sampler=sampler))


def test_companions_do_not_change_tokens(prompts, usual, draw_samples, same_samples):
    crowd = {f"other {i}": (5 + i, 9, 20 - i) for i in range(4)}
    found = draw_samples([*requests(crowd, (0, 1, 7)), *reversed(requests(prompts))])
    same_samples(usual, {name: found[name] for name in usual})


def test_sample_indices_name_the_samples(prompts, usual, draw_samples, same_samples):
    """Samples 2 and 1 drawn in another order, with others, are the samples 1 and 2."""
    found = draw_samples(requests(prompts, (2, 5, 1)))
    same_samples(
        {name: s for name, s in usual.items() if name[1] != 0},
        {name: s for name, s in found.items() if name[1] != 5},
    )


@pytest.fixture(scope="module")
def trainer_logprobs(model, params, prompts):
    """(sample, temperature, dtype) -> the trainer's log-probabilities of its tokens."""

    @functools.partial(jax.jit, static_argnums=2)
    def compute(batch, temperature, dtype):
        config = model.replace(compute_dtype=dtype)
        return completion_logprobs(
            params, config, batch, temperature=temperature, remat="none", chunk=1024
        )[0]

    def run(sample, temperature: float, dtype: str = "float32") -> np.ndarray:
        example = Example(prompts[sample.example_id], tuple(sample.tokens.tolist()))
        batch = collate([example], length=32, completion=12)
        return np.asarray(compute(batch, np.float32(temperature), dtype))[0, : len(sample.tokens)]

    return run


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("chunk", [6, 2], ids=["ring", "stash"])
def test_logprobs_are_the_trainers(
    prompts, draw_samples, make_sampler, base_engine, trainer_logprobs, temperature, chunk
):
    """Of the same tokens at the same temperature, however few of them the rings hold."""
    sampler = make_sampler(engine=dataclasses.replace(base_engine, chunk=chunk))
    found = draw_samples(requests(prompts), sampler=sampler, temperature=temperature)
    assert max(len(s.tokens) for s in found.values()) > 6
    assert ("stash" in {c.name for c in sampler.programs.compilations}) == (chunk == 2)
    for sample in found.values():
        expected = trainer_logprobs(sample, temperature)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
        assert (sample.logprobs < 0).all()


def test_greedy_is_the_argmax_and_its_logprobs_are_at_temperature_one(
    prompts, draw_samples, trainer_logprobs
):
    found = draw_samples(requests(prompts), temperature=0.0)
    for (name, _), sample in found.items():
        assert sample.tokens.tolist() == found[name, 0].tokens.tolist()
        np.testing.assert_allclose(sample.logprobs, trainer_logprobs(sample, 1.0), atol=1e-4)
    other = draw_samples(requests(prompts), temperature=0.0, seed=5)
    assert all(s.tokens.tolist() == other[name].tokens.tolist() for name, s in found.items())


NEVER = 1000  # no token


def test_stop_ids_are_arguments(prompts, draw_samples, make_sampler):
    """Two samplers with other stop ids: each stops at its own, and neither changes the other."""
    never = make_sampler(stop_ids=[NEVER])
    whole = draw_samples(requests(prompts), sampler=never)
    drawn = np.concatenate([s.tokens for s in whole.values()])
    stop = int(np.bincount(drawn).argmax())  # the most frequent: ends several of the samples
    for _ in range(2):
        cut = draw_samples(requests(prompts), sampler=make_sampler(stop_ids=[stop]))
        for name, sample in draw_samples(requests(prompts), sampler=never).items():
            assert sample.finish_reason == "length" and len(sample.tokens) == 11
            assert sample.tokens.tolist() == whole[name].tokens.tolist()
            stops = np.flatnonzero(sample.tokens == stop)
            expected = sample.tokens[: stops[0] + 1] if len(stops) else sample.tokens
            assert cut[name].tokens.tolist() == expected.tolist()
            assert cut[name].finish_reason == ("stop" if len(stops) else "length")
            np.testing.assert_allclose(
                cut[name].logprobs, sample.logprobs[: len(expected)], atol=1e-4
            )
        assert {s.finish_reason for s in cut.values()} == {"stop", "length"}


def test_a_stop_at_the_first_and_at_the_last_token(prompts, draw_samples, make_sampler):
    whole = draw_samples(requests(prompts), sampler=make_sampler(stop_ids=[NEVER]))
    tokens = whole["long", 0].tokens
    first = draw_samples(requests(prompts), sampler=make_sampler(stop_ids=[int(tokens[0])]))
    assert first["long", 0].tokens.tolist() == tokens[:1].tolist()
    assert first["long", 0].finish_reason == "stop"
    ends = [s for s in whole.values() if s.tokens[-1] not in s.tokens[:-1]]
    last = draw_samples(requests(prompts), sampler=make_sampler(stop_ids=[int(ends[0].tokens[-1])]))
    found = last[ends[0].example_id, ends[0].index]
    assert found.tokens.tolist() == ends[0].tokens.tolist()
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 6, 7])
def test_length_limits(limit, prompts, usual, draw_samples, make_sampler):
    """Limits below, at and above the chunk of 6: the first so many of the same tokens."""
    whole = draw_samples(requests(prompts), sampler=make_sampler(stop_ids=[NEVER]))
    found = draw_samples(
        requests(prompts), sampler=make_sampler(stop_ids=[NEVER]), max_new_tokens=limit
    )
    for name, sample in found.items():
        assert sample.tokens.tolist() == whole[name].tokens[:limit].tolist()
        assert len(sample.logprobs) == limit
        assert sample.finish_reason == "length"


def test_every_request_comes_back_once_and_statistics_add_up(prompts, draw_samples, make_sampler):
    sampler = make_sampler()
    uneven = requests(prompts) + [
        Request(f"{n}{i}", p, (i,)) for n, p in prompts.items() for i in range(3)
    ]
    found = draw_samples(uneven, sampler=sampler)
    assert found.keys() == {(r.example_id, i) for r in uneven for i in r.samples}
    assert sampler.stats.samples == len(found)
    assert sampler.stats.decode_tokens == sum(len(s.tokens) for s in found.values())
    prompt_tokens = sampler.stats.prefill_tokens + sampler.stats.shared_tokens
    assert prompt_tokens == sum(len(r.prompt) for r in uneven)


def test_nothing_compiles_again_for_the_same_shapes(prompts, draw_samples, make_sampler):
    sampler = make_sampler(stop_ids=[5])
    draw_samples(requests(prompts), sampler=sampler)
    before = len(sampler.programs.compilations)
    draw_samples(requests(prompts), sampler=sampler, temperature=0.3, seed=4)
    assert len(sampler.programs.compilations) == before
    assert {c.name for c in sampler.programs.compilations} >= {"decode", "prefill", "weights"}


def test_prompts_that_begin_alike_share_pages(draw_samples, make_sampler, same_samples):
    """As the orders of one item's responses do: the same samples, fewer tokens computed."""
    head = tuple(range(4, 21))  # two pages of 8, and one token more
    alike = [Request("r", (*head, 30 + i, 25, 7), (2 * i, 2 * i + 1)) for i in range(3)]
    usual, apart = make_sampler(), make_sampler(engine=EngineConfig(9, 8, 32, 6, share=False))
    found = draw_samples(alike, sampler=usual)
    same_samples(found, draw_samples(alike, sampler=apart))
    assert apart.stats.prefill_tokens == 3 * 20
    assert usual.stats.prefill_tokens == 20 + 2 * 4
    assert usual.stats.shared_tokens == 2 * 16


@pytest.mark.parametrize(
    "waiting, calls",
    [(1, [1]), (3, [1, 1, 1]), (4, [8]), (9, [16]), (20, [16, 8]), (18, [16, 1, 1])],
    ids=str,
)
def test_prompts_are_computed_in_few_sizes_at_least_half_full(waiting, calls):
    found = []
    while waiting > 0:
        found.append(at_once(waiting, 16))
        waiting -= found[-1]
    assert found == calls


def test_a_page_is_computed_over_those_before_it(draw_samples, make_sampler):
    """Not over as many as the deepest prompt has: that one has six, most have one."""
    sampler = make_sampler(engine=EngineConfig(8, 8, 8, 6))
    lengths = (48, 5, 6, 7, 3)
    draw_samples([Request(str(n), (*range(4, 4 + n // 2), *range(4, 4 + n - n // 2)), (0,))
                  for n in lengths], sampler=sampler)  # fmt: skip
    before = [c.shape[-1] for c in sampler.programs.compilations if c.name == "prefill"]
    assert sorted(before) == [0, 1, 2, 4, 8]


def test_caches_are_written_in_place(draw_samples, make_sampler, prompts, model):
    """No program copies the pages or the rings that it reads and writes: they fill a device."""
    sampler = make_sampler(engine=EngineConfig(9, 8, 8, 6))  # a page at a time: no equal shapes
    draw_samples(requests(prompts), sampler=sampler)
    heads, width = model.num_kv_heads, model.head_dim
    found = set()
    for (name, shape), program in sampler.programs._programs.items():
        if name == "prefill":
            _, _, plan, before = shape
            caches = [(plan.pages, plan.page)]
            found.add((name, before))
        elif name == "decode":
            _, plan, lanes, ring, *_ = shape
            caches = [(plan.pages, plan.page), (lanes, ring)]
            found.add(name)
        else:
            continue
        arrays = [f"f32[1,{rows},{heads},{width},{slots}]" for rows, slots in caches]
        arrays += [f"f32[1,{rows},{heads},{slots},{width}]" for rows, slots in caches]
        lines = program.as_text().splitlines()
        assert any(array in line for array in arrays for line in lines)
        copies = [line for line in lines if " copy(" in line]
        assert not [line for line in copies if any(f"= {array}" in line for array in arrays)]
    assert found >= {("prefill", 0), ("prefill", 1), "decode"}


def test_pages_in_bfloat16_are_written_in_place_on_a_cpu(
    draw_samples, make_params, one_device, prompts, model
):
    """XLA's CPU compiler converts all of an array of bfloat16 to write a part of it."""
    config = model.replace(compute_dtype="bfloat16")
    weights = jax.tree.map(lambda x: x.astype("bfloat16"), make_params(config, 0))
    sampler = Sampler(config, [1000], EngineConfig(9, 8, 8, 6), one_device)
    draw_samples(requests(prompts), sampler=sampler, weights=weights)
    heads, width = model.num_kv_heads, model.head_dim
    found = set()
    for (name, shape), program in sampler.programs._programs.items():
        if name == "prefill":
            _, _, plan, before = typing.cast(tuple, shape)
            found.add(before)
            text = program.as_text()
            assert f"u16[1,{plan.pages},{heads},{width},{plan.page}]" in text
            for slots in (f"{width},{plan.page}", f"{plan.page},{width}"):
                for dtype in ("f32", "bf16"):
                    assert f"{dtype}[1,{plan.pages},{heads},{slots}]" not in text
    assert found >= {0, 1}


def test_refill_keeps_lanes_busy(draw_samples, make_sampler, same_samples, model, params):
    """Long and short samples: the same tokens, in fewer steps than a batch at a time."""
    many = [Request(f"p{i}", (5 + i % 7, 9, 17), (0, 1)) for i in range(24)]
    quick = make_sampler([3, 7, 11], EngineConfig(8, 8, 64, 2))
    batch = make_sampler([3, 7, 11], EngineConfig(8, 8, 64, 2, refill=False))
    found = draw_samples(many, sampler=quick, max_new_tokens=60)
    same_samples(found, draw_samples(many, sampler=batch, max_new_tokens=60))
    assert quick.stats.occupancy > 1.2 * batch.stats.occupancy
    assert quick.stats.decode_tokens == sum(len(s.tokens) for s in found.values())


def test_a_long_tail_moves_to_fewer_lanes(draw_samples, make_sampler, same_samples):
    """With its stashed tokens: the last samples, of many blocks each, are the same ones."""
    many = [Request(f"p{i}", (5 + i % 7, 9, 17), (0, 1)) for i in range(12)]
    wide = make_sampler([3, 7, 11], EngineConfig(8, 8, 64, 2))
    tight = make_sampler([3, 7, 11], EngineConfig(8, 8, 64, 2, min_lanes=1))
    found = draw_samples(many, sampler=tight, max_new_tokens=60)
    same_samples(found, draw_samples(many, sampler=wide, max_new_tokens=60))
    assert tight.stats.lane_steps < wide.stats.lane_steps
    assert {"compact", "stash", "grow stash"} <= {c.name for c in tight.programs.compilations}


def test_what_is_not_wanted_is_not_drawn(prompts, usual, make_sampler, params, same_samples):
    """Adaptive k: an example's samples that have not begun are dropped."""
    sampler = make_sampler(engine=EngineConfig(2, 8, 32, 4))
    found = {}

    def wanted(request):
        return not any(example == request.example_id for example, _ in found)

    config = SamplingConfig(max_new_tokens=11)
    for s in sampler.sample(params, requests(prompts), config, jax.random.key(0), wanted=wanted):
        found[s.example_id, s.index] = s
    assert {name for name, _ in found} == set(prompts)
    assert len(found) + sampler.stats.dropped == 9
    assert sampler.stats.dropped > 2
    same_samples(found, {name: usual[name] for name in found})


def test_a_budget_of_bytes_is_kept(prompts, usual, draw_samples, make_sampler, same_samples, model):
    token = 2 * 2 * model.num_kv_heads * model.head_dim * 4
    small = make_sampler(engine=EngineConfig(9, 8, 32, 6, cache_bytes=60 * token))
    same_samples(usual, draw_samples(requests(prompts), sampler=small))
    assert 0 < small.stats.cache_bytes <= 60 * token
    with pytest.raises(ValueError, match=r"one sample needs .* room for .* lower the length limit"):
        none = make_sampler(engine=EngineConfig(9, 8, 32, 6, cache_bytes=20 * token))
        draw_samples(requests(prompts), sampler=none)


@pytest.mark.parametrize("chunk", [6, 2], ids=["ring", "stash"])
def test_in_bfloat16_logprobs_are_the_trainers(
    chunk, model, params, prompts, one_device, base_engine, trainer_logprobs
):
    """With the same roundings: as near as sums of float32 in another order. In a wider model, such
    a sum lands on the other side of a rounding now and then, and the gap is a bfloat16 step of a
    few numbers; bfloat16 itself is off by about 0.02 here."""
    half = model.replace(compute_dtype="bfloat16")
    engine_config = dataclasses.replace(base_engine, chunk=chunk)
    sampler = engine.Sampler(half, [NEVER], engine_config, one_device)
    config = SamplingConfig(max_new_tokens=11)
    off = []
    for sample in sampler.sample(params, requests(prompts), config, jax.random.key(0)):
        assert sample.logprobs.dtype == np.float32
        expected = trainer_logprobs(sample, 1.0, "bfloat16")
        np.testing.assert_allclose(sample.logprobs, expected, atol=2e-6)
        off.append(np.abs(expected - trainer_logprobs(sample, 1.0)).max())
    assert max(off) > 0.01  # it was bfloat16


@pytest.mark.parametrize("option", ["int8_weights", "int8_cache"])
def test_8_bit_options_stay_near(option, prompts, draw_samples, make_sampler, trainer_logprobs):
    """Off by default; log-probabilities move by a few hundredths, not more."""
    # With a chunk of 2, cached tokens and their scales move to the stash.
    engine = dataclasses.replace(make_sampler().engine, chunk=2, **{option: True})
    found = draw_samples(requests(prompts), sampler=make_sampler(engine=engine))
    gaps = [
        np.abs(sample.logprobs - trainer_logprobs(sample, 1.0)).max() for sample in found.values()
    ]
    assert 1e-4 < max(gaps) < 0.3


@pytest.mark.slow
def test_a_prompt_of_5000_tokens_with_a_window_of_4096(small, make_params, one_device):
    """Shared by three samples, or one each: the same, with the trainer's log-probabilities."""
    model = small.replace(num_layers=2, sliding_window=4096, max_position=8192)
    params = make_params(model, 0)
    prompt = tuple(np.random.default_rng(0).integers(4, 40, 5000).tolist())
    config, key = SamplingConfig(max_new_tokens=8), jax.random.key(0)
    sampler = engine.Sampler(model, [NEVER], EngineConfig(3, 512, 2048, 4), one_device)
    shared = list(sampler.sample(params, [Request("a", prompt, (0, 1, 2))], config, key))
    single = [Request("a", prompt, (i,)) for i in range(3)]
    alone = engine.Sampler(model, [NEVER], EngineConfig(1, 1024, 8192, 8), one_device)
    repeated = list(alone.sample(params, single, config, key))
    assert alone.stats.prefill_tokens == 3 * sampler.stats.prefill_tokens
    by_index = {sample.index: sample for sample in repeated}
    batch = collate(
        [Example(prompt, tuple(sample.tokens.tolist())) for sample in shared[:1]],
        length=5008,
        completion=8,
    )
    trained, _ = completion_logprobs(
        params, model, batch, temperature=1.0, remat="none", chunk=1024
    )
    np.testing.assert_allclose(shared[0].logprobs, trained[0], atol=1e-4)
    for sample in shared:
        assert sample.tokens.tolist() == by_index[sample.index].tokens.tolist()


def test_errors_name_the_example_and_the_fix(draw_samples):
    with pytest.raises(ValueError, match="example a: the prompt has no tokens"):
        draw_samples([Request("a", (), (0,))])
    with pytest.raises(ValueError, match="example b: the prompt has no tokens"):
        draw_samples([Request("ok", (4,), (0,)), Request("b", (), (0,))])
    with pytest.raises(ValueError, match=r"example c: 7 .* 90 new ones .* 96 positions"):
        draw_samples([Request("c", (4,) * 7, (0,))], max_new_tokens=90)


def test_the_last_position_can_be_used(draw_samples, make_sampler):
    sampler = make_sampler(stop_ids=[NEVER], engine=EngineConfig(1, 8, 64, 100))
    (sample,) = draw_samples(
        [Request("c", (4,) * 6, (0,))], sampler=sampler, max_new_tokens=90
    ).values()
    assert len(sample.tokens) == 90
