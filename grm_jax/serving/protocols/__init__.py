"""One file a wire protocol: what a client sends, what it gets, and how it learns of a failure.

rollout.py     native: one rollout a request, judged in its group
openrlhf.py    OpenRLHF's remote reward model: /get_reward
slime.py       slime's remote_rm: /rm
nemo_gym.py    NeMo Gym: /compare, /verify and its companions, /v1/responses with a pair
rerank.py      vLLM's /score, /rerank, /generative_scoring
scalar.py      vLLM's /classify and SGLang's /v1/embeddings: the scalar RM's raw score
chat.py        OpenAI's /v1/chat/completions and /v1/models

common.py      errors in a protocol's form; policy_text.py: a policy's chat tokens -> turns
json_reply.py  replies that follow a JSON schema

Each file has `router(service, groups)`; `routers` is all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter

    from grm_jax.serving.groups import Groups
    from grm_jax.serving.service import Service


def routers(service: Service, groups: Groups) -> list[APIRouter]:
    """The routers of all protocols, which share the groups of rollouts."""
    from grm_jax.serving.protocols import (
        chat,
        nemo_gym,
        openrlhf,
        rerank,
        rollout,
        scalar,
        slime,
    )

    return [
        module.router(service, groups)
        for module in (rollout, openrlhf, slime, nemo_gym, rerank, scalar, chat)
    ]
