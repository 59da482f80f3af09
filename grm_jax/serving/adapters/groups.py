"""What adapters share: rollouts by their prompts, one judgement a group, verdicts as rewards."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

from grm_jax.data.conversation import read_turns, transcript
from grm_jax.errors import UserError
from grm_jax.judge.request import OPTIONS, TEXTS, ScoreOptions
from grm_jax.serving.client import JudgeClient, JudgeError, JudgeRefused, JudgeUnavailable

log = logging.getLogger(__name__)
Reward = Literal["score", "rank", "value"]
_FIELDS = {"score": "scores", "rank": "rewards", "value": "values"}
_TOGETHER = 64  # groups that are asked for at once


class LocalJudge(Protocol):
    """`grm_jax.Judge`, in place of a server: `score(query, responses, **options)` -> a Verdict."""

    def score(self, query: Any, responses: Sequence[str], **options: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One response to one prompt. `shared`: other options that its group has in common."""

    query: str | list[dict[str, Any]]
    response: str
    shared: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(cls, prompt: Any, completion: Any, **shared: Any) -> Rollout:
        """From texts or messages; a completion of several messages is joined to one text.

        Raises UserError for what a judge can not read, an image for example.
        """
        query: Any = prompt
        if not isinstance(prompt, str):
            query = [dict(turn) for turn in read_turns("prompt", _plain(prompt))]
        response = completion
        if not isinstance(completion, str):
            response = transcript(read_turns("completion", _plain(completion)))
        given = tuple((name, value) for name, value in shared.items() if value is not None)
        return cls(query, response, given)

    @property
    def key(self) -> str:
        """Equal for rollouts that belong together."""
        return json.dumps([self.query, self.shared], sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a rollout: its place in a verdict, or why there is none."""

    verdict: Mapping[str, Any] | None
    index: int = 0
    failure: str = ""
    refusal: Exception | None = None
    """What the judge said to a request that it does not take."""

    def reward(self, which: Reward) -> float | None:
        return None if self.verdict is None else float(self.verdict[_FIELDS[which]][self.index])


class Judging:
    """Asks a server, or a judge in this process, for the verdicts of whole groups.

    Args:
      judge: a server's URL, a `JudgeClient`, or an object with `Judge.score`.
      group: judge equal prompts together; False: each rollout alone, on the same scale.
      options: of every request, as `JudgeClient.judge` takes them.

    Raises UserError for an option that is unknown or out of range.
    """

    def __init__(
        self,
        judge: str | JudgeClient | LocalJudge,
        *,
        group: bool = True,
        token: str | None = None,
        timeout: float = 600.0,
        **options: Any,
    ):
        if isinstance(judge, str):
            judge = JudgeClient(judge, token=token, timeout=timeout)
        self.judge = judge
        self.group = group
        self.options = {"rating": True, **options}
        self._worked = False
        unknown = sorted(set(options) - {*OPTIONS, *TEXTS})
        if unknown:
            raise UserError(f"unknown option {', '.join(unknown)}; give some of {_names()}")
        ScoreOptions(**{name: value for name, value in options.items() if name in OPTIONS})

    def score(self, rollouts: Sequence[Rollout]) -> list[Judged]:
        """What became of each rollout, in order.

        Raises JudgeError and UserError for what every request would meet: a wrong token or route,
        and until there is a first verdict, the refusal of all that was asked.
        """
        groups = self._groups(rollouts)
        if isinstance(self.judge, JudgeClient) and len(groups) > 1:
            with ThreadPoolExecutor(min(len(groups), _TOGETHER)) as pool:
                found = list(pool.map(lambda rows: self._ask(rows, rollouts), groups))
        else:
            found = [self._ask(rows, rollouts) for rows in groups]
        return self._spread(groups, found, len(rollouts))

    async def ascore(self, rollouts: Sequence[Rollout]) -> list[Judged]:
        """`score`, without blocking the event loop."""
        groups = self._groups(rollouts)
        room = asyncio.Semaphore(_TOGETHER if isinstance(self.judge, JudgeClient) else 1)

        async def ask(rows: list[int]) -> Judged:
            async with room:
                return await self._aask(rows, rollouts)

        return self._spread(groups, await asyncio.gather(*map(ask, groups)), len(rollouts))

    def _groups(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.key if self.group else i, []).append(i)
        return list(groups.values())

    def _ask(self, rows: list[int], rollouts: Sequence[Rollout]) -> Judged:
        query, responses, options = self._request(rows, rollouts)
        try:
            if isinstance(self.judge, JudgeClient):
                return _judged(self.judge.judge(query, responses, critiques=False, **options))
            return _judged(self.judge.score(query, responses, **options).to_json(critiques=False))
        except (JudgeError, UserError) as error:
            return _failed(error)

    async def _aask(self, rows: list[int], rollouts: Sequence[Rollout]) -> Judged:
        if not isinstance(self.judge, JudgeClient):
            return await asyncio.to_thread(self._ask, rows, rollouts)
        query, responses, options = self._request(rows, rollouts)
        try:
            verdict = await self.judge.ajudge(query, responses, critiques=False, **options)
        except JudgeError as error:
            return _failed(error)
        return _judged(verdict)

    def _request(
        self, rows: list[int], rollouts: Sequence[Rollout]
    ) -> tuple[Any, list[str], dict[str, Any]]:
        first = rollouts[rows[0]]
        return first.query, [rollouts[i].response for i in rows], {
            **self.options, **dict(first.shared),
        }  # fmt: skip

    def _spread(
        self, groups: Sequence[list[int]], found: Sequence[Judged], count: int
    ) -> list[Judged]:
        refusals = [judged.refusal for judged in found if judged.refusal is not None]
        if refusals and len(refusals) == len(found) and not self._worked:
            raise refusals[0]
        self._worked = self._worked or any(judged.verdict is not None for judged in found)
        rows: list[Judged] = [Judged(None)] * count
        for where, judged in zip(groups, found, strict=True):
            for index, i in enumerate(where):
                rows[i] = dataclasses.replace(judged, index=index)
        return rows


class OnFailure:
    """What a trainer that takes no None gets for a rollout that could not be judged.

    Args:
      policy: "raise"; a number, which the user has chosen; or "group_mean": the mean of the scores
        that this process has got for the same prompt, and an error where there are none. What
        stands in for a score never enters a mean.
    """

    _MOST = 10_000  # prompts that are remembered

    def __init__(self, policy: Literal["raise", "group_mean"] | float | int | str = "raise"):
        if policy not in ("raise", "group_mean"):
            try:
                policy = float(policy)
            except ValueError:
                raise UserError(
                    f"on_failure is {policy!r:.40}; give 'raise', 'group_mean' or a number"
                ) from None
        self.policy = policy
        self._scores: dict[str, list[float]] = {}

    def scored(self, key: str, score: float) -> None:
        """Remember a score of a prompt."""
        if self.policy == "group_mean":
            self._scores.setdefault(key, []).append(score)
            while len(self._scores) > self._MOST:
                del self._scores[next(iter(self._scores))]

    def number(self, key: str, failure: str) -> float:
        """What stands in. Raises JudgeUnavailable."""
        if isinstance(self.policy, float):
            return self.policy
        scores = self._scores.get(key, [])
        if self.policy == "group_mean" and scores:
            return sum(scores) / len(scores)
        raise JudgeUnavailable(
            f"no judgement ({failure}); on_failure=0.0 would go on with a number"
        )


def warn_once(say: Callable[[str], None], said: set[str], key: str, message: str) -> None:
    if key not in said:
        said.add(key)
        say(message)


def _plain(messages: Any) -> Any:
    """Messages as plain lists and dicts: trainers hand over arrays and mappings of their own."""
    if isinstance(messages, Mapping):
        return [dict(messages)]
    if isinstance(messages, Sequence) or hasattr(messages, "tolist"):
        return [dict(m) if isinstance(m, Mapping) else m for m in messages]
    return messages


def _judged(verdict: Mapping[str, Any]) -> Judged:
    if verdict.get("failure") is not None:
        return Judged(None, failure=str(verdict["failure"]))
    return Judged(verdict)


def _failed(error: JudgeError | UserError) -> Judged:
    if isinstance(error, JudgeError) and error.about_setup:
        raise error
    refused = isinstance(error, (JudgeRefused, UserError))
    return Judged(None, failure=str(error), refusal=error if refused else None)


def _names() -> str:
    return ", ".join((*OPTIONS, "reference", "principles", "criteria"))
