"""OpenRLHF's Python file of a remote reward: `--reward.remote_url /path/reward_func.py`.

    from grm_jax.serving.adapters.openrlhf import openrlhf_reward
    reward_func = openrlhf_reward("http://127.0.0.1:8000", k=8, group_size=8)

It asks the route that OpenRLHF could ask itself (`/get_reward`, which strips the policy's chat
tokens and puts groups together), with tries and a deadline of one's own: OpenRLHF gives up after
180 s. A reward that never comes ends OpenRLHF's training with a log line at INFO, so failures are
logged as errors here, and raised.
"""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from grm_jax.serving.client import JudgeClient, JudgeError

log = logging.getLogger(__name__)


def openrlhf_reward(
    url: str,
    *,
    k: int = 8,
    group_size: int | None = None,
    window: float | None = None,
    criteria: str | None = None,
    reward: str = "score",
    label: str = "ignore",
    token: str | None = None,
    timeout: float = 600.0,
) -> Callable[..., dict[str, Any]]:
    """`reward_func` for OpenRLHF.

    Args:
      group_size, window, criteria, reward, label: as the route /get_reward has them in its URL.
      timeout: seconds for one reward, all tries together.
    """
    given = {"k": k, "group_size": group_size, "window": window, "criteria": criteria,
             "reward": reward, "label": label}  # fmt: skip
    said = {name: value for name, value in given.items() if value is not None}
    path = f"/get_reward?{urllib.parse.urlencode(said)}"
    client = JudgeClient(url, token=token, timeout=timeout)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any
    ) -> dict[str, Any]:
        del kwargs
        body = {"query": list(queries), "prompts": list(prompts), "labels": list(labels)}
        try:
            reply = client.post(path, body)
        except JudgeError:
            log.exception("no reward; OpenRLHF goes on without one, and then stops")
            raise
        import torch  # pyright: ignore[reportMissingImports]

        return {
            "rewards": torch.tensor(reply["rewards"]),
            "scores": torch.tensor(reply["scores"]),
            "extra_logs": {
                name: torch.tensor(values) for name, values in reply["extra_logs"].items()
            },
        }

    return reward_func
