r"""Critiques whose scores are wrong, learnt with scores that agree with the labels (--rft.relabel).

    wrong critique -> the scores of the best response and of the one that won are exchanged
                   -> the same text, with the other box

Rejective fine-tuning learns nothing of a record whose critiques are all wrong, and a judge at
chance has half of its critiques rejected. Where the text of a critique says little of the verdict,
as that of a small model, it may as well stand before the right scores, and every record teaches its
label. It is not in the paper, and wrong for a judge whose text gives reasons: such a judge would
learn to score against them.
"""

from __future__ import annotations

import dataclasses

from grm_jax.critique import read, shuffle
from grm_jax.critique.correctness import best_label, decisive
from grm_jax.critique.template import Template
from grm_jax.data.trajectories import Trajectory
from grm_jax.judge.expected import written_at


def relabelled(row: Trajectory, template: Template) -> Trajectory | None:
    """A wrong critique with the scores of two responses exchanged, so that it is right (Eq. 10).

    None where that can not be: for a critique that is unparsable, or whose top score is shared, or
    whose box is not a plain list of whole scores, and for single responses.
    """
    scores, labels = row.scores, row.labels
    if scores is None or labels is None or len(scores) < 2 or not decisive(scores):
        return None
    best, won = best_label(labels), scores.index(max(scores))
    exchanged = list(scores)
    exchanged[best], exchanged[won] = scores[won], scores[best]
    spans = written_at(row.text, shuffle(scores, row.order))
    if spans is None:
        return None
    text, new = row.text, shuffle(exchanged, row.order)
    for (start, end), score in reversed(list(zip(spans, new, strict=True))):
        text = f"{text[:start]}{score:.0f}{text[end:]}"
    if read(template, text, len(new)).scores != tuple(new):
        return None  # the verdict is read elsewhere in the text
    return dataclasses.replace(row, text=text, scores=tuple(exchanged), correct=True, kept=True)
