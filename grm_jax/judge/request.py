"""What a judge is asked: a conversation, n responses, and how its critiques are drawn and voted.

    query, responses (+ reference, principles, criteria) -> JudgeRequest -> the judge -> a Verdict

No JAX and no model: commands, the server and its clients build requests with this file alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from grm_jax.critique.prompt import Turn
from grm_jax.critique.voting import SCALAR_WEIGHT
from grm_jax.data.conversation import check_turns, read_turns, transcript
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, check_text, show
from grm_jax.errors import UserError
from grm_jax.judge.prompts import OrderMode

Method = Literal["vote", "guided", "weighted", "hybrid"]
METHODS: tuple[str, ...] = get_args(Method)
MOST_RESPONSES = 256
MOST_SAMPLES = 1024
MOST_LABELS = 1024


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name} is {value!r:.60}; give a whole number from {low} to {high}")


def _number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if value is None:
        return
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        span = f" from {low:g} to {high:g}" if math.isfinite(high) else ""
        span = span or (f" of {low:g} or more" if math.isfinite(low) else "")
        raise UserError(f"{name} is {value!r:.60}; give a number{span}")


@dataclasses.dataclass(frozen=True)
class JudgeDefaults:
    """How the trained judge is sampled where nobody says otherwise; stored beside its weights."""

    temperature: float = 0.5
    """Of the samples of a vote (the paper's)."""
    max_new_tokens: int = 1024
    """Length limit of a critique."""


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How critiques of one request are drawn, and what is made of them."""

    k: int = 8
    """Critiques that are sampled."""
    seed: int = 0
    """Of the samples and of the orders in which they see the responses. The same request with the
    same seed gets the same critiques, but for rounding: a call that needs more room has arrays of
    other sizes, and seldom another token."""
    temperature: float | None = None
    """None: what the judge was trained to be sampled at; 0 is greedy."""
    max_new_tokens: int | None = None
    """Length limit of a critique; None: the judge's own."""
    order: OrderMode = "balanced"
    """How the samples see the responses; see `critique.orders`."""
    rating: bool = False
    """Rate a single response with the template for several (1-10) instead of calling it correct or
    not."""
    method: Method | None = None
    """vote: sums of scores (Eq. 14). guided: of the `k_meta` critiques that the meta RM ranks
    highest. weighted: of all, weighted by the meta RM's probability. hybrid: the mean vote plus
    `scalar_weight` times the scalar RM's score, both centred. None: guided where the judge has a
    meta RM, else vote."""
    k_meta: int | None = None
    """Critiques that vote with `guided`; None: half of them."""
    expected: bool = False
    """Vote with the expected scores: the mean of the distribution from which each score was drawn,
    instead of the drawn one. A critique without them votes with the drawn ones."""
    scalar_weight: float = SCALAR_WEIGHT
    """Of the scalar RM's score with `hybrid`."""
    adaptive: float | None = None
    """Stop sampling at this probability of another winner; None: draw all k."""
    threshold: float | None = None
    """With `adaptive`, single responses are decided against it; None: the middle of the range."""
    at_once: int | None = None
    """Most responses that a critique reads. More are dealt into random groups, anew for each of the
    k critiques, which then costs as many critiques as there are groups, and has scores where all of
    these can be read; None: all responses."""

    def __post_init__(self) -> None:
        _whole("k", self.k, 1, MOST_SAMPLES)
        _whole("seed", self.seed, 0, 2**63 - 1)
        _number("temperature", self.temperature, 0.0)
        _number("scalar_weight", self.scalar_weight, 0.0)
        _number("adaptive", self.adaptive, 0.0, 1.0)
        _number("threshold", self.threshold)
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens, 1, 2**20)
        if self.order not in get_args(OrderMode):
            raise UserError(
                f"order is {self.order!r:.60}; give one of {', '.join(get_args(OrderMode))}"
            )
        if self.method is not None and self.method not in METHODS:
            raise UserError(f"method is {self.method!r:.60}; give one of {', '.join(METHODS)}")
        if self.k_meta is not None:
            _whole("k_meta", self.k_meta, 1, self.k)
        if self.at_once is not None:
            _whole("at_once", self.at_once, 2, MOST_RESPONSES)
        for name in ("rating", "expected"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r:.60}; give true or false")


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """How a judge is sampled on the records of a file, for evaluation."""

    k: int = 8
    """Samples a record, besides the greedy one."""
    temperature: float | None = None
    """Of the k samples; None: what the judge was trained to be sampled at."""
    max_new_tokens: int | None = None
    """Length limit of a critique; None: the judge's own."""
    order: OrderMode = "balanced"
    """How the k samples see the responses."""
    rating: bool = False
    """Rate single responses 1-10 too, with the template for several, as the paper does."""
    seed: int = 0
    greedy: bool = True
    """Also judge once greedily."""
    adaptive: float | None = None
    """Stop sampling a record at this probability of a change of verdict; None: draw all k."""
    threshold: float | None = None
    """With `adaptive`: single responses are decided against it; None: the middle of the range."""


OPTIONS = tuple(field.name for field in dataclasses.fields(ScoreOptions))
TEXTS = ("query", "responses", "reference", "principles", "criteria")


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One query with its n >= 1 responses.

    Attributes:
      record: the texts. Its id is a digest of them, so that equal requests get equal critiques. Its
        labels say nothing.
      options: how it is judged.
    """

    record: Preference
    options: ScoreOptions = ScoreOptions()

    @classmethod
    def make(
        cls,
        query: str | Sequence[Any],
        responses: Sequence[Any],
        *,
        reference: str | None = None,
        principles: Sequence[str] | None = None,
        criteria: str | Sequence[str] | None = None,
        options: ScoreOptions = ScoreOptions(),
    ) -> JudgeRequest:
        """A request from texts or from chat messages.

        Args:
          query: the user's query, or messages of which the last is the user's (or a tool's result).
            System, developer and tool messages are shown as text; content may be text parts.
          responses: texts, or for each a list of messages (a reply with tool calls, say), which are
            joined to one text.
          reference: an answer to judge against.
          principles: what to judge by, instead of the judge's own principles.
          criteria: what counts, in words: "The answer is correct and cites the law." It is added to
            the principles.

        Raises UserError naming the field, what was found and the fix.
        """
        turns = _turns(query)
        if isinstance(responses, str) or not isinstance(responses, Sequence):
            raise DataError("responses", show(responses), "give a list of texts")
        if len(responses) > MOST_RESPONSES:
            raise DataError("responses", f"{len(responses)}", f"give at most {MOST_RESPONSES}")
        texts = tuple(_response(f"responses[{i}]", text) for i, text in enumerate(responses))
        if not texts:
            raise DataError("responses", "an empty list", "give at least one response")
        if reference is not None:
            check_text("reference", reference)
        stated = (*_texts("principles", principles), *_texts("criteria", criteria))
        parts = [[[t["role"], t["content"]] for t in turns], texts, reference, stated]
        record = Preference(
            id=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20],
            turns=turns,
            responses=texts,
            labels=(0.0,) * len(texts),
            reference=reference,
            principles=stated or None,
        )
        return cls(record, options)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], **defaults: Any) -> JudgeRequest:
        """A request from a JSON object with the names of `make` and of `ScoreOptions`.

        Args:
          defaults: options that hold where the object does not say.

        Raises UserError for an unknown field, too: a misspelt option is never left out in silence.
        """
        unknown = sorted(set(values) - {*TEXTS, *OPTIONS})
        if unknown:
            raise UserError(
                f"unknown field {', '.join(map(repr, unknown))}; the fields are "
                f"{', '.join((*TEXTS, *OPTIONS))}"
            )
        for name in ("query", "responses"):
            if values.get(name) is None:
                raise DataError(name, "missing", "give it")
        said = {name: values[name] for name in OPTIONS if values.get(name) is not None}
        texts = {name: values[name] for name in TEXTS if values.get(name) is not None}
        return cls.make(**texts, options=ScoreOptions(**{**defaults, **said}))

    @property
    def groups(self) -> int:
        """Into how many groups the responses are dealt for a critique (`at_once`); 1: it reads all
        of them."""
        n = len(self.record.responses)
        return math.ceil(n / (self.options.at_once or n))

    @property
    def samples(self) -> int:
        """How many critiques are sampled at most: k of each group."""
        return self.options.k * self.groups

    @functools.cached_property
    def digest(self) -> str:
        """Names the request with its options: equal ones have equal verdicts of one judge."""
        options = dataclasses.asdict(self.options)
        at_once = options.pop("at_once")  # says nothing where no responses are dealt
        dealt = (at_once,) if self.groups > 1 else ()
        text = f"{self.record.id} {(*options.values(), *dealt)}"
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclasses.dataclass(frozen=True)
class LabelRequest:
    """A query with its items, each of which is one prompt: how likely is each label as the token
    behind it? See `labels.py`.

    Attributes:
      query, items: texts, or token ids.
      labels: token ids.
      item_first: an item comes before the query.
      special: a query that is a text gets the token that begins texts.

    Raises DataError for no item, no label, or more than `MOST_LABELS` labels.
    """

    query: str | tuple[int, ...]
    items: tuple[str | tuple[int, ...], ...]
    labels: tuple[int, ...]
    item_first: bool = False
    special: bool = True

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("items", "an empty list", "give at least one")
        if not 1 <= len(self.labels) <= MOST_LABELS:
            raise DataError(
                "label_token_ids", f"{len(self.labels):,} of them", f"give 1 to {MOST_LABELS:,}"
            )


def _turns(query: Any) -> tuple[Turn, ...]:
    """The conversation, whose last turn is the user's."""
    if isinstance(query, str):
        check_text("query", query, filled=True)
        return (Turn(role="user", content=query),)
    if isinstance(query, Mapping) or not isinstance(query, Sequence):
        raise DataError("query", show(query), "give a text or a list of messages")
    turns = read_turns("query", list(query))
    check_turns("query", turns)
    return turns


def _response(name: str, response: Any) -> str:
    if isinstance(response, str):
        check_text(name, response)
        return response
    if isinstance(response, Mapping):
        response = [response]
    if not isinstance(response, Sequence):
        raise DataError(name, show(response), "give a text or a list of messages")
    return transcript(read_turns(name, list(response)))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A text or texts; () for None. An empty list is an error: it asks for nothing."""
    if value is None:
        return ()
    if isinstance(value, str) and name == "criteria":
        value = [value]
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise DataError(name, show(value), "give a list with at least one text, or leave it out")
    for i, text in enumerate(value):
        check_text(f"{name}[{i}]", text, filled=True)
    return tuple(value)
