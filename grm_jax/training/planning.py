"""What a stage needs on devices that are not there.

    recipe, devices -> train step, prefill, decode steps -> bytes, FLOPs, traffic

The real code runs up to the point where arrays would be made: shapes with shardings stand for them.
Where the devices' compiler is at hand the programs are compiled, and their memory is the
compiler's; else activations are `estimate`d. What lies on a device besides a program's own
arguments is added up from the shapes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from grm_jax import config as configs
from grm_jax.model.config import ModelConfig, model_config
from grm_jax.model.flops import train_flops
from grm_jax.model.params import Params, abstract_params
from grm_jax.parallel.hlo import collective_bytes
from grm_jax.parallel.mesh import data_parallel, decode_mesh, sharding, use_mesh
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.engine import Rollout, Sampler
from grm_jax.sampler.plan import make_plan
from grm_jax.sampler.programs import Programs
from grm_jax.sampler.schedule import Request
from grm_jax.training import estimate
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.run import Run
from grm_jax.training.step import (
    abstract_state,
    make_train_step,
    micro_batches,
    param_shardings,
)
from grm_jax.training.trainable import Trainable


@dataclasses.dataclass
class Phase:
    """One program and what lies on a device while it runs.

    Attributes:
      name: of the phase.
      bytes: by kind, on one device.
      flops: that its mathematics asks for, all devices together; 0 where nobody counts.
      traffic: bytes that a device receives, by kind of collective.
      seconds: of compiling.
    """

    name: str
    bytes: dict[str, float]
    flops: float = 0.0
    traffic: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


class OutOfMemory(ValueError):
    """The compiler refuses a program that can not fit."""


class PlannedRun(Run):
    """A run without files: a pretrained size needs no tokenizer to be planned for.

    Args:
      devices: those to plan for, or as many others where `compiles` is False.
    """

    def __init__(self, setup: configs.Setup, devices: Sequence[Any], *, compiles: bool):
        super().__init__(setup, devices)
        self.compiles = compiles

    @property
    def model(self) -> ModelConfig:  # pyright: ignore[reportIncompatibleVariableOverride]
        from grm_jax.model.attention_backends import choose
        from grm_jax.training.run import read_model_config

        base, device = self.setup.base, self.mesh.devices.flat[0]
        found = read_model_config(base) if base else model_config(self.setup.size)
        backend = choose(self.setup.attention, device.platform, device.device_kind)
        return found.replace(attention=backend)


class DryPrograms(Programs):
    """Compiles, and returns shapes where results would be."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.compiled: dict[str, Any] = {}

    def put(self, tree: Any, where: Sharding) -> Any:
        def shape(x: Any) -> jax.ShapeDtypeStruct:
            found = jax.eval_shape(lambda: x) if not hasattr(x, "dtype") else x
            return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=where)

        return jax.tree.map(shape, tree)

    def run(self, name, shape, function, *args, donate=(), out_shardings=None):
        with use_mesh(self.mesh):
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
            self.compiled[name] = compiled = compile_or_refuse(name, jitted.lower(*args))
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(function, *args),
            compiled.output_shardings,
        )


def compile_or_refuse(name: str, lowered: Any) -> Any:
    """The compiled program. Raises OutOfMemory with the compiler's figures if it does not fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = next((line for line in str(error).splitlines() if "hbm" in line.lower()), str(error))
        raise OutOfMemory(f"{name}: {told.strip()}") from error


def device_bytes(tree: Any) -> float:
    """Bytes of abstract arrays on one device."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def plan_stage(run: PlannedRun, stage: Any) -> list[Phase]:
    """The phases of a recipe's stage: `configs.RL`, or one with a `fitting`.

    Raises OutOfMemory when a program does not fit by itself.
    """
    if isinstance(stage, configs.RL):
        return _plan_rl(run, stage)
    phases = [_plan_fit(run, stage.fitting, scalar=_is_scalar(stage))]
    sampling = getattr(stage, "sampling", None)
    if sampling is not None:
        weights = abstract_params(run.table(), jnp.float32, param_shardings(run.table(), run.mesh))
        # As many records as fill the lanes.
        records = -(-run.setup.engine.max_rows // stage.samples)
        phases.insert(0, _plan_rollout(run, weights, records, stage.samples, sampling, {}))
    return phases


def _is_scalar(stage: Any) -> bool:
    return isinstance(stage, configs.MetaRM | configs.ScalarRM)


def _plan_rl(run: PlannedRun, stage: configs.RL) -> list[Phase]:
    from grm_jax.training.rl import rl_loss

    trainable = Trainable(run, "base")
    state, optimizer = _abstract_state(run, stage.optimizer, stage.steps, trainable)
    frozen = _frozen(run, trainable)
    rows = min(stage.train_groups or stage.prompts, stage.prompts)
    parts = micro_batches(rows, stage.device_batch, run.mesh)
    prompt, drawn = run.setup.prompt_buckets[-1], stage.sampling.max_new_tokens
    completions = (rows, stage.group, drawn)
    batch = {
        "prompts": ((rows, prompt), jnp.int32),
        "lengths": ((rows,), jnp.int32),
        "targets": (completions, jnp.int32),
        "mask": (completions, jnp.float32),
        "advantages": ((rows, stage.group), jnp.float32),
        "old": (completions, jnp.float32),
        "reference": (completions, jnp.float32),
    }
    loss = rl_loss(run, stage)
    step = make_train_step(
        lambda params, frozen, batch: loss(trainable.assemble(params, frozen), None, batch),
        optimizer, trainable.table, run.mesh, micro_batches=parts, spike=run.setup.guard.spike,
    )  # fmt: skip
    held = {}
    if stage.kl_coef and not stage.offload_reference and frozen is None:
        reference = _weights(run, run.model.compute_dtype)
        held["reference policy"] = device_bytes(reference)
    policy = trainable.assemble(state.params, frozen)
    rollout = _plan_rollout(
        run, policy, stage.prompts, stage.group, stage.sampling,
        held | {"optimiser": device_bytes(state.opt_state)},
    )  # fmt: skip
    tokens = [(prompt + stage.group * drawn, stage.group * drawn)] * rows
    flops = train_flops(run.model, tokens)
    each = rows // parts // data_parallel(run.mesh)
    sizes = [each * n for n in tokens[0]]
    update = _plan_step(run, step, state, frozen, batch, parts, sizes, flops, held)
    return [rollout, update]


def _plan_fit(run: PlannedRun, fitting: configs.Fitting, *, scalar: bool) -> Phase:
    from grm_jax.sampler.scoring import row_scores
    from grm_jax.training.examples import completion_logprobs
    from grm_jax.training.losses import bce_loss, sft_loss

    trainable = Trainable(run, "base", int(scalar))
    state, optimizer = _abstract_state(run, fitting.optimizer, fitting.steps, trainable)
    frozen = _frozen(run, trainable)
    rows, setup = fitting.batch_size, run.setup
    parts = micro_batches(rows, fitting.device_batch, run.mesh)
    length = setup.length_buckets[-1]
    completion = min(length // 2, setup.judge.max_new_tokens)
    batch = {
        "tokens": ((rows, length), jnp.int32),
        "lengths": ((rows,), jnp.int32),
        "labels": ((rows,), jnp.float32),
        "starts": ((rows,), jnp.int32),
        "targets": ((rows, completion), jnp.int32),
        "mask": ((rows, completion), jnp.float32),
    }

    def loss(params, frozen, batch):
        params = trainable.assemble(params, frozen)
        if scalar:
            tokens, lengths = batch["tokens"], batch["lengths"]
            scores = row_scores(params, run.model, tokens, lengths, remat=setup.remat)
            return bce_loss(scores, batch["labels"], batch["mask"][:, 0])
        logprobs, _ = completion_logprobs(
            params, run.model, batch, temperature=1.0, remat=setup.remat, chunk=setup.logprob_chunk
        )
        return sft_loss(logprobs, batch["mask"])

    step = make_train_step(
        loss, optimizer, trainable.table, run.mesh, micro_batches=parts, spike=setup.guard.spike
    )
    each = rows // parts // data_parallel(run.mesh)
    heads = 0 if scalar else completion
    flops = train_flops(run.model, [(length, heads)] * rows)
    sizes = [each * length, each * heads]
    return _plan_step(run, step, state, frozen, batch, parts, sizes, flops, {})


def _plan_step(run, step, state, frozen, batch, parts, sizes, flops, held) -> Phase:
    """A train step of `sizes` (tokens, head tokens) on a device at a time."""
    where = sharding(run.mesh, ("batch",) if parts == 1 else (None, "batch"))

    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if parts == 1 else (parts, shape[0] // parts, *shape[1:])

    given = {
        name: jax.ShapeDtypeStruct(split(shape), dtype, sharding=where)
        for name, (shape, dtype) in batch.items()
    }
    found = {
        "parameters": device_bytes(state.params),
        "optimiser": device_bytes(state.opt_state),
        "frozen weights": device_bytes(frozen),
        **held,
        "batch": device_bytes(given),
    }
    # The gradients' sum over micro-batches, float32.
    gradients = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * 4.0 for x in jax.tree.leaves(state.params)
    )
    if not run.compiles:
        found["gradients"] = gradients * (1 if parts == 1 else 2)
        setup = run.setup
        found["activations and scratch"] = estimate.update_bytes(
            run.model, run.mesh, sizes[0], sizes[1], setup.remat, setup.logprob_chunk
        )
        return Phase("update", found, flops)
    started = time.perf_counter()
    compiled = compile_or_refuse("train step", step.lower(state, frozen, given))
    memory = compiled.memory_analysis()
    # What of the outputs does not reuse an input's memory is scratch, too.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    scratch = memory.temp_size_in_bytes + max(0, outputs)
    found["gradients"] = min(gradients, scratch)
    found["activations and scratch"] = scratch - found["gradients"]
    traffic = collective_bytes(compiled.as_text())
    return Phase("update", found, flops, traffic, time.perf_counter() - started)


def _plan_rollout(
    run: PlannedRun,
    params: Params,
    records: int,
    samples: int,
    sampling: SamplingConfig,
    held: dict[str, float],
) -> Phase:
    """Prefill and a chunk of decode steps, at the size that the engine would plan."""
    mesh, length = decode_mesh(run.mesh), run.setup.prompt_buckets[-1]
    sampler = Sampler(run.model, [1], run.setup.engine, mesh)
    sampler.programs = programs = DryPrograms(mesh)
    requests = [
        Request(str(i), (i, *[0] * (length - 1)), tuple(range(samples))) for i in range(records)
    ]
    shards = data_parallel(mesh)
    plan = make_plan(
        run.model, run.setup.engine, requests, sampling.max_new_tokens, shards,
        split=mesh.shape["tensor"],
    )  # fmt: skip
    name = f"rollout ({plan.shape.lanes * shards} samples at once)"
    page = plan.shape.page
    rows = max(1, min(run.setup.engine.prefill_tokens // (page * shards), plan.shape.lanes))
    found = {"parameters": device_bytes(params), **held}
    if not run.compiles:
        found["decoding weights"] = estimate.decode_weight_bytes(run.model, mesh)
        found["caches"] = float(plan.bytes)
        scratch = estimate.prefill_bytes(run.model, mesh, rows * page, length)
        return Phase(name, found | {"activations and scratch": scratch})
    started = time.perf_counter()
    key = jax.eval_shape(lambda: jax.random.key(0))
    rollout = Rollout(sampler, params, plan, shards, sampling, key)  # pyright: ignore[reportArgumentType]
    rollout.reset_lanes()
    some = np.zeros((shards, rows), np.int32)
    rollout.prefill(
        np.zeros((shards, rows, page), np.int32), some, some,
        np.zeros((shards, rows, plan.shape.depth), np.int32), some, first=False,
    )  # fmt: skip
    rollout.steps(rollout.board.work(), 1)
    temporary = max(
        programs.compiled[name].memory_analysis().temp_size_in_bytes
        for name in ("prefill", "decode")
    )
    caches = (rollout.pages, rollout.lanes, rollout.stash)
    found["decoding weights"] = device_bytes(rollout.weights)
    found["caches"] = device_bytes(caches)
    found["activations and scratch"] = float(temporary)
    traffic = collective_bytes(programs.compiled["decode"].as_text())
    seconds = time.perf_counter() - started
    return Phase(name, found, 0.0, traffic, seconds)


def _abstract_state(run, optimizer, steps, trainable):
    chain = make_optimizer(optimizer, steps, trainable.table)
    return abstract_state(trainable.table, chain, run.mesh, trainable.dtype), chain


def _weights(run: Run, dtype: Any) -> Params:
    table = run.table()
    return abstract_params(table, jnp.dtype(dtype), param_shardings(table, run.mesh))


def _frozen(run: Run, trainable: Trainable) -> Params | None:
    return _weights(run, run.model.compute_dtype) if trainable.adapters else None
