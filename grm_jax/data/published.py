"""Readers for the rows of published preference sets. `shapes.py` has the table of their fields.

Field names are those of the authors' files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import read_turns, split_replies
from grm_jax.data.fields import Fields, decoded, number
from grm_jax.data.prompts import helpsteer_prompt, read_prompt
from grm_jax.data.rows import DataError, check_text, show

# (turns, responses, labels)
Said = tuple[tuple[Turn, ...], tuple[str, ...], tuple[float, ...]]

_TIE = (0.5, 0.5)
_WINNERS = {
    "model_a": (1.0, 0.0), "model_b": (0.0, 1.0), "tie": _TIE, "tie (bothbad)": _TIE,
    "bothbad": _TIE, "both_bad": _TIE,
}  # fmt: skip


def read_ultrafeedback(fields: Fields) -> Said:
    turns = read_prompt(fields)
    rows = _objects(fields, "completions")
    responses = tuple(_inner_text("completions", i, row, "response") for i, row in enumerate(rows))
    for name in ("overall_score", "fine-grained_score"):
        if all(row.get(name) is not None for row in rows):
            given = (number(f"completions[{i}].{name}", row[name]) for i, row in enumerate(rows))
            return turns, responses, tuple(given)
    return turns, responses, tuple(_mean_rating(i, row) for i, row in enumerate(rows))


def _mean_rating(i: int, row: Mapping[str, Any]) -> float:
    place, aspects = f"completions[{i}].annotations", row.get("annotations")
    if not isinstance(aspects, Mapping) or not aspects:
        fix = "give each completion an overall_score, a fine-grained_score or annotations"
        raise DataError(f"completions[{i}].overall_score", show(row.get("overall_score")), fix)
    ratings = []
    for name, aspect in aspects.items():
        rating = aspect.get("Rating") if isinstance(aspect, Mapping) else aspect
        ratings.append(number(f"{place}.{name}.Rating", rating))
    return sum(ratings) / len(ratings)


def read_nectar(fields: Fields) -> Said:
    fields.get("turns")  # the number of turns, not a conversation
    turns = read_prompt(fields.without("turns"))
    rows = _objects(fields, "answers")
    responses = tuple(_inner_text("answers", i, row, "answer") for i, row in enumerate(rows))
    ranks = (number(f"answers[{i}].rank", row.get("rank")) for i, row in enumerate(rows))
    return turns, responses, tuple(0.0 - rank for rank in ranks)


def read_openhermes(fields: Fields) -> Said:
    """Candidates and their ranks, 1 the best. `chosen`, where it is there, must be of that rank."""
    turns = read_prompt(fields)
    responses = fields.texts("candidates_completions")
    given = fields.items("ranks", "give a list of numbers, one a candidate")
    if not responses or len(given) != len(responses):
        problem = f"{len(given)} for {len(responses)} candidates"
        raise DataError("ranks", problem, "give one rank a candidate")
    ranks = [number(f"ranks[{i}]", rank) for i, rank in enumerate(given)]
    fields.get("rejected")  # one of the candidates
    if "chosen" in fields:
        chosen = fields.get("chosen")
        if isinstance(chosen, list):
            messages = read_turns("chosen", chosen, fields.unused)
            chosen = messages[-1]["content"] if messages else ""
        best = [text for text, rank in zip(responses, ranks, strict=True) if rank == min(ranks)]
        if chosen not in best:
            raise DataError("ranks", "the lowest is not that of 'chosen'", "rank the best one 1")
    return turns, responses, tuple(0.0 - rank for rank in ranks)


def read_shp(fields: Fields) -> Said:
    """A post and two comments; `labels` is 1 where A has more votes, 0 where B has."""
    fix = "give 1 where A is preferred, 0 where B is"
    first = number("labels", fields.need("labels", fix))
    if first not in (0, 1):
        raise DataError("labels", show(fields.get("labels")), fix)
    turns = (Turn(role="user", content=fields.text("history", filled=True)),)
    return turns, (fields.text("human_ref_A"), fields.text("human_ref_B")), (first, 1 - first)


def read_helpsteer2(fields: Fields) -> Said:
    return _of_two(
        fields, helpsteer_prompt(fields), "response_1", "response_2", "preference_strength"
    )


def read_helpsteer3(fields: Fields) -> Said:
    return _of_two(fields, read_prompt(fields), "response1", "response2", "overall_preference")


def _of_two(
    fields: Fields, turns: tuple[Turn, ...], first: str, second: str, preference: str
) -> Said:
    """A strength below 0 means that the first response is better, above 0 the second."""
    strength = fields.number(preference)
    labels = _TIE if strength == 0 else (float(strength < 0), float(strength > 0))
    return turns, (fields.text(first), fields.text(second)), labels


def read_arena(fields: Fields) -> Said:
    whole = []
    for name in ("conversation_a", "conversation_b"):
        messages = fields.items(name, "give a list of messages")
        whole.append(read_turns(name, messages, fields.unused))
        if not whole[-1] or whole[-1][-1]["role"] != "assistant":
            raise DataError(name, "the last message is not the assistant's", "end with the reply")
    shared = split_replies(whole)
    if shared is None:
        raise DataError(
            "conversation_b", "other questions than in 'conversation_a'", "give one dialogue a row"
        )
    turns, replies = shared
    return turns, replies, _winner(fields)


def read_arena_columns(fields: Fields) -> Said:
    """prompt, response_a, response_b: a text each, or (JSON) lists with a text a turn."""
    names = ("prompt", "response_a", "response_b")
    values = [fields.need(name, "give a text, or a list with a text a turn") for name in names]
    if all(isinstance(v, list) or isinstance(decoded(v), list) for v in values):
        said = [fields.texts(name) for name in names]
    else:
        said = [(fields.text(name),) for name in names]
    for name, texts in zip(names, said, strict=True):
        if len(texts) != len(said[0]) or not texts:
            problem = f"{len(texts)} turns where the prompt has {len(said[0])}"
            raise DataError(name, problem, "give a text a turn")
    whole = [
        tuple(
            Turn(role=role, content=text)
            for pair in zip(said[0], side, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        )
        for side in said[1:]
    ]
    shared = split_replies(whole)
    assert shared is not None  # both have the prompt's questions
    return (*shared, _winner(fields))


def _winner(fields: Fields) -> tuple[float, float]:
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    if "winner" in fields or not any(name in fields for name in names):
        fix = f"give one of {', '.join(_WINNERS)}"
        winner = fields.need("winner", fix)
        if not isinstance(winner, str) or winner not in _WINNERS:
            raise DataError("winner", show(winner), fix)
        return _WINNERS[winner]
    votes = [fields.number(name) if name in fields else 0.0 for name in names]
    if sorted(votes) != [0, 0, 1]:
        raise DataError(names[0], f"votes {votes}", "give 'winner', or 1 in one of the three")
    return _TIE if votes[2] else (votes[0], votes[1])


def read_alpaca(fields: Fields) -> Said:
    texts = fields.texts("output")
    if len(texts) != 2:
        raise DataError("output", f"{len(texts)} texts", "give two: the better, then the worse")
    return read_prompt(fields), texts, (1.0, 0.0)


def _objects(fields: Fields, name: str) -> list[Mapping[str, Any]]:
    rows = fields.items(name, "give a list of objects")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}[{i}]", show(row), "give an object")
    if not rows:
        raise DataError(name, "an empty list", "give at least one response")
    return rows


def _inner_text(name: str, i: int, row: Mapping[str, Any], field: str) -> str:
    check_text(f"{name}[{i}].{field}", row.get(field))
    return row[field]


# The field by which a shape is recognised -> its reader.
READERS: dict[str, Callable[[Fields], Said]] = {
    "completions": read_ultrafeedback,
    "answers": read_nectar,
    "human_ref_A": read_shp,
    "candidates_completions": read_openhermes,
    "preference_strength": read_helpsteer2,
    "overall_preference": read_helpsteer3,
    "conversation_a": read_arena,
    "response_a": read_arena_columns,
    "output": read_alpaca,
}
