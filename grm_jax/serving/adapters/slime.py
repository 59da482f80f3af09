"""slime: rewards of whole groups, `--group-rm --custom-rm-path my_reward.grm_reward`.

    from grm_jax.serving.adapters.slime import slime_reward
    grm_reward = slime_reward("http://127.0.0.1:8000", k=8)

With `--group-rm`, slime hands over a group's samples; without (and in evaluation, where it has no
groups) one sample, which is judged alone. slime takes no None: `on_failure` says what a failed
judgement is, as in verl.py. `grm_jax.serving.adapters.slime.grm_reward` itself asks the server of
`--rm-url`, with the options of its query string.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Coroutine
from typing import Any

from grm_jax.errors import UserError
from grm_jax.serving.adapters.groups import Judging, OnFailure, Reward, Rollout
from grm_jax.serving.protocols import policy_text

_ASKED: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {}
_NUMBERS: dict[str, Callable[[str], Any]] = {"k": int, "seed": int, "timeout": float}


def slime_reward(
    url: str, *, k: int = 8, reward: Reward = "score", on_failure: Any = "raise",
    reference: bool = False, **options: Any,
) -> Callable[..., Coroutine[Any, Any, Any]]:  # fmt: skip
    """`async f(args, samples)` for slime.

    Args:
      reference: judge against the sample's label.
      options: token, timeout, criteria, seed, and others that /v1/judge takes.
    """
    judging = Judging(url, k=k, **options)
    failing = OnFailure(on_failure)

    async def grm_reward(args: Any, samples: Any, **kwargs: Any) -> Any:
        del args, kwargs
        many = isinstance(samples, (list, tuple))
        rollouts = [_rollout(sample, reference) for sample in (samples if many else [samples])]
        numbers = []
        judged = await judging.ascore(rollouts)
        for rollout, row in zip(rollouts, judged, strict=True):
            number = row.reward(reward)
            if number is None:
                number = failing.number(rollout.key, row.failure)
            else:
                failing.scored(rollout.key, number)
            numbers.append(number)
        return numbers if many else numbers[0]

    return grm_reward


async def grm_reward(args: Any, samples: Any, **kwargs: Any) -> Any:
    """`slime_reward` of the server that `args.rm_url` names."""
    url = getattr(args, "rm_url", None)
    if not url:
        raise UserError("--rm-url names no server; give its address, such as http://host:8000?k=8")
    if url not in _ASKED:
        parts = urllib.parse.urlsplit(url)
        options = {
            name: _NUMBERS.get(name, str)(value)
            for name, value in urllib.parse.parse_qsl(parts.query)
        }
        _ASKED[url] = slime_reward(f"{parts.scheme}://{parts.netloc}", **options)
    return await _ASKED[url](args, samples, **kwargs)


def _rollout(sample: Any, reference: bool) -> Rollout:
    label = sample.label if reference else None
    response = policy_text.read_response(sample.response)
    if not isinstance(sample.prompt, str):
        return Rollout.read(sample.prompt, response, reference=label)
    turns, begun = policy_text.read_prompt(sample.prompt)
    return Rollout.read(turns, begun + response, reference=label)
