"""Gradients in bfloat16 with several of everything at once: rows, heads, blocks of keys.

XLA's CPU compiler has no program for some products in bfloat16, depending on which dimensions are
larger than one. Each gradient is compared with float32's.
"""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import attention_backends
from grm_jax.model.batch import completion_logprobs
from grm_jax.model.heads import token_logprobs
from grm_jax.model.lora import adapter_table, attach
from grm_jax.model.options import LoRAConfig
from grm_jax.model.params import build_tree, param_table
from grm_jax.model.shared_prefix import encode_completions
from grm_jax.model.transformer import encode_packed

ROWS, LENGTH = 3, 20


@pytest.fixture(scope="module")
def tokens(small) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(4, small.vocab_size, (ROWS, LENGTH)).astype(np.int32)


def rows(params, config, tokens, remat):
    batch = {
        "tokens": jnp.asarray(tokens), "lengths": jnp.asarray([LENGTH, LENGTH - 3, LENGTH]),
        "starts": jnp.asarray([4, 5, 6]), "targets": jnp.asarray(tokens[:, -8:]),
    }  # fmt: skip
    found, _ = completion_logprobs(
        params, config, batch, temperature=1.0, remat=remat, chunk=5, with_entropy=True
    )
    return found.mean()


def packed(params, config, tokens, remat):
    positions = jnp.tile(jnp.arange(LENGTH // 2), (ROWS, 2))
    segments = jnp.repeat(jnp.asarray([[0, 1]]), LENGTH // 2, axis=1).repeat(ROWS, axis=0)
    hidden = encode_packed(params, config, jnp.asarray(tokens), positions, segments, remat=remat)
    return token_logprobs(params, config, hidden, jnp.asarray(tokens), temperature=1.0)[0].mean()


def shared(params, config, tokens, remat):
    completions = jnp.asarray(tokens[:, 8:]).reshape(ROWS, 2, 6)
    hidden = encode_completions(
        params, config, jnp.asarray(tokens[:, :8]), jnp.asarray([8, 6, 7]), completions,
        remat=remat,
    )  # fmt: skip
    return token_logprobs(params, config, hidden, completions, temperature=1.0)[0].mean()


def gradient(loss, params, config, tokens, remat="none"):
    found = jax.jit(jax.grad(lambda p: loss(p, config, tokens, remat)))(params)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(found)])


def scans(jaxpr):
    """The equations of the scans in `jaxpr` that are not within another scan."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from scans(inner)


def traced(params, config, tokens, remat):
    """The jaxpr of the gradient of `rows`."""
    return jax.make_jaxpr(jax.grad(lambda p: rows(p, config, tokens, remat)))(params)


@pytest.mark.parametrize("remat", ["none", "block", "block_save_attention"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_what_the_backward_pass_keeps_is_stacked_as_bits(
    backend, remat, small, small_params, tokens
):
    """A scan stacks no bfloat16 numbers, which XLA's CPU compiler would convert as a whole."""
    config = small.replace(compute_dtype="bfloat16", attention=backend)
    found = scans(traced(small_params, config, tokens, remat).jaxpr)
    layers = [e for e in found if e.params["length"] == small.num_blocks]
    assert len(layers) == 2  # forward and backward
    stacked = {str(x.aval.dtype) for e in layers for x in e.outvars[e.params["num_carry"] :]}
    assert "uint16" in stacked
    assert "bfloat16" not in stacked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_not_computed_again(dtype, small, small_params, tokens):
    config = small.replace(compute_dtype=dtype)
    none, block = (
        str(traced(small_params, config, tokens, remat)).count("dot_general")
        for remat in ("none", "block")
    )
    assert block - none >= 7 * len(small.slots)  # the products with the weights of a layer


def random_adapters(config):
    rng = np.random.default_rng(1)
    table = adapter_table(param_table(config), LoRAConfig(rank=4))
    return build_tree(table, lambda spec: 0.1 * rng.normal(size=spec.shape).astype(np.float32))


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of the angle between two gradients."""
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("loss", [rows, packed, shared], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "block", [512, pytest.param(8, marks=pytest.mark.slow)], ids=["one block", "blocks"]
)
def test_gradients(loss, block, small, small_params, tokens, monkeypatch):
    monkeypatch.setattr(attention_backends, "BLOCK", block)
    half = small.replace(compute_dtype="bfloat16")
    for remat in ("none", "block") if loss is rows else ("none",):
        found = gradient(loss, small_params, half, tokens, remat)
        assert alike(found, gradient(loss, small_params, small, tokens, remat)) > 0.995


@pytest.mark.parametrize("loss", [rows, shared], ids=lambda f: f.__name__)
def test_gradients_of_adapters(loss, small, small_params, tokens):
    table, half = param_table(small), small.replace(compute_dtype="bfloat16")

    def adapted(adapters, config, tokens, remat):
        return loss(attach(small_params, adapters, table, 2.0), config, tokens, remat)

    adapters = random_adapters(small)
    found = gradient(adapted, adapters, half, tokens)
    assert alike(found, gradient(adapted, adapters, small, tokens)) > 0.995
