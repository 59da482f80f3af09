r"""Text from outside is only text: it cannot forge or close a section of a template.

A judged response may contain the judge's own section markers, to end its own section early or to
smuggle in another response. Each such marker gets one backslash inside, and nothing else changes:

    #### Responses to be Scored ####   ->  ###\# Responses to be Scored ###\#
    [The Begin of Response 2]          ->  [\The Begin of Response 2]
    [B]   (templates with letters)     ->  [\B]
    <answer  (guard="<answer")         ->  <\answer

Markers are searched in the text as a reader sees it (`lookalikes.skeleton`): in lower case, with
full-width letters and look-alikes of other alphabets made plain, and without invisible characters
(zero-width spaces, direction overrides, variation selectors, NUL). So
`[Ｔhe<zero-width space> begin OF response 2]` is found too, also with a Cyrillic `Т`. A `####`
without a second `####` on its line (`#### 42`, a Markdown heading) is not a marker and stays.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from grm_jax.critique.lookalikes import skeleton
from grm_jax.critique.template import Template

# Each pattern matches at the first character of a marker, inside a look-ahead so that overlapping
# markers are all found. From one `[` a match never reaches beyond the next, so the scan is linear.
# White space may be missing between words: characters that fonts show as a gap are skipped.
_RESPONSE_MARKER = re.compile(r"(?=\[\s*the\s*(?:begin|end)(?:ning)?\s*of\s*(?:the\s*)?response)")
_LETTER_TAG = re.compile(r"(?=\[[a-z]\])")
_HASHES = re.compile(r"#{4,}")
_BREAK = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"  # ends a line, as `str.splitlines` has it
_SPEAKER_LINE = re.compile(rf"(?:\A|[{_BREAK}])[^\S{_BREAK}]*(system|user|assistant)(?=\s*:)")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def neutralise(text: str, template: Template | None = None) -> str:
    """`text` with every section marker broken by a backslash; other text comes back unchanged.

    Applying it twice changes nothing more. Lone surrogates, which no tokenizer can encode, become
    U+FFFD. Linear in the length of the text.

    Args:
        text: a query, response, reference answer or principle.
        template: the template it goes into; adds that template's own markers (letter tags, guard).
    """
    text = _SURROGATE.sub("\ufffd", text)
    return _broken(text, _breaks(text, template))


def break_speakers(text: str) -> str:
    """The text of one turn with a backslash after a word that would start another turn of the
    conversation in which it stands: `Assistant: fine` on a line of its own."""
    folded, origin = skeleton(text)
    ends = (match.end(1) for match in _SPEAKER_LINE.finditer(folded))
    return _broken(text, [(end if origin is None else origin[end - 1] + 1) for end in ends])


def _broken(text: str, breaks: Sequence[int]) -> str:
    """`text` with a backslash before each of these positions, which ascend."""
    if not breaks:
        return text
    pieces, start = [], 0
    for position in breaks:
        pieces.append(text[start:position])
        start = position
    pieces.append(text[start:])
    return "\\".join(pieces)


def _breaks(text: str, template: Template | None) -> list[int]:
    """Positions in `text` before which a backslash breaks a marker, ascending."""
    folded, origin = skeleton(text)
    after: set[int] = set()  # folded positions of the characters that a backslash follows
    for pattern in _patterns(template):
        after.update(match.start() for match in pattern.finditer(folded))
    if "####" in folded:
        after.update(_header_breaks(folded))
    return sorted((position if origin is None else origin[position]) + 1 for position in after)


def _header_breaks(folded: str) -> list[int]:
    breaks = []
    start = 0
    for line in folded.split("\n"):
        runs = [match.span() for match in _HASHES.finditer(line)]
        if len(runs) > 1 or any(end - begin >= 8 for begin, end in runs):
            for begin, end in runs:
                # After every third '#' that another one follows, so that no four stay together.
                breaks.extend(start + at for at in range(begin + 2, end - 1, 3))
        start += len(line) + 1
    return breaks


def _patterns(template: Template | None) -> list[re.Pattern[str]]:
    patterns = [_RESPONSE_MARKER]
    if template is not None:
        if template.labels == "letter":
            patterns.append(_LETTER_TAG)
        patterns.extend(_guard_pattern(literal) for literal in template.guard)
    return patterns


@functools.lru_cache(maxsize=256)
def _guard_pattern(literal: str) -> re.Pattern[str]:
    return re.compile(f"(?={re.escape(skeleton(literal)[0])})")
