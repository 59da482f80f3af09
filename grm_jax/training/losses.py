"""Losses: pure functions of arrays that return `Loss(total, count, aux)`.

Sums and denominators travel together: micro-batches add both, and the division happens once, so
unequal micro-batches give the gradient of the whole batch. `aux` holds (sum, denominator) pairs of
metrics, which are averaged in the same way.

Dimensions: B sequences, C completion tokens (padded), P pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Aggregation = Literal["sequence", "token"]
Aux = dict[str, tuple[jax.Array, jax.Array]]


class Loss(NamedTuple):
    """A loss as sum and denominator; the loss is total / count."""

    total: jax.Array
    count: jax.Array
    aux: Aux


def sft_loss(logprobs: jax.Array, mask: jax.Array) -> Loss:
    """Mean negative log-likelihood of completion tokens.

    Args:
      logprobs: [B, C] float32 log-probabilities of the target tokens.
      mask: [B, C] 1 for real completion tokens.
    """
    total, count = -jnp.sum(logprobs * mask), jnp.sum(mask)
    return Loss(total, count, {"loss": (total, count)})


def group_advantages(rewards: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """GRPO's advantages: rewards [P, G] normalised within each group of G rollouts.

    (r - mean) / (std + epsilon) with the population standard deviation; a group whose rewards
    are all equal carries no signal and gets exactly zero. (The paper gives neither convention.)
    """
    mean = jnp.mean(rewards, axis=1, keepdims=True)
    std = jnp.std(rewards, axis=1, keepdims=True)
    return jnp.where(std > epsilon, (rewards - mean) / (std + epsilon), 0.0)


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Per-token KL estimate pi_ref/pi - log(pi_ref/pi) - 1 >= 0, the one of the original GRPO.

    The log-ratio is clamped to +-20 so that a token the reference finds impossible can not
    overflow float32.
    """
    log_ratio = jnp.clip(reference - logprobs, -20.0, 20.0)
    return jnp.exp(log_ratio) - log_ratio - 1.0


def grpo_loss(
    logprobs: jax.Array,
    old: jax.Array,
    reference: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    aggregation: Aggregation = "sequence",
) -> Loss:
    """The negative of Eq. (15): clipped policy gradient with a k3 KL penalty in the loss.

        J = mean_i 1/|o_i| sum_t { min[rho A, clip(rho, 1 - low, 1 + high) A] - beta KL }

    Args:
      logprobs: [B, C] of the policy being trained, at the rollout's temperature.
      old: [B, C] of the policy that sampled.
      reference: [B, C] of the frozen reference policy.
      advantages: [B], one a rollout.
      mask: [B, C] 1 for real completion tokens.
      clip_low, clip_high: epsilon below and above 1.
      kl_coef: beta.
      aggregation: "sequence" averages over tokens, then over rollouts (the paper); "token" averages
        over all tokens of the batch.
    """
    ratio = jnp.exp(jnp.clip(logprobs - old, -20.0, 20.0))
    adv = advantages[:, None]
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = jnp.minimum(ratio * adv, clipped * adv)
    kl = k3(logprobs, reference)
    per_token = -(surrogate - kl_coef * kl)
    tokens = jnp.sum(mask)
    if aggregation == "sequence":
        lengths = jnp.sum(mask, axis=1)
        total = jnp.sum(jnp.sum(per_token * mask, axis=1) / jnp.maximum(lengths, 1.0))
        count = jnp.sum((lengths > 0).astype(jnp.float32))
    else:
        total, count = jnp.sum(per_token * mask), tokens
    was_clipped = (ratio * adv > clipped * adv).astype(jnp.float32)
    aux: Aux = {
        "loss": (total, count),
        "kl": (jnp.sum(kl * mask), tokens),
        "clip_fraction": (jnp.sum(was_clipped * mask), tokens),
    }
    return Loss(total, count, aux)


def bce_loss(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Loss:
    """Binary cross-entropy of the meta RM: is this critique correct?

    Args:
      scores: [B] logits.
      labels: [B] 1 if the critique is correct by Eq. (10), else 0.
      weights: [B] 0 for padding rows.
    """
    per_row = optax.losses.sigmoid_binary_cross_entropy(scores, labels)
    total, count = jnp.sum(per_row * weights), jnp.sum(weights)
    right = ((scores > 0) == (labels > 0.5)).astype(jnp.float32)
    return Loss(
        total, count, {"loss": (total, count), "accuracy": (jnp.sum(right * weights), count)}
    )


def bradley_terry_loss(chosen: jax.Array, rejected: jax.Array, weights: jax.Array) -> Loss:
    """-log sigmoid(chosen - rejected), the scalar baseline's loss; all [P]."""
    margin = chosen - rejected
    total, count = -jnp.sum(jax.nn.log_sigmoid(margin) * weights), jnp.sum(weights)
    right = jnp.sum((margin > 0).astype(jnp.float32) * weights)
    return Loss(total, count, {"loss": (total, count), "accuracy": (right, count)})
