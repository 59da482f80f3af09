"""Rule-based online RL (section 3.2 of arXiv:2504.02495): GRPO with a KL penalty.

One step:
    records -> G rollouts each (one order of responses a group; with `--rl.orders` several groups)
            -> reward, Eq. (11) (`rewards.py`)
            -> group-normalised advantages -> one gradient step of Eq. (15)

The old policy is given by the sampler's own log-probabilities, with which the tokens were drawn.
Each rollout is used for one update, so the ratio of the policies differs from 1 only by the gap
between sampler and trainer, which every step reports: the clip hardly ever acts. The reference is
the start model and stays frozen.

Randomness is keyed by (run, stage, step, example, sample), so that a resumed run draws what a run
without an interruption draws.

Dimensions: N groups (prompts of a step), G rollouts of a group, P prompt tokens, C completion
tokens; B groups of a micro-batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax.critique import is_correct
from grm_jax.data.collate import collate_groups, round_up
from grm_jax.data.loader import batches, group_by_length
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import to_trajectory
from grm_jax.errors import UserError
from grm_jax.judge.critiques import Rollout
from grm_jax.metrics import StepLog
from grm_jax.model.batch import Batch, group_logprobs
from grm_jax.model.flops import train_flops
from grm_jax.model.params import Params
from grm_jax.model.storage import param_shardings
from grm_jax.parallel.mesh import own_rows, put_batch, use_mesh
from grm_jax.training import rewards
from grm_jax.training.heldout import critique_accuracy, critique_records
from grm_jax.training.inputs import sampled, usable
from grm_jax.training.lengths import Reading
from grm_jax.training.loop import Loop, Work
from grm_jax.training.losses import Loss, group_advantages, grpo_loss
from grm_jax.training.options import RL
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import ConfigError
from grm_jax.training.step import HostBatch, LossFn, first, micro_batches, zeros_of
from grm_jax.training.trainable import Assemble, Trainable, as_it_is

log = logging.getLogger("grm_jax")
T = TypeVar("T")


def check_options(config: RL) -> None:
    """Raise ConfigError for options that do not go together."""
    if not config.sampling.unfiltered:
        raise ConfigError(
            "rollouts must be drawn from the whole distribution, or the policy's log-probabilities "
            "are not theirs: give --rl.sampling.temperature above 0, --rl.sampling.top-k 0, "
            f"--rl.sampling.top-p 1 and --rl.sampling.min-p 0, not {config.sampling}"
        )
    if config.prompts % config.orders:
        raise ConfigError(
            f"--rl.prompts {config.prompts} are not whole records of --rl.orders {config.orders} "
            f"prompts each; give --rl.prompts {config.orders * -(-config.prompts // config.orders)}"
        )
    rewards.check(config)


def run_rl(run: Run, config: RL, init: str | None = None) -> None:
    """Train from `init` (default: the rft stage); does nothing when already done."""
    check_options(config)
    start = init or "rft"
    stage = Stage(run, "rl", config, init, [start])
    if stage.done:
        return
    records = usable_records(run, config)
    heldout = critique_records(run, "rl", run.records)
    stage.begin()
    trainable = Trainable(run, start)
    reference = Reference(run, config, trainable)
    rows = config.prompts if config.train_groups is None else config.train_groups
    parts = micro_batches(min(rows, config.prompts), config.device_batch, run.mesh)
    critic, data = run.new_critic(config.orders), record_batches(run, records, config)
    shown = ("reward", "signal", "kl", "entropy", "length", "logprob_gap")
    loop = Loop(
        stage, config.steps, config.optimizer, trainable, data,
        log_every=1, shown=shown, heldout=critique_accuracy(run, heldout, critic),
    )  # fmt: skip
    rollout_log = StepLog(stage.directory / "rollouts.jsonl", loop.first)
    train_step = loop.train_step(
        policy_objective(run, config, trainable.assemble), micro_batches=parts, cut=by_length
    )
    previous = loop.first
    with contextlib.closing(rollout_log), loop:
        for step in loop:
            if step <= previous:  # back at a checkpoint: the rollouts since then are drawn again
                rollout_log.rewind(step - 1)
            previous = step
            asked: list[Preference] = next(data)
            with loop.timer.phase("update"):
                # Rollouts need the parameters now; this wait belongs to the update.
                jax.block_until_ready(loop.state.params)
            with loop.timer.phase("rollout"):
                rollouts = critic.critiques(
                    trainable.assemble(loop.state.params, trainable.frozen),
                    asked,
                    range(config.group * config.orders),
                    config.sampling,
                    jax.random.fold_in(run.stage_key("rl"), step),
                    salt=f"step {step}",
                )
            with loop.timer.phase("reward"):
                asked, groups = groups_of(asked, rollouts, config.orders)
                threshold = critic.prompts.single.threshold
                earned = rewards.rule(asked, groups, config, threshold)
                learnt = rewards.learnt(earned, asked, groups, config, threshold)
                shares = None
                if config.text_weight != 1.0:
                    shares = rewards.shares(groups, config.text_weight, run.tokenizer.decode)
                batch = rollout_batch(groups, learnt, config, run.setup.prompt_buckets, shares)
            with loop.timer.phase("reference"):
                local: dict[str, Any] = dict(own_rows(batch, run.mesh, parts))
                local["reference"] = reference.logprobs(local, parts)
            host_metrics = rollout_metrics(groups, earned, learnt)
            tokens, seconds = host_metrics.pop("tokens"), loop.timer.seconds["rollout"]
            host_metrics["rollout_tokens_per_second"] = tokens / seconds
            loop.take(train_step, local, _work(run, batch), host_metrics)
            if config.save_rollouts:
                rollout_log.write(_rows(step, asked, groups, earned, threshold))
    stage.finish(trainable.whole(loop.state.params))


class Reference:
    """The frozen policy, to which the KL penalty keeps the trained policy near.

    It is the model before training. With adapters, the frozen weights that they belong to serve as
    the reference, and there is no second copy.

    Args:
      config: with a `kl_coef` of 0 nothing is loaded; with `offload_reference` the weights are kept
        in host memory between steps.
    """

    def __init__(self, run: Run, config: RL, trainable: Trainable):
        self._mesh = run.mesh
        self._on_device = param_shardings(run.table(), run.mesh)
        self._params = trainable.untrained() if config.kl_coef else None
        self._offload = config.offload_reference and not trainable.adapters
        if self._offload and self._params is not None:
            on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), self._on_device)
            self._params = jax.device_put(self._params, on_host)

        def compute(params: Params, batch: Batch) -> jax.Array:
            logprobs, _ = group_logprobs(
                params,
                run.model,
                batch,
                temperature=config.sampling.temperature,
                remat="none",
                chunk=run.setup.logprob_chunk,
            )
            return logprobs  # [B, G, C]

        self._compute = jax.jit(lambda params, batch: _by_part(compute, params, batch))

    def logprobs(self, batch: HostBatch, parts: int) -> jax.Array | np.ndarray:
        """Log-probabilities of a batch's completions: [N, G, C], or [parts, N / parts, G, C] for
        several micro-batches; zeros where there is no penalty, which `policy_objective` replaces.
        """
        if self._params is None:
            return np.zeros_like(batch["mask"])
        params = self._params
        if self._offload:
            params = jax.device_put(params, self._on_device)
        with use_mesh(self._mesh):
            put = put_batch(batch, self._mesh, parts=parts)
            logprobs = self._compute(params, put if parts > 1 else _one_part(put))
        return logprobs if parts > 1 else logprobs[0]


def _one_part(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[None], batch)


def _by_part(compute: Callable[[Params, Batch], jax.Array], params: Params, batch: Batch):
    """`compute` of each micro-batch, one after the other; zeros for those without rollouts."""
    width = batch["mask"].shape[-1]

    def whole(part: Batch) -> jax.Array:
        logprobs = compute(params, part)  # [B, G, C], or [B, G, C / 2]
        return jnp.pad(logprobs, ((0, 0), (0, 0), (0, width - logprobs.shape[-1])))

    return jax.lax.map(functools.partial(by_length, whole, zeros_of(whole, first(batch))), batch)


def usable_records(run: Run, config: RL) -> list[Preference]:
    """The records that rollouts are drawn for. Raises DataError as `inputs.usable` does, and
    ConfigError where they are fewer than a step asks for.
    """
    buckets, lengths = run.setup.prompt_buckets, run.lengths
    readings = [
        sampled(run, "rl", lengths.judge, config.sampling.max_new_tokens),
        Reading("prompt", lengths.judge, buckets[-1], "raise --prompt-buckets"),
    ]
    records = usable(run, "rl", readings)
    if len(records) * config.orders < config.prompts:
        raise ConfigError(
            f"--rl.prompts {config.prompts} are {config.prompts // config.orders} records a step, "
            f"but there are only {len(records)} preferences"
        )
    return records


def record_batches(run: Run, records: list[Preference], config: RL):
    """Endless batches of a step's records, whose prompts fall into the same length bucket."""
    size = config.prompts // config.orders
    groups = group_by_length(
        records, run.lengths.prompt, run.setup.prompt_buckets, "prompts", "--prompt-buckets"
    )
    # A bucket with fewer records than a batch joins the next longer one, or else the one before.
    for bucket in list(groups):
        if len(groups[bucket]) < size and len(groups) > 1:
            others = [b for b in groups if b > bucket] or [b for b in groups if b < bucket][-1:]
            groups[others[0]] = groups[others[0]] + groups.pop(bucket)
    # Every process has all records of a step, and samples them together with the others.
    return batches(groups, dict.fromkeys(groups, list), size, run.setup.seed)


def groups_of(
    records: Sequence[Preference], rollouts: Mapping[str, list[Rollout]], orders: int
) -> tuple[list[Preference], list[list[Rollout]]]:
    """The N groups of a step and the record of each. Rollout i of a record shows its responses in
    order i % `orders`, and those of one order are a group."""
    pairs = [
        (record, rollouts[record.id][turn::orders]) for record in records for turn in range(orders)
    ]
    return [record for record, _ in pairs], [group for _, group in pairs]


def rollout_batch(
    groups: list[list[Rollout]],
    learnt: np.ndarray,
    config: RL,
    prompt_buckets: tuple[int, ...],
    shares: Sequence[Sequence[np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """The groups of a step as one batch, in which C is the most tokens that a rollout may have.

    Args:
      learnt: [N, G] the rewards that the policy learns from.
      shares: of each rollout, the share of its advantage that each token learns from; None: all.

    With `train_groups`, this many groups remain, those with signal first, and groups without signal
    get a mask of zeros, so that micro-batches with no others are skipped. Groups of similar length
    are neighbours, so that short ones share micro-batches, which are cut to their length
    (`by_length`).

    Returns the arrays of `collate_groups`, advantages [N, G], old [N, G, C] and, if given, share
    [N, G, C]; `_plan_rl` in `planning/programs.py` makes the same ones.
    """
    advantages = np.asarray(group_advantages(jnp.asarray(learnt)))
    signal = np.any(advantages != 0, axis=1)
    chosen = np.arange(len(groups))
    if config.train_groups is not None:
        chosen = np.argsort(~signal, kind="stable")[: config.train_groups]
    longest_rollout = np.asarray([max(c.tokens for c in group) for group in groups])
    goes_last = ~signal[chosen] if config.train_groups is not None else np.zeros(len(chosen))
    chosen = chosen[np.lexsort((longest_rollout[chosen], goes_last))]
    advantages = advantages[chosen]
    if config.placeless:
        advantages = rewards.placeless(advantages, [groups[p] for p in chosen])
    prompts = [groups[p][0].prompt for p in chosen]
    for p, prompt in zip(chosen, prompts, strict=True):
        assert all(c.prompt == prompt for c in groups[p]), "rollouts of a group share their prompt"
    longest = max(len(prompt) for prompt in prompts)
    length = next((bucket for bucket in prompt_buckets if bucket >= longest), None)
    if length is None:  # of six responses or more, `usable_records` tries only some orders
        raise UserError(
            f"a prompt of {longest} tokens is longer than the last of the prompt buckets, "
            f"{prompt_buckets[-1]}; raise --prompt-buckets"
        )
    width = round_up(config.sampling.max_new_tokens, 8)
    completions = [[c.ids.tolist() for c in groups[p]] for p in chosen]
    batch = collate_groups(prompts, completions, length=length, completion=width)
    batch["advantages"] = advantages.astype(np.float32)
    batch["old"] = np.zeros_like(batch["mask"])
    for row, p in enumerate(chosen):
        for g, critique in enumerate(groups[p]):
            batch["old"][row, g, : len(critique.logprobs)] = critique.logprobs
    if shares is not None:
        batch["share"] = np.zeros_like(batch["mask"])
        for row, p in enumerate(chosen):
            for g, share in enumerate(shares[p]):
                batch["share"][row, g, : len(share)] = share
    if config.train_groups is not None:
        # Whole groups: a rollout of exactly average reward in a group with signal still counts.
        batch["mask"] *= signal[chosen, None, None]
    return batch


def _work(run: Run, batch: dict[str, np.ndarray]) -> Work:
    """Tokens and FLOPs of an update. A prompt counts once for its group, and groups without a mask
    do not count."""
    learned = batch["mask"].sum(axis=(1, 2))  # [N]
    rows = [
        (prompt + tokens, tokens)
        for prompt, tokens in zip(batch["lengths"].tolist(), learned.tolist(), strict=True)
        if tokens
    ]
    return Work(sum(length for length, _ in rows), train_flops(run.model, rows))


def rollout_metrics(
    groups: list[list[Rollout]], earned: np.ndarray, learnt: np.ndarray
) -> dict[str, float]:
    """Metrics of the rollouts of a step.

    Args:
      earned, learnt: the rewards [N, G] of the rule, and those that the policy learns from.
    """
    critiques = [critique for group in groups for critique in group]
    lengths = np.asarray([c.tokens for c in critiques])
    return {
        "reward": float(earned.mean()),
        "correct": float((earned == 1.0).mean()),
        "signal": float((learnt.max(axis=1) > learnt.min(axis=1)).mean()),
        "length": float(lengths.mean()),
        "tokens": float(lengths.sum()),
        "truncated": float(np.mean([c.finish_reason == "length" for c in critiques])),
        "unparsable": float(np.mean([c.failure is not None for c in critiques])),
        "first_wins": first_wins(critiques),
    }


def first_wins(critiques: Sequence[Rollout]) -> float:
    """The share of verdicts won by the response that was shown first, minus 1/n: 0 for a judge that
    leans to no place. Of critiques without a tie of two responses or more; 0 where there is none.
    """
    places = [(rewards.winning_place(c.scores, c.order), len(c.order)) for c in critiques]
    leanings = [(place == 0) - 1 / n for place, n in places if place is not None]
    return float(np.mean(leanings)) if leanings else 0.0


def _rows(
    step: int,
    records: list[Preference],
    groups: list[list[Rollout]],
    rewards: np.ndarray,
    threshold: float | None = None,
) -> list[dict[str, Any]]:
    """Rollouts as rows of trajectories with step and reward. `correct` is Eq. (10), whatever `tie`
    says."""
    rows = []
    for record, group, reward in zip(records, groups, rewards, strict=True):
        for critique, value in zip(group, reward, strict=True):
            correct = is_correct(critique.scores, record.labels, threshold=threshold)
            trajectory = to_trajectory(record, critique, correct, kept=True)
            row = {k: v for k, v in dataclasses.asdict(trajectory).items() if v is not None}
            rows.append({"step": step, "reward": float(value), **row})
    return rows


def policy_objective(run: Run, config: RL, assemble: Assemble = as_it_is) -> LossFn:
    """GRPO's loss of a `rollout_batch` with the reference's log-probabilities.

    The rollouts of a group share their prompt, which is computed once for all of them.

    Args:
      assemble: see `Trainable.assemble`.
    """
    model, setup = run.model, run.setup

    def loss_fn(params, frozen, batch) -> Loss:
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
        # [B, G, C] -> [B * G, C]
        logprobs, entropy, reference, old, mask = (
            x.reshape(-1, x.shape[-1])
            for x in (logprobs, entropy, batch["reference"], batch["old"], batch["mask"])
        )
        advantages = batch["advantages"].reshape(-1)  # [B * G]
        if "share" in batch:
            advantages = advantages[:, None] * batch["share"].reshape(mask.shape)  # [B * G, C]
        if not config.kl_coef:
            reference = jax.lax.stop_gradient(logprobs)  # no penalty: a KL of 0 is reported
        loss = grpo_loss(
            logprobs,
            old,
            reference,
            advantages,
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

    return loss_fn


def by_length(compute: Callable[[Batch], T], nothing: T, batch: Batch) -> T:
    """`compute` of a micro-batch of groups, cut to half of its C completion slots where none of its
    rollouts is longer; `nothing` for one without rollouts (dropped groups). A `step.Cut`.
    """
    width = batch["mask"].shape[-1]
    half = -(-width // 2)
    used = jnp.any(batch["mask"] > 0, axis=(0, 1))
    branch = jnp.any(used).astype(jnp.int32) + jnp.any(used[half:])

    def skipped(batch: Batch) -> T:
        del batch
        return nothing

    def halved(batch: Batch) -> T:
        # Arrays [B, G, C] are of completions; those of prompts and groups have fewer dimensions.
        return compute({k: x[..., :half] if x.ndim == 3 else x for k, x in batch.items()})

    return jax.lax.switch(branch, (skipped, halved, compute), batch)
