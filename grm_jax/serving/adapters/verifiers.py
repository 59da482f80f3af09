"""verifiers: a judge plugin of its v1, and a group reward for rubrics of the older interface.

v1 finds plugins by the name of a module on the path. One line makes one, `my_judge.py`:

    from grm_jax.serving.adapters.verifiers import GRMJudge
    __all__ = ["GRMJudge"]

    [[taskset.task.judges]]
    id = "my_judge"
    base_url = "http://127.0.0.1:8000"
    group_size = 8

v1 scores one trace a call; the server puts a prompt's traces together. Older rubrics take
`Rubric(funcs=[verifiers_reward("http://127.0.0.1:8000")])`, which judges a whole group at once.

A failed judgement is raised, as the judges of verifiers do: a rollout is asked again or left out,
and never scored 0.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Literal

from grm_jax.serving.adapters.groups import Judging, OnFailure, Reward, Rollout
from grm_jax.serving.client import JudgeClient

if TYPE_CHECKING:
    GRMJudge: Any
    GRMJudgeConfig: Any

__all__ = ["GRMJudge", "GRMJudgeConfig", "verifiers_reward"]  # pyright: ignore


def verifiers_reward(
    url: str, *, k: int = 8, reward: Reward = "score", token: str | None = None,
    timeout: float = 600.0, **options: Any,
) -> Callable[..., Coroutine[Any, Any, list[float]]]:  # fmt: skip
    """A group reward function: `async f(prompts, completions) -> list[float]`.

    Raises JudgeUnavailable for a judgement that failed.
    """
    judging = Judging(url, k=k, token=token, timeout=timeout, **options)
    failing = OnFailure("raise")

    async def grm_reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        rollouts = [Rollout.read(p, c) for p, c in zip(prompts, completions, strict=True)]
        numbers = []
        for rollout, row in zip(rollouts, await judging.ascore(rollouts), strict=True):
            number = row.reward(reward)
            numbers.append(failing.number(rollout.key, row.failure) if number is None else number)
        return numbers

    return grm_reward


def __getattr__(name: str) -> Any:
    """The classes that need verifiers, when they are asked for."""
    if name in ("GRMJudge", "GRMJudgeConfig"):
        globals().update(_classes())
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _classes() -> dict[str, type]:
    import importlib

    vf: Any = importlib.import_module("verifiers.v1")
    judge: Any = importlib.import_module("verifiers.v1.judge")

    class GRMJudgeConfig(vf.JudgeConfig):
        """`base_url` names the server; the token is in the variable that `api_key_var` names."""

        base_url: str = "http://127.0.0.1:8000"
        api_key_var: str = "GRM_JAX_TOKEN"
        k: int = 8
        group_size: int | None = None
        window: float | None = None
        criteria: str | None = None
        reward: str = "score"
        """`score`, `unit` or `rank`."""
        answer_field: str = ""
        """The task's field with an answer to judge against; empty: none."""
        question_field: str = ""
        """The task's field with the question; empty: the task's prompt."""
        view: Literal["last_reply", "full_trace"] = "last_reply"
        seconds: float = 600.0
        """For one verdict, all tries together."""

    class GRMJudge(judge.Judge[float, GRMJudgeConfig]):
        """Scores a trace with a generative reward model; raises where there is no judgement."""

        async def score(self, task: Any, trace: Any) -> float:
            import os

            config = self.config
            options = {
                "group_size": config.group_size, "window": config.window,
                "criteria": config.criteria,
                "reference": str(getattr(task, config.answer_field))
                if config.answer_field else None,
            }  # fmt: skip
            client = JudgeClient(
                config.base_url,
                token=os.environ.get(config.api_key_var),
                timeout=config.seconds,
            )
            share = await client.arollout(
                judge.judge_question(task, config.question_field),
                judge.judge_response(trace, config.view),
                k=config.k,
                **{name: value for name, value in options.items() if value is not None},
            )
            await client.aclose()
            return float(share[config.reward])

    return {"GRMJudge": GRMJudge, "GRMJudgeConfig": GRMJudgeConfig}
