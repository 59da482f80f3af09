"""Accuracy on held-out records while a stage trains: `--heldout.every`.

    held-out records -> one critique each by the present weights -> correct? (Eq. 10)
                     -> heldout/accuracy, heldout/unparsable in metrics.jsonl and TensorBoard

The critiques come from the judge's prompts and the sampler, as anywhere else. Training does not
notice: the order of its data, its random keys and its state are as they would be without.

The reward heads write no critiques: meta_rm.py and scalar_rm.py have measures of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from grm_jax import files
from grm_jax.critique import is_correct
from grm_jax.data.holdout import overlap
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory
from grm_jax.judge.critiques import Critic
from grm_jax.model.params import Params
from grm_jax.sampler.options import SamplingConfig
from grm_jax.training.inputs import readable
from grm_jax.training.lengths import Reading
from grm_jax.training.run import STAGES, Run
from grm_jax.training.setup import ConfigError

# The parameters of a forward pass -> metrics by name.
Measure = Callable[[Params], Mapping[str, float]]


def heldout_records(
    run: Run, stage: str, readings: Sequence[Reading], learned: Iterable[Preference | Trajectory]
) -> list[Preference]:
    """The records on which a stage is measured while it trains; none without `--heldout.every`.

    Args:
      stage: the name of the stage.
      readings: the prompts that are made of each record; `--long-prompts` applies to them.
      learned: what the stage learns from.

    Raises ConfigError where there are no held-out records, where one of them is learnt from, and
    where another stage of the run was trained with another share held out.
    """
    options = run.setup.heldout
    if not options.every:
        return []
    if shared := overlap(run.heldout, learned):
        record, reason = shared[0]
        raise ConfigError(
            f"{stage}: {len(shared)} of {len(run.heldout)} held-out records are learnt from, too; "
            f"the first, {record.source or record.id}, shares {reason} with a training record. "
            "Give other --heldout.records, or take these rows out of the training data"
        )
    _check_other_stages(run)
    return readable(run, stage, readings, run.heldout, options.limit)


def _check_other_stages(run: Run) -> None:
    """Raise ConfigError for a stage of the run that has learnt from what is held out now."""
    share = run.setup.heldout.share
    for stage in STAGES:
        file = run.directory / stage / "config.json"
        if not share or not file.exists():
            continue
        before = files.read_json(file, ConfigError)["setup"].get("heldout", {}).get("share", 0.0)
        if before != share:
            raise ConfigError(
                f"--heldout.share {share:g}, but the {stage} stage of {run.directory} was trained "
                f"with {before:g}, and may have learnt from what is held out now; give all stages "
                "of a run the same share, or use --heldout.records"
            )


def critique_records(
    run: Run, stage: str, learned: Iterable[Preference | Trajectory]
) -> list[Preference]:
    """`heldout_records` of a stage that trains a model which writes critiques."""
    new = run.setup.judge.max_new_tokens
    reading = Reading(
        "prompt", run.lengths.judge, run.model.max_position - new,
        f"give a smaller --judge.max-new-tokens (the model has {run.model.max_position:,} "
        "positions)",
    )  # fmt: skip
    return heldout_records(run, stage, [reading], learned)


def critique_accuracy(
    run: Run, records: Sequence[Preference], critic: Critic | None = None
) -> Measure | None:
    """Measures one critique of each record; None without records.

    Args:
      critic: the one that draws the stage's rollouts, whose compiled programs are used again; None
        for a stage that has none.

    Returns a function of the parameters; its metrics are `accuracy`, the share of records whose
    critique is correct by Eq. (10), as RL's `correct`: a tie for the best response is wrong;
    `unparsable`, the share of critiques without readable scores, which are wrong, too; and `n`,
    the number of records.
    """
    if not records:
        return None
    critic = critic or run.new_critic("one")
    setup, threshold = run.setup, critic.prompts.single.threshold
    sampling = SamplingConfig(
        temperature=setup.judge.temperature if setup.heldout.sampled else 0.0,
        max_new_tokens=setup.judge.max_new_tokens,
    )
    # The same key and order of responses at every step: metrics differ by the weights alone.
    key = run.stage_key("heldout")

    def measure(params: Params) -> dict[str, float]:
        by_id = critic.critiques(params, records, [0], sampling, key, salt="heldout")
        critiques = [by_id[record.id][0] for record in records]
        correct = [
            is_correct(critique.scores, record.labels, threshold=threshold)
            for critique, record in zip(critiques, records, strict=True)
        ]
        return {
            "accuracy": float(np.mean(correct)),
            "unparsable": float(np.mean([critique.failure is not None for critique in critiques])),
            "n": float(len(records)),
        }

    return measure
