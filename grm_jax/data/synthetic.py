"""The embedded world: small judging tasks with a computable truth, a noisy teacher, a tokenizer.

With it every stage of SPCT runs on a CPU in minutes, through the same code as real data: the world
is written to ordinary preference and trajectory files with an ordinary tokenizer.

A query asks for a computed answer (`sum 3 4`), in a unit, with three of five wishes:

    sum 3 4 in cm start_with hello greet anna mention fruit

A response is the asked words in order, with 0-3 defects injected (wrong answer, wrong unit, missing
or wrong word). Every violated criterion costs 5 (answer, unit) or 3 (a wish); the true score is
10 - cost, and the best response is unique by construction. A single response is acceptable (label
1) when its true score is at least 6.

The cold-start teacher writes critiques of at most three criteria, while five apply, so that no
single sample covers all of them, but a vote can. Some criteria are irrelevant, and it makes errors:

    Specific Criteria: answer high name low
    Analysis: [A] answer 7 yes name anna yes [B] answer 6 no name anna yes
    Scores: \\boxed{10, 5}

Each check names the evidence and then judges it. Some operand pairs and some combinations of a task
with a wish are not in the training data (`Split.OPERANDS`, `Split.COMBINATIONS`), and where
`WorldConfig` says so, neither is a whole task, or a kind of defect.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

NUMBERS = [str(i) for i in range(19)]
OPENINGS = ["hello", "sure", "okay", "greetings"]
ENDINGS = ["done", "bye", "end", "finished"]
NAMES = ["anna", "ben", "carl", "dora", "emil", "fay"]
POLITE = ["please", "kindly", "gladly"]
UNITS = ["cm", "kg", "days", "coins"]
TOPICS = {
    "fruit": ["apple", "pear", "plum"],
    "animal": ["cat", "dog", "fox"],
    "colour": ["red", "blue", "green"],
    "tool": ["saw", "axe", "drill"],
}
TOPIC_WORDS = [word for words in TOPICS.values() for word in words]
TASKS = ["sum", "larger", "smaller", "after", "repeat"]
ONE_OPERAND = ("after", "repeat")
CORE = ("answer", "unit")
WISHES = ["start", "ending", "name", "polite", "topic"]
IRRELEVANT = ["style", "length", "tone"]
CRITERIA = [*CORE, *WISHES]
Task = Literal["sum", "larger", "smaller", "after", "repeat"]
Criterion = Literal["answer", "unit", "start", "ending", "name", "polite", "topic"]
COST = {criterion: 5 if criterion in CORE else 3 for criterion in CRITERIA}
# The words that a response may use for a criterion, in the order in which they are written.
SLOTS = {
    "start": OPENINGS,
    "name": NAMES,
    "polite": POLITE,
    "topic": TOPIC_WORDS,
    "answer": NUMBERS,
    "unit": UNITS,
    "ending": ENDINGS,
}
WISH_WORDS = {
    "start": "start_with",
    "ending": "end_with",
    "name": "greet",
    "polite": "be_polite",
    "topic": "mention",
}
ACCEPTABLE = 6  # a single response with at least this true score has label 1
LETTERS = "ABCD"


class Split(enum.Enum):
    """What an item may contain: TRAIN excludes the contents of the other two."""

    TRAIN = "train"
    OPERANDS = "operands"
    COMBINATIONS = "combinations"


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The number of examples in the files of the embedded world."""

    cold_start: int = 24_000
    """Teacher trajectories for supervised training."""
    train: int = 8_000
    """Preferences for RFT, RL, the meta RM and the scalar baseline."""
    fresh: int = 1_000
    """Held-out preferences of the training distribution; none occurs in the training files."""
    shifted: int = 200
    """Held-out preferences of each kind that training has not seen: operand pairs, combinations of
    a task and a wish, and those of the next two options."""
    unseen_task: Task | None = None
    """No training record asks this; held-out records that do have the domain `task`."""
    unseen_defect: Criterion | None = None
    """Every response of the training records meets this criterion, if it applies; held-out records
    in which one violates it have the domain `defect`."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Check:
    """Whether a response meets a criterion, and the word that shows it (`none` if missing)."""

    ok: bool
    evidence: str


@dataclasses.dataclass(frozen=True)
class Item:
    """A query, its responses, and the truth about them."""

    task: str
    operands: tuple[int, ...]
    asked: Mapping[str, str]  # criterion -> asked word (a category for `topic`)
    responses: tuple[tuple[str, ...], ...]
    checks: tuple[Mapping[str, Check], ...]

    @property
    def answer(self) -> str:
        a, b = self.operands[0], self.operands[-1]
        value = {"sum": a + b, "larger": max(a, b), "smaller": min(a, b), "after": a + 1}
        return str(value.get(self.task, a))

    @property
    def criteria(self) -> list[str]:
        """Applicable criteria: the answer and what was asked for."""
        return ["answer", *self.asked]

    @property
    def penalties(self) -> list[int]:
        return [sum(COST[c] for c, x in check.items() if not x.ok) for check in self.checks]

    @property
    def labels(self) -> list[float]:
        """True scores; for a single response 1.0 (acceptable) or 0.0."""
        truth = [10.0 - penalty for penalty in self.penalties]
        return [float(truth[0] >= ACCEPTABLE)] if len(truth) == 1 else truth

    @property
    def query(self) -> str:
        """Every word preceded by a space, as in the vocabulary."""
        words = [self.task, *map(str, self.operands), "in", self.asked["unit"]]
        for criterion, word in self.asked.items():
            if criterion != "unit":
                words += [WISH_WORDS[criterion], *([word] if word else [])]
        return "".join(f" {word}" for word in words)

    @property
    def response_texts(self) -> list[str]:
        return ["".join(f" {word}" for word in response) for response in self.responses]


def _held_combination(task: str, asked: Mapping[str, str]) -> bool:
    held_out = {
        "sum": ("ending", "bye"),
        "larger": ("start", "sure"),
        "repeat": ("name", "fay"),
        "after": ("topic", "tool"),
        "smaller": ("unit", "kg"),
    }
    criterion, word = held_out[task]
    return asked.get(criterion) == word


def _held_operands(operands: Sequence[int]) -> bool:
    return len(operands) == 2 and (operands[0] * 3 + operands[1] * 7) % 10 == 1


def _in_split(split: Split, task: str, operands: Sequence[int], asked: Mapping[str, str]) -> bool:
    held_out = (_held_operands(operands), _held_combination(task, asked))
    wanted = {
        Split.TRAIN: (False, False),
        Split.OPERANDS: (True, False),
        Split.COMBINATIONS: (False, True),
    }
    return held_out == wanted[split]


def _respond(rng: random.Random, draft: Item, defects: set[str]) -> tuple[str, ...]:
    """A response to the draft's query that violates `defects`."""
    words = []
    for criterion, slot in SLOTS.items():
        if criterion != "answer" and criterion not in draft.asked:
            continue
        broken = criterion in defects
        if criterion == "answer":
            word = draft.answer
            if broken:
                true, ops = int(word), draft.operands
                near = {true - 2, true - 1, true + 1, true + 2, ops[0], ops[-1]}
                word = str(rng.choice(sorted(x for x in near if x != true and 0 <= x <= 18)))
        elif criterion == "polite":
            word = None if broken else rng.choice(POLITE)
        elif criterion == "topic":
            good = TOPICS[draft.asked[criterion]]
            wrong = [word for word in TOPIC_WORDS if word not in good]
            word = rng.choice([*wrong, *[None] * 4]) if broken else rng.choice(good)
        else:
            word = draft.asked[criterion]
            if broken:
                word = rng.choice([*(w for w in slot if w != word), None])
        if word is not None:
            words.append(word)
    return tuple(words)


def check_response(item: Item, response: Sequence[str]) -> dict[str, Check]:
    """The truth about a response: each applicable criterion's evidence and whether it is met."""
    checks = {}
    for criterion in item.criteria:
        evidence = next((word for word in response if word in SLOTS[criterion]), "none")
        if criterion == "answer":
            ok = evidence == item.answer
        elif criterion == "polite":
            ok = evidence != "none"
        elif criterion == "topic":
            ok = evidence in TOPICS[item.asked[criterion]]
        else:
            ok = evidence == item.asked[criterion]
        checks[criterion] = Check(ok, evidence)
    return checks


def make_item(
    rng: random.Random,
    n: int,
    split: Split = Split.TRAIN,
    *,
    tasks: Sequence[str] = TASKS,
    defects: Collection[str] = CRITERIA,
) -> Item:
    """A random item with n responses, whose best response is unique.

    Args:
      tasks: what its query may ask.
      defects: the criteria that its responses may violate.
    """
    defect_weights = (0.4, 0.3, 0.2, 0.1) if n == 1 else (0.2, 0.4, 0.27, 0.13)
    while True:
        task = rng.choice(tasks)
        operands = tuple(rng.randint(1, 6) for _ in range(1 if task in ONE_OPERAND else 2))
        if len(operands) == 2 and operands[0] == operands[1] and task != "sum":
            continue
        asked = {"unit": rng.choice(UNITS)}
        for wish in rng.sample(WISHES, 3):
            if wish == "polite":
                asked[wish] = ""
            else:
                asked[wish] = rng.choice(list(TOPICS) if wish == "topic" else SLOTS[wish])
        if not _in_split(split, task, operands, asked):
            continue
        draft = Item(task, operands, asked, (), ())
        breakable = [criterion for criterion in draft.criteria if criterion in defects]
        responses = []
        for _ in range(n):
            count = rng.choices((0, 1, 2, 3), defect_weights)[0]
            responses.append(_respond(rng, draft, set(rng.sample(breakable, count))))
        checks = tuple(check_response(draft, response) for response in responses)
        item = Item(task, operands, asked, tuple(responses), checks)
        if n == 1:
            if item.labels[0] == 1.0 and rng.random() < 0.25:  # both labels about equally often
                continue
            return item
        first, second = sorted(item.penalties)[:2]
        if first == second or (second - first > 6 and rng.random() < 0.5):
            continue  # no unique best; or too easy to be worth having often
        return item


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The program that writes cold-start critiques, with human-like errors.

    A critique is careful with probability `careful`, else careless; the two differ in how often a
    check is wrong, how often a criterion is irrelevant, and how often a weight is mistaken.
    """

    careful: float = 0.7
    check_error: tuple[float, float] = (0.03, 0.30)
    irrelevant: tuple[float, float] = (0.11, 0.32)
    weight_error: tuple[float, float] = (0.10, 0.35)
    three_criteria: float = 0.6  # else two

    def write(self, rng: random.Random, item: Item) -> str:
        """A critique of the item's responses in the order in which they stand."""
        careless = int(rng.random() >= self.careful)
        error = self.check_error[careless]
        relevant, others = item.criteria, [c for c in CRITERIA + IRRELEVANT]
        others = [c for c in others if c not in relevant]
        rng.shuffle(relevant)
        rng.shuffle(others)
        count = 3 if rng.random() < self.three_criteria else 2
        chosen = [
            (others if rng.random() < self.irrelevant[careless] else relevant).pop()
            for _ in range(count)
        ]
        weights = {}
        for criterion in chosen:
            high = (criterion in CORE) ^ (rng.random() < self.weight_error[careless])
            weights[criterion] = "high" if high else "low"
        analysis, scores = "", []
        for letter, checks in zip(LETTERS, item.checks, strict=False):
            analysis += f" [{letter}]"
            cost = 0
            for criterion in chosen:
                check = checks.get(criterion, Check(True, "none"))
                if rng.random() < error:
                    check = self._misjudge(rng, item, criterion, check)
                analysis += f" {criterion} {check.evidence} {'yes' if check.ok else 'no'}"
                if not check.ok:
                    cost += 5 if weights[criterion] == "high" else 3
            scores.append(max(1, 10 - cost))
        if len(scores) == 1:
            scores = [int(scores[0] >= ACCEPTABLE)]
        return format_critique(weights, analysis, scores)

    def _misjudge(self, rng: random.Random, item: Item, criterion: str, check: Check) -> Check:
        """Half the errors judge right evidence wrongly, half misread the evidence itself."""
        if criterion not in item.criteria or rng.random() < 0.5:
            return Check(not check.ok, check.evidence)
        if check.ok:
            return Check(False, "none")
        if criterion == "answer":
            return Check(True, item.answer)
        if criterion == "topic":
            return Check(True, rng.choice(TOPICS[item.asked["topic"]]))
        return Check(True, "kindly" if criterion == "polite" else item.asked[criterion])


def format_critique(weights: Mapping[str, str], analysis: str, scores: Sequence[int]) -> str:
    """The output format that the released weights emit, in this world's words."""
    criteria = "".join(f" {criterion} {weight}" for criterion, weight in weights.items())
    boxed = ", ".join(map(str, scores))
    return f"Specific Criteria:{criteria}\nAnalysis:{analysis}\nScores: \\boxed{{{boxed}}}"


def vocabulary() -> list[str]:
    """The pieces of the world's language after the control tokens, each once."""
    words = [f" [{letter}]" for letter in LETTERS] + [" best"]
    for group in (
        NUMBERS, OPENINGS, ENDINGS, NAMES, POLITE, UNITS, list(TOPICS), TOPIC_WORDS, CRITERIA,
        IRRELEVANT, TASKS, ["in"], list(WISH_WORDS.values()), ["high", "low", "none", "yes", "no"],
    ):  # fmt: skip
        words += [f" {word}" for word in group]
    pieces = ["Specific Criteria:", "\nAnalysis:", "\nScores: \\boxed{", ", ", "}"]
    return list(dict.fromkeys([*pieces, *(str(i) for i in range(11)), *words]))
