"""TRL's GRPOTrainer: a reward function that judges each group with one request.

    trainer = GRPOTrainer(..., reward_funcs=trl_reward("http://127.0.0.1:8000", k=8))

`trl_reward_async` is the same as a coroutine function, which TRL runs beside others. Both can be
pickled, as AsyncGRPO asks. Completions are grouped by equal prompts: TRL hands over what one
process has, which may be a part of a group, or several groups.

A judgement that failed is None. TRL leaves a row out of the loss where every reward function gave
None. Beside another reward function (a format reward, say) it counts None as 0, which is a penalty:
then drop the other one for such rows, too.

With a `grm_jax.Judge` in place of a URL, it judges in the trainer's process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from grm_jax.errors import UserError
from grm_jax.serving.adapters.groups import Judging, LocalJudge, Reward, Rollout, warn_once
from grm_jax.serving.client import JudgeClient

log = logging.getLogger(__name__)
Rewards = list[float | None]


def trl_reward(
    judge: str | JudgeClient | LocalJudge,
    *,
    k: int = 8,
    group: bool = True,
    reward: Reward = "score",
    reference: str | None = None,
    criteria: str | Sequence[str] | None = None,
    token: str | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> Callable[..., Rewards]:
    """A reward function.

    Args:
      judge: the server's URL, a client, or a `grm_jax.Judge`.
      k: critiques of a group.
      group: judge completions of equal prompts together; False: each alone.
      reward: "score", the mean score on the template's scale; "rank", from 0 to 1 in the group;
        "value", what the verdict ranks by.
      reference: the data set's column with an answer to judge against.
      criteria: what counts, in words.
      token, timeout: of the client; seconds for a group, all tries together.
      options: others that /v1/judge takes: seed, method, principles, temperature, ..

    The function raises for what every call would meet: a wrong token or route, and until it has its
    first verdict, a refusal of all that it asks. A server that does not answer within `timeout`
    gives None. Wrong options raise UserError here.
    """
    return _TrlReward(
        judge, k=k, group=group, reward=reward, reference=reference, criteria=criteria,
        token=token, timeout=timeout, **options,
    ).grm_reward  # fmt: skip


def trl_reward_async(
    judge: str | JudgeClient | LocalJudge, **options: Any
) -> Callable[..., Coroutine[Any, Any, Rewards]]:
    """`trl_reward` as a coroutine function; it takes the same."""
    return _TrlReward(judge, **options).grm_reward_async


class _TrlReward:
    def __init__(
        self,
        judge: str | JudgeClient | LocalJudge,
        *,
        k: int = 8,
        reward: Reward = "score",
        reference: str | None = None,
        criteria: str | Sequence[str] | None = None,
        **options: Any,
    ):
        if reward not in ("score", "rank", "value"):
            raise UserError(f"reward is {reward!r:.40}; give 'score', 'rank' or 'value'")
        if criteria is not None:
            options["criteria"] = criteria
        self._judging = Judging(judge, k=k, **options)
        self._reward: Reward = reward
        self._reference = reference
        self._said: set[str] = set()

    def grm_reward(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Rewards:
        judged = self._judging.score(self._rollouts(prompts, completions, columns))
        return self._rewards(judged, columns)

    async def grm_reward_async(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Rewards:
        judged = await self._judging.ascore(self._rollouts(prompts, completions, columns))
        return self._rewards(judged, columns)

    def _rollouts(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[Rollout]:
        references: Sequence[Any] = [None] * len(prompts)
        if self._reference is not None:
            if self._reference not in columns:
                raise UserError(
                    f"reference={self._reference!r}: the data set has no such column; it has "
                    f"{', '.join(sorted(columns))}"
                )
            references = columns[self._reference]
        return [
            Rollout.read(prompt, completion, reference=reference)
            for prompt, completion, reference in zip(prompts, completions, references, strict=True)
        ]

    def _rewards(self, judged: Sequence[Any], columns: dict[str, Any]) -> Rewards:
        rewards = [row.reward(self._reward) for row in judged]
        failures = [row.failure for row in judged if row.verdict is None]
        if failures:
            warn_once(
                log.warning,
                self._said,
                "failed",
                f"{len(failures)} of {len(judged)} completions could not be judged "
                f"({failures[0]}); their reward is None. TRL leaves such rows out, but counts None "
                "as 0 beside another reward function's number. This is said once",
            )
        log_metric = columns.get("log_metric")
        if callable(log_metric):
            log_metric("grm/failed", len(failures) / max(len(judged), 1))
        return rewards
