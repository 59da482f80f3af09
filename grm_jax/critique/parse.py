r"""From generated text to principles, analysis and scores, or a named failure.

These rules decide which scores count, in this order:

1. Candidates are the `\boxed{...}` groups; bare brackets (`[8, 9]`, `[[8, 9]]`) only if the text
   has no `\boxed{` at all, and only brackets that hold nothing but numbers: an echo such as
   `[The End of Response 2]` is not a candidate. The number after `Scores:` is never read.
   boxes.py reads the contents of a group: separators, full-width digits, markup around numbers.
2. A group with n entries is a verdict. Groups with another number of entries are skipped
   (`\boxed{42}` may quote an answer), and so are placeholders whose entries have no digit
   (`\boxed{x, x}` repeats the format). n numbers with something else between them (`8 9`, `8/9`)
   are an unparsable verdict and are not skipped.
3. The *last* verdict alone decides. If it cannot be parsed, the text fails with not_a_number,
   separators or markup, and if an entry is outside low..high with out_of_range. An earlier verdict
   is not used instead, since it may be a draft or a quotation from a judged response. Nothing is
   clipped. A plain number is `8`, `8.5`, `-3`; not `9/10`, `1e3`, `NaN`.
4. One box for each response (`\boxed{8} \boxed{9}`, or `Response 1: \boxed{8}` and so on, a line
   each) is a verdict if it ends the text and starts its line, and if these are all boxes of the
   text or `Scores:` is their heading. Anything else could be a quotation: several_boxes.
5. A `\boxed{` after the last verdict that is never closed is an unfinished verdict: no_box.
6. Without a verdict the failure is that of the last group: separators, markup, several_boxes (two
   boxes or more with one number each), empty, not_a_number (placeholders), wrong_count; or no_box.
7. Text that was cut off at the length limit must end with a verdict, followed only by white space,
   markup or punctuation. Otherwise the failure is `truncated`, since a verdict in the middle may be
   a quotation.

The time is linear for any input: each pattern stops at the next bracket or line.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from grm_jax.critique import boxes
from grm_jax.critique.template import Template

Failure = Literal[
    "no_box",
    "empty",
    "several_boxes",
    "separators",
    "markup",
    "wrong_count",
    "out_of_range",
    "not_a_number",
    "truncated",
]

_CLOSING = re.compile(r"[\s*_`~$#.;!)\]}>\\-]*")

_HEADER = re.compile(
    r"[\s#*_>`]*"
    r"(?P<key>specific criteria|analysis|(?:final |overall )?scores?|output)"
    r"[ \t*_]*(?P<colon>[:：]|\Z)[*_]*[ \t]*",
    re.IGNORECASE,
)
SHOWN = 80  # characters of a box that a report shows
_HEADER_REACH = 200  # characters of a line in which a header may end
_SECTION_OF = {"specific criteria": "principles", "analysis": "analysis"}

# From the start of its line to the first of one box a response, and between two of them.
_LABEL = r"(?:response\s*(\d+)(?:'s)?(?:\s+score)?[ \t*_]*[:：=][ \t*_]*)?[ \t$]*"
_FIRST = re.compile(
    r"[\s>*_#-]*(?P<scores>(?:final |overall )?scores?[ \t*_]*[:：][\s*_-]*)?" + _LABEL,
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"[\s,;.、$*_-]*" + _LABEL, re.IGNORECASE)
_GAP = 80  # characters between two boxes of one verdict at most


@dataclass(frozen=True)
class Parsed:
    """What a critique says. Exactly one of `scores` and `failure` is None.

    Attributes:
        scores: n numbers in the order in which the responses were shown, or None.
        failure: why there are no scores, or None.
        principles: the text of the `Specific Criteria` section, "" if there is none.
        analysis: the text of the `Analysis` section, "" if there is none.
    """

    scores: tuple[float, ...] | None
    failure: Failure | None
    principles: str
    analysis: str


def parse(
    text: str, n: int, *, low: float = 1, high: float = 10, truncated: bool = False
) -> Parsed:
    """Read one score for each response, each within low..high (Eq. 7: 1..10).

    Args:
        text: what the model generated, without the prompt.
        n: number of responses judged.
        low, high: the range of the template's scores, both ends allowed.
        truncated: whether generation stopped at the length limit.

    Raises:
        ValueError: n < 1 or low > high. Nothing in `text` raises.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a critique judges at least one response")
    if not low <= high:
        raise ValueError(f"low={low} is above high={high}")
    verdict, failure = _scores(text, n, truncated)
    if verdict is not None and not all(low <= score <= high for score in verdict):
        verdict, failure = None, "out_of_range"
    principles, analysis = _sections(text)
    return Parsed(verdict, failure, principles, analysis)


def parse_index(text: str, n: int, *, truncated: bool = False) -> Parsed:
    """Read the 1-based place of the best response (Eq. 6, LLM as a judge).

    `scores` is 1.0 at that place and 0.0 elsewhere, so that `vote` is the majority of Eq. (13).
    A place outside 1..n is out_of_range, one that is not whole is not_a_number.
    """
    parsed = parse(text, 1, low=1, high=n, truncated=truncated)
    if parsed.scores is None:
        return parsed
    (place,) = parsed.scores
    if place != int(place):
        return Parsed(None, "not_a_number", parsed.principles, parsed.analysis)
    one_hot = tuple(1.0 if index + 1 == place else 0.0 for index in range(n))
    return Parsed(one_hot, None, parsed.principles, parsed.analysis)


def read(template: Template, text: str, n: int, *, truncated: bool = False) -> Parsed:
    """Parse a reply to `template`, with its range, as scores or an index as its header says."""
    if template.reads == "index":
        return parse_index(text, n, truncated=truncated)
    return parse(text, n, low=template.low, high=template.high, truncated=truncated)


def last_box(text: str) -> str:
    r"""The last `\boxed{...}` of `text` as written, shortened for a report; "" without one."""
    plain = boxes.to_ascii(text)
    groups, _ = boxes.find(plain)
    groups = groups or boxes.find_brackets(plain)
    if not groups:
        return ""
    box = text[groups[-1].start : groups[-1].end]
    return box if len(box) <= SHOWN else box[: SHOWN - 3] + "..."


def commonest_boxes(failed: Iterable[tuple[str | None, str]]) -> dict[str, tuple[str, int]]:
    """Failure -> (the most frequent last box of such critiques, its count).

    Args:
        failed: (failure, text) of critiques; those with None and those without a box are skipped.
    """
    counted: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for failure, text in failed:
        if failure is not None and (box := last_box(text)):
            counted[failure][box] += 1
    return {kind: counts.most_common(1)[0] for kind, counts in sorted(counted.items())}


def one_line(box: str) -> str:
    """A box on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(box.split()))


def verdict_start(text: str, n: int) -> int | None:
    r"""Where the last verdict on n responses begins, whether or not it can be parsed; without one
    where the last `\boxed{...}` begins, or None without any."""
    text = boxes.to_ascii(text)
    contents, _ = _candidates(text, n)
    verdict = _last_verdict(text, contents, n)
    if verdict is not None:
        return verdict[1].start
    written = [group.start for group, _ in contents if text[group.start] == "\\"]
    return written[-1] if written else None


def _candidates(text: str, n: int) -> tuple[list[tuple[boxes.Group, boxes.Content]], int | None]:
    """The groups that may be a verdict, and where a box begins that is never closed."""
    groups, unfinished = boxes.find(text)
    if not groups and unfinished is None:
        groups = boxes.find_brackets(text)
    return [(group, boxes.content(group.text, n)) for group in groups], unfinished


def _last_verdict(
    text: str, contents: list[tuple[boxes.Group, boxes.Content]], n: int
) -> tuple[boxes.Content, boxes.Group] | None:
    """The last verdict and the text that it takes."""
    row = _one_a_response(text, contents, n)
    if row is not None:
        return row, boxes.Group(contents[-n][0].start, contents[-1][0].end, None)
    decisive = [(content, group) for group, content in contents if content.decides]
    return decisive[-1] if decisive else None


def _scores(text: str, n: int, truncated: bool) -> tuple[tuple[float, ...] | None, Failure | None]:
    text = boxes.to_ascii(text)
    contents, unfinished = _candidates(text, n)
    verdict = _last_verdict(text, contents, n)
    content, end = (None, 0) if verdict is None else (verdict[0], verdict[1].end)

    if truncated and not (content and _closes(text, end)):
        return None, "truncated"
    if unfinished is not None and unfinished >= end:
        return None, "no_box"
    if content is not None:
        return content.numbers, content.cause
    if not contents:
        return None, "no_box"
    if n > 1 and sum(content.single for _, content in contents) > 1:
        return None, "several_boxes"
    return None, _cause([content for _, content in contents])


def _cause(contents: list[boxes.Content]) -> Failure:
    """Why none of these groups is a verdict: a placeholder, else the cause of the last one."""
    if any(content.cause == "not_a_number" for content in contents):
        return "not_a_number"
    return contents[-1].cause or "wrong_count"


def _one_a_response(
    text: str, contents: list[tuple[boxes.Group, boxes.Content]], n: int
) -> boxes.Content | None:
    """The verdict of the last n boxes together, with one number each, or None."""
    last = contents[-n:]
    if n < 2 or len(last) < n or not all(content.single for _, content in last):
        return None
    if not _closes(text, last[-1][0].end):
        return None
    start = last[0][0].start
    line = text.rfind("\n", max(0, start - _GAP), start) + 1
    if line == 0 and start > _GAP:
        return None
    head = _FIRST.fullmatch(text, line, start)
    if head is None:
        return None
    above = text[max(0, line - _GAP) : line].rstrip().rpartition("\n")[2]
    titled = head["scores"] or _FIRST.fullmatch(above + " ")
    if len(contents) > n and not (titled and (head["scores"] or "core" in above)):
        return None
    labels = [head[2]]
    for (before, _), (after, _) in itertools.pairwise(last):
        if not 0 <= after.start - before.end <= _GAP:
            return None
        between = _BETWEEN.fullmatch(text, before.end, after.start)
        if between is None:
            return None
        labels.append(between[1])
    if labels not in ([None] * n, [str(index + 1) for index in range(n)]):
        return None
    return boxes.Content(tuple(content.value for _, content in last), None, decides=True)


def _closes(text: str, end: int) -> bool:
    return _CLOSING.fullmatch(text, end) is not None


def _sections(text: str) -> tuple[str, str]:
    """The `Specific Criteria` and the `Analysis` sections, without their headers."""
    sections: dict[str, list[str]] = {"principles": [], "analysis": [], "other": []}
    section = "other"
    for line in text.split("\n"):
        match = _HEADER.match(line[:_HEADER_REACH])
        # A word without a colon is a header only if it is alone on its line, as in "### Output".
        if match is not None and (match["colon"] or match.end() == len(line)):
            key = match["key"].lower()
            section = _SECTION_OF.get(key, "other")
            line = line[match.end() :]
        sections[section].append(line)
    principles = "\n".join(sections["principles"]).strip()
    analysis = "\n".join(sections["analysis"]).strip()
    if principles and not analysis:  # everything on one line
        principles, _, analysis = principles.partition("Analysis:")
        analysis = analysis.rpartition("Scores:")[0] or analysis
    return principles.strip(), analysis.strip()
