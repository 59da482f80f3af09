"""Losses: pure functions of arrays that return `Loss(total, count, aux)`.

A loss keeps its sum and its denominator apart. Micro-batches add up both, and the division is made
once, so that micro-batches of unequal length give the gradient of the whole batch. `aux` holds
(sum, denominator) pairs of metrics, which are averaged in the same way.

Dimensions: B sequences, C completion tokens (padded), N groups of G rollouts, P pairs.
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
    """Mean negative log-likelihood of completion tokens, weighted by the mask.

    Args:
      logprobs: [B, C] float32 log-probabilities of the target tokens.
      mask: [B, C] the weight of each completion token, 1 unless the stage has `text_weight`; 0 for
        padding.
    """
    total, count = -jnp.sum(logprobs * mask), jnp.sum(mask)
    return Loss(total, count, {"loss": (total, count)})


def group_advantages(rewards: jax.Array, *, smallest_std: float = 1e-6) -> jax.Array:
    """GRPO's advantages [N, G]: rewards [N, G] normalised within each group of G rollouts.

    (r - mean) / (std + smallest_std) with the population standard deviation. A group whose rewards
    are all equal has no signal and gets exactly zero: `rl.rollout_batch` tells by this which groups
    have signal. The paper says neither which standard deviation it takes nor what it does with such
    groups.
    """
    mean = jnp.mean(rewards, axis=1, keepdims=True)  # [N, 1]
    std = jnp.std(rewards, axis=1, keepdims=True)  # [N, 1]
    return jnp.where(std > smallest_std, (rewards - mean) / (std + smallest_std), 0.0)


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of the KL divergence to the reference for each token, as in the original GRPO:
    pi_ref/pi - log(pi_ref/pi) - 1, which is never negative. (The third of the estimators in
    Schulman's note "Approximating KL divergence".)

    The log-ratio is clipped to +-20, so that exp does not overflow float32 for a token that only
    one of the two policies finds possible.
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

    with rho = exp(logprobs - old), the ratio of the policies.

    Args:
      logprobs: [B, C] of the policy being trained, at the rollout's temperature.
      old: [B, C] of the policy that sampled.
      reference: [B, C] of the frozen reference policy.
      advantages: [B], one a rollout, or [B, C], one a token.
      mask: [B, C] 1 for real completion tokens.
      clip_low, clip_high: how far the ratio may lie below and above 1 before it is clipped.
      kl_coef: beta.
      aggregation: "sequence" averages over tokens, then over rollouts (the paper); "token" averages
        over all tokens of the batch.
    """
    with jax.named_scope("grpo_loss"):
        ratio = jnp.exp(jnp.clip(logprobs - old, -20.0, 20.0))  # [B, C]
        adv = advantages if advantages.ndim == 2 else advantages[:, None]  # [B, C] or [B, 1]
        clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
        surrogate = jnp.minimum(ratio * adv, clipped * adv)  # [B, C]
        kl = k3(logprobs, reference)  # [B, C]
        per_token = -(surrogate - kl_coef * kl)
    tokens = jnp.sum(mask)
    if aggregation == "sequence":
        lengths = jnp.sum(mask, axis=1)  # [B]
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
    """The loss of the scalar baseline: -log sigmoid(chosen - rejected).

    Args:
      chosen: [P] scores of the better responses.
      rejected: [P] scores of the worse ones.
      weights: [P] 0 for padding.
    """
    margin = chosen - rejected
    total, count = -jnp.sum(jax.nn.log_sigmoid(margin) * weights), jnp.sum(weights)
    right = jnp.sum((margin > 0).astype(jnp.float32) * weights)
    return Loss(total, count, {"loss": (total, count), "accuracy": (right, count)})
