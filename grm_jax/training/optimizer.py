"""Optimizers: optax chains, made from a small dataclass of options."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from grm_jax.errors import UserError
from grm_jax.model.params import ParamSpec, build_tree
from grm_jax.training.options import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of `steps` steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    first = peak / (warmup + 1)  # not zero: the first step should not be wasted
    rest = max(1, steps - warmup)
    final = peak * config.final_fraction
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(first, peak, warmup)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(first, peak, warmup, warmup + rest, final)
    rise = optax.linear_schedule(first, peak, warmup)
    return optax.join_schedules([rise, optax.linear_schedule(peak, final, rest)], [warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, table: tuple[ParamSpec, ...]
) -> optax.GradientTransformation:
    """The optax chain: gradients are converted to float32, clipped, and made into updates.

    Moments are float32 whatever the parameters' dtype is (optax alone would follow the parameters).
    The table tells muon which dimensions of a matrix are its inputs.
    """
    rate = schedule(config, steps)
    decayed = None
    if config.decayed == "matrices":
        decayed = build_tree(table, lambda spec: bool(spec.inputs))
    if config.name == "adamw":
        update = optax.adamw(
            rate, config.b1, config.b2,
            weight_decay=config.weight_decay, mask=decayed, mu_dtype=jnp.float32,
        )  # fmt: skip
    elif config.name == "muon":
        update = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            adam_learning_rate=lambda step: rate(step) * config.adam_scale,
            muon_weight_dimension_numbers=build_tree(table, _muon_dimensions),
            mu_dtype=jnp.float32,
        )
    elif config.name == "adafactor":
        update = optax.adafactor(
            rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=decayed
        )
    else:
        raise UserError(f"unknown optimizer {config.name!r}; choose adamw, muon or adafactor")
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return _in_float32(optax.chain(clip, update))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on gradients and parameters in float32; otherwise its moments would have the dtype of
    the parameters."""

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params=None):
        wide = None if params is None else optax.tree.cast(params, jnp.float32)
        return inner.update(optax.tree.cast(updates, jnp.float32), state, wide)

    return optax.GradientTransformation(init, update)


def _muon_dimensions(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers | None:
    if not spec.stacked or not spec.inputs:
        return None
    outputs = tuple(i for i in range(1, len(spec.shape)) if i not in spec.inputs)
    return optax.contrib.MuonDimensionNumbers(spec.inputs, outputs)
