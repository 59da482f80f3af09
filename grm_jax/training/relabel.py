r"""Critiques whose scores are wrong, learnt with scores that agree with the labels (--rft.relabel).

    wrong critique of several responses -> the scores of the best one and of the one that won are
                                           exchanged
    wrong critique of a single response -> its score is mirrored: 0 becomes 1, of 1..10 a 3 an 8
                   -> the same text, with the other box

Rejective fine-tuning learns nothing of a record whose critiques are all wrong, and a judge at
chance has half of its critiques rejected. Where the text of a critique says little of the verdict,
as that of a small model, it may as well stand before the right scores, and every record teaches its
label. It is not in the paper, and wrong for a judge whose text gives reasons: such a judge would
learn to score against them.
"""

from __future__ import annotations

import dataclasses

from grm_jax.critique import is_correct, read, shuffle
from grm_jax.critique.correctness import best_label, decisive
from grm_jax.critique.template import Template
from grm_jax.critique.template_set import Templates
from grm_jax.data.trajectories import Trajectory
from grm_jax.judge.expected import written_at


def relabelled(row: Trajectory, templates: Templates) -> Trajectory | None:
    """A wrong critique with scores that make it right (Eq. 10).

    None where that can not be: for a critique that is unparsable, or whose top score is shared (or
    in the middle, for a single response), or whose box is not a plain list of whole scores.
    """
    scores, labels = row.scores, row.labels
    if scores is None or labels is None:
        return None
    template = templates.single if len(scores) == 1 else templates.many
    right = _right(scores, labels, template)
    spans = written_at(row.text, shuffle(scores, row.order))
    if right is None or spans is None:
        return None
    text, shown = row.text, shuffle(right, row.order)
    for (start, end), score in reversed(list(zip(spans, shown, strict=True))):
        text = f"{text[:start]}{score:.0f}{text[end:]}"
    if read(template, text, len(shown)).scores != tuple(shown):
        return None  # the verdict is read elsewhere in the text
    return dataclasses.replace(row, text=text, scores=right, correct=True, kept=True)


def _right(
    scores: tuple[float, ...], labels: tuple[float, ...], template: Template
) -> tuple[float, ...] | None:
    """The scores as they would be right, if an exchange of two or a mirror makes them so."""
    found = list(scores)
    if len(scores) == 1:
        found = [template.low + template.high - scores[0]]
    elif decisive(scores):
        best, won = best_label(labels), scores.index(max(scores))
        found[best], found[won] = scores[won], scores[best]
    right = is_correct(found, labels, threshold=template.threshold if len(found) == 1 else None)
    return tuple(found) if right else None
