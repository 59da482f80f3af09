"""A session with the judge's interface and without a model: quick, and told what to answer.

The score of a response is what it asks for ("score=7"), else a digest of it decides. A response
that says "unreadable" makes every critique of its request fail with `no_box`. A query that says
"too long" is refused with UserError; one that says "explode" ends the engine with an error of the
program; one that says "never" never ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, LabelRequest
from grm_jax.judge.verdict import (
    Completion,
    Judgement,
    LabelLogprobs,
    ScalarScores,
    Usage,
    Verdict,
    decide,
    require_method,
)
from grm_jax.serving.service import Served, Service

SCALE = (1.0, 10.0)


@dataclasses.dataclass
class _Work:
    kind: str
    args: Any
    left: int
    texts: tuple[str, ...]
    finished: int = 0


class FakeSession:
    """Draws `slots` samples a step, of the oldest requests first; each step takes `seconds`.

    Attributes:
      requests: every JudgeRequest that was added; chats: (messages, sampling, n, seed).
      cancelled: tickets. steps: how many.
      gate: while it is cleared, steps do nothing.
    """

    def __init__(
        self, *, slots: int = 64, seconds: float = 0.0, guided: bool = True, scalar: bool = True
    ):
        self.slots, self.seconds, self.guided, self.scalar = slots, seconds, guided, scalar
        self.requests: list[JudgeRequest] = []
        self.chats: list[tuple[Any, ...]] = []
        self.scalars: list[tuple[Any, ...]] = []
        self.labels: list[LabelRequest] = []
        self.cancelled: list[int] = []
        self.steps = 0
        self.gate = threading.Event()
        self.gate.set()
        self.replies: list[str] = []
        """Texts that chats answer with, in turn; without any: what the last message says."""
        self._work: dict[int, _Work] = {}
        self._tickets = 0
        self._thread: int | None = None

    def open(self) -> tuple[FakeSession, Served]:
        """What `Service` calls."""
        return self, Served("fake", "f" * 12, guided=self.guided, scalar=self.scalar)

    def add(self, request: JudgeRequest) -> int:
        n, options = len(request.record.responses), request.options
        method = options.method or ("guided" if self.guided else "vote")
        require_method(method, n, guided=self.guided, scalar=self.scalar)
        self.requests.append(request)
        return self._add("judge", request, options.k, _texts(request.record.turns))

    def add_chat(self, messages: Sequence[Turn], sampling: Any, n: int = 1, seed: int = 0) -> int:
        self.chats.append((tuple(messages), sampling, n, seed))
        return self._add("chat", (tuple(messages), sampling, n, seed), n, _texts(messages))

    def add_scalar(self, turns: Sequence[Turn], responses: Sequence[str]) -> int:
        if not self.scalar:
            raise UserError("this judge has no scalar RM; load it with one (--scalar)")
        self.scalars.append((tuple(turns), tuple(responses)))
        texts = _texts(turns)
        words = len(" ".join(texts).split())
        return self._add("scalar", (tuple(responses), words), 1, texts)

    def add_labels(self, asked: LabelRequest) -> int:
        self.labels.append(asked)
        return self._add("labels", asked, 1, (str(asked.query),))

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        self._work.pop(ticket, None)

    def finished(self, ticket: int) -> int:
        self._one_thread()
        return self._work[ticket].finished

    def step(self) -> list[tuple[int, Any]]:
        self._one_thread()
        self.steps += 1
        time.sleep(self.seconds if self.gate.is_set() else 0.005)
        if not self.gate.is_set():
            return []
        room, ended = self.slots, []
        for ticket, work in list(self._work.items()):
            if any("explode" in text for text in work.texts):
                raise RuntimeError("an error of the program")
            if any("never" in text for text in work.texts):
                continue
            drawn = min(room, work.left)
            work.left -= drawn
            work.finished += drawn
            room -= drawn
            if not work.left:
                del self._work[ticket]
                ended.append((ticket, self._result(work)))
            if not room:
                break
        if not ended and not self.seconds:
            time.sleep(0.002)  # as a step that does something
        return ended

    @property
    def idle(self) -> bool:
        return not self._work

    def _add(self, kind: str, args: Any, left: int, texts: tuple[str, ...]) -> int:
        self._one_thread()
        if any("too long" in text for text in texts):
            raise UserError("the prompt has 9,999 tokens, and 4,096 leave room for a critique")
        self._tickets += 1
        self._work[self._tickets] = _Work(kind, args, left, texts)
        return self._tickets

    def _one_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "a session is used from one thread"

    def _result(self, work: _Work) -> Any:
        if work.kind == "judge":
            return self.verdict(work.args)
        if work.kind == "scalar":
            responses, words = work.args
            read = sum(words + len(text.split()) for text in responses)
            return ScalarScores(tuple(score(text) / 2 - 1 for text in responses), read)
        if work.kind == "labels":
            rows = tuple(
                tuple(-score(str(item)) * (1 + label % 3) / 4 for label in work.args.labels)
                for item in work.args.items
            )
            return LabelLogprobs(rows, 5 * len(rows))
        messages, sampling, n, seed = work.args
        prompt = sum(len(turn["content"].split()) for turn in messages)
        completions = []
        for i in range(n):
            text = self.replies.pop(0) if self.replies else (
                f"{messages[-1]['content']} [{seed}.{i} at {sampling.temperature:g}]"
            )  # fmt: skip
            words = tuple(range(len(text.split())))[: sampling.max_new_tokens]
            cut = len(words) < len(text.split())
            text = " ".join(text.split()[: len(words)]) if cut else text
            reason = "length" if cut else "stop"
            completions.append(Completion(text, words, (-0.5,) * len(words), reason, prompt))
        return tuple(completions)

    def verdict(self, request: JudgeRequest) -> Verdict:
        """What every `add` of the request is answered with."""
        record, options = request.record, request.options
        n = len(record.responses)
        failed = any("unreadable" in text for text in record.responses)
        rows = []
        for sample in range(options.k):
            scores = None if failed else tuple(
                min(10.0, max(1.0, score(text) + (sample % 3 == 2) * (i == 0)))
                for i, text in enumerate(record.responses)
            )  # fmt: skip
            rows.append(
                Judgement(
                    example_id=record.id, sample=sample, order=tuple(range(n)), scores=scores,
                    failure="no_box" if failed else None, finish_reason="stop", tokens=20,
                    text=f"Critique {sample} of <b>{n}</b> responses, seed {options.seed}.",
                    meta=(float(sample) if self.guided and not failed else None),
                    principles="Accuracy: is it right? (weight 100%)", expected=scores,
                )
            )  # fmt: skip
        scalar = tuple(score(text) / 2 for text in record.responses) if self.scalar else None
        return decide(
            request, rows, scale=SCALE, guided=self.guided, scalar=scalar,
            usage=Usage(100, 20 * options.k, options.k), judge="f" * 12, seconds=0.25,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def running(session: FakeSession, **options: Any) -> AsyncIterator[Service]:
    """A service that is ready, and stopped at the end."""
    service = Service(session.open, **options)
    service.start()
    await service.opened()
    try:
        yield service
    finally:
        session.gate.set()
        await service.drain(0.0)


def score(text: str) -> float:
    """The score of a response: what it asks for, else 1..10 by a digest of it."""
    asked = re.search(r"score=(\d+)", text)
    return float(asked[1]) if asked else 1.0 + hashlib.sha256(text.encode()).digest()[0] % 10


def _texts(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tuple(turn["content"] for turn in turns)
