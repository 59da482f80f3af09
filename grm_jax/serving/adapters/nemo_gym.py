"""NeMo Gym: a resources server whose rewards a judge elsewhere gives.

NeMo Gym starts its servers itself, from an `app.py` with a configuration of its own:

    from grm_jax.serving.adapters.nemo_gym import grm_server
    GRMServer = grm_server("http://127.0.0.1:8000")
    if __name__ == "__main__":
        GRMServer.run_webserver()

Each rollout goes to the judge's own /verify, where the rollouts of a task are judged together. A
failure is NeMo Gym's: the row with `_ng_failure_class: "judge_failed"`, which its collector keeps
out of the means and asks again; also where the judge can not be reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grm_jax.serving.client import JudgeClient, JudgeError


async def verify_row(client: JudgeClient, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row that /verify answers for a rollout's row."""
    try:
        return await client.apost("/verify", row)
    except JudgeError as error:
        return dict(row) | {
            "reward": 0.0,
            "_ng_failure_class": "judge_failed",
            "_ng_failure_judge_error": f"{type(error).__name__}: {error}",
        }


def grm_server(url: str, *, token: str | None = None, timeout: float = 600.0) -> type:
    """The class of a resources server. Needs NeMo Gym."""
    from fastapi.responses import JSONResponse
    from nemo_gym.base_resources_server import (  # pyright: ignore[reportMissingImports]
        BaseVerifyRequest,
        SimpleResourcesServer,
    )
    from pydantic import ConfigDict

    client = JudgeClient(url, token=token, timeout=timeout)

    class RolloutRow(BaseVerifyRequest):
        model_config = ConfigDict(extra="allow", populate_by_name=True)

    class GRMServer(SimpleResourcesServer):
        async def verify(self, body: RolloutRow) -> Any:
            row = await verify_row(client, body.model_dump(mode="json", by_alias=True))
            return JSONResponse(row)

    return GRMServer
