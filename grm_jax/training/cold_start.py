r"""The cold start without a teacher: the base model writes the critiques that SFT learns from.

    records -> texts with worked examples, a hint and the first word of the verdict
            -> continued by the base model -> each cut after its first box
            -> kept where its scores agree with the labels, and it repeats nothing of the prompt:
               no hint, no marker, and no line of the worked examples' critiques
            -> sft/trajectories.jsonl
            -> SFT, which shows the run's own templates, without examples

A base model continues text, and does not answer messages: the text is outside the chat format, and
the template's last line, such as "Criteria:", is the beginning of the critique. The worked examples
teach the format, the hint the verdict. What SFT learns from is the format, a short critique, and
scores that are right. The sft stage begins so without `--instructions`, where
`--sft.cold-start.many` names a template that shows examples.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grm_jax.critique import (
    Template,
    TemplateError,
    boxes,
    is_correct,
    keep_hinted,
    read,
    unshuffle,
)
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory, read_trajectories, to_trajectory
from grm_jax.errors import UserError
from grm_jax.judge.critiques import Critic, Rollout
from grm_jax.judge.prompts import Prompts
from grm_jax.training.inputs import learnt, sampled, usable
from grm_jax.training.lengths import Lengths
from grm_jax.training.options import SFT, ColdStart
from grm_jax.training.run import Run, Stage
from grm_jax.training.sampling import sample_in_chunks

log = logging.getLogger("grm_jax")


def cold_start(stage: Stage, config: SFT) -> list[Trajectory]:
    """The kept critiques of the base model; sampled first, unless that was done before.

    Raises UserError where none is kept.
    """
    file = stage.directory / "trajectories.jsonl"
    if not file.exists():
        _sample(stage, config.cold_start, usable_records(stage.run, config), file)
    rows = [row for row in read_trajectories(file) if isinstance(row, Trajectory)]
    kept = [row for row in rows if row.kept]
    failures = collections.Counter(row.failure for row in rows if row.failure is not None)
    listed = ", ".join(f"{count} {kind}" for kind, count in failures.most_common())
    log.info(
        "sft cold start   %d critiques of the base model, %d unparsable%s, %d kept, of %d records",
        len(rows), sum(failures.values()), f" ({listed})" if listed else "", len(kept),
        len({row.example_id for row in kept}),
    )  # fmt: skip
    if not kept:
        raise UserError(
            f"the cold start kept none of {len(rows)} critiques; look at {file}. A base model that "
            "does not follow worked examples needs a teacher's critiques: --instructions FILE"
        )
    return kept


def usable_records(run: Run, config: SFT) -> list[Preference]:
    """The records of which the base model writes critiques. Their prompts must fit with worked
    examples and a hint, and without them in a training row. Raises DataError as `inputs.usable`
    does, and TemplateError for a template that does not end with the beginning of a critique.
    """
    start = config.cold_start
    for template in shown(start).values():
        opening(template)
    new = start.sampling.max_new_tokens
    with_examples = Lengths(_prompts(run, start), run.templates.meta)
    readings = [
        sampled(run, "sft.cold-start", with_examples.hinted, new),
        learnt(run, "sft", config.fitting, run.lengths.judge, new),
    ]
    return usable(run, "sft", readings, start.records)


class Texts(Prompts):
    """Prompts that a base model continues: the text of the last message, not in the chat format."""

    def ids(
        self, record: Preference, order: Sequence[int], *, hinted: bool = False
    ) -> tuple[int, ...]:
        """The text's token ids, after what the checkpoint's tokenizer puts before a text."""
        text = self.messages(record, order, hinted=hinted)[-1]["content"].rstrip()
        return (*self.tokenizer.begin_ids, *self.tokenizer.encode(text))


def shown(config: ColdStart) -> dict[str, Template]:
    """The templates with worked examples, by the option that names them; none without them."""
    if config.many is None:
        return {}
    return {"many": Template.load(config.many), "single": Template.load(config.single)}


def opening(template: Template) -> str:
    """The last line of a template, with which the critique begins, such as "Criteria:".

    Raises TemplateError where that line is not plain text.
    """
    line = template.source.rstrip().rpartition("\n")[2]
    if "{%" in line or "{{" in line:
        raise TemplateError(
            f"{template.origin}: its last line is {line!r:.60}; for the cold start "
            "(--sft.cold-start) a template ends with plain text that begins the critique, such as "
            "'Criteria:'"
        )
    return line


def _prompts(run: Run, config: ColdStart) -> Texts:
    assert config.many is not None
    templates = TemplateConfig(config.many, config.single, run.setup.templates.meta)
    return Texts(run.tokenizer, templates, order="balanced", seed=run.setup.seed)


def _sample(stage: Stage, config: ColdStart, records: Sequence[Preference], file: Path) -> None:
    run = stage.run
    params = run.sampler.take(run.params("base", dtype=run.model.compute_dtype))
    run.sampler.budget.forget()
    critic, key = Critic(run.sampler, _prompts(run, config)), run.stage_key("sft")

    def draw(part: Sequence[Preference], progress: Callable[[int], None]) -> Iterator[Trajectory]:
        drawn = critic.critiques(
            params, part, range(config.samples), config.sampling, key, hinted=True, salt="sft",
            progress=progress,
        )  # fmt: skip
        for record in part:
            template = critic.prompts.template(record)
            for rollout in drawn[record.id]:
                critique = until_verdict(rollout, template)
                correct = is_correct(critique.scores, record.labels, threshold=template.threshold)
                hint = critic.prompts.hint(record, critique.order)
                kept = keep_hinted(correct) and not copies(critique.text, hint, template)
                yield to_trajectory(record, critique, correct, kept=kept, hinted=True)

    sample_in_chunks(
        file, records, draw, chunk=config.chunk, rows_each=config.samples, what="sft cold start"
    )


def copies(text: str, hint: str, template: Template) -> bool:
    """Whether a critique repeats the hint, a marker of the prompt's sections, or a line of the
    template's worked examples, scores apart: SFT would learn to name the best response before it
    has judged, to write prompts, or to say of every response what was said of an example's."""
    if hint in text or "####" in text or "[The " in text:
        return True
    shown = {line.strip() for line in template.source.splitlines() if line.strip()}
    return any(line.strip() in shown for line in text.splitlines() if not boxes.find(line)[0])


def until_verdict(rollout: Rollout, template: Template) -> Critique:
    """The critique from the template's last line to its first box: a base model goes on with
    another example."""
    critique = rollout.plain(rollout.sample)
    text = f"{opening(template)} {critique.text.strip()}"
    found, _ = boxes.find(text)
    if not found:
        return dataclasses.replace(critique, text=text)
    text = text[: found[0].end]
    parsed = read(template, text, len(critique.order))
    return dataclasses.replace(
        critique,
        text=text,
        scores=unshuffle(parsed.scores, critique.order),
        failure=parsed.failure,
        finish_reason="stop",
    )
