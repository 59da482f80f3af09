"""Every loss against NumPy written from the paper's formulas, and what must hold of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.training import losses

B, C = 5, 7
seeds = st.integers(0, 10**6)


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Completions of 0 to C tokens."""
    return (np.arange(C) < rng.integers(0, C + 1, (B, 1))).astype(np.float32)


def value(loss: losses.Loss) -> float:
    return float(loss.total) / max(float(loss.count), 1e-8)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@given(seeds)
def test_sft_is_the_mean_over_real_tokens(seed):
    rng = np.random.default_rng(seed)
    logprobs, mask = -rng.exponential(size=(B, C)).astype(np.float32), random_mask(rng)
    loss = losses.sft_loss(jnp.asarray(logprobs), jnp.asarray(mask))
    real = logprobs[mask > 0]
    assert float(loss.count) == real.size
    np.testing.assert_allclose(float(loss.total), -real.astype(np.float64).sum(), rtol=1e-5)
    weights = mask * rng.uniform(0.1, 1.0, (B, C)).astype(np.float32)
    loss = losses.sft_loss(jnp.asarray(logprobs), jnp.asarray(weights))
    expected = -np.sum(logprobs.astype(np.float64) * weights), weights.sum()
    np.testing.assert_allclose((float(loss.total), float(loss.count)), expected, rtol=1e-5)


@given(seeds)
def test_bce(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=B).astype(np.float32) * 3
    labels, weights = rng.integers(0, 2, B), rng.integers(0, 2, B).astype(np.float32)
    loss = losses.bce_loss(jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(weights))
    p = sigmoid(scores.astype(np.float64))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    np.testing.assert_allclose(float(loss.total), (expected * weights).sum(), rtol=1e-4, atol=1e-6)
    right, count = loss.aux["accuracy"]
    assert float(count) == weights.sum() == float(loss.count)
    assert float(right) == (((p > 0.5) == labels) * weights).sum()


@given(seeds)
def test_bradley_terry(seed):
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(size=(2, B)).astype(np.float32) * 3
    weights = rng.integers(0, 2, B).astype(np.float32)
    loss = losses.bradley_terry_loss(*map(jnp.asarray, (chosen, rejected, weights)))
    expected = -np.log(sigmoid(chosen.astype(np.float64) - rejected))
    np.testing.assert_allclose(float(loss.total), (expected * weights).sum(), rtol=1e-4, atol=1e-6)
    assert float(loss.aux["accuracy"][0]) == ((chosen > rejected) * weights).sum()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_neither_overflow_nor_lose_their_gradient(scale):
    one = jnp.ones(1)
    for label in (0.0, 1.0):
        total, grad = jax.value_and_grad(
            lambda s, label=label: losses.bce_loss(s, label * one, one).total
        )(scale * one)
        wrong = (scale > 0) != (label > 0.5)
        assert float(total) == pytest.approx(abs(scale) if wrong else 0.0)
        assert abs(float(grad[0])) == pytest.approx(float(wrong))


@given(seeds)
def test_advantages_are_normalised_within_each_group(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([-1.0, 0.0, 1.0], size=(6, 4)).astype(np.float32)
    rewards[0] = rng.choice([-1.0, 1.0])
    found = np.asarray(losses.group_advantages(jnp.asarray(rewards)))
    for row, advantages in zip(rewards.astype(np.float64), found, strict=True):
        if row.std() == 0:
            assert (advantages == 0.0).all()
        else:
            np.testing.assert_allclose(advantages, (row - row.mean()) / row.std(), atol=1e-4)


@given(seeds)
def test_k3_is_never_negative_and_zero_only_where_equal(seed):
    rng = np.random.default_rng(seed)
    policy, reference = -rng.exponential(size=(2, 50)).astype(np.float32) * 8
    kl = np.asarray(losses.k3(jnp.asarray(policy), jnp.asarray(reference)))
    assert (kl >= 0).all()
    ratio = np.clip(reference.astype(np.float64) - policy, -20, 20)
    np.testing.assert_allclose(kl, np.exp(ratio) - ratio - 1, rtol=1e-3, atol=1e-5)
    assert (np.asarray(losses.k3(jnp.asarray(policy), jnp.asarray(policy))) == 0).all()


def test_k3_estimates_the_kl_divergence():
    """E_{x ~ pi}[k3] = KL(pi || ref), exactly, summed over a small vocabulary."""
    rng = np.random.default_rng(0)
    pi, ref = (np.exp(z) / np.exp(z).sum() for z in rng.normal(size=(2, 9)))
    k3 = np.asarray(losses.k3(jnp.log(jnp.asarray(pi)), jnp.log(jnp.asarray(ref))))
    np.testing.assert_allclose((pi * k3).sum(), (pi * np.log(pi / ref)).sum(), rtol=1e-4)


def test_an_impossible_token_of_the_reference_stays_finite():
    total = losses.k3(jnp.asarray([-1e-3, -1e4]), jnp.asarray([-1e4, -1e-3]))
    assert np.isfinite(np.asarray(total)).all()


def grpo_numpy(logprobs, old, reference, advantages, mask, low, high, beta, aggregation) -> float:
    """Eq. (15) token by token."""
    per_rollout, every = [], []
    for row in range(B):
        terms = []
        for t in range(C):
            if not mask[row, t]:
                continue
            rho = np.exp(logprobs[row, t] - old[row, t])
            a = advantages[row, t] if advantages.ndim == 2 else advantages[row]
            surrogate = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
            ratio = np.exp(reference[row, t] - logprobs[row, t])
            terms.append(surrogate - beta * (ratio - np.log(ratio) - 1))
        every += terms
        if terms:
            per_rollout.append(np.mean(terms))
    parts = per_rollout if aggregation == "sequence" else every
    return -float(np.mean(parts)) if parts else 0.0


@given(
    seeds, st.sampled_from(["sequence", "token"]), st.sampled_from([(0.2, 0.2), (0.1, 0.4)]),
    st.booleans(),
)  # fmt: skip
def test_grpo(seed, aggregation, clip, by_token):
    rng = np.random.default_rng(seed)
    old, reference = -rng.exponential(size=(2, B, C))
    logprobs = old + rng.normal(size=(B, C)) * 0.4
    advantages, mask = rng.normal(size=(B, C) if by_token else B), random_mask(rng)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logprobs, old, reference, advantages, mask)]
    loss = losses.grpo_loss(
        *arrays, clip_low=clip[0], clip_high=clip[1], kl_coef=0.08, aggregation=aggregation
    )
    expected = grpo_numpy(logprobs, old, reference, advantages, mask, *clip, 0.08, aggregation)
    assert value(loss) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    clipped, tokens = loss.aux["clip_fraction"]
    rho = np.exp(logprobs - old)
    signs = advantages if by_token else advantages[:, None]
    bites = np.where(signs > 0, rho > 1 + clip[1], rho < 1 - clip[0]) & (mask > 0)
    assert float(clipped) == bites.sum()
    assert float(tokens) == mask.sum()


def test_padding_can_hold_anything():
    rng = np.random.default_rng(3)
    old, reference = -rng.exponential(size=(2, B, C)).astype(np.float32)
    mask = random_mask(rng)
    advantages = jnp.asarray(rng.normal(size=B), jnp.float32)

    def run(filler: float) -> float:
        logprobs, other = (np.where(mask > 0, x, filler) for x in (old * 1.1, old))
        arrays = map(jnp.asarray, (logprobs, other, np.where(mask > 0, reference, -filler)))
        options = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1}
        return value(losses.grpo_loss(*arrays, advantages, jnp.asarray(mask), **options))

    assert run(0.0) == run(-1e4) == run(1e4)


# A policy with parameters: logits [B, C, V], tokens drawn from it.


@pytest.fixture(scope="module")
def policy():
    rng = np.random.default_rng(5)
    theta = jnp.asarray(rng.normal(size=(B, C, 6)), jnp.float32)
    tokens, mask = rng.integers(0, 6, (B, C)), random_mask(np.random.default_rng(8))

    def logprobs(theta):
        picked = jnp.take_along_axis(jax.nn.log_softmax(theta), tokens[..., None], axis=-1)
        return picked[..., 0]

    return theta, logprobs, jnp.asarray(mask)


def gradient(policy, advantages, *, kl_coef=0.0, reference=None, aggregation="sequence"):
    theta, logprobs, mask = policy
    old = jax.lax.stop_gradient(logprobs(theta))

    def loss(theta):
        found = losses.grpo_loss(
            logprobs(theta), old, old if reference is None else reference, advantages, mask,
            clip_low=0.2, clip_high=0.2, kl_coef=kl_coef, aggregation=aggregation,
        )  # fmt: skip
        return found.total / found.count

    return np.asarray(jax.grad(loss)(theta))


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_on_policy_the_gradient_is_that_of_reinforce(policy, aggregation, kl_coef):
    """With the group-normalised reward; the KL to the policy itself has no gradient either."""
    theta, logprobs, mask = policy
    rewards = jnp.asarray([[1.0, -1.0, -1.0, 1.0, -1.0]])
    advantages = losses.group_advantages(rewards)[0]

    def reinforce(theta):
        weighted = advantages[:, None] * logprobs(theta) * mask
        if aggregation == "token":
            return -weighted.sum() / mask.sum()
        lengths = mask.sum(axis=1)
        per_rollout = weighted.sum(axis=1) / jnp.maximum(lengths, 1)
        return -per_rollout.sum() / (lengths > 0).sum()

    found = gradient(policy, advantages, kl_coef=kl_coef, aggregation=aggregation)
    np.testing.assert_allclose(found, np.asarray(jax.grad(reinforce)(theta)), atol=1e-6)
    assert np.abs(found).max() > 1e-3


def test_without_advantage_only_the_kl_pulls(policy):
    theta, logprobs, _ = policy
    reference = logprobs(theta) + 0.5
    zero = jnp.zeros(B)
    assert (gradient(policy, zero, reference=reference) == 0).all()
    pulled = gradient(policy, zero, reference=reference, kl_coef=0.08)
    assert np.abs(pulled).max() > 1e-4
    # Descending it moves the policy towards the reference, which likes these tokens more.
    moved = logprobs(theta - 0.1 * pulled) - logprobs(theta)
    assert float((moved * policy[2]).min()) >= 0


def test_beyond_the_clip_there_is_no_gradient(policy):
    theta, logprobs, mask = policy
    current = logprobs(theta)

    def loss(theta, shift, advantage):
        return losses.grpo_loss(
            logprobs(theta), current - shift, current, advantage * jnp.ones(B), mask,
            clip_low=0.2, clip_high=0.3, kl_coef=0.0,
        ).total  # fmt: skip

    grad = jax.grad(loss)
    for shift, advantage, flows in [
        (np.log(1.35), 1.0, False),  # already likelier than 1 + 0.3, and good
        (np.log(1.35), -1.0, True),
        (np.log(1.25), 1.0, True),  # within the upper bound of 0.3
        (np.log(0.75), -1.0, False),  # already less likely than 1 - 0.2, and bad
        (np.log(0.75), 1.0, True),
    ]:
        assert (np.abs(np.asarray(grad(theta, shift, advantage))).max() > 1e-3) == flows
