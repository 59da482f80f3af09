"""The shapes of rows of preference data, read as turns, responses and labels.

A row has a prompt (`prompts.py` says in which fields) and one of these groups of fields:

    responses, labels | scores | best             n responses; best: an index from 0
    response | completion, label                  one response: 1 or true is correct, 0 or false not
    chosen, rejected                              texts, messages, or lists of texts: RewardBench 2,
                                                  Skywork, UltraFeedback binarized, Orca, Alpaca and
                                                  ShareGPT DPO. Without a prompt: whole
                                                  conversations, lists of messages or HH's texts
    output: [better, worse]                       Alpaca's older form
    response, helpfulness                         HelpSteer 1, 2: one of several rows of a record;
                                                  a list ("disagreements") is the annotators',
                                                  whose mean is taken
    response_1, response_2, preference_strength   HelpSteer 2, its preferences
    response1, response2, overall_preference      HelpSteer 3
    completions: [{response, overall_score}]      UltraFeedback; else fine-grained_score, else the
                                                  mean of the annotations' ratings
    answers: [{answer, rank}]                     Nectar: the label is minus the rank
    candidates_completions, ranks                 OpenHermesPreferences: the same; `chosen` and
                                                  `rejected` are two of them
    human_ref_A, human_ref_B, labels              SHP: the prompt is `history`; labels: 1 for A
    conversation_a, conversation_b, winner        arena votes, whole conversations
    response_a, response_b, winner_model_a, ..    arena votes, JSON lists of texts

Labels are the ratings of a row, higher is better. If a row only says which of two responses is
better, they are 1 and 0; if it calls them equal (a tie, both bad), 0.5 and 0.5. `score_chosen` and
`score_rejected` are labels; a chosen response with the lower score is an error.

Two conversations may differ before their last reply (arena votes of several turns, tool calls).
Their common turns are then the prompt, and each response is all that follows, as one text
(`conversation.transcript`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from grm_jax.critique.prompt import Turn
from grm_jax.data import published
from grm_jax.data.conversation import (
    check_turns,
    is_message,
    read_turns,
    split_hh,
    split_replies,
    transcript,
)
from grm_jax.data.fields import Fields, decoded, grade, grades, number
from grm_jax.data.prompts import (
    LAST_PROMPTS,
    PROMPTS,
    helpsteer_prompt,
    read_prompt,
    with_system,
)
from grm_jax.data.published import Said
from grm_jax.data.rows import DataError, check_text, kind, show

_LABELS = ("labels", "scores", "best")
_SINGLE = ("response", "completion")
_MEDIA = ("images", "image", "audios", "videos")
_HH_REPLY = "\n\nAssistant:"
_KNOWN = (
    "give either 'responses' (with labels, scores or best), or 'response' with 'label', or "
    "'chosen' with 'rejected', each with its prompt; or rows as HelpSteer, UltraFeedback, Nectar, "
    "OpenHermesPreferences, SHP, arena votes or Alpaca publish them: response, helpfulness | "
    "response_1, response_2, preference_strength | response1, response2, overall_preference | "
    "completions | answers | candidates_completions, ranks | human_ref_A, human_ref_B, labels | "
    "conversation_a, conversation_b, winner | response_a, response_b, winner_model_a, .. | "
    "instruction, output: [better, worse]"
)


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a row. rated: the row is one rated response of a record of several rows."""

    turns: tuple[Turn, ...]
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    rated: bool = False


def read_content(fields: Fields) -> Content:
    """The content of a row of any known shape. Raises DataError naming the field and a fix."""
    for name in _MEDIA:
        if name in fields and fields.get(name) not in ("", []):
            raise DataError(name, "not text", "a judge reads only text: leave the row out")
    reader = _shape(fields)
    turns, responses, labels = reader(fields)
    turns = with_system(fields, turns)
    check_turns("turns", turns)
    if reader is not _read_rated:
        require_consistent(responses, labels)
    return Content(turns, responses, labels, rated=reader is _read_rated)


def read_texts(fields: Fields) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns and responses of a row, to be judged: labels may be missing and are not read.

    The shapes are those of `read_content`. A reply may be a list of messages, as one text. Raises
    DataError naming the field and a fix.
    """
    single = [name for name in _SINGLE if name in fields]
    if "responses" in fields and not single and "chosen" not in fields:
        replies = fields.items("responses", "give a list of texts")
        responses = tuple(_reply(f"responses[{i}]", reply) for i, reply in enumerate(replies))
        if not responses:
            raise DataError("responses", "an empty list", "give at least one response")
    elif len(single) == 1 and "responses" not in fields and "chosen" not in fields:
        responses = (_reply(single[0], fields.get(single[0])),)
    else:
        content = read_content(fields)
        return content.turns, content.responses
    turns = with_system(fields, read_prompt(fields))
    check_turns("turns", turns)
    return turns, responses


def _reply(name: str, reply: Any) -> str:
    if isinstance(reply, list) or is_message(reply):
        return transcript(read_turns(name, _side(reply)))
    check_text(name, reply)
    return reply


def require_consistent(responses: Sequence[str], labels: Sequence[float]) -> None:
    """Raise DataError for identical responses with different labels, which are not a preference."""
    first: dict[str, int] = {}
    for i, text in enumerate(responses):
        j = first.setdefault(text, i)
        if labels[i] != labels[j]:
            raise DataError(
                "responses",
                f"responses {j} and {i} (from 0) are identical, their labels are not: "
                f"{labels[j]:g} and {labels[i]:g}",
                "leave the row out: no judge can tell them apart",
            )


def _shape(fields: Fields) -> Callable[[Fields], Said]:
    """The reader for this row's fields. Exactly one of the plain shapes must fit."""
    if "candidates_completions" in fields and "ranks" in fields:
        return published.read_openhermes  # also beside 'chosen' and 'rejected'
    plain = [name for name in ("responses", *_SINGLE, "chosen") if name in fields]
    if not plain and "rejected" in fields:
        plain = ["chosen"]
    if len(plain) > 1:
        raise DataError("responses", f"the row has both {plain[0]!r} and {plain[1]!r}", _KNOWN)
    if plain:
        if plain[0] in _SINGLE:
            rated = "label" not in fields and "helpfulness" in fields.names()
            return _read_rated if rated else _read_single
        return _read_list if plain == ["responses"] else _read_pair
    for name, reader in published.READERS.items():
        if name in fields:
            return reader
    shapes = ("responses", *_SINGLE, "chosen", *published.READERS)
    if nulls := [name for name in shapes if name in fields.names()]:
        raise DataError(nulls[0], "null", _KNOWN)
    raise DataError("responses", f"no known shape; the row has {fields.names()}", _KNOWN)


def _read_list(fields: Fields) -> Said:
    turns = read_prompt(fields)
    responses = fields.texts("responses")
    if not responses:
        raise DataError("responses", "an empty list", "give at least one response")
    name = fields.one_of(_LABELS)
    if name == "best":
        return turns, responses, _best(fields, len(responses))
    labels = grades(name, fields.items(name, "give a list of numbers, one a response"))
    if len(labels) != len(responses):
        problem = f"{len(labels)} for {len(responses)} responses"
        raise DataError(name, problem, "give one label a response")
    return turns, responses, labels


def _best(fields: Fields, n: int) -> tuple[float, ...]:
    given = fields.get("best")
    try:
        best = number("best", given)
    except DataError:
        best = -1.0  # the error below says what it is
    if best not in range(n):
        raise DataError(
            "best",
            show(given),
            f"give the best response's index from 0: an integer in 0..{n - 1}",
        )
    if n == 1:
        raise DataError(
            "best", "one response is always the best", "give 'labels': [1] or [0] instead"
        )
    return tuple(float(i == best) for i in range(n))


def _read_single(fields: Fields) -> Said:
    turns = read_prompt(fields)
    response = fields.text(fields.one_of(_SINGLE))
    fix = "give 1 (or true) for correct, 0 (or false) for not"
    label = fields.need("label", fix)
    value = grade("label", label)
    if value not in (0, 1):
        raise DataError("label", show(label), fix)
    return turns, (response,), (value,)


def _read_rated(fields: Fields) -> Said:
    turns = helpsteer_prompt(fields)
    return turns, (fields.text(fields.one_of(_SINGLE)),), (_helpfulness(fields),)


def _helpfulness(fields: Fields) -> float:
    """A rating, or the mean of one an annotator."""
    given = fields.get("helpfulness")
    if isinstance(given, str) and isinstance(decoded(given), list):
        given = decoded(given)
    if not isinstance(given, list):
        return fields.number("helpfulness")
    if not given:
        raise DataError("helpfulness", "an empty list", "give at least one rating")
    return math.fsum(number(f"helpfulness[{i}]", x) for i, x in enumerate(given)) / len(given)


def _read_pair(fields: Fields) -> Said:
    sides = ("chosen", "rejected")
    chosen, rejected = (
        _side(fields.need(name, "give 'chosen' and 'rejected' together")) for name in sides
    )
    for name in _LABELS:
        if name in fields:
            raise DataError(
                name, "given together with 'chosen'", "drop it: the pair says which is better"
            )
    others = [name for name in (*PROMPTS, *LAST_PROMPTS) if name in fields]
    if "prompt" in fields and "messages" in others:
        fields.get("messages")  # some sets repeat the chosen conversation there
        prompt = read_prompt(fields.without("messages"))
    else:
        prompt = read_prompt(fields) if others else None
    if any(isinstance(side, list) and not _messages(side) for side in (chosen, rejected)):
        return _read_lists(fields, prompt, chosen, rejected)
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise DataError(
            "chosen",
            f"chosen is {kind(chosen)}, rejected is {kind(rejected)}",
            "give two strings or two lists of messages",
        )
    if isinstance(chosen, str):
        for name, text in zip(sides, (chosen, rejected), strict=True):
            check_text(name, text)
        turns, replies = (prompt, (chosen, rejected)) if prompt else _read_hh(chosen, rejected)
    else:
        turns, replies = _read_conversations(fields, (chosen, rejected), prompt)
    return turns, replies, _scores(fields)


def _side(value: Any) -> Any:
    """A single message in place of a list of messages (ShareGPT) becomes a list of one."""
    return [value] if is_message(value) else value


def _messages(values: list[Any]) -> bool:
    return not any(isinstance(value, str) for value in values)


def _read_lists(
    fields: Fields, prompt: tuple[Turn, ...] | None, chosen: Any, rejected: Any
) -> Said:
    """Lists of texts: every chosen one has label 1, every rejected one 0."""
    lists: list[tuple[str, ...]] = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        texts = (side,) if isinstance(side, str) else fields.texts(name)
        if not texts:
            raise DataError(name, "an empty list", "give at least one text")
        for text in texts:
            check_text(name, text)
        lists.append(texts)
    if prompt is None:
        fields.one_of(PROMPTS)  # says what is missing
        raise AssertionError
    good, bad = lists
    labels = (1.0,) * len(good) + (0.0,) * len(bad)
    return prompt, (*good, *bad), labels


def _scores(fields: Fields) -> tuple[float, float]:
    """1 and 0, or the scores, if the pair was made from scores."""
    names = ("score_chosen", "score_rejected")
    if not all(name in fields for name in names):
        return 1.0, 0.0
    good, bad = (fields.number(name) for name in names)
    if good < bad:
        problem = f"{good:g}, below score_rejected {bad:g}"
        raise DataError("score_chosen", problem, "the chosen response has the higher score")
    return good, bad


def _read_hh(chosen: str, rejected: str) -> tuple[tuple[Turn, ...], tuple[str, str]]:
    r"""Two texts "\n\nHuman: a\n\nAssistant: b" of one conversation; texts are trimmed.

    The replies start at the last "\n\nAssistant:" that both share. (In 5 of the 2,312 rows of
    harmless-base/test a reply continues with invented turns, which are part of that reply.)
    """
    start = chosen.rfind(_HH_REPLY)
    while start >= 0 and not rejected.startswith(chosen[: start + len(_HH_REPLY)]):
        start = chosen.rfind(_HH_REPLY, 0, start)
    turns = split_hh(chosen[: max(start, 0)])
    if turns is None:
        raise DataError(
            "chosen",
            f"no 'prompt' in the row, and no HH conversation that both share: {show(chosen)}",
            "add 'prompt', or open both with the same '\\n\\nHuman: ...\\n\\nAssistant:'",
        )
    good, bad = (text[start + len(_HH_REPLY) :].strip() for text in (chosen, rejected))
    return turns, (good, bad)


def _read_conversations(
    fields: Fields, sides: tuple[list[Any], list[Any]], prompt: tuple[Turn, ...] | None
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Messages that end with the assistant's. The prompt may be in both, or only in its own
    field."""
    whole = []
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        turns = read_turns(name, messages, fields.unused)
        if not turns or turns[-1]["role"] != "assistant":
            raise DataError(name, "the last message is not the assistant's", "end with the reply")
        if prompt is None and len(turns) == 1:
            raise DataError(name, "a reply and no conversation", "add 'prompt' to the row")
        if prompt is not None and turns[0]["role"] == "assistant":
            turns = (*prompt, *turns)
        if prompt is not None and _unlike(turns, prompt):
            raise DataError(
                name, "starts with another conversation than the prompt's", "give the reply alone"
            )
        whole.append(turns)
    shared = split_replies(whole)
    if shared is None:
        raise DataError(
            "rejected",
            "the conversation before the last reply is not that of 'chosen'",
            "a pair needs one shared conversation and two replies to it",
        )
    return shared


def _unlike(turns: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> bool:
    """Whether a conversation does not continue the prompt. It may have a system turn that the
    prompt lacks, and more turns than the prompt."""
    own_system = turns[0]["role"] == "system" and prompt[0]["role"] != "system"
    dialogue = turns[1:] if own_system else turns
    # Some sets give the first question as the prompt, some the last.
    return prompt not in (dialogue[: len(prompt)], dialogue[:-1][-len(prompt) :])
