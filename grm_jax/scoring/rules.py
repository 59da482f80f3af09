"""What benchmarks differ in: ties, unreadable critiques, order and form of the question.

Each benchmark states what its authors do (`Benchmark.authors`); `PAPER` is what the paper of
DeepSeek-GRM does on all of them. Every single rule can be replaced on the command line.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

TieRule = Literal["wrong", "half", "shared", "random", "excluded"]
UnparsedRule = Literal["wrong", "half", "chance", "excluded"]
OrderRule = Literal["fixed", "random", "both"]
Form = Literal["list", "pairs", "single"]
Protocol = Literal["authors", "paper"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a benchmark is asked and scored.

    Credits are expectations: where authors draw once at random, this is the mean of all draws.
    """

    ties: TieRule = "random"
    """The top shared by w responses. wrong: 0. half: 0.5 if the best is among them. shared and
    random: 1/w if the best is among them (a share each, or one drawn: the same on average).
    excluded: not counted."""
    unparsed: UnparsedRule = "wrong"
    """A verdict without any readable critique. wrong: 0. half: 0.5. chance: 1 / number of
    responses. excluded: not counted."""
    order: OrderRule = "random"
    """How responses are shown. fixed: as in the file. random: seeded shuffles, balanced over the
    samples of a vote. both: pairs are two games, as in the file and swapped."""
    form: Form = "list"
    """What one question shows. list: all responses. pairs: the best and one other. single: one."""
    threshold: float = 0.5
    """Single responses: a mean score above it says correct."""


# The paper shuffles every sample by itself. Shuffles that are balanced over a vote show a response
# in each place as often in expectation, and with less noise.
PAPER = Rules(ties="random", unparsed="wrong", order="random", form="list")
