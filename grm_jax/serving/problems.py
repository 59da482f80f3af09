"""What can go wrong besides a user's mistake (`UserError`, status 400), and its HTTP status.

Overloaded         429   too much waits; `retry_after` says when there is room
Unavailable        503   the model is being loaded, the server is stopping
DeadlineExceeded   504   no verdict in time; the work was given up
EngineFailed       500   an error of the program ended the engine's thread
JudgementFailed    422   no critique could be read; the same request fails again
NotOffered         404   this server has no model for the route
"""

from __future__ import annotations

import math

from grm_jax.judge.verdict import Verdict


class ServiceProblem(Exception):
    """A request that was sound and still has no answer.

    Attributes:
      status: of the HTTP reply. kind: its name in the reply's JSON.
      retry_after: seconds after which trying again makes sense; None: it does not.
    """

    status = 500
    kind = "internal_error"

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


class Overloaded(ServiceProblem):
    status = 429
    kind = "overloaded"


class Unavailable(ServiceProblem):
    status = 503
    kind = "unavailable"


class DeadlineExceeded(ServiceProblem):
    status = 504
    kind = "deadline_exceeded"


class EngineFailed(ServiceProblem):
    status = 500
    kind = "engine_failed"


class JudgementFailed(ServiceProblem):
    """A verdict without numbers, for protocols that have no other word for it."""

    status = 422
    kind = "judgement_failed"

    def __init__(self, verdict: Verdict):
        failed = ", ".join(f"{name}: {count}" for name, count in verdict.failures.items())
        super().__init__(
            f"none of {len(verdict.critiques)} critiques could be read ({failed}); ask for more "
            "(k), or with another seed"
        )
        self.verdict = verdict


class NotOffered(ServiceProblem):
    status = 404
    kind = "not_offered"
