"""The sampler's attention against the trainer's, in bfloat16, with a softcap and without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.attention import Places
from grm_jax.model.attention_backends import self_attention
from grm_jax.model.shape import Kind
from grm_jax.sampler.attend import Layout, lane_attend, page_attend
from grm_jax.sampler.cache import Pages, Ring, Stash, stored

LANES = 8


@pytest.fixture(scope="module")
def half(small):
    """One block; Gemma-2's softcap; a window that some of the keys lie outside of."""
    return small.replace(
        num_layers=2, head_dim=32, attn_softcap=50.0, sliding_window=48, compute_dtype="bfloat16"
    )


def vectors(config, rows: int, length: int, scale: float = 1.0) -> list[jax.Array]:
    """Queries [B, T, K, G, h], times `scale`, and keys and values [B, T, K, h], as large as a
    layer's are. Without a softcap, scores are large, and those of float32 depend on the order of
    addition: queries and keys then have few bits, so that the scores are exact."""
    rng = np.random.default_rng(length)
    shape = (rows, length, config.num_kv_heads)
    shapes = ((*shape, config.queries_per_kv, config.head_dim), *[(*shape, config.head_dim)] * 2)
    q, k, v = (rng.normal(size=s) for s in shapes)
    if config.attn_softcap is None:
        q, k = np.round(4 * q) / 4, np.round(4 * k) / 4
    return [jnp.asarray(x, jnp.bfloat16) for x in (q * scale, k, v)]


# With a softcap; without one, with scores up to 25, and up to hundreds.
CAPS = [(50.0, 1.0), (None, 1.0), (None, 16.0)]


def trainers(config, kind: Kind, q, k, v) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    window = config.sliding_window if kind == "local" else None
    compute = self_attention(
        Places(positions, positions), window=window, softcap=config.attn_softcap, backend="chunked"
    )
    return np.asarray(jax.jit(compute)(q, k, v).astype(jnp.float32))


def assert_same_bits(found: np.ndarray, expected: np.ndarray, but: float = 0.0) -> None:
    """But for a share of the numbers, which lie next to the expected ones in bfloat16: sums of
    float32 in another order can end on the other side of a rounding."""
    differ = found != expected
    assert differ.mean() <= but, f"{differ.sum()} of {differ.size}"
    np.testing.assert_allclose(found[differ], expected[differ], rtol=2**-7)


@pytest.mark.parametrize(("cap", "scale"), CAPS)
@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize(("keys", "but"), [(64, 0.0), (512, 1e-4)])
def test_a_page_has_the_trainers_bits(keys, but, kind, cap, scale, half):
    half = half.replace(attn_softcap=cap)
    q, k, v = vectors(half, 1, keys, scale)
    start, fill = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), keys)

    @jax.jit
    def run(q, k, v):
        return page_attend(half, start, fill, None, keys)(q, k, v, kind, {})[0]

    found = np.asarray(run(q, k, v).astype(jnp.float32))
    assert_same_bits(found, trainers(half, kind, q, k, v), but)


@pytest.mark.parametrize(("cap", "scale"), CAPS)
@pytest.mark.parametrize("kind", ["local", "global"])
def test_a_page_over_earlier_ones_has_the_trainers_bits(kind, cap, scale, half):
    """The last of three pages. Without a softcap, the peaks of its own keys are the higher ones
    for some queries, and the lower ones for others."""
    half, size = half.replace(attn_softcap=cap), 32
    q, k, v = vectors(half, 1, 3 * size, scale)
    parts = ("k", k[:, : 2 * size]), ("v", v[:, : 2 * size])
    pages = {name: jnp.moveaxis(x.reshape(1, 2, size, *x.shape[2:]), 2, 3) for name, x in parts}
    pages["k"] = pages["k"].swapaxes(3, 4)

    @jax.jit
    def run(q, k, v):
        start, fill = jnp.full((1, 1), 2 * size), jnp.full((1, 1), size)
        attend = page_attend(half, start, fill, jnp.asarray([[[0, 1]]]), size)
        return attend(q, k, v, kind, {"pages": pages})[0]

    found = np.asarray(run(*(x[:, 2 * size :] for x in (q, k, v))).astype(jnp.float32))
    assert_same_bits(found, trainers(half, kind, q, k, v)[:, 2 * size :], 2e-3)


def drawn_token(
    config, kind: Kind, q, k, v, *, int8: bool = False, grid: bool = False
) -> np.ndarray:
    """Attention of the last token of each row, which is the new one: the keys and values of those
    before it are in two pages, two blocks of the stash, and the ring."""
    keys = q.shape[1]
    prompt, drawn = keys // 2, keys // 2 - 1
    page, older = prompt // 2, keys // 4
    block = older // 2

    def cut(x: jax.Array, begin: int, end: int, size: int) -> jax.Array:
        """[B, T, K, ...] -> [1, pieces of every lane in turn, K, size, ...]."""
        pieces = x[:, begin:end].reshape(-1, size, *x.shape[2:])
        return jnp.moveaxis(pieces, 1, 2)[None]

    like = dict.fromkeys(("k_scale",)) if int8 else {}

    def held(begin: int, end: int, size: int) -> dict[str, jax.Array]:
        layer = {
            name: cut(x, begin, end, size) for name, x in stored({"k": k, "v": v}, like).items()
        }
        return layer | {"k": layer["k"].swapaxes(3, 4)}

    lanes = np.arange(LANES)
    twice = np.arange(2 * LANES)
    layout = Layout(
        start=jnp.asarray([twice % 2 * page]),
        fill=jnp.full((1, 2 * LANES), page),
        reader=jnp.asarray([twice // 2]),
        cell=jnp.asarray([np.stack([2 * lanes, 2 * lanes + 1], axis=1)]),
        used=jnp.ones((1, LANES, 2), bool),
        length=jnp.full((1, LANES), prompt),
        stashed=jnp.full((1, LANES), older),
        owner=jnp.asarray([twice // 2]),
        offset=jnp.asarray([twice % 2 * block]),
    )
    layer = {
        "pages": held(0, prompt, page),
        "stash": held(prompt, prompt + older, block),
        "ring": held(prompt + older, keys - 1, drawn - older),
    }
    blocks = ({"local": layer, "global": layer},)

    def of(name: str) -> tuple[Any, ...]:
        return tuple({slot: layer[name] for slot, layer in block.items()} for block in blocks)

    @jax.jit
    def run(q, k, v):
        pages = Pages(of("pages"), jnp.zeros(()))
        stash, ring = Stash(of("stash")), Ring(of("ring"), jnp.zeros((), jnp.int32))
        counts = jnp.full((1, LANES), drawn)
        attend = lane_attend(config, layout, counts, pages, stash, ring, grid=grid)
        return attend(*(x[None, :, -1] for x in (q, k, v)), kind, layer)[0]

    return np.asarray(run(q, k, v).astype(jnp.float32))[0]


@pytest.mark.parametrize(("cap", "scale"), CAPS)
@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("keys", [64, 512])
def test_a_drawn_token_has_the_trainers_bits(keys, kind, cap, scale, half):
    half = half.replace(attn_softcap=cap)
    q, k, v = vectors(half, LANES, keys, scale)
    found = drawn_token(half, kind, q, k, v)
    assert_same_bits(found, trainers(half, kind, q, k, v)[:, -1], 2e-3)


# Which of 64 tokens each part holds.
PARTS = {
    "page 0": (0, 16), "page 1": (16, 32), "block 0": (32, 40), "block 1": (40, 48),
    "ring": (48, 63), "itself": (63, 64),
}  # fmt: skip


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_without_a_softcap_one_part_may_outweigh_the_others(part, grid, half):
    """Its scores are eight times as large, so its peak is the highest, and some parts are 0. Every
    second lane has far higher peaks than the others, whose weights would be 0 beside them."""
    config = half.replace(attn_softcap=None, compute_dtype="float32")
    q, k, v = (x.astype(jnp.float32) for x in vectors(config, LANES, 64))
    begin, end = PARTS[part]
    k, q = k.at[:, begin:end].multiply(8), q.at[::2].multiply(16)
    found = drawn_token(config, "global", q, k, v, grid=grid)
    np.testing.assert_allclose(found, trainers(config, "global", q, k, v)[:, -1], atol=2e-6)


@pytest.mark.parametrize("cap", [50.0, None])
@pytest.mark.parametrize("grid", [False, True])
def test_8_bit_keys_have_their_scale_before_the_softmax(grid, cap, half):
    """As if the caches held the numbers for which the 8-bit integers stand."""
    config = half.replace(attn_softcap=cap, compute_dtype="float32")
    q, k, v = (x.astype(jnp.float32) for x in vectors(config, LANES, 64, 4.0))
    pieces = stored({"k": k, "v": v}, dict.fromkeys(("k_scale",)))
    meant = [pieces[name] * pieces[f"{name}_scale"][..., None] for name in ("k", "v")]
    # The new token is not in a cache.
    meant = [new.at[:, -1].set(old[:, -1]) for new, old in zip(meant, (k, v), strict=True)]
    found = drawn_token(config, "global", q, k, v, int8=True, grid=grid)
    np.testing.assert_allclose(found, drawn_token(config, "global", q, *meant), atol=2e-5)
