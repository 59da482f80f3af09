"""What a stage needs on devices that need not be there.

    recipe, devices -> train step, prefill, decode steps -> bytes, FLOPs, traffic

The code of training and sampling runs up to the point where arrays would be allocated; shapes with
shardings take their place. If the devices' compiler is available, the programs are compiled, and
their memory is what the compiler reports; otherwise activations are estimated (`estimate`). Arrays
on a device that are no arguments of the program are added up from their shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from grm_jax import recipes
from grm_jax.data.collate import Example, collate, collate_groups, round_up
from grm_jax.data.packing import collate_packed
from grm_jax.errors import UserError
from grm_jax.model.config import model_config
from grm_jax.model.flops import train_flops
from grm_jax.model.params import Params, abstract_params
from grm_jax.model.storage import param_shardings
from grm_jax.parallel.devices import find_device
from grm_jax.parallel.mesh import data_parallel, decode_mesh, sharding
from grm_jax.planning import estimate
from grm_jax.planning.hlo import collective_bytes
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.plan import cache_room, decode_weight_bytes, make_plan, prefill_bytes
from grm_jax.sampler.programs import Programs, SamplerStats
from grm_jax.sampler.runner import Runner
from grm_jax.sampler.schedule import Request
from grm_jax.training.meta_rm import critique_objective
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.rl import by_length, policy_objective
from grm_jax.training.run import Run
from grm_jax.training.scalar_rm import collate_pairs, preference_objective
from grm_jax.training.sft import completion_objective
from grm_jax.training.step import TrainStep, abstract_state, make_train_step, micro_batches
from grm_jax.training.trainable import Trainable


class Work(NamedTuple):
    """A row of a batch: its tokens, how many of them need logits, and how many sequences it has."""

    tokens: int
    heads: int
    sequences: int = 1


@dataclasses.dataclass
class Phase:
    """One program, and what is on a device while it runs.

    Attributes:
      name: the name of the phase.
      bytes: the bytes on one device, by kind.
      flops: the model FLOPs of all devices together; 0 where they are not counted.
      traffic: the bytes that a device receives, by kind of collective.
      seconds: the seconds that compiling took.
    """

    name: str
    bytes: dict[str, float]
    flops: float = 0.0
    traffic: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


class OutOfMemory(UserError):
    """The compiler refuses a program that does not fit."""


class PlannedRun(Run):
    """A run without files: a pretrained size needs no tokenizer to be planned for.

    Args:
      devices: the devices to plan for, or as many others if `compiles` is False.
      kind: JAX's name of the devices that are planned for.
      compiles: whether programs are compiled for the devices.
    """

    def __init__(self, setup: recipes.Setup, devices: Sequence[Any], kind: str, *, compiles: bool):
        super().__init__(setup, devices)
        self.kind, self.compiles = kind, compiles

    @property
    def device(self) -> tuple[str, str]:
        """Of the devices that are planned for: CPUs may stand in for them."""
        return "tpu" if self.compiles else "gpu", self.kind

    @property
    def vocab_size(self) -> int:
        return model_config(self.setup.size).vocab_size


class DryPrograms(Programs):
    """Compiles programs without running them, and returns the shapes of their results."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.by_name: dict[str, Any] = {}

    @property
    def on_cpu(self) -> bool:
        """False: CPUs only stand in for the devices that are planned for."""
        return False

    def put(self, tree: Any, sharding: Sharding) -> Any:
        def shape(x: Any) -> jax.ShapeDtypeStruct:
            array = jax.eval_shape(lambda: x) if not hasattr(x, "dtype") else x
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        return jax.tree.map(shape, tree)

    def run(self, name, shape, function, *args, **how):
        with refusal(name):
            self.by_name[name] = program = self.compiled(name, shape, function, *args, **how)
        return jax.tree.map(
            lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
            jax.eval_shape(function, *args),
            program.output_shardings,
        )


@contextlib.contextmanager
def refusal(name: str) -> Iterator[None]:
    """Raises OutOfMemory, with the compiler's figures, for a program that does not fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = str(error).splitlines()
        reason = next((line for line in lines if "hbm" in line.lower()), str(error))
        raise OutOfMemory(f"{name}: {reason.strip()}") from error


def device_bytes(tree: Any) -> float:
    """Bytes of abstract arrays on one device."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def plan_stage(run: PlannedRun, stage: Any) -> list[Phase]:
    """The phases of a recipe's stage: `recipes.RL`, or one with a `fitting`.

    Raises OutOfMemory when a program does not fit by itself.
    """
    if isinstance(stage, recipes.RL):
        return _plan_rl(run, stage)
    phases = [_plan_fit(run, stage)]
    sampling = getattr(stage, "sampling", None)
    if sampling is not None:
        weights = _weights(run, run.model.compute_dtype)
        # Enough records to fill all lanes.
        records = -(-run.setup.engine.max_rows // stage.samples)
        rollout = _plan_rollout(
            run, weights, records, stage.samples, sampling,
            orders=getattr(stage, "orders", 1), laid_out=True,
        )  # fmt: skip
        phases.insert(0, rollout)
    return phases


def _plan_rl(run: PlannedRun, stage: recipes.RL) -> list[Phase]:
    trainable = Trainable(run, "base")
    state, optimizer = _abstract_state(run, stage.optimizer, stage.steps, trainable)
    frozen = _frozen(run, trainable)
    resident = {}
    if stage.kl_coef and not stage.offload_reference and frozen is None:
        resident["reference policy"] = device_bytes(_weights(run, run.model.compute_dtype))
    policy = trainable.assemble(state.params, frozen)
    rollout = _plan_rollout(
        run, policy, stage.prompts, stage.group, stage.sampling,
        {"parameters": device_bytes(policy)} | resident
        | {"optimizer": device_bytes(state.opt_state)},
    )  # fmt: skip
    rows = min(stage.train_groups or stage.prompts, stage.prompts)
    prompt, drawn = run.setup.prompt_buckets[-1], round_up(stage.sampling.max_new_tokens, 8)
    completions = [[[1] * drawn] * stage.group] * rows
    batch = collate_groups([[1] * prompt] * rows, completions, length=prompt, completion=drawn)
    batch["advantages"] = batch["mask"][:, :, 0]
    batch["old"] = batch["reference"] = batch["mask"]
    if stage.text_weight != 1.0:
        batch["share"] = batch["mask"]
    row = Work(tokens=prompt + stage.group * drawn, heads=stage.group * drawn)
    objective = policy_objective(run, stage, trainable.assemble)
    step = _step(run, objective, optimizer, trainable, rows, stage.device_batch, by_length)
    return [rollout, _plan_step(run, step, state, frozen, batch, row, resident)]


def _plan_fit(run: PlannedRun, stage: Any) -> Phase:
    """The update of a stage with a `fitting`, on its longest rows."""
    fitting, setup, rows = stage.fitting, run.setup, stage.fitting.batch_size
    length = fitting.pack or setup.length_buckets[-1]
    learned = round_up(min(length // 2, setup.judge.max_new_tokens), 8)
    if fitting.pack:  # of all examples in a row together
        learned = length // 2
    example = Example((1,) * (length - learned), (1,) * learned)
    scalar = isinstance(stage, recipes.MetaRM | recipes.ScalarRM)
    trainable = Trainable(run, "base", int(scalar))
    if isinstance(stage, recipes.ScalarRM):
        objective = preference_objective(run, trainable.assemble)
        batch = collate_pairs([(example, example)] * rows, length)
    else:
        make_objective = critique_objective if scalar else completion_objective
        objective = make_objective(run, trainable.assemble)
        # Only the data tells how many examples share a packed row; here it is one.
        batch = (
            collate_packed([(example,)] * rows, length=length, completion=learned, segments=1)
            if fitting.pack
            else collate([example] * rows, length=length, completion=learned)
        )
    state, optimizer = _abstract_state(run, fitting.optimizer, fitting.steps, trainable)
    step = _step(run, objective, optimizer, trainable, rows, fitting.device_batch)
    tokens = batch["tokens"][0].size
    row = Work(tokens, 0 if scalar else learned, sequences=tokens // length)
    return _plan_step(run, step, state, _frozen(run, trainable), batch, row, {})


def _step(run, objective, optimizer, trainable, rows, device_batch, cut=None) -> TrainStep:
    return make_train_step(
        objective, optimizer, trainable.table, run.mesh, spike=run.setup.guard.spike,
        micro_batches=micro_batches(rows, device_batch, run.mesh), cut=cut,
    )  # fmt: skip


def _plan_step(run, step, state, frozen, batch, row: Work, resident) -> Phase:
    """A train step on a host batch of equal rows; `resident`: other bytes on the device."""
    parts, rows = step.parts, len(next(iter(batch.values())))
    layout = sharding(run.mesh, ("batch",) if parts == 1 else (None, "batch"))

    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if parts == 1 else (parts, shape[0] // parts, *shape[1:])

    abstract_batch = {
        name: jax.ShapeDtypeStruct(split(x.shape), x.dtype, sharding=layout)
        for name, x in batch.items()
    }
    sequence = row.tokens / row.sequences, row.heads / row.sequences
    flops = train_flops(run.model, [sequence] * row.sequences) * rows
    sizes = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "frozen weights": device_bytes(frozen),
        **resident,
        "batch": device_bytes(abstract_batch),
    }
    # The gradients' sum over micro-batches, float32.
    gradients = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * 4.0 for x in jax.tree.leaves(state.params)
    )
    if not run.compiles:
        sizes["gradients"] = gradients * (1 if parts == 1 else 2)
        setup, at_once = run.setup, rows // parts // data_parallel(run.mesh)
        sizes["activations and scratch"] = estimate.update_bytes(
            run.model, run.mesh, at_once * row.tokens, at_once * row.heads,
            setup.remat, setup.logprob_chunk,
        )  # fmt: skip
        return Phase("update", sizes, flops)
    started = time.perf_counter()
    with refusal("train step"):
        compiled = step.lower(state, frozen, abstract_batch).compile()
    memory = compiled.memory_analysis()
    # Outputs that do not reuse the memory of an input count as scratch, too.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    scratch = memory.temp_size_in_bytes + max(0, outputs)
    sizes["gradients"] = min(gradients, scratch)
    sizes["activations and scratch"] = scratch - sizes["gradients"]
    traffic = collective_bytes(compiled.as_text())
    return Phase("update", sizes, flops, traffic, time.perf_counter() - started)


def _plan_rollout(
    run: PlannedRun,
    params: Params,
    records: int,
    samples: int,
    sampling: SamplingConfig,
    resident: Mapping[str, float] = {},
    *,
    orders: int = 1,
    laid_out: bool = False,
) -> Phase:
    """Prefill and a chunk of decode steps, at the size that the engine would plan.

    Args:
      resident: the bytes of other arrays on the device, the parameters included.
      orders: the prompts of a record, among which its samples are divided.
      laid_out: the parameters are for sampling alone, and the decoding weights replace them.
    """
    mesh, length = decode_mesh(run.mesh), run.setup.prompt_buckets[-1]
    programs = DryPrograms(mesh)
    requests = [
        Request(str(i), (i, order, *[0] * (length - 2)), tuple(range(order, samples, orders)))
        for i in range(records)
        for order in range(min(orders, samples))
    ]
    shards, engine = data_parallel(mesh), run.setup.engine
    sizes = dict(resident)
    device = find_device(run.kind)
    if engine.cache_bytes is None and device is not None:
        free = device.memory - sum(sizes.values())
        if laid_out:
            free -= decode_weight_bytes(run.model, mesh)
        room = cache_room(run.model, engine, mesh, length, free, laid_out=laid_out)
        engine = dataclasses.replace(engine, cache_bytes=room)
    try:
        plan = make_plan(
            run.model, engine, requests, sampling.max_new_tokens, shards,
            split=mesh.shape["tensor"], on_cpu=programs.on_cpu,
        )  # fmt: skip
    except ValueError as error:
        raise OutOfMemory(f"rollout: {error}") from error
    name = f"rollout ({plan.shape.lanes * shards} samples at once)"
    page = plan.shape.page
    rows = max(1, min(run.setup.engine.prefill_tokens // (page * shards), plan.shape.lanes))
    if not run.compiles:
        sizes["decoding weights"] = decode_weight_bytes(run.model, mesh)
        sizes["caches"] = float(plan.bytes)
        scratch = prefill_bytes(run.model, mesh, rows * page, length)
        return Phase(name, sizes | {"activations and scratch": scratch})
    started = time.perf_counter()
    key = jax.eval_shape(lambda: jax.random.key(0))
    runner = Runner(run.model, run.setup.engine, programs, SamplerStats(), params, plan, key, [1])  # pyright: ignore[reportArgumentType]
    zeros = np.zeros((shards, rows), np.int32)
    runner.compute_pages(
        np.zeros((shards, rows, page), np.int32), zeros, zeros,
        np.zeros((shards, rows, plan.shape.depth), np.int32), zeros,
    )  # fmt: skip
    runner.steps(runner.batch.work(), 1, sampling)
    temporary = max(
        programs.by_name[name].memory_analysis().temp_size_in_bytes
        for name in ("prefill", "decode")
    )
    caches = (runner.pages, runner.lanes, runner.stash)
    shared = set() if laid_out else {id(x) for x in jax.tree.leaves(params)}
    sizes["decoding weights"] = device_bytes(
        [x for x in jax.tree.leaves(runner.weights) if id(x) not in shared]
    )
    sizes["caches"] = device_bytes(caches)
    sizes["activations and scratch"] = float(temporary)
    traffic = collective_bytes(programs.by_name["decode"].as_text())
    seconds = time.perf_counter() - started
    return Phase(name, sizes, 0.0, traffic, seconds)


def _abstract_state(run, optimizer, steps, trainable):
    chain = make_optimizer(optimizer, steps, trainable.table)
    return abstract_state(trainable.table, chain, run.mesh, trainable.dtype), chain


def _weights(run: Run, dtype: Any) -> Params:
    table = run.table()
    return abstract_params(table, jnp.dtype(dtype), param_shardings(table, run.mesh))


def _frozen(run: Run, trainable: Trainable) -> Params | None:
    return _weights(run, run.model.compute_dtype) if trainable.adapters else None
