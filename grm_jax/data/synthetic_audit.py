"""Compares critiques of the embedded world with the truth: false alarms and missed violations.

Votes use only scores. Here every check in a critique (`name anna yes`) is compared with the truth
about that response. This reveals a policy that has learnt to break ties by inventing faults, even
if its accuracy rises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from grm_jax.data.synthetic import CRITERIA, LETTERS, TASKS, WISH_WORDS, Item, check_response

VERDICTS = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Counts of checks on criteria that apply.

    Attributes:
      met: checks of criteria that the response meets; false_alarms: of these, judged "no".
      violated: checks of criteria that it violates; misses: of these, judged "yes".
    """

    met: int = 0
    false_alarms: int = 0
    violated: int = 0
    misses: int = 0

    def __add__(self, other: Audit) -> Audit:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Audit(*(a + b for a, b in pairs))

    @property
    def false_alarm_rate(self) -> float:
        """Share of met criteria that are judged violated."""
        return self.false_alarms / max(1, self.met)

    @property
    def recall(self) -> float:
        """Share of violated criteria that are judged violated."""
        return 1.0 - self.misses / max(1, self.violated)


def read_query(query: str) -> Item:
    """The item of a query, without responses. Raises ValueError for any other text."""
    words = query.split()
    if len(words) < 4 or words[0] not in TASKS or "in" not in words:
        raise ValueError(f"not a query of the embedded world: {query!r}")
    unit = words.index("in")
    operands = tuple(int(word) for word in words[1:unit])
    asked = {"unit": words[unit + 1]}
    names = {word: criterion for criterion, word in WISH_WORDS.items()}
    rest = iter(words[unit + 2 :])
    for word in rest:
        asked[names[word]] = "" if names[word] == "polite" else next(rest)
    return Item(words[0], operands, asked, (), ())


def audit(critique: str, query: str, shown: Sequence[str]) -> Audit:
    """Compare a critique's checks with the truth about the responses in the order shown."""
    item = read_query(query)
    truth = [check_response(item, response.split()) for response in shown]
    _, _, analysis = critique.partition("Analysis:")
    words = analysis.partition("Scores:")[0].split()
    counts = {"met": 0, "false_alarms": 0, "violated": 0, "misses": 0}
    response = None
    for index, word in enumerate(words):
        letter = word.strip("[]")
        if word.startswith("[") and letter in LETTERS:
            place = LETTERS.index(letter)
            response = truth[place] if place < len(truth) else None
        checked = word in CRITERIA and index + 2 < len(words) and words[index + 2] in VERDICTS
        if not checked or response is None or word not in response:
            continue
        said_no = words[index + 2] == "no"
        if response[word].ok:
            counts["met"] += 1
            counts["false_alarms"] += said_no
        else:
            counts["violated"] += 1
            counts["misses"] += not said_no
    return Audit(**counts)


def audit_all(critiques: Iterable[tuple[str, str, Sequence[str]]]) -> Audit:
    """The sum over (critique, query, shown responses)."""
    total = Audit()
    for critique, query, shown in critiques:
        total += audit(critique, query, shown)
    return total
