"""What a rollout of RL earns: the rule of Eq. (11), and what may be added to it.

    scores, labels -> +1 or -1 (`rule`)
        * less for right rollouts that are probable for their group (`rarity`, --rl.rare)
        + what a rollout adds to the votes of half of its group (`vote_gains`, --rl.vote)
        -> normalised within the group (`losses.group_advantages`)
        - what would strengthen a leaning to a place (`placeless`, --rl.placeless)
        * less for the tokens before the verdict (`shares`, --rl.text-weight)

The rule alone makes one critique right. A verdict is a vote of many, which gains most from
critiques that are right where the others are wrong.

Dimensions: N groups, G rollouts of a group, n responses, S votes, T tokens of a rollout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from grm_jax.critique import rule_reward, verdict_start
from grm_jax.critique.correctness import best_label
from grm_jax.data.preferences import Preference
from grm_jax.judge.critiques import Rollout
from grm_jax.judge.expected import token_at
from grm_jax.scoring.measures import top
from grm_jax.training.options import RL
from grm_jax.training.setup import ConfigError

MOST = 16  # rollouts of a group whose votes are counted: 12,870 votes


def check(config: RL) -> None:
    """Raise ConfigError for a group whose votes are too many to count, and for options that do not
    go together."""
    if config.placeless and config.prompts < 2:
        raise ConfigError(
            "--rl.placeless compares groups whose right response is shown in different places: "
            f"give --rl.prompts 2 or more, not {config.prompts}"
        )
    if config.vote and not 2 <= config.group <= MOST:
        raise ConfigError(
            f"--rl.vote counts the votes of half of a group of 2 to {MOST} rollouts, and "
            f"--rl.group is {config.group}; change it, or give --rl.vote 0"
        )


def rule(
    records: Sequence[Preference],
    groups: Sequence[Sequence[Rollout]],
    config: RL,
    threshold: float | None = None,
) -> np.ndarray:
    """The reward of every rollout by Eq. (11), [N, G] float32; `threshold`: the score above which a
    single response counts as correct."""
    rewards = [
        [
            rule_reward(critique.scores, record.labels, tie=config.tie, threshold=threshold)
            for critique in group
        ]
        for record, group in zip(records, groups, strict=True)
    ]
    return np.asarray(rewards, np.float32)


def learnt(
    rewards: np.ndarray,
    records: Sequence[Preference],
    groups: Sequence[Sequence[Rollout]],
    config: RL,
    threshold: float | None = None,
) -> np.ndarray:
    """The rewards [N, G] that the policy learns from: those of the rule with `config.rare` and
    `config.vote`; without either the rewards themselves."""
    found = rewards
    if config.rare:
        logprobs = np.asarray([[float(np.sum(c.logprobs)) for c in group] for group in groups])
        found = np.where(rewards == 1.0, rewards * rarity(logprobs, config.rare), rewards)
    if config.vote:
        gains = [
            vote_gains([c.scores for c in group], record.labels, threshold)
            for record, group in zip(records, groups, strict=True)
        ]
        found = found + config.vote * np.asarray(gains)
    return found.astype(np.float32)


def rarity(logprobs: np.ndarray, weight: float) -> np.ndarray:
    """Factors [N, G] from 1 - `weight` for a group's most probable rollout up to 1 - `weight` / G
    for the least probable one, in equal steps (the unlikeliness reward of arXiv:2506.02355).

    Args:
      logprobs: [N, G] log-probability of each whole rollout.
    """
    group = logprobs.shape[1]
    rank = np.argsort(np.argsort(-logprobs, axis=1, kind="stable"), axis=1)  # 0: most probable
    return 1.0 - weight * (group - rank) / group


def placeless(advantages: np.ndarray, groups: Sequence[Sequence[Rollout]]) -> np.ndarray:
    """Advantages [N, G] that do not strengthen the groups' leaning to a place.

    The advantages are fitted, by least squares over the groups with signal, by the place of each
    rollout's winner. Where the fit favours the places that win more often than chance already, it
    is subtracted: what remains has no correlation with any place. Where it disfavours them the
    advantages stay, since a leaning may be unlearnt. Rollouts without a winner (`winning_place`)
    keep their advantages, groups without signal their zeros, and each group's mean stays zero.

    With one order a record (`--rl.orders 1`), chance decides how often each place is right in a
    step, and what a step would learn of that is taken out. Of few groups that is much; of a single
    one with signal it is all.
    """
    signal = np.any(advantages != 0, axis=1)
    most = max(len(group[0].order) for group in groups)
    wins = np.zeros((*advantages.shape, most))
    centred, lean = np.zeros_like(wins), np.zeros(most)
    for n, group in enumerate(groups):
        places = [winning_place(critique.scores, critique.order) for critique in group]
        decided = [g for g, place in enumerate(places) if place is not None]
        if not decided:
            continue
        for g in decided:
            wins[n, g, places[g]] = 1.0
        # Centred, so that the fit keeps the group's mean, and knows of no place alone.
        centred[n, decided] = wins[n, decided] - wins[n, decided].mean(axis=0)
        responses = len(group[0].order)
        lean[:responses] += wins[n, decided].sum(axis=0)[:responses] - len(decided) / responses
    fitted = np.linalg.lstsq(
        centred[signal].reshape(-1, most), advantages[signal].reshape(-1), rcond=None
    )[0]
    if fitted @ lean <= 0:
        return advantages
    return np.where(signal[:, None], advantages - centred @ fitted, 0.0)


def shares(
    groups: Sequence[Sequence[Rollout]],
    weight: float,
    decode: Callable[[Sequence[int]], str],
) -> list[list[np.ndarray]]:
    """Of each rollout, the share [T] of its advantage that each token learns from
    (`token_weights`).

    Args:
      decode: token ids to the text that was read.
    """
    return [
        [
            np.asarray(
                token_weights(
                    critique.ids.tolist(), critique.text, len(critique.order), weight, decode
                ),
                np.float32,
            )
            for critique in group
        ]
        for group in groups
    ]


def token_weights(
    ids: Sequence[int], text: str, n: int, weight: float, decode: Callable[[Sequence[int]], str]
) -> tuple[float, ...]:
    """`weight` for each of the tokens before the verdict on n responses (`verdict_start`), 1 for
    the others, and 1 for all where nothing is like a verdict. `ids` are the tokens of the text and
    its end."""
    start = verdict_start(text, n)
    before = 0 if start is None else token_at(decode, ids, start)
    return (weight,) * before + (1.0,) * (len(ids) - before)


def winning_place(scores: Sequence[float] | None, order: Sequence[int]) -> int | None:
    """Where the response with the top score was shown, from 0; None without scores, with a tie, and
    for a single response. `scores` are in the record's order of responses, `order` as shown."""
    if scores is None or len(scores) < 2 or scores.count(max(scores)) > 1:
        return None
    return order.index(scores.index(max(scores)))


def vote_gains(
    scores: Sequence[Sequence[float] | None],
    labels: Sequence[float],
    threshold: float | None = None,
) -> np.ndarray:
    """[G] how much more often a vote of half of the group is right with a rollout in it than
    without it, over all such votes; a tie counts as often as a random pick from it is right.

    A rollout without scores has no vote, so that its gain is what the place is worth to others.

    Args:
      scores: G rollouts of one record, each with n scores, or None where it failed.
      threshold: the score above which a single response counts as correct; None: its score is the
        label 0 or 1 itself, and the majority decides.
    """
    group, n = len(scores), len(labels)
    votes = _halves(group)  # [S, G]
    cast = np.asarray([row if row is not None else (0.0,) * n for row in scores])  # [G, n]
    usable = np.asarray([row is not None for row in scores])
    used = votes @ usable  # [S]
    totals = np.round(votes @ cast, 9)  # [S, n]
    if n == 1:
        bar = (0.5 if threshold is None else threshold) * used
        right = ((totals[:, 0] > bar) == (labels[0] == 1)).astype(float)
        right = np.where(totals[:, 0] == np.round(bar, 9), 0.5, right)
    else:
        leading = top(totals)
        right = leading[:, best_label(labels)] / leading.sum(axis=1)
    right = np.where(used > 0, right, 0.0)
    inside = votes.sum(axis=0)
    return (right @ votes) / inside - (right @ (1.0 - votes)) / (len(votes) - inside)


@functools.cache
def _halves(group: int) -> np.ndarray:
    """[S, G] which rollouts are in each vote of half of a group."""
    chosen = list(itertools.combinations(range(group), group // 2))
    votes = np.zeros((len(chosen), group))
    np.put_along_axis(votes, np.asarray(chosen), 1.0, axis=1)
    return votes
