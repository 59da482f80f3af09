"""The two heads against NumPy and transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from grm_jax.model import heads, transformer
from grm_jax.model.config import model_config

CONFIG = model_config("tiny").replace(vocab_size=23, embed_dim=12, final_softcap=3.0)
TOKENS = (2, 5)


@pytest.fixture
def case(rng):
    params = {"embed": rng.normal(size=(CONFIG.vocab_size, CONFIG.embed_dim)).astype(np.float32)}
    hidden = rng.normal(size=(*TOKENS, CONFIG.embed_dim)).astype(np.float32)
    return params, hidden, rng.integers(0, CONFIG.vocab_size, TOKENS)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_logprobs_and_entropy_are_numpys(case, temperature, chunk):
    params, hidden, targets = case
    z = hidden.astype(np.float64) @ params["embed"].T.astype(np.float64)
    z = CONFIG.final_softcap * np.tanh(z / CONFIG.final_softcap) / temperature
    logp = log_softmax(z, axis=-1)
    got, entropy = heads.token_logprobs(
        params, CONFIG, hidden, targets, temperature=temperature, chunk=chunk, with_entropy=True
    )
    assert entropy is not None
    want = np.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(entropy, -(np.exp(logp) * logp).sum(-1), atol=5e-6)
    assert got.dtype == jnp.float32 and got.shape == TOKENS
    assert heads.token_logprobs(params, CONFIG, hidden, targets, temperature=temperature)[1] is None


def test_gradients_are_those_of_the_formula(case):
    """Log-probabilities and entropies have a backward pass of their own: against automatic ones."""
    params, hidden, targets = case
    weights = np.linspace(-1, 2, targets.size, dtype=np.float32).reshape(TOKENS)

    def ours(embed, hidden):
        logprobs, entropy = heads.token_logprobs(
            {"embed": embed}, CONFIG, hidden, targets, temperature=0.7, chunk=3, with_entropy=True
        )
        assert entropy is not None
        return jnp.sum(weights * logprobs) + jnp.sum(weights**2 * entropy)

    def plain(embed, hidden):
        z = CONFIG.final_softcap * jnp.tanh(hidden @ embed.T / CONFIG.final_softcap) / 0.7
        logp = jax.nn.log_softmax(z)
        picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * picked) - jnp.sum(weights**2 * jnp.sum(jnp.exp(logp) * logp, -1))

    both = (jax.grad(f, argnums=(0, 1))(params["embed"], hidden) for f in (ours, plain))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunks_change_neither_values_nor_gradients(case):
    """Chunks that divide the ten tokens, that do not, of one token, and one of them all."""
    params, hidden, targets = case
    weights = np.linspace(-1, 2, targets.size, dtype=np.float32).reshape(TOKENS)

    def value(params, hidden, chunk):
        logprobs, entropy = heads.token_logprobs(
            params, CONFIG, hidden, targets, temperature=0.7, chunk=chunk, with_entropy=True
        )
        assert entropy is not None
        return jnp.sum(weights * logprobs + 0.3 * entropy)

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), static_argnums=2)
    whole = run(params, hidden, 10)
    for chunk in (1, 3, 5):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            whole,
            run(params, hidden, chunk),
        )


def test_logits_of_a_batch_never_exist():
    """With 4,096 tokens and 4,096 words, the float32 logits alone would be 64 MiB."""
    config = CONFIG.replace(vocab_size=4096)
    shapes = jax.ShapeDtypeStruct((4096, 12), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.int32)

    def value(embed, hidden, targets):
        out, _ = heads.token_logprobs(
            {"embed": embed}, config, hidden, targets, temperature=1.0, chunk=256
        )
        return out.sum()

    compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(shapes[0], *shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 24 * 2**20


def test_take_rows_repeats_the_last_token_past_the_end():
    hidden = np.arange(12.0).reshape(2, 6, 1)
    got = np.asarray(heads.take_rows(hidden, np.array([1, 4]), 3))[..., 0]
    assert got.tolist() == [[1, 2, 3], [10, 11, 11]]


def test_scalar_head_is_that_of_transformers(classifier, rng):
    """Right-padded rows: the last token that is not padding."""
    config, lengths = classifier.config, np.array([12, 5, 9])
    tokens = rng.integers(1, config.vocab_size, (3, 12))
    valid = np.arange(12) < lengths[:, None]
    tokens = np.where(valid, tokens, 0)
    hidden = jax.jit(transformer.encode, static_argnums=1)(
        classifier.params, config, tokens, lengths
    )
    ours = heads.scalar(classifier.params, hidden, jnp.asarray(lengths)[:, None] - 1)[:, 0]
    theirs = classifier.logits(tokens, attention_mask=valid.astype(int))
    assert ours.shape == theirs.shape == (3, 1)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
