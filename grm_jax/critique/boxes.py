r"""The contents of `\boxed{...}`: n numbers, or the cause why there are none.

Read as separators: `,` `，` `、` `،`, or `;` `；`, one kind in one box (`8,5; 9` could be two or
three numbers). Full-width digits are read as digits. What cannot change a number is removed: LaTeX
spaces, `\text{8}` and similar commands, and braces, brackets and parentheses around the whole list
or one entry. Two numbers are never joined: markup between them counts as a space.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Cause = Literal["empty", "separators", "markup", "wrong_count", "not_a_number"]

# Each full-width character is replaced by one plain character, so that positions do not change.
_PLAIN = str.maketrans("０１２３４５６７８９，；．＋－\u2212｛｝［］＼", "0123456789,;.+--{}[]\\")
_BOX_OR_BRACE = re.compile(r"\\{1,2}boxed[ \t]*\{|[{}]")
_BOX = re.compile(r"\s*\\+boxed[ \t]*\{")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# An attempt at a number: distinguishes `9/10` and `NaN` from a placeholder such as `x`.
_ATTEMPT = re.compile(r"\d|^[+-]?(?:nan|inf|infinity)$", re.IGNORECASE)
# What a bare bracket may hold besides plain numbers and still be a (failed) verdict.
_NUMBER_LIKE = re.compile(r"[+-]?(?:nan|inf|infinity|[\d.]+(?:e[+-]?\d+|/\d+|%)?)", re.IGNORECASE)
_SEPARATORS = (",、،", ";")
_SEPARATOR = re.compile(r"[,、،;]")
_SPACE = re.compile(r"\\+[ ,;:!]|~|\\+q?quad(?![a-z])|\\+(?:left|right)(?![a-z])|\u200b|\ufeff")
_COMMAND = r"(?:\\+(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|bm|boldsymbol|boxed)[ \t]*)?"
_AROUND_ONE = re.compile(_COMMAND + r"\{([^{}\\,;、،]*[0-9][^{}\\,;、،]*)\}")
_AROUND_ALL = re.compile(
    r"\s*(?:" + _COMMAND + r"\{([^{}]*)\}|\\+\{([^{}]*?)\\+\}|\[([^][]*)\]|\(([^()]*)\)"
    r"|(?:\*{1,2}|\$)([^*$]*)(?:\*{1,2}|\$))\s*"
)
_OTHER_SEPARATORS = re.compile(r"(?:[\s,;、،/|&:+-]|and|or|vs\.?|to)*", re.IGNORECASE)
_WORDS = re.compile(r"(?<![0-9.])[0-9]+(?:\.[0-9]+)?")
_DEPTH = 4  # layers of markup that are removed
LONGEST = 400  # maximum length of a group with braces inside, or of one that is not a plain list


@dataclass(frozen=True)
class Group:
    """A bracketed list in a text. text: its contents, None if it is too long and nested to be
    read."""

    start: int
    end: int
    text: str | None


@dataclass(frozen=True)
class Content:
    """What a group says about n responses.

    Attributes:
        numbers: n plain numbers, or None.
        cause: why there are no numbers, or None.
        decides: whether the group is a verdict, parsable or not; other groups are skipped.
        value: the number, if the group holds one plain number.
        single: whether it holds one plain number.
    """

    numbers: tuple[float, ...] | None
    cause: Cause | None
    decides: bool
    value: float = 0.0
    single: bool = False


def to_ascii(text: str) -> str:
    """`text` with full-width digits and brackets replaced by plain ones; its length stays the
    same."""
    return text if text.isascii() else text.translate(_PLAIN)


def find(text: str) -> tuple[list[Group], int | None]:
    r"""The closed `\boxed{}` groups in the order of their ends, and the start of the last open one.

    A long group with braces inside is not read, since reading each level again would cost quadratic
    time.
    """
    groups: list[Group] = []
    starts: list[int] = []  # per open brace: where its box starts, -1 for another brace
    contents: list[int] = []  # per open brace: where its content starts
    nested: list[bool] = []  # per open brace: whether braces stand inside
    for match in _BOX_OR_BRACE.finditer(text):
        if match.group() != "}":
            if nested:
                nested[-1] = True
            starts.append(-1 if match.group() == "{" else match.start())
            contents.append(match.end())
            nested.append(False)
        elif starts:
            start, content, deep = starts.pop(), contents.pop(), nested.pop()
            if start >= 0:
                readable = not deep or match.start() - content <= LONGEST
                inside = text[content : match.start()] if readable else None
                groups.append(Group(start, match.end(), inside))
    unclosed = [start for start in starts if start >= 0]
    return groups, unclosed[-1] if unclosed else None


def find_brackets(text: str) -> list[Group]:
    """The bare brackets that hold nothing but numbers and attempts at them."""
    groups = []
    for match in _BRACKETS.finditer(text):
        entries = [entry.strip() for entry in _SEPARATOR.split(match.group(1))]
        if all(map(_NUMBER_LIKE.fullmatch, entries)):
            groups.append(Group(match.start(), match.end(), match.group(1)))
    return groups


def content(text: str | None, n: int) -> Content:
    """Read a group's text as the scores of n responses."""
    if text is None:
        return Content(None, "markup", decides=False)
    marked = "\\" in text or "{" in text
    text = _unwrapped(text)
    if _BOX.match(text) and text.rstrip().endswith("}"):  # the inner box is a group of its own
        return Content(None, "markup", decides=False)
    if not _SEPARATOR.sub("", text).strip():
        return Content(None, "empty", decides=False)
    kinds = [kind for kind in _SEPARATORS if any(mark in text for mark in kind)]
    entries = [entry.strip() for entry in _SEPARATOR.split(text)]
    if len(kinds) > 1:
        return Content(None, "separators", decides=True)
    if len(entries) == n and all(map(_NUMBER.fullmatch, entries)):
        numbers = tuple(float(entry) for entry in entries)
        return Content(numbers, None, decides=True, value=numbers[0], single=n == 1)
    if len(entries) == 1 and _NUMBER.fullmatch(entries[0]):
        return Content(None, "wrong_count", decides=False, value=float(entries[0]), single=True)
    separated = n > 1 and len(text) <= LONGEST and len(_WORDS.findall(text)) == n
    if separated and "" not in entries and _OTHER_SEPARATORS.fullmatch(_WORDS.sub(" ", text)):
        return Content(None, "separators", decides=True)
    shaped = len(entries) == n
    attempt = any(map(_ATTEMPT.search, entries))
    if marked and attempt:
        return Content(None, "markup", decides=shaped)
    if shaped:
        return Content(None, "not_a_number", decides=attempt)
    return Content(None, "wrong_count", decides=False)


def _unwrapped(text: str) -> str:
    """`text` without LaTeX spaces and without markup around the whole or around single entries."""
    if len(text) > LONGEST:
        return text
    text = _SPACE.sub(" ", text)
    for _ in range(_DEPTH):
        before = text
        text = _AROUND_ONE.sub(r" \1 ", text)
        whole = _AROUND_ALL.fullmatch(text)
        if whole is not None:
            text = next(part for part in whole.groups() if part is not None)
        if text == before:
            break
    return text
