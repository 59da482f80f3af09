"""The rules in which benchmarks differ: ties, unparsable critiques, order and form of questions.

`Benchmark.authors` has the rules of a benchmark's authors, `PAPER` those that the DeepSeek-GRM
paper uses for all benchmarks. Every single rule can be replaced on the command line.
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
    """How the questions of a benchmark are asked and scored.

    Credits are expectations: where authors draw once at random, this is the mean of all draws.
    """

    ties: TieRule = "random"
    """What a verdict earns if w responses share its top score. wrong: 0. half: 0.5 if the
    best response is among them. shared and random: 1/w if it is among them (the credit is split, or
    one of them is drawn, which is the same on average). excluded: it is not counted."""
    unparsed: UnparsedRule = "wrong"
    """What a verdict without any parsable critique earns. wrong: 0. half: 0.5. chance: 1 / number
    of responses. excluded: it is not counted."""
    order: OrderRule = "random"
    """The order in which responses are shown. fixed: as in the file. random: seeded shuffles,
    balanced over the samples of a vote. both: each pair is asked twice, as in the file and
    swapped."""
    form: Form = "list"
    """What one question shows. list: all responses. pairs: the best one and one other. single: one
    response."""
    threshold: float = 0.5
    """A single response is called correct if its mean score is above this."""


# The paper shuffles the responses of every sample independently. Shuffles that are balanced over a
# vote show each response in each place equally often too, with less noise.
PAPER = Rules(ties="random", unparsed="wrong", order="random", form="list")
