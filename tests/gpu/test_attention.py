"""Attention on a GPU is that of the CPU in float32: all backends, at the size of real heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.errors import UserError
from grm_jax.model.attention import Places
from grm_jax.model.attention_backends import choose, self_attention

pytestmark = pytest.mark.gpu

BATCH, LENGTH, KV, GROUP, HEAD = 2, 192, 2, 2, 256


def output_and_gradients(backend, window, dtype, where):
    """In float32, from inputs that bfloat16 holds exactly. Rows have two segments and padding."""
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, BATCH, LENGTH, KV, GROUP, HEAD))
    k, v = rng.normal(size=(2, BATCH, LENGTH, KV, HEAD))
    arrays = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (3 * q, k / 4, v, g)]
    slots = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    starts = np.array([[0, 70, 187], [0, 133, 180]])
    segment = (slots[:, :, None] >= starts[:, None]).sum(-1) - 1
    position = slots - np.take_along_axis(starts, segment, axis=1)
    arrays, position, segment = jax.device_put((arrays, position, segment), where)

    @jax.jit
    def compute(q, k, v, g, position, segment):
        places = Places(position, position, segment, segment)
        run = self_attention(places, window=window, softcap=50.0, backend=backend)
        real = (segment < 2)[:, :, None, None, None]

        def total(q, k, v):
            out = jnp.where(real, run(q, k, v), 0)
            return jnp.sum((out * g).astype(jnp.float32)), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    with jax.default_matmul_precision("highest"):
        found = compute(*arrays, position, segment)
    return [np.asarray(x.astype(jnp.float32)) for x in found]


def largest_error(found, truth):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("backend", ["reference", "chunked", "tokamax"])
def test_backends_agree_with_float32_on_the_cpu(backend, window, gpu):
    if backend == "tokamax":
        try:
            choose("tokamax", gpu.platform, gpu.device_kind)
        except UserError as error:
            pytest.skip(str(error))
    (cpu, *_) = jax.devices("cpu")
    truth = output_and_gradients("reference", window, jnp.float32, cpu)
    if backend != "tokamax":  # which computes in 16 bits alone
        found = output_and_gradients(backend, window, jnp.float32, gpu)
        assert largest_error(found, truth) < 1e-4
    usual = largest_error(output_and_gradients("reference", window, jnp.bfloat16, cpu), truth)
    found = output_and_gradients(backend, window, jnp.bfloat16, gpu)
    assert largest_error(found, truth) < 2 * usual < 0.05
