"""Rule-based online RL (section 3.2): GRPO with a KL penalty.

One step:
    records -> G rollouts each (one order of responses a group) -> rule reward, Eq. (11)
            -> group-normalised advantages -> one gradient step of Eq. (15)

The old policy is the sampler's own log-probabilities: what really drew the tokens. There is one
update a rollout, so the ratio differs from 1 only by the gap between sampler and trainer, which
every step reports. The reference is the start model and stays frozen.

Randomness is keyed by (run, stage, step, example, sample): a run that was stopped repeats the one
that was not.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.config import RL, ConfigError
from grm_jax.critique import rule_reward
from grm_jax.data.loader import batches, collate_groups, group_by_length, round_up
from grm_jax.data.preferences import Preference
from grm_jax.metrics import MetricsWriter, Progress, StepLog, Timer
from grm_jax.sampler.critic import Critique
from grm_jax.training.examples import group_logprobs
from grm_jax.training.fit import begin
from grm_jax.training.losses import Loss, group_advantages, grpo_loss
from grm_jax.training.optimizer import make_optimizer, schedule
from grm_jax.training.rft import to_trajectory
from grm_jax.training.run import Run, Stage, Stopped, stop_request
from grm_jax.training.step import LossFn, make_train_step

log = logging.getLogger("grm_jax")


def run_rl(run: Run, config: RL, init: str | None = None) -> None:
    """Train from `init` (default: the rft stage); does nothing when already done."""
    if not config.sampling.unfiltered:
        raise ConfigError(
            "rl.sampling must draw from the whole distribution, or the policy's log-probabilities "
            "are not those of its rollouts: give temperature > 0, top_k=0, top_p=1, min_p=0, not "
            f"{config.sampling}"
        )
    stage = Stage(run, "rl", config, init)
    if stage.done:
        return
    setup, start = run.setup, init or "rft"
    stage.begin(start)
    # The reference policy: the start model, never updated.
    reference = run.params(start)
    table = run.table()
    optimizer = make_optimizer(config.optimizer, config.steps, table)
    rate = schedule(config.optimizer, config.steps)
    train_step = make_train_step(
        rl_loss(run, config), optimizer, table, run.mesh, micro_batches=config.micro_batches
    )
    critic = run.critic("one")
    data = record_batches(run, config)
    checkpoints = stage.open_checkpoints()
    state = begin(checkpoints, table, optimizer, run, start, 0, data)
    first = int(state.step)
    metrics = MetricsWriter(stage.directory, first)
    rollout_log = StepLog(stage.directory / "rollouts.jsonl", first)
    progress = Progress("rl", config.steps, done=first)
    timer = Timer()
    try:
        with stop_request() as stop:
            for step in range(first + 1, config.steps + 1):
                records: list[Preference] = next(data)
                with timer.phase("rollout"):
                    rollouts = critic.critiques(
                        state.params,
                        records,
                        range(config.group),
                        config.sampling,
                        jax.random.fold_in(run.stage_key("rl"), step),
                        salt=f"step {step}",
                    )
                with timer.phase("reward"):
                    groups = [rollouts[record.id] for record in records]
                    rewards = np.asarray(
                        [
                            [rule_reward(c.scores, record.labels, tie=config.tie) for c in group]
                            for record, group in zip(records, groups, strict=True)
                        ],
                        np.float32,
                    )
                    batch = rollout_batch(groups, rewards, config, setup.prompt_buckets)
                with timer.phase("update"):
                    state, values = train_step(state, reference, batch)
                    values = {name: float(value) for name, value in values.items()}
                values |= describe(groups, rewards) | timer.take()
                spent = sum(v for name, v in values.items() if name.startswith("seconds/"))
                values["tokens_per_second"] = values.pop("tokens") / spent
                values["learning_rate"] = float(np.asarray(rate(step - 1)))
                metrics.write(step, values)
                if config.save_rollouts:
                    rollout_log.write(_rows(step, records, groups, rewards))
                shown = ("reward", "signal", "kl", "entropy", "length", "logprob_gap")
                progress.update(1, {name: values[name] for name in shown})
                if stop.asked or (step % setup.checkpoint_every == 0 and step < config.steps):
                    checkpoints.save(step, state, data)
                if stop.asked:
                    raise Stopped(f"rl saved at step {step}")
    finally:
        checkpoints.close()
        metrics.close()
        rollout_log.close()
    stage.finish(state.params)


def rl_loss(run: Run, config: RL) -> LossFn:
    """GRPO's loss of a `rollout_batch`; the frozen input is the reference policy.

    The rollouts of a group share their prompt, which is computed once for all of them.
    """
    model, setup = run.model, run.setup
    temperature = config.sampling.temperature

    def compute(params, reference, batch) -> Loss:
        logprobs, entropy = group_logprobs(
            params,
            model,
            batch,
            temperature=temperature,
            remat=setup.remat,
            chunk=setup.logprob_chunk,
            with_entropy=True,
        )
        assert entropy is not None
        ref, _ = group_logprobs(
            reference,
            model,
            batch,
            temperature=temperature,
            remat="none",
            chunk=setup.logprob_chunk,
        )
        # Groups of rollouts as rows of them.
        logprobs, entropy, ref, old, mask = (
            x.reshape(-1, x.shape[-1])
            for x in (logprobs, entropy, ref, batch["old"], batch["mask"])
        )
        loss = grpo_loss(
            logprobs,
            old,
            jax.lax.stop_gradient(ref),
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

    def loss_fn(params, reference, batch) -> Loss:
        # A micro-batch without rollouts (dropped groups) costs nothing, forward or backward.
        shape = jax.eval_shape(compute, params, reference, batch)

        def nothing(params, reference, batch) -> Loss:
            # Depends on params so that both branches have gradients.
            del reference, batch
            zero = 0.0 * jnp.sum(params["final_norm"])
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero, shape)

        return jax.lax.cond(jnp.any(batch["mask"] > 0), compute, nothing, params, reference, batch)

    return loss_fn


def record_batches(run: Run, config: RL):
    """Endless batches of records whose prompts fall into the same length bucket."""
    critic = run.critic("given")

    def prompt_length(record: Preference) -> int:
        messages = critic.messages(record, range(len(record.responses)))
        return len(run.tokenizer.chat(messages))

    lengths = {record.id: prompt_length(record) for record in run.records}
    groups = group_by_length(
        run.records, lambda r: lengths[r.id], run.setup.prompt_buckets, "prompts"
    )
    # A bucket with fewer records than a batch joins the next longer one (or the one before).
    for bucket in list(groups):
        if len(groups[bucket]) < config.prompts and len(groups) > 1:
            others = [b for b in groups if b > bucket] or [b for b in groups if b < bucket][-1:]
            groups[others[0]] = groups[others[0]] + groups.pop(bucket)
    if len(run.records) < config.prompts:
        raise ConfigError(
            f"rl.prompts={config.prompts} but there are only {len(run.records)} preferences"
        )
    return batches(groups, dict.fromkeys(groups, list), config.prompts, run.setup.seed)


def rollout_batch(
    groups: list[list[Critique]],
    rewards: np.ndarray,
    config: RL,
    prompt_buckets: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """P groups of G rollouts as one batch of groups, of few possible shapes.

    Groups with signal stand first; with `train_groups` only the first so many remain, those without
    signal among them with a zero mask (so that whole micro-batches of them are skipped). Adds
    advantages [B, G] and old [B, G, C] to `collate_groups`' arrays.
    """
    advantages = np.asarray(group_advantages(jnp.asarray(rewards)))
    signal = np.any(advantages != 0, axis=1)
    chosen = np.argsort(-signal.astype(int), kind="stable")[: config.train_groups]
    prompts = [groups[p][0].prompt for p in chosen]
    for p, prompt in zip(chosen, prompts, strict=True):
        assert all(c.prompt == prompt for c in groups[p]), "rollouts of a group share their prompt"
    longest = max(len(prompt) for prompt in prompts)
    length = next((bucket for bucket in prompt_buckets if bucket >= longest), None)
    if length is None:
        raise ValueError(
            f"a prompt of {longest} tokens is longer than the last of prompt_buckets, "
            f"{prompt_buckets[-1]}; raise it"
        )
    # Completions are padded to half or all of the maximum: two shapes.
    half = max(8, -(-config.sampling.max_new_tokens // 2))
    width = round_up(max(len(c.tokens) for p in chosen for c in groups[p]), half)
    completions = [[c.tokens.tolist() for c in groups[p]] for p in chosen]
    batch = collate_groups(prompts, completions, length=length, completion=width)
    batch["advantages"] = advantages[chosen].astype(np.float32)
    batch["old"] = np.zeros_like(batch["mask"])
    for row, p in enumerate(chosen):
        for g, critique in enumerate(groups[p]):
            batch["old"][row, g, : len(critique.logprobs)] = critique.logprobs
    if config.train_groups is not None:
        # Whole groups: a rollout of exactly average reward in a group with signal still counts.
        batch["mask"] *= signal[chosen, None, None]
    return batch


def describe(groups: list[list[Critique]], rewards: np.ndarray) -> dict[str, float]:
    """What a step's rollouts were like."""
    every = [critique for group in groups for critique in group]
    lengths = np.asarray([len(c.tokens) for c in every])
    return {
        "reward": float(rewards.mean()),
        "correct": float((rewards == 1.0).mean()),
        "signal": float((rewards.std(axis=1) > 0).mean()),
        "length": float(lengths.mean()),
        "tokens": float(lengths.sum()),
        "truncated": float(np.mean([c.finish_reason == "length" for c in every])),
        "unparsed": float(np.mean([c.failure is not None for c in every])),
    }


def _rows(
    step: int, records: list[Preference], groups: list[list[Critique]], rewards: np.ndarray
) -> list[dict[str, Any]]:
    """Rollouts as trajectory rows with step and reward. Correct is Eq. (10) under any tie rule."""
    rows = []
    for record, group, reward in zip(records, groups, rewards, strict=True):
        for critique, value in zip(group, reward, strict=True):
            correct = rule_reward(critique.scores, record.labels) > 0
            trajectory = to_trajectory(record, critique, correct, kept=True)
            row = {k: v for k, v in dataclasses.asdict(trajectory).items() if v is not None}
            rows.append({"step": step, "reward": float(value), **row})
    return rows
