"""The compute dtype is chosen by what the device is fast in, and products round once."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.errors import UserError
from grm_jax.model import compute_dtype
from grm_jax.model.compute_dtype import bfloat16_speedup, choose_dtype
from grm_jax.model.config import SIZES
from grm_jax.model.linear import LowRank, linear


@pytest.fixture
def speedup(monkeypatch):
    """Sets what the probe of the CPU measures."""
    compute_dtype._log_once.cache_clear()
    return lambda value: monkeypatch.setattr(compute_dtype, "bfloat16_speedup", lambda: value)


@pytest.mark.parametrize(
    ("own", "platform", "measured", "chosen"),
    [
        ("bfloat16", "cpu", 1.5, "bfloat16"),
        ("bfloat16", "cpu", 1.49, "float32"),
        ("bfloat16", "gpu", None, "bfloat16"),
        ("bfloat16", "tpu", None, "bfloat16"),
        ("float32", "cpu", 7.0, "float32"),
        ("float32", "gpu", None, "float32"),
    ],
)
def test_auto_is_the_own_dtype_where_it_is_fast(own, platform, measured, chosen, speedup, caplog):
    speedup(measured)
    caplog.set_level(logging.INFO, "grm_jax")
    assert choose_dtype("auto", own, platform) == chosen
    assert choose_dtype("auto", own, platform) == chosen
    (line,) = caplog.messages
    assert line.startswith(f"compute dtype    {chosen} (")
    if own == "bfloat16" and platform == "cpu":
        assert f"{measured:.1f} times as fast" in line


def test_a_request_is_followed_without_a_probe(speedup, caplog):
    speedup(None)
    caplog.set_level(logging.INFO, "grm_jax")
    assert choose_dtype("bfloat16", "float32", "cpu") == "bfloat16"
    assert choose_dtype("float32", "bfloat16", "gpu") == "float32"
    assert not caplog.messages
    with pytest.raises(UserError, match="'float16'; choose one of auto, float32, bfloat16"):
        choose_dtype("float16", "bfloat16", "gpu")  # pyright: ignore[reportArgumentType]


def test_the_probe_measures_this_machine():
    assert 0.01 < bfloat16_speedup() < 100


def test_the_embedded_default_is_float32():
    released = ("2b", "9b", "27b")
    assert [SIZES[name].dtype for name in ("tiny", *released)] == ["float32"] + ["bfloat16"] * 3


def _arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _half(x) -> np.ndarray:
    """Rounded to bfloat16, as float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)


HALF_UNIT = 2.0**-8  # the largest relative error of a rounding to bfloat16, which keeps 8 bits


def _close(found, exact, magnitude, terms, relative=0.0):
    """Whether `found` may be `exact`, a sum of `terms` products that was added up in float32.

    In any order, the sum is off by at most terms * eps * magnitude, the sum of absolute values.
    `relative` bounds the error of roundings before or after it.
    """
    bound = (terms * np.finfo(np.float32).eps + relative) * magnitude
    error = np.abs(np.asarray(found.astype(jnp.float32), np.float64) - exact)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("wide", [False, True])
def test_products_and_gradients_round_once(wide):
    """Sums of 4,096 terms: an accumulator in bfloat16 would stop counting after 256."""
    shapes = ((4096, 24), (24, 40)) if wide else ((4096, 40), (40, 24))
    x, w = _arrays(*shapes)
    dy = np.abs(_arrays((4096, w.shape[1]), seed=1)[0]) + 1.0  # no cancellation hides an error
    x = np.abs(x) + 1.0
    y, pull = jax.vjp(lambda x, w: linear(x, w), jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy, jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, w, dy = _half(x), _half(w), _half(dy)
    _close(y, x @ w, np.abs(x) @ np.abs(w), w.shape[0], HALF_UNIT)
    _close(dx, dy @ w.T, np.abs(dy) @ np.abs(w.T), w.shape[1], HALF_UNIT)
    _close(dw, x.T @ dy, np.abs(x.T) @ np.abs(dy), len(x))


def test_an_adapters_gradients_are_not_rounded_between():
    x, w, a, b = _arrays((4096, 24), (24, 40), (24, 4), (4, 40))
    dy = np.abs(_arrays((4096, 40), seed=1)[0]) + 1.0
    x, scale = np.abs(x) + 1.0, 0.5

    def apply(x, a, b):
        return linear(x, LowRank(jnp.asarray(w, jnp.bfloat16), a, b, scale))

    y, pull = jax.vjp(apply, jnp.asarray(x, jnp.bfloat16), jnp.asarray(a), jnp.asarray(b))
    dx, da, db = pull(jnp.asarray(dy, jnp.bfloat16))
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == ("bfloat16", "bfloat16", "float32", "float32")
    x, w, a, b, dy = (_half(value) for value in (x, w, a, b, dy))
    # x a and scale dy b' enter products in bfloat16; next to the middle between two such numbers
    # the last bits of a float32 sum decide, and a whole unit is at stake.
    low, dlow = _half(np.float32(x @ a)), _half(np.float32(scale * (dy @ b.T)))
    _close(da, x.T @ dlow, np.abs(x.T) @ np.abs(dlow), 4096, 2 * HALF_UNIT)
    _close(db, scale * low.T @ dy, scale * np.abs(low.T) @ np.abs(dy), 4096, 2 * HALF_UNIT)
    both = np.abs(dy) @ np.abs(w.T) + np.abs(dlow) @ np.abs(a.T)
    _close(dx, dy @ w.T + dlow @ a.T, both, 64, 3 * HALF_UNIT)
