"""The sampler's attention against the trainer's, in bfloat16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.attention import Places
from grm_jax.model.attention_backends import self_attention
from grm_jax.model.gemma2 import Kind
from grm_jax.model.params import LAYER_KINDS
from grm_jax.sampler.attend import Layout, lane_attend, page_attend
from grm_jax.sampler.cache import Pages, Ring, Stash

LANES = 8


@pytest.fixture(scope="module")
def half(small):
    """One block; Gemma-2's softcap; a window that some of the keys lie outside of."""
    return small.replace(
        num_layers=2, head_dim=32, attn_softcap=50.0, sliding_window=48, compute_dtype="bfloat16"
    )


def vectors(config, rows: int, length: int) -> list[jax.Array]:
    """Queries [B, T, K, G, h], and keys and values [B, T, K, h], as large as a layer's are."""
    rng = np.random.default_rng(length)
    shape = (rows, length, config.num_kv_heads)
    shapes = ((*shape, config.queries_per_kv, config.head_dim), *[(*shape, config.head_dim)] * 2)
    return [jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes]


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


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize(("keys", "but"), [(64, 0.0), (512, 1e-4)])
def test_a_page_has_the_trainers_bits(keys, but, kind, half):
    q, k, v = vectors(half, 1, keys)
    start, fill = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), keys)

    @jax.jit
    def run(q, k, v):
        return page_attend(half, start, fill, None, keys)(q, k, v, kind, {})[0]

    found = np.asarray(run(q, k, v).astype(jnp.float32))
    assert_same_bits(found, trainers(half, kind, q, k, v), but)


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("keys", [64, 512])
def test_a_drawn_token_has_the_trainers_bits(keys, kind, half):
    """Its keys and values are in two pages, two blocks of the stash, the ring and itself."""
    q, k, v = vectors(half, LANES, keys)
    prompt, drawn = keys // 2, keys // 2 - 1  # the last token is the new one
    page, older = prompt // 2, keys // 4
    block = older // 2

    def cut(x: jax.Array, begin: int, end: int, size: int) -> jax.Array:
        """[B, T, K, h] -> [1, pieces of every lane in turn, K, size, h]."""
        pieces = x[:, begin:end].reshape(-1, size, *x.shape[2:])
        return jnp.moveaxis(pieces, 1, 2)[None]

    def stored(begin: int, end: int, size: int) -> dict[str, jax.Array]:
        return {"k": cut(k, begin, end, size).swapaxes(3, 4), "v": cut(v, begin, end, size)}

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
        "pages": stored(0, prompt, page),
        "stash": stored(prompt, prompt + older, block),
        "ring": stored(prompt + older, keys - 1, drawn - older),
    }
    blocks = ({"local": layer, "global": layer},)

    def of(name: str) -> tuple[Any, ...]:
        return tuple({kind: block[kind][name] for kind in LAYER_KINDS} for block in blocks)

    @jax.jit
    def run(q, k, v):
        pages = Pages(of("pages"), jnp.zeros(()))
        stash, ring = Stash(of("stash")), Ring(of("ring"), jnp.zeros((), jnp.int32))
        counts = jnp.full((1, LANES), drawn)
        attend = lane_attend(half, layout, counts, pages, stash, ring)
        return attend(*(x[None, :, -1] for x in (q, k, v)), kind, layer)[0]

    found = np.asarray(run(q, k, v).astype(jnp.float32))[0]
    assert_same_bits(found, trainers(half, kind, q, k, v)[:, -1], 2e-3)
