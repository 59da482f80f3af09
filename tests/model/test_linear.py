"""The forms in which a weight may be stored multiply alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.linear import Int8, OutMajor, computed_once, int8, linear


def problem(axes: int):
    rng = np.random.default_rng(0)
    inputs = (6,) if axes == 1 else (2, 3)
    x = rng.normal(size=(2, 5, *inputs)).astype(np.float32)
    w = rng.normal(size=(*inputs, 4, 7)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), np.tensordot(x, w, axes)


@pytest.mark.parametrize("axes", [1, 2])
def test_out_major(axes):
    x, w, expected = problem(axes)
    turned = OutMajor(w.reshape(6, -1).T, (4, 7))
    np.testing.assert_allclose(jax.jit(linear, static_argnums=2)(x, w, axes), expected, atol=1e-5)
    found = jax.jit(linear, static_argnums=2)(x, turned, axes)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_int8_is_near_and_exact_for_what_it_can_hold(axes):
    x, w, expected = problem(axes)
    small = int8(w, axes)
    assert small.values.dtype == jnp.int8 and small.values.shape == w.shape
    # Rounding is at most half a step: the inputs' absolute sum times half the scale bounds it.
    bound = np.tensordot(np.abs(x), 0.5 * np.broadcast_to(small.scale, w.shape), axes)
    assert (np.abs(np.asarray(linear(x, small, axes)) - expected) <= bound + 1e-5).all()
    exact = Int8(small.values, jnp.ones_like(small.scale))
    again = int8(exact.values.astype(jnp.float32), axes)
    np.testing.assert_array_equal(again.values, exact.values)


def test_a_column_of_zeros_stays_zero():
    assert not np.asarray(linear(jnp.ones((1, 3)), int8(jnp.zeros((3, 2)), 1))).any()


@pytest.mark.parametrize(
    ("shape", "axes"), [((6, 9), 1), ((9, 6), 1), ((6, 2, 4), 1), ((2, 4, 6), 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_product(shape, axes, dtype, rng):
    """Whichever of input and output is the wider."""
    x = jnp.asarray(rng.normal(size=(3, 5, *shape[:axes])), dtype)
    w = jnp.asarray(rng.normal(size=shape), dtype)
    dy = rng.normal(size=(3, 5, *shape[axes:]))

    def gradients(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w) * dy), argnums=(0, 1)))(x, w)

    want = gradients(lambda x, w: jnp.tensordot(x, w, axes))
    for found, right in zip(gradients(lambda x, w: linear(x, w, axes)), want, strict=True):
        assert found.dtype == right.dtype and found.shape == right.shape
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(right, np.float32), rtol=tolerance,
            atol=tolerance * float(jnp.abs(right).max()),
        )  # fmt: skip


def test_what_is_computed_once_is_not_changed():
    """The product that a CPU computes it by is exact, also for the smallest and largest numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 33)).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (7, 33))
    x = x.astype(np.float32)
    np.testing.assert_array_equal(jax.jit(computed_once)(x), x)
