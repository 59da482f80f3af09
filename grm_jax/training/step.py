"""Train state and the gradient step: micro-batches by scan, donated state, the table's shardings.

A batch is a dict of arrays with leading dimension [B]. `make_train_step` splits it into
micro-batches [M, B/M], adds up gradients of loss sums and denominators, divides once and applies
one update. A step whose loss or gradient is not finite, or whose gradient norm is a spike, is
skipped: only the count of such steps changes (`training.loop` goes back to a checkpoint after many
in a row). A step whose gradient is exactly zero changes nothing at all, neither by momentum nor by
weight decay. The learning rate follows the number of the step, whatever was skipped before it.

Dimensions: B rows of a batch, M micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grm_jax.errors import UserError
from grm_jax.model.batch import Batch
from grm_jax.model.linear import round_randomly
from grm_jax.model.params import Params, ParamSpec, abstract_params, init_params
from grm_jax.model.storage import param_shardings
from grm_jax.parallel.mesh import data_parallel, put_batch, replicated, sharding, use_mesh
from grm_jax.training.losses import Aux, Loss

HostBatch = Mapping[str, np.ndarray]
T = TypeVar("T")

# (trained parameters, the parameters beside them that are not trained or None, micro-batch) -> Loss
LossFn = Callable[[Params, Any, Batch], Loss]
# (a computation on a micro-batch, zeros in the form of its result, micro-batch) -> the computation
# on the part of the micro-batch that is needed
Cut = Callable[[Callable[[Batch], Any], Any, Batch], Any]

GUARD_WARMUP = 20  # steps before anything is a spike
GUARD_DECAY = 0.95
GUARD_POWERS = 8  # spikes in a row after which the limit grows no further (30 ** 9 = 2e13)


@flax.struct.dataclass
class Guard:
    """The statistics by which a spike is recognised: float32 and int32 scalars.

    Attributes:
      norm: the running mean of the gradient norm.
      good: the number of steps that were applied.
      skipped: the number of steps that were skipped since the last one that was applied.
    """

    norm: jax.Array
    good: jax.Array
    skipped: jax.Array

    @classmethod
    def fresh(cls) -> Guard:
        # A new array for each: the state is donated, and no buffer can be donated twice.
        zeros = (jnp.zeros((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32))
        return cls(*zeros)

    def judge(
        self, loss: jax.Array, norm: jax.Array, spike: float
    ) -> tuple[jax.Array, jax.Array, Guard]:
        """(whether to apply the step, whether it is harmful, the guard after it).

        A spike is a gradient norm above `spike` times the running mean; with `spike` 0 there are
        none. A spike still enters the mean, clipped to `spike` times the mean, the next one in a
        row to `spike` squared times it, and so on: a single spike hardly moves the mean, and a
        lasting change of scale, by whatever factor, is accepted after a few steps.

        A gradient of exactly zero (no rollout, or with `train_groups` no group with signal) has no
        information: the step is not applied, is not harmful, and leaves the guard as it is.
        """
        # The mean is zero in runs of an earlier version, where steps without signal entered it.
        warmed_up = (self.good >= GUARD_WARMUP) & (self.norm > 0.0)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        silent = finite & (norm == 0.0)
        bound = jnp.where(warmed_up, spike * self.norm, jnp.inf) if spike else jnp.inf
        harmful = ~finite | (norm > bound)
        apply = ~harmful & ~silent
        in_a_row = jnp.minimum(self.skipped, GUARD_POWERS).astype(jnp.float32)
        limit = bound * spike**in_a_row if spike else jnp.inf
        clipped = jnp.minimum(jnp.where(finite, norm, self.norm), limit)
        decay = jnp.where(warmed_up, GUARD_DECAY, self.good / (self.good + 1.0))
        after = Guard(
            norm=decay * self.norm + (1.0 - decay) * clipped,
            good=self.good + apply,
            skipped=jnp.where(apply, 0, self.skipped + 1),
        )
        guard = jax.tree.map(lambda old, new: jnp.where(silent, old, new), self, after)
        return apply, harmful, guard


@flax.struct.dataclass
class TrainState:
    """What a gradient step reads and writes; `step` counts skipped steps, too."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard


def state_shardings(
    table: tuple[ParamSpec, ...], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings of a train state: moments are sharded as their parameters are."""
    param_layout = param_shardings(table, mesh)
    params = abstract_params(table, shardings=param_layout)
    by_path = {spec.path: spec for spec in table}

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        # A moment sits under the same keys as its parameter, below the optimizer's own.
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        spec = next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), None)
        if spec is None or spec.shape != leaf.shape:
            return replicated(mesh)
        return sharding(mesh, spec.axes)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    guard = jax.tree.map(lambda _: replicated(mesh), jax.eval_shape(Guard.fresh))
    return TrainState(step=replicated(mesh), params=param_layout, opt_state=opt_state, guard=guard)  # pyright: ignore[reportArgumentType]


def abstract_state(
    table: tuple[ParamSpec, ...], optimizer: optax.GradientTransformation, mesh: Mesh, dtype: Any
) -> TrainState:
    """Shapes, dtypes and shardings of a train state whose parameters are stored in `dtype`."""

    def fresh(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), Guard.fresh())

    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        jax.eval_shape(fresh, abstract_params(table, dtype)),
        state_shardings(table, optimizer, mesh),
    )


def init_state(
    table: tuple[ParamSpec, ...],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    key: jax.Array | None = None,
    params: Params | None = None,
) -> TrainState:
    """A fresh state from a random key, or from given parameters (which are copied)."""
    shardings = state_shardings(table, optimizer, mesh)
    start: Params
    if params is not None:
        copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings.params)
        start = copy(params)
    elif key is not None:
        start = jax.jit(lambda k: init_params(table, k), out_shardings=shardings.params)(key)
    else:
        raise ValueError("init_state needs a key or params")
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(start)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    guard = jax.device_put(Guard.fresh(), shardings.guard)
    return TrainState(step=step, params=start, opt_state=opt_state, guard=guard)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    table: tuple[ParamSpec, ...],
    mesh: Mesh,
    *,
    micro_batches: int = 1,
    spike: float = 0.0,
    key: jax.Array | None = None,
    cut: Cut | None = None,
) -> TrainStep:
    """A jitted (state, frozen, host batch) -> (state, metrics). The state is donated.

    Args:
      loss_fn: pure; see `LossFn`.
      table: of the trained parameters.
      micro_batches: M; must divide the batch size, or a step raises ValueError.
      spike: see `Guard.judge`.
      key: of the run and stage, for the rounding into bfloat16 parameters (`apply_updates`);
        None: jax.random.key(0).
      cut: how a micro-batch is made shorter, or skipped; None: it is computed as it is. Gradients
        are computed within its branches, so that only the branch that runs keeps activations.

    The metrics are every entry of the loss's aux as a mean over the batch, `grad_norm`, `skipped`
    (1 for a harmful step) and `skipped_in_a_row`.
    """
    shardings = state_shardings(table, optimizer, mesh)

    def step(state: TrainState, frozen: Any, batch: Batch, key_data: jax.Array):
        def whole(batch: Batch) -> tuple[Params, Loss]:
            def total(p: Params) -> tuple[jax.Array, Loss]:
                loss = loss_fn(p, frozen, batch)
                return loss.total, loss

            (_, loss), grads = jax.value_and_grad(total, has_aux=True)(state.params)
            return grads, loss

        # One trace of the gradient gives all zeros; a trace takes seconds.
        several = micro_batches > 1
        gradient = whole
        if several or cut is not None:
            nothing = zeros_of(whole, first(batch) if several else batch)
            gradient = whole if cut is None else functools.partial(cut, whole, nothing)
        if several:
            zeros = jax.tree.map(lambda x: x.astype(jnp.float32), nothing)

            def add(carry, micro):
                return jax.tree.map(jnp.add, carry, gradient(micro)), None

            (grads, loss), _ = jax.lax.scan(add, zeros, batch)
        else:
            grads, loss = gradient(batch)
        with jax.named_scope("gradient_norm"):
            count = jnp.maximum(loss.count, 1e-8)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
            norm = optax.tree.norm(grads)
            apply, harmful, guard = state.guard.judge(loss.total / count, norm, spike)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rounding = jax.random.fold_in(jax.random.wrap_key_data(key_data), state.step)
            params = apply_updates(state.params, updates, rounding)
            params = jax.tree.map(lambda new, old: jnp.where(apply, new, old), params, state.params)
            opt_state = applied_or_kept(apply, opt_state, state.opt_state)
        metrics = {
            **means(loss.aux),
            "grad_norm": norm,
            "skipped": harmful.astype(jnp.float32),
            "skipped_in_a_row": guard.skipped,
        }
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    return TrainStep(jitted, mesh, micro_batches, jax.random.key(0) if key is None else key)


def first(parts: Batch) -> Batch:
    """The first of the micro-batches, which are stacked."""
    return jax.tree.map(lambda x: x[0], parts)


def zeros_of(compute: Callable[[Batch], T], batch: Batch) -> T:
    """Zeros in the form of `compute(batch)`, which is not computed."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, batch))


class TrainStep:
    """What `make_train_step` returns: call it with (state, frozen, this process's batch).

    Attributes:
      parts: the number of micro-batches.
    """

    def __init__(self, jitted: Any, mesh: Mesh, micro_batches: int, key: jax.Array):
        self._jitted, self._mesh, self.parts = jitted, mesh, micro_batches
        self._key = np.asarray(jax.random.key_data(key))  # on the host: the same in all processes

    def __call__(
        self, state: TrainState, frozen: Any, batch: HostBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with use_mesh(self._mesh):
            placed = put_batch(batch, self._mesh, parts=self.parts)
            return self._jitted(state, frozen, placed, self._key)

    def lower(self, state: Any, frozen: Any, batch: Any) -> Any:
        """The step for abstract arguments, the batch already in its micro-batches."""
        with use_mesh(self._mesh):
            return self._jitted.lower(state, frozen, batch, self._key)


def applied_or_kept(apply: jax.Array, new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """The optimizer's state after a step: `new` if it was applied, else `old`. Schedules advance in
    either case, so that the learning rate of step n is always the schedule's n-th.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda n, o: n if is_schedule(n) else jnp.where(apply, n, o), new, old, is_leaf=is_schedule
    )


def micro_batches(rows: int, device_batch: int, mesh: Mesh) -> int:
    """The smallest number of equal parts of a batch with which a device computes at most
    `device_batch` rows at a time; 0 rows means all of them.

    Raises UserError where the devices can not share the rows evenly.
    """
    shards = data_parallel(mesh)
    if rows % shards:
        raise UserError(
            f"a batch of {rows} rows can not be shared evenly by {shards} data-parallel devices; "
            "change the batch size or the mesh"
        )
    device_rows = rows // shards
    if not device_batch:
        return 1
    divisors = (parts for parts in range(1, device_rows + 1) if device_rows % parts == 0)
    return next(parts for parts in divisors if device_rows // parts <= device_batch)


def apply_updates(params: Params, updates: Any, key: jax.Array) -> Params:
    """params + updates. The sums are rounded to bfloat16 parameters stochastically: an update much
    smaller than a parameter's last bit still moves it in expectation, and would be lost by rounding
    to nearest.

    Args:
      key: the key of run, stage and step.
    """
    leaves, tree = jax.tree.flatten(params)
    moved = [
        (p + u).astype(p.dtype)
        if p.dtype != jnp.bfloat16
        else round_randomly(p.astype(jnp.float32) + u, jax.random.fold_in(key, index))
        for index, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(tree, moved)


def means(aux: Aux) -> dict[str, jax.Array]:
    """(sum, denominator) pairs as means."""
    return {name: total / jnp.maximum(count, 1e-8) for name, (total, count) in aux.items()}
