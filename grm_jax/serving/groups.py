"""Rollouts that arrive one a request, judged as the group that they are.

A generative judge scores a whole group with one critique, and compares better when it sees them
side by side. Several trainers send one rollout a request, so requests that ask about the same
prompt wait for each other for a short time:

    rollout ──┐
    rollout ──┼─ same prompt, same options ──► one JudgeRequest ──► one Verdict ──► a Share each
    rollout ──┘     until the group is full, or its window has passed

What holds:
  - A group is judged when it has `size` members, or when the window of its first member ends,
    whichever is sooner. A member that never comes holds up nobody.
  - Only what members sent is judged. A missing member has no placeholder.
  - Equal responses stay apart: each has its own place.
  - A client that goes away before its group is judged leaves it. One that goes away later, or was
    told to come back, finds its place again: the same rollout, asked again, gets the score that it
    got in its group, instead of one of a group of its own.
  - The order in which members arrive says nothing: equal groups get equal verdicts.

All of it lives on one event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Hashable

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Verdict
from grm_jax.serving.problems import DeadlineExceeded, JudgementFailed, Unavailable


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """How rollouts that arrive alone are put together."""

    window: float = 2.0
    """Seconds that a rollout waits for others of its prompt at most; 0: it is judged alone. Longer
    than it takes a trainer to send a group, and much shorter than its time-out."""
    size: int | None = None
    """Rollouts of a prompt. A group is judged as soon as it has them all; None: when its window
    ends. The trainer's group size is what belongs here."""

    def __post_init__(self) -> None:
        if not self.window >= 0:
            raise UserError(f"--groups.window {self.window}: give 0 or more seconds")
        if self.size is not None and self.size < 1:
            raise UserError(f"--groups.size {self.size}: give 1 or more")


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rollout gets from its group's verdict, which is at place `index` there."""

    verdict: Verdict
    index: int

    @property
    def score(self) -> float:
        """Mean score over the critiques, on the template's scale."""
        return self.verdict.scores[self.index]

    @property
    def rank(self) -> float:
        """Rank in the group, from 0 (worst) to 1 (best); alone: its score within the scale."""
        return self.verdict.rewards[self.index]

    @property
    def std(self) -> float:
        return self.verdict.std[self.index]

    @property
    def size(self) -> int:
        """Members of the group that was judged."""
        return len(self.verdict.scores)


@dataclasses.dataclass(eq=False)
class _Place:
    response: str
    waiter: asyncio.Future[None] | None = None
    """Of the client that waits; None: it has gone."""
    served: bool = False


@dataclasses.dataclass(eq=False)
class _Group:
    key: Hashable
    asked: JudgeRequest
    """Of the first member; the others differ in their response alone."""
    size: int
    closes: float
    timer: asyncio.TimerHandle | None = None
    places: list[_Place] = dataclasses.field(default_factory=list)
    task: asyncio.Task[None] | None = None
    verdict: Verdict | None = None


class Groups:
    """Puts rollouts together and hands out shares.

    Args:
      judge: what judges a whole group, such as `Service.judge`.
      options: the window and size that hold where a request does not say.
      most: responses that `judge` takes at most.
      keep: seconds for which the place of a client that has gone is kept.
    """

    def __init__(
        self,
        judge: Callable[[JudgeRequest], Awaitable[Verdict]],
        options: GroupOptions = GroupOptions(),
        *,
        most: int = 64,
        keep: float = 60.0,
    ):
        self._judge = judge
        self.options = options
        self._most = most
        self._keep = keep
        self._open: dict[Hashable, _Group] = {}
        self._closed: dict[Hashable, list[_Group]] = {}

    @property
    def waiting(self) -> int:
        """Rollouts that wait for others of their group."""
        return sum(len(group.places) for group in self._open.values())

    async def score(
        self,
        request: JudgeRequest,
        *,
        seconds: float,
        scope: str = "",
        size: int | None = None,
        window: float | None = None,
    ) -> Share:
        """The share of one rollout.

        Args:
          request: with a single response. Its query, reference, principles and options are what
            members of a group have in common.
          seconds: until it is given up, waiting for others included.
          scope: sets apart what has the same texts and does not belong together, by a task's id.
          size, window: as in `GroupOptions`; of a group, the largest size and the earliest end that
            its members ask for hold.

        Raises:
          JudgementFailed: no critique of the group could be read.
          DeadlineExceeded: no verdict in time.
          UserError, ServiceProblem: what `judge` raises.
        """
        record, options = request.record, request.options
        (response,) = record.responses
        turns = tuple((turn["role"], turn["content"]) for turn in record.turns)
        key = (scope, turns, record.reference, record.principles, options)
        group, place = self._return(key, response) or self._join(key, request, size, window)
        if group.verdict is not None:  # it comes back, and its group has been judged meanwhile
            return self._serve(group, place)
        place.waiter = asyncio.get_running_loop().create_future()
        if group.task is None and len(group.places) >= group.size:
            self._close(group)
        try:
            await asyncio.wait_for(place.waiter, seconds)
            return self._serve(group, place)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no verdict within {seconds:g} seconds", retry_after=1
            ) from None
        finally:
            place.waiter = None
            if not place.served:
                self._left(group, place)

    def _join(
        self, key: Hashable, request: JudgeRequest, size: int | None, window: float | None
    ) -> tuple[_Group, _Place]:
        """A place in the open group of the key, which is made if there is none."""
        loop = asyncio.get_running_loop()
        size = min(size or self.options.size or self._most, self._most)
        closes = loop.time() + (self.options.window if window is None else window)
        group = self._open.get(key)
        if group is None:
            group = self._open[key] = _Group(key, request, size, closes)
        group.size = max(group.size, size)
        group.closes = min(group.closes, closes)
        if group.timer is not None:
            group.timer.cancel()
        group.timer = loop.call_at(group.closes, self._close, group)
        place = _Place(request.record.responses[0])
        group.places.append(place)
        return group, place

    def _return(self, key: Hashable, response: str) -> tuple[_Group, _Place] | None:
        """The place that a client has left in a group that is judged or has been."""
        for group in self._closed.get(key, ()):
            for place in group.places:
                if place.response == response and place.waiter is None and not place.served:
                    return group, place
        return None

    def _close(self, group: _Group) -> None:
        """The group takes no more members and is judged."""
        if group.task is not None:
            return
        if group.timer is not None:
            group.timer.cancel()
        del self._open[group.key]
        self._closed.setdefault(group.key, []).append(group)
        group.places.sort(key=lambda place: place.response)
        group.task = asyncio.ensure_future(self._run(group))

    async def _run(self, group: _Group) -> None:
        record = group.asked.record
        error: Exception | None = None
        try:
            verdict = await self._judge(
                JudgeRequest.make(
                    list(record.turns),
                    [place.response for place in group.places],
                    reference=record.reference,
                    principles=record.principles,
                    options=group.asked.options,
                )
            )
            if verdict.failure is not None:
                raise JudgementFailed(verdict)
            group.verdict = verdict
        except asyncio.CancelledError:
            error = Unavailable("the group was given up; ask again", retry_after=1)
            raise
        except Exception as raised:
            error = raised
        finally:
            if error is not None:
                self._forget(group)
            for place in group.places:
                if place.waiter is None or place.waiter.done():
                    continue
                if error is None:
                    place.waiter.set_result(None)
                else:
                    place.waiter.set_exception(error)
        asyncio.get_running_loop().call_later(self._keep, self._forget, group)

    def _serve(self, group: _Group, place: _Place) -> Share:
        assert group.verdict is not None
        place.served = True
        if all(place.served for place in group.places):
            self._forget(group)
        return Share(group.verdict, group.places.index(place))

    def _left(self, group: _Group, place: _Place) -> None:
        """A client has gone without its share."""
        if group.task is None:
            group.places.remove(place)
            if not group.places:
                if group.timer is not None:
                    group.timer.cancel()
                del self._open[group.key]
        elif group.verdict is None and all(place.waiter is None for place in group.places):
            asyncio.get_running_loop().call_later(self._keep, self._give_up, group)

    def _give_up(self, group: _Group) -> None:
        """Nobody has come back for the group."""
        if group.task is not None and all(place.waiter is None for place in group.places):
            group.task.cancel()

    def _forget(self, group: _Group) -> None:
        groups = self._closed.get(group.key, [])
        if group in groups:
            groups.remove(group)
        if not groups:
            self._closed.pop(group.key, None)
