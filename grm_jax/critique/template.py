"""Prompt templates: jinja2 files with a machine-readable first line.

The first line is a comment that says how the answer is read:

    {# grm_jax: name=grm low=1 high=10 reads=scores #}

    name       the name of the template in logs
    low, high  the range of a score, both ends allowed (`high=n` where the box holds an index)
    reads      `scores`: the box holds one score a response; `index`: the place of the best one, of
               two responses or more
    labels     how the text names a response: `number` (Response 1, the default) or `letter` ([A])
    responses  `many` (default) or `one` (the template has no numbered markers)
    guard      the section markers of an own template, separated by `|`, that outside text must not
               be able to forge: guard="<answer|</answer". The markers of the built-in templates
               are always guarded (`neutralise.py`)

The body sees `query`, `responses` (a list), `letters` (a list as long), and `hint`, `reference`,
`principles` (a list), which are None where the caller gave none. Outside text must stand on lines
of its own: `#### {{ query }} ####` would let a query close the header it stands in.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from grm_jax import files
from grm_jax.errors import UserError

LabelStyle = Literal["number", "letter"]

BUILTIN = (
    "grm", "single", "meta", "judge", "short", "short_single", "short_examples",
    "short_single_examples", "compact", "compact_single", "compact_meta",
)  # fmt: skip
REQUIRED = ("query", "responses")
OPTIONAL = ("hint", "reference", "principles")
VARIABLES = (*REQUIRED, "letters", *OPTIONAL)

_HEADER = re.compile(r"\{#[-+]?\s*grm_jax:(?P<fields>.*?)[-+]?#\}[ \t]*\Z")
_HEADER_EXAMPLE = "{# grm_jax: name=mine low=1 high=10 reads=scores #}"
_FIELDS = ("name", "low", "high", "reads", "labels", "responses", "guard")


class TemplateError(UserError):
    """A template that cannot be used, or not in this way. The message has file, line and fix."""


# No autoescape, since prompts are plain text. Block tags remove the newline after them, so that a
# template file can end with a newline that is not part of the prompt.
_ENVIRONMENT = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    # Cached here and not in Template, so that a Template is plain data that can be pickled.
    return _ENVIRONMENT.from_string(source)


@dataclass(frozen=True)
class Template:
    """A loaded template. Make one with `Template.load`; render it with `prompt.render`.

    Plain data: it can key a cache and travel to another process.
    """

    name: str
    origin: str  # file path, or "built-in"
    source: str
    low: float
    high: float  # inf where the box holds an index: the range is then 1..n
    reads: Literal["scores", "index"]
    labels: LabelStyle = "number"
    single: bool = False
    guard: tuple[str, ...] = ()
    uses: frozenset[str] = frozenset()

    @classmethod
    def load(cls, name_or_path: str | Path | Template) -> Template:
        """The built-in template of that name, or the template file at that path; a template itself.

        Raises:
            TemplateError: no such template or file, no header on its first line, a wrong header
                field, a jinja syntax error, or a variable that render() does not set.
        """
        if isinstance(name_or_path, Template):
            return name_or_path
        if isinstance(name_or_path, str) and name_or_path in BUILTIN:
            return _load_builtin(name_or_path)
        path = files.expanded(name_or_path)
        if path.is_file():
            source = files.read_text(path, TemplateError)
            return cls.from_source(source, str(path))
        raise TemplateError(
            f"no template {str(name_or_path)!r}: it is neither a file nor one of the built-in "
            f"templates {', '.join(BUILTIN)}; name one of these or give the path of your own file"
        )

    @classmethod
    def from_source(cls, source: str, origin: str) -> Template:
        """A template from the text of its file; `origin` names it in messages."""
        source = source.removeprefix("\ufeff")
        header = _read_header(source.split("\n", 1)[0].rstrip("\r"), origin)
        try:
            tree = _ENVIRONMENT.parse(source)
            _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{origin}:{error.lineno}: template syntax: {error.message}"
            ) from error
        uses = _check_variables(tree, origin)
        return cls(origin=origin, source=source, uses=uses, **header)

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the text's SHA-256, which identify the wording in logs."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()[:12]

    @property
    def scale(self) -> tuple[float, float]:
        """The range of the scores that `read` returns; 0..1 where the box holds an index."""
        return (0.0, 1.0) if self.reads == "index" else (self.low, self.high)

    @property
    def threshold(self) -> float | None:
        """A score above it calls a single response correct: the middle of the range.

        None if the scores are the labels 0 and 1 themselves, as in the paper.
        """
        return None if self.scale == (0.0, 1.0) else sum(self.scale) / 2

    def hint_text(self, best: int, n: int, labels: Sequence[float] | None = None) -> str:
        """`hint_text` with the names that this template gives to responses."""
        return hint_text(best, n, labels, style=self.labels)

    def fill(self, **variables: object) -> str:
        """The rendered body. Use `prompt.render`, which checks and neutralises the variables."""
        try:
            return _compile(self.source).render(**variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateError(
                f"{self.origin}: rendering failed: {error}; correct the template"
            ) from error


@functools.cache
def _load_builtin(name: str) -> Template:
    file = resources.files("grm_jax.critique") / "templates" / f"{name}.jinja"
    return Template.from_source(file.read_text(encoding="utf-8"), f"built-in:{name}.jinja")


def label(index: int, style: LabelStyle) -> str:
    """The name of the response at 0-based `index` in the text: "Response 3" or "[C]"."""
    return f"Response {index + 1}" if style == "number" else f"[{string.ascii_uppercase[index]}]"


def hint_text(
    best: int,
    n: int,
    labels: Sequence[float] | None = None,
    *,
    style: LabelStyle = "number",
) -> str:
    """The hint of hinted sampling: which response the ground truth prefers (SPCT, section 3.1).

    Args:
        best: 0-based place of the best response in the order *in which responses are shown*.
        n: number of responses shown.
        labels: ground truth, needed only for n = 1 (1 correct, 0 incorrect). The paper gives no
            wording for that case.
        style: how the template names a response.

    Raises:
        ValueError: `best` is not one of the n places, or n = 1 without a 0/1 label.
    """
    if not 0 <= best < n:
        raise UserError(f"best is {best} of {n} responses; it is a 0-based place, 0..{n - 1}")
    if n == 1:
        if labels is None or len(labels) != 1 or labels[0] not in (0, 1):
            raise UserError(
                f"the hint for a single response needs labels=(1,) or labels=(0,), got {labels!r}"
            )
        correct = labels[0] == 1
        if style == "letter":
            return f"best {label(0, style)}" if correct else "best none"
        return "The response is correct." if correct else "The response is incorrect."
    if style == "letter":
        return f"best {label(best, style)}"
    return f"The best response is: {label(best, style)}"


def _read_header(line: str, origin: str) -> dict:
    match = _HEADER.match(line)
    if match is None:
        raise TemplateError(
            f"{origin}:1: the template has no header; make its first line: {_HEADER_EXAMPLE}"
        )

    def bad(what: str) -> TemplateError:
        return TemplateError(f"{origin}:1: header: {what}; an example: {_HEADER_EXAMPLE}")

    try:
        words = shlex.split(match["fields"])
    except ValueError as error:
        raise bad(f"unbalanced quotes ({error})") from error
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise bad(f"{word!r} is not key=value")
        if key not in _FIELDS:
            raise bad(f"unknown field {key!r}, the fields are {', '.join(_FIELDS)}")
        if key in values:
            raise bad(f"{key} is given twice")
        values[key] = value
    for key in ("name", "low", "high", "reads"):
        if key not in values:
            raise bad(f"{key} is missing")

    def choice(key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = values.get(key, default)
        if value not in allowed:
            raise bad(f"{key}={value}, but it is one of {', '.join(allowed)}")
        return value

    def number(key: str) -> float:
        try:
            value = float(values[key])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise bad(f"{key}={values[key]} is not a number")
        return value

    reads = choice("reads", "", ("scores", "index"))
    low = number("low")
    if reads == "index":
        if low != 1 or values["high"] != "n":
            raise bad("with reads=index the range is low=1 high=n")
        high = math.inf
    else:
        high = number("high")
        if not low < high:
            raise bad(f"low={values['low']} is not below high={values['high']}")
    guard = tuple(values["guard"].split("|")) if "guard" in values else ()
    for literal in guard:
        # A break is one backslash after the first character: see neutralise.py.
        if len(literal) < 2 or "\\" in literal:
            raise bad(f"guard {literal!r} must have two characters or more and no backslash")
    return {
        "name": values["name"],
        "low": low,
        "high": high,
        "reads": reads,
        "labels": choice("labels", "number", ("number", "letter")),
        "single": choice("responses", "many", ("many", "one")) == "one",
        "guard": guard,
    }


def _check_variables(tree: nodes.Template, origin: str) -> frozenset[str]:
    """The variables that the body reads; raises for one that render() does not set."""
    undeclared = meta.find_undeclared_variables(tree)
    settable = {*VARIABLES, *_ENVIRONMENT.globals}
    unknown = sorted(undeclared - settable)
    if unknown:
        line = min(
            (name.lineno for name in tree.find_all(nodes.Name) if name.name == unknown[0]),
            default=1,
        )
        raise TemplateError(
            f"{origin}:{line}: unknown variable {unknown[0]!r}; "
            f"a template may use {', '.join(VARIABLES)}"
        )
    for name in REQUIRED:
        if name not in undeclared:
            raise TemplateError(f"{origin}: the template never uses {name!r}; add {{{{ {name} }}}}")
    return frozenset(undeclared)
