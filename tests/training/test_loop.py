"""Harmful steps: they are skipped and counted, and many of them lead back to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grm_jax.data.synthetic import WorldConfig
from grm_jax.model.config import SIZES
from grm_jax.model.linear import round_randomly
from grm_jax.parallel.options import MeshConfig
from grm_jax.training.heldout import Measure
from grm_jax.training.loop import Diverged, Loop, Work
from grm_jax.training.losses import Loss
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.options import OptimizerConfig
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import GuardConfig, HeldOutConfig, Setup
from grm_jax.training.step import Guard, init_state, make_train_step
from grm_jax.training.trainable import Trainable


def scaled_loss(params, frozen, batch) -> Loss:
    """A loss whose gradient is as large as the batch says."""
    del frozen
    total = jnp.mean(batch["size"]) * jnp.sum(params["final_norm"])
    return Loss(total, jnp.ones(()), {"loss": (total, jnp.ones(()))})


def sizes(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"size": np.full(4, value, np.float32)} for value in values]


@pytest.fixture
def steps(table, params, one_device):
    """(sizes, spike) -> parameters and metrics after each step."""

    def run(batches, spike=0.0):
        optimizer = optax.sgd(0.01)
        step = make_train_step(scaled_loss, optimizer, table, one_device, spike=spike)
        state, found = init_state(table, optimizer, one_device, params=params), []
        for batch in batches:
            state, metrics = step(state, None, batch)
            norm = np.asarray(state.params["final_norm"])
            found.append((norm, {k: float(v) for k, v in metrics.items()}))
        return found

    return run


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad, steps):
    (first, _), (second, metrics), (third, after) = steps(sizes(1, bad, 1))
    np.testing.assert_array_equal(first, second)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)
    assert not np.array_equal(second, third) and np.isfinite(third).all()
    assert (after["skipped"], after["skipped_in_a_row"]) == (0, 0)


def test_a_spike_is_not_taken_but_a_lasting_change_is(steps):
    found = steps(sizes(*[1] * 25, 50, 1, *[50] * 40), spike=5.0)
    skipped = [metrics["skipped"] for _, metrics in found]
    assert sum(skipped[:25]) == 0, "nothing is a spike while the norm is not known"
    assert skipped[25:27] == [1, 0]
    assert skipped[27] == 1 and skipped[-1] == 0
    assert sum(steps(sizes(*[1] * 25, 50), spike=0.0)[25][1]["skipped"] for _ in "x") == 0


def test_the_guard_is_its_formula():
    guard, norms = Guard.fresh(), [2.0, 4.0, 3.0]
    for norm in norms:
        take, harmful, guard = guard.judge(jnp.asarray(0.0), jnp.asarray(norm), 10.0)
        assert bool(take) and not bool(harmful)
    assert float(guard.norm) == pytest.approx(np.mean(norms))
    assert int(guard.good) == 3


def judged(norms, guard=None, spike=30.0) -> list[tuple[bool, bool, int]]:
    """(taken, harmful, harmful ones in a row) of steps with these gradient norms."""
    judge, found = jax.jit(Guard.judge, static_argnums=3), []
    guard = guard or Guard.fresh()
    for norm in norms:
        take, harmful, guard = judge(guard, jnp.asarray(0.0), jnp.asarray(norm, jnp.float32), spike)
        found.append((bool(take), bool(harmful), int(guard.skipped)))
    return found


@pytest.mark.parametrize("period", [2, 20, 25, 50])
def test_sparse_signal_is_learnt_from(period):
    """Steps without signal enter neither the mean nor the count, nor do they end a row."""
    norms = [0.1 * (1 + i % 3) if i % period == 0 else 0.0 for i in range(30 * period)]
    found = judged(norms)
    assert [take for take, _, _ in found] == [norm > 0 for norm in norms]
    assert not any(harmful for _, harmful, _ in found)


@pytest.mark.parametrize("start", [0.0, 1e-30, 1e-8, 1e-4, 1e2])
@pytest.mark.parametrize("steps", [19, 20, 21, 60])
@pytest.mark.parametrize("after", [1e-6, 0.1, 1e3])
def test_a_lasting_change_is_accepted_before_patience_ends(start, steps, after):
    """By whatever factor the norms change, and wherever in the warm-up."""
    found = judged([start] * steps + [after] * 40)[steps:]
    assert max(row for _, _, row in found) < GuardConfig().patience
    assert all(take for take, _, _ in found[10:])


def test_a_guard_that_zeros_had_closed_opens_again():
    """Older runs let steps without signal into the mean: their checkpoints may hold a zero."""
    closed = Guard(jnp.zeros(()), jnp.asarray(20), jnp.asarray(3))
    assert judged([0.5, 0.4], closed) == [(True, False, 0), (True, False, 0)]


def test_single_spikes_are_still_skipped():
    quiet = [1.0, 0.7, 1.3] * 10
    for spikes in ([31.5], [200.0], [1e6], [50.0, 1e4]):
        found = judged(quiet + spikes + quiet)
        assert [h for _, h, _ in found] == [False] * 30 + [True] * len(spikes) + [False] * 30
        assert found[29 + len(spikes)][2] == len(spikes)
    found = judged([*quiet, 40.0, *quiet, 45.0])
    assert found[30][1] and found[-1][1], "a spike does not open the door to the next one"


def test_an_empty_step_changes_nothing_and_the_schedule_goes_on(table, params, one_device):
    """Momentum and weight decay rest; the rate of a step is the schedule's own."""
    rates = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.1)
    optimizer = make_optimizer(rates, 10, table)
    step = make_train_step(scaled_loss, optimizer, table, one_device)
    state = init_state(table, optimizer, one_device, params=params)
    for size in (1.0, 1.0):
        state, _ = step(state, None, sizes(size)[0])
    before = jax.device_get(state.params)
    for size in (0.0, np.nan):
        state, metrics = step(state, None, sizes(size)[0])
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(old, new)
        assert float(metrics["skipped"]) == (not np.isfinite(size))
    counts = [
        int(node.count)
        for node in jax.tree.leaves(
            state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(node, optax.ScaleByScheduleState)
    ]
    assert counts == [int(state.step)] == [4]


def test_rounding_is_right_on_average():
    """Updates of a hundredth of the last bit: to nearest they are lost, all of them."""
    x = jnp.full(200_000, 1.0 + 2**-7 * 0.01, jnp.float32)
    found = round_randomly(x, jax.random.key(0))
    assert found.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(found, np.float32))) == {1.0, 1.0 + 2**-7}
    assert float(jnp.mean(found.astype(jnp.float32))) == pytest.approx(float(x[0]), abs=5e-6)
    exact = jnp.asarray([0.0, -1.5, 3.0, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(round_randomly(exact, jax.random.key(1)), exact)
    assert jnp.isnan(round_randomly(jnp.asarray([jnp.nan]), jax.random.key(2)))[0]


def test_bfloat16_parameters_learn_from_tiny_updates(table, params, one_device):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = optax.sgd(1e-4)
    step = make_train_step(scaled_loss, optimizer, table, one_device)
    state = init_state(table, optimizer, one_device, params=low)
    before = np.asarray(state.params["final_norm"], np.float32)
    for _ in range(100):
        state, _ = step(state, None, sizes(1.0)[0])
    assert state.params["final_norm"].dtype == jnp.bfloat16
    moved = np.asarray(state.params["final_norm"], np.float32) - before
    assert moved.mean() == pytest.approx(-0.01, rel=0.3)


def test_bfloat16_rounding_is_keyed_by_the_run(table, params, one_device):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = optax.sgd(1e-4)

    def after(seed: int | None) -> list[np.ndarray]:
        key = None if seed is None else jax.random.key(seed)
        step = make_train_step(scaled_loss, optimizer, table, one_device, key=key)
        state, _ = step(init_state(table, optimizer, one_device, params=low), None, sizes(1.0)[0])
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(state.params)]

    usual = after(0)
    for seed, same in ((0, True), (None, True), (1, False)):
        equal = [np.array_equal(a, b) for a, b in zip(usual, after(seed), strict=True)]
        assert all(equal) == same


@pytest.fixture
def stage(tmp_path, monkeypatch, model) -> Stage:
    monkeypatch.setitem(SIZES, "micro", model)
    setup = Setup(
        run_dir=str(tmp_path), size="micro", mesh=MeshConfig(1, 1, 1), checkpoint_every=5,
        world=WorldConfig(cold_start=5, train=5, fresh=2, shifted=1),
        guard=GuardConfig(spike=0.0, patience=3, rollbacks=2), log_every=1,
    )  # fmt: skip
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    found = Stage(Run(setup), "sft", None)
    found.begin()
    return found


def run_loop(
    stage: Stage, values: list[float], steps: int, log_every=1, heldout: Measure | None = None
) -> list[tuple[int, float]]:
    """Train on batches of these sizes; the steps at which each batch was met."""
    source = grain.MapDataset.source(sizes(*values)).repeat().to_iter_dataset()
    met = []
    trainable, config = Trainable(stage.run, "base"), OptimizerConfig(learning_rate=1e-3)
    with Loop(
        stage, steps, config, trainable, iter(source), log_every=log_every, heldout=heldout
    ) as loop:
        step = loop.train_step(scaled_loss, micro_batches=1)
        for number in loop:
            batch = loop.next_batch()
            met.append((number, float(batch["size"][0])))
            loop.take(step, batch, Work(tokens=4.0))
    return met


def logged(stage: Stage) -> list[dict]:
    lines = (Path(stage.directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_few_bad_steps_are_passed_over(stage, caplog):
    met = run_loop(stage, [1.0, 1.0, np.nan, 1.0], 8)
    assert [number for number, _ in met] == list(range(1, 9))
    rows = logged(stage)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0] * 2
    assert rows[2]["loss"] is None, "JSON has no NaN"
    assert "sft: step 3 was skipped (loss nan, gradient norm nan); 1 in a row" in caplog.text


def test_a_row_is_the_mean_of_its_steps_and_phases(stage):
    """Also of a phase that only some of the steps have: a checkpoint."""
    run_loop(stage, [1.0, 3.0], 12, log_every=4)
    rows = logged(stage)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert ["seconds/checkpoint" in row for row in rows] == [False, True, True]
    assert all(row["seconds/update"] > 0 for row in rows)
    assert rows[0]["loss"] > rows[-1]["loss"]


def test_many_lead_back_to_the_checkpoint_and_on_with_other_data(stage, caplog):
    met = run_loop(stage, [1.0] * 6 + [np.nan] * 4 + [2.0] * 20, 12)
    back = [index for index in range(1, len(met)) if met[index][0] <= met[index - 1][0]]
    assert len(back) == 1 and met[back[0]][0] == 6, "from step 5's checkpoint"
    assert all(size == 2.0 for _, size in met[back[0] :]), "the bad data is behind"
    assert "back to step 5" in caplog.text
    assert [row["step"] for row in logged(stage)] == list(range(1, 13))


def measured_every(stage: Stage, every: int) -> Measure:
    """Measures a parameter, every so often."""
    run = stage.run
    run.setup = dataclasses.replace(run.setup, heldout=HeldOutConfig(every=every))
    return lambda params: {"norm": float(params["final_norm"][0]), "n": 1.0}


def test_what_is_held_out_is_measured_every_n_steps_and_at_the_end(stage, caplog):
    caplog.set_level("INFO", "grm_jax")
    run_loop(stage, [1.0], 8, heldout=measured_every(stage, 3))
    rows = logged(stage)
    norms = {row["step"]: row["heldout/norm"] for row in rows if "heldout/norm" in row}
    assert list(norms) == [3, 6, 8]
    assert norms[3] > norms[6] > norms[8], "each with the parameters after its step"
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert f"  heldout/norm {norms[8]:.4g}  heldout/n 1  " in caplog.text, "in the progress line"


def test_steps_that_are_repeated_are_measured_again_and_not_twice(stage):
    values = [1.0] * 6 + [np.nan] * 4 + [2.0] * 20
    met = run_loop(stage, values, 12, heldout=measured_every(stage, 2))
    assert len(met) > 12, "it went back to a checkpoint"
    steps = [row["step"] for row in logged(stage) if "heldout/norm" in row]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_when_that_does_not_help_it_ends(stage):
    with pytest.raises(Diverged, match="3 steps in a row were skipped, and going back"):
        run_loop(stage, [np.nan], 20)


def test_a_profile_is_two_step_numbers(stage):
    run = stage.run
    run.setup = dataclasses.replace(run.setup, profile="3")
    with pytest.raises(ValueError, match="--profile 3: give FIRST:LAST"):
        run_loop(stage, [1.0], 2)
