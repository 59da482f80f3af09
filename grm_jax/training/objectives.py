"""What each stage minimises: a forward pass of its collated batch, then a formula of `losses`.

SFT and RFT      `completion_objective`     `data.loader.example_batches`
RL               `policy_objective`         `rl.rollout_batch`, and `reference`
meta RM          `critique_objective`       `data.loader.example_batches`
scalar baseline  `preference_objective`     `scalar_rm.collate_pairs`

A stage trains on it; `planning` compiles it for devices that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from grm_jax.config import RL
from grm_jax.model.params import Params
from grm_jax.sampler.scoring import row_scores
from grm_jax.training.examples import completion_logprobs, critique_scores, group_logprobs
from grm_jax.training.losses import Loss, bce_loss, bradley_terry_loss, grpo_loss, sft_loss
from grm_jax.training.run import Run
from grm_jax.training.step import Batch, LossFn

T = TypeVar("T")


def completion_objective(run: Run) -> LossFn:
    """Negative log-likelihood of completions."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        del frozen
        logprobs, _ = completion_logprobs(
            params, model, batch, temperature=1.0, remat=setup.remat, chunk=setup.logprob_chunk
        )
        return sft_loss(logprobs, batch["mask"])

    return loss_fn


def critique_objective(run: Run) -> LossFn:
    """Binary cross-entropy of whether critiques are correct."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        del frozen
        return bce_loss(*critique_scores(params, model, batch, remat=setup.remat))

    return loss_fn


def preference_objective(run: Run) -> LossFn:
    """Bradley-Terry's: -log sigmoid of the difference of a pair's scores."""
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
        del frozen
        pairs, _, length = batch["tokens"].shape
        tokens, lengths = batch["tokens"].reshape(2 * pairs, length), batch["lengths"].reshape(-1)
        scores = row_scores(params, model, tokens, lengths, remat=setup.remat).reshape(pairs, 2)
        return bradley_terry_loss(scores[:, 0], scores[:, 1], jnp.ones(pairs, jnp.float32))

    return loss_fn


def policy_objective(
    run: Run, config: RL, assemble: Callable[[Params, Any], Params] = lambda params, _: params
) -> LossFn:
    """GRPO's loss of a `rollout_batch` with the reference's log-probabilities.

    The rollouts of a group share their prompt, which is computed once for all of them. Gradients
    are taken within the branches of `by_length`: through them, every branch's activations would be
    kept, whichever was taken.

    Args:
      assemble: (trained, frozen) -> the model's parameters.
    """
    model, setup = run.model, run.setup

    def compute(params, frozen, batch) -> Loss:
        params = assemble(params, frozen)
        logprobs, entropy = group_logprobs(
            params,
            model,
            batch,
            temperature=config.sampling.temperature,
            remat=setup.remat,
            chunk=setup.logprob_chunk,
            with_entropy=True,
        )
        assert entropy is not None
        # Groups of rollouts as rows of them.
        logprobs, entropy, reference, old, mask = (
            x.reshape(-1, x.shape[-1])
            for x in (logprobs, entropy, batch["reference"], batch["old"], batch["mask"])
        )
        if not config.kl_coef:
            reference = jax.lax.stop_gradient(logprobs)  # no penalty, and none to report
        loss = grpo_loss(
            logprobs,
            old,
            reference,
            batch["advantages"].reshape(-1),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            aggregation=config.aggregation,
        )
        tokens = jnp.sum(mask)
        gap = jnp.sum(jnp.abs(logprobs - old) * mask)
        aux = {"entropy": (jnp.sum(entropy * mask), tokens), "logprob_gap": (gap, tokens)}
        return loss._replace(aux=jax.lax.stop_gradient(loss.aux | aux))

    def nothing(params, frozen, batch) -> Loss:
        shapes = jax.eval_shape(compute, params, frozen, batch)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.custom_vjp
    def loss_fn(params, frozen, batch) -> Loss:
        given = params, frozen
        return by_length(
            functools.partial(compute, *given), functools.partial(nothing, *given), batch
        )

    def forward(params, frozen, batch):
        def total(params, batch):
            loss = compute(params, frozen, batch)
            return loss.total, loss

        def some(batch):
            (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(params, batch)
            return loss, gradient

        def none(batch):
            return nothing(params, frozen, batch), jax.tree.map(jnp.zeros_like, params)

        return by_length(some, none, batch)

    def backward(gradient, given: Loss):
        scaled = jax.tree.map(lambda g: g * given.total.astype(g.dtype), gradient)
        return scaled, None, None

    loss_fn.defvjp(forward, backward)
    return cast(LossFn, loss_fn)


def by_length(compute: Callable[[Batch], T], nothing: Callable[[Batch], T], batch: Batch) -> T:
    """`compute` of a micro-batch of groups, cut to half of its C completion slots where none of its
    rollouts is longer; `nothing` of one without rollouts (dropped groups).
    """
    width = batch["mask"].shape[-1]
    half = -(-width // 2)
    used = jnp.any(batch["mask"] > 0, axis=(0, 1))
    branch = jnp.any(used).astype(jnp.int32) + jnp.any(used[half:])

    def halved(batch: Batch) -> T:
        slots = ("targets", "mask", "old", "reference")
        return compute({k: x[..., :half] if k in slots else x for k, x in batch.items()})

    return jax.lax.switch(branch, (nothing, halved, compute), batch)
