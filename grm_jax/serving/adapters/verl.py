"""verl: `compute_score`, and a reward manager of its own.

    reward.custom_reward_function.path=pkg://grm_jax.serving.adapters.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000
    +reward.custom_reward_function.reward_kwargs.group_size=8

verl scores one rollout a call, from several processes; the server puts a prompt's rollouts
together (`group_size`, `window`). verl does not hand the prompt over: `compute_score` reads it from
`extra_info[question_key]`. `GRMRewardManager` reads `raw_prompt`, which verl always has:

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://grm_jax.serving.adapters.verl
    reward.reward_manager.name=GRMRewardManager

A score may not be None there, so `on_failure` says what a failed judgement is: "raise" (the
default), a number, or "group_mean". A wrong option is an error when the first rollout is scored,
and so is a refusal before the first verdict: a number for it would be the reward of the whole run.
Every row has the same extra keys, as verl needs it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grm_jax.errors import UserError
from grm_jax.judge.request import OPTIONS, ScoreOptions
from grm_jax.serving.adapters.groups import OnFailure, Rollout
from grm_jax.serving.client import JudgeClient, JudgeError, JudgeRefused

if TYPE_CHECKING:
    Base = object
else:
    try:
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase as Base
    except ImportError:
        Base = object

# What /v1/rollout takes beside the options of a request.
GROUPING = ("group_size", "window", "scope", "criteria", "principles")
URL = "GRM_JAX_URL"  # environment variable that names the server where no option does
_SCORERS: dict[Any, _Scorer] = {}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    question_key: str = "question",
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **settings: Any,
) -> dict[str, float]:
    """The score of one rollout, judged in its prompt's group.

    Args:
      question_key: the field of `extra_info` with the prompt, a text or messages.
      settings: url, token, timeout, k, group_size, window, reward ("score", "unit", "rank"),
        reference (True: the ground truth is an answer to judge against), on_failure, and others
        that /v1/rollout takes.

    Raises UserError without a prompt or a URL, JudgeError as `on_failure` says.
    """
    del data_source, reward_router_address, reward_model_tokenizer
    question = (extra_info or {}).get(question_key)
    if question is None:
        raise UserError(
            f"extra_info has no {question_key!r}, and verl hands no prompt over; put it there when "
            "the data set is made, name its field (question_key), or use GRMRewardManager"
        )
    return await _scorer(settings).score(question, solution_str, ground_truth)


class GRMRewardManager(Base):
    """A reward manager that reads the prompt from the batch.

    Its settings are those of `compute_score`, in
    `reward.custom_reward_function.reward_kwargs`.
    """

    def __init__(
        self, config: Any, tokenizer: Any, compute_score: Any = None,
        reward_router_address: str | None = None, reward_model_tokenizer: Any = None,
    ):  # fmt: skip
        del reward_router_address, reward_model_tokenizer
        if Base is not object:
            super().__init__(config, tokenizer, compute_score)  # pyright: ignore
        self.tokenizer = tokenizer
        function = config.reward.get("custom_reward_function") or {}
        settings = dict(function.get("reward_kwargs") or {})
        settings.pop("question_key", None)
        self._scorer = _scorer(settings)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """`{"reward_score", "reward_extra_info"}` of one trajectory (the last, of several)."""
        row = data[-1:][0]
        responses = row.batch["responses"]
        length = responses.shape[-1]
        valid = responses[: int(row.batch["attention_mask"][-length:].sum())]
        text = await asyncio.to_thread(self.tokenizer.decode, valid, skip_special_tokens=True)
        prompt = row.non_tensor_batch["raw_prompt"]
        model = row.non_tensor_batch.get("reward_model") or {}
        extra = await self._scorer.score(
            prompt if isinstance(prompt, str) else list(prompt), text, model.get("ground_truth")
        )
        return {"reward_score": extra["score"], "reward_extra_info": extra}


class _Scorer:
    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 600.0,
        k: int = 8,
        reward: str = "score",
        reference: bool = False,
        on_failure: Any = "raise",
        **options: Any,
    ):
        url = url or os.environ.get(URL)
        if not url:
            raise UserError(f"no url: give it in reward_kwargs, or set {URL}")
        if reward not in ("score", "unit", "rank"):
            raise UserError(f"reward is {reward!r:.40}; give 'score', 'unit' or 'rank'")
        unknown = sorted(set(options) - {*OPTIONS, *GROUPING})
        if unknown:
            raise UserError(
                f"unknown setting {', '.join(unknown)}; give some of url, token, timeout, reward, "
                f"reference, on_failure, {', '.join((*GROUPING, *OPTIONS))}"
            )
        ScoreOptions(k=k, **{name: options[name] for name in OPTIONS if name in options})
        self._client = JudgeClient(url, token=token, timeout=timeout)
        self._options = {"k": k, **options}
        self._answered = False
        self._reward = reward
        self._reference = reference
        self._on_failure = OnFailure(on_failure)

    async def score(self, prompt: Any, response: str, ground_truth: Any) -> dict[str, float]:
        reference = str(ground_truth) if self._reference and ground_truth is not None else None
        rollout = Rollout.read(prompt, response, reference=reference)
        try:
            share = await self._client.arollout(
                rollout.query, rollout.response, **self._options, **dict(rollout.shared)
            )
        except JudgeError as error:
            refused = isinstance(error, JudgeRefused) and error.kind != "judgement_failed"
            if error.about_setup or (refused and not self._answered):
                raise
            return _row(self._on_failure.number(rollout.key, str(error)), None)
        self._answered = True
        score = float(share[self._reward])
        self._on_failure.scored(rollout.key, score)
        return _row(score, share)


def _row(score: float, share: Mapping[str, Any] | None) -> dict[str, float]:
    """The same keys in every row; NaN where there is nothing to tell."""
    known = share or {}
    return {
        "score": score,
        "acc": score,  # the name that verl's validation looks for
        "grm_rank": float(known.get("rank", "nan")),
        "grm_std": float(known.get("std", "nan")),
        "grm_group_size": float(known.get("group_size", 0)),
        "grm_failed": float(share is None),
    }


def _scorer(settings: Mapping[str, Any]) -> _Scorer:
    """One for equal settings: it keeps connections and a group's scores."""
    key = repr(sorted(settings.items()))
    if key not in _SCORERS:
        _SCORERS[key] = _Scorer(**settings)
    return _SCORERS[key]
