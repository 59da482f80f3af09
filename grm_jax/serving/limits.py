"""What one request may ask for at most. A request beyond is refused by name, never cut."""

from __future__ import annotations

import dataclasses

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for at most."""

    body_bytes: int = 4 * 2**20
    """Bytes of a request's body."""
    depth: int = 32
    """Lists and objects within each other in a JSON body."""
    responses: int = 64
    """Responses of one query."""
    k: int = 128
    """Samples of one request: critiques, of all groups (`at_once`), or the `n` of a chat."""
    max_new_tokens: int | None = None
    """Tokens of one sample; None: what the engine was planned for."""
    deadline: float = 600.0
    """Seconds until a request is given up; a request may ask for fewer."""
    queue: int = 4096
    """Samples that wait or run, of all requests together. What comes beyond is told to come back
    (status 429)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise UserError(
                    f"--limits.{field.name.replace('_', '-')} {value}: give more than 0"
                )

    def check(self, request: JudgeRequest) -> None:
        """Raise UserError for a request that is beyond them."""
        self.check_responses(len(request.record.responses))
        self.check_samples("k", request.options.k)
        if request.samples > self.k:
            raise UserError(
                f"k {request.options.k} of {request.groups} groups (at_once "
                f"{request.options.at_once}): {request.samples:,} critiques; this server takes "
                f"at most {self.k}; give a smaller k, or a larger at_once"
            )
        self.check_tokens("max_new_tokens", request.options.max_new_tokens)

    def check_responses(self, count: int) -> None:
        _most("responses", f"{count} of them", count, self.responses)

    def check_items(self, count: int) -> None:
        _most("items", f"{count} of them", count, self.responses)

    def check_samples(self, name: str, count: int) -> None:
        _most(name, str(count), count, self.k)

    def check_tokens(self, name: str, count: int | None) -> None:
        if count is not None and self.max_new_tokens is not None:
            _most(name, str(count), count, self.max_new_tokens)


def _most(name: str, found: str, count: int, most: int) -> None:
    if count > most:
        raise UserError(f"{name}: {found}; this server takes at most {most}")
