"""What each stage of a run on real text is worth, on held-out records.

    python experiments/real_text/report.py --run runs/smollm2_135m --base models/smollm2 \
        --heldout runs/real_text/data/heldout.jsonl --output experiments/real_text/smollm2_135m

    for each model that the run has (base, sft, rft, rl; with the meta and the scalar RM, if any)
        python -m grm_jax.evaluate --bench preferences -> samples, resumable; RUN/report/STAGE has
        its figures, the bias table and the HTML report
    -> accuracy of one sample, of votes, guided votes, votes plus scalar head, against chance
    -> what each stage's gradient steps cost
    -> results.json, table.md, critiques.md

The base model judges with worked examples, as text that it continues; the others with the template
that they were trained on. A tie earns one over the number of tied responses, an unparsable critique
or a verdict without any readable one is wrong. Chance is a guess among the responses; `p` is the
two-sided p-value of accuracy minus chance, by a bootstrap over records.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "claims"))
import flops

from grm_jax.critique import best_label, credit, is_correct, vote
from grm_jax.data.critiques import Critique, read_critiques
from grm_jax.data.preferences import Preference, read_preferences, write_preferences
from grm_jax.errors import UserError
from grm_jax.model.storage import is_model_dir
from grm_jax.scoring import scalar_scores
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.results import versions
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.scalar_scores import read_scalar_scores
from grm_jax.scoring.statistics import paired_difference

STAGES = ("sft", "rft", "rl")
RMS = ("meta_rm", "scalar_rm")


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path
    """The run directory."""
    heldout: Path
    """Records that no stage has learnt from."""
    output: Path
    """Where the tables go; samples are kept in the run directory."""
    base: Path | None = None
    """The base model, to judge with worked examples."""
    k: int = 8
    """Critiques of each record."""
    limit: int | None = None
    """Judge only this many records, from the first one on."""
    base_records: int = 200
    """How many of them the base model judges."""
    max_characters: int = 4096
    """Records whose conversation and responses are longer are left out, and counted."""


def main(args: Arguments) -> None:
    records = list(read_preferences(args.heldout))[: args.limit]
    folder = args.run / "report"
    kept, rows = short(records, args.max_characters, folder)
    methods: dict[str, np.ndarray] = {}
    failures: dict[str, float] = {}
    shown: list[Critique] = []
    if args.base is not None:
        few = kept[: args.base_records]
        methods["base, worked examples"], failures["base, worked examples"] = base(args, few)
    for stage in trained(args.run, STAGES):
        judged = evaluate(args, stage, rows, folder) / "preferences"
        shown = read_critiques(judged / "samples.jsonl")
        found, failures[stage] = credits(kept, shown, judged / scalar_scores.FILE)
        scalar = found.pop("scalar", None)
        methods |= {f"{stage}, {name}": values for name, values in found.items()}
        if scalar is not None:
            methods["scalar RM"] = scalar
    write(args, kept, len(records), methods, failures, shown)


def short(records: Sequence[Preference], most: int, folder: Path) -> tuple[list[Preference], Path]:
    """Leave out records of more than `most` characters, conversation and responses together.

    Returns the others, and the file in `folder` to which they were written.
    """

    kept = shorter(records, most)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"heldout-{len(kept)}.jsonl"
    write_preferences(rows, kept)
    return kept, rows


def shorter(records: Iterable[Preference], most: int) -> list[Preference]:
    """The records with at most so many characters in conversation and responses."""

    def characters(record: Preference) -> int:
        said = [turn["content"] for turn in record.turns]
        return sum(map(len, (*said, *record.responses)))

    return [record for record in records if characters(record) <= most]


def evaluate(args: Arguments, stage: str, rows: Path, folder: Path) -> Path:
    """The results of a stage's model; what was sampled before is not sampled again."""
    output = folder / stage
    command = [
        sys.executable, "-m", "grm_jax.evaluate", "--bench", "preferences", "--data", str(rows),
        "--model", str(args.run / stage / "model"), "-k", str(args.k), "--output", str(output),
        "--cache", str(folder / "cache"), "--long-prompts", "truncate-middle",
    ]  # fmt: skip
    subprocess.run([*command, *rm_options(args.run)], check=True)
    return output


def trained(run: Path, stages: Sequence[str]) -> list[str]:
    """The stages of which the run has a model. Raises UserError where it has none."""
    found = [stage for stage in stages if is_model_dir(run / stage / "model")]
    if not found:
        raise UserError(f"{run} has no model of {', '.join(stages)}; train one first")
    return found


def rm_options(run: Path) -> list[str]:
    """The options of `grm_jax.evaluate` for the reward models that the run has."""
    found = []
    for option, name in (("--meta", "meta_rm"), ("--scalar", "scalar_rm")):
        if is_model_dir(run / name / "model"):
            found += [option, str(run / name)]
    return found


def base(args: Arguments, records: Sequence[Preference]) -> tuple[np.ndarray, float]:
    """(credits of one critique each of the base model with worked examples, share unparsable)."""
    from grm_jax import recipes
    from grm_jax.judge.critiques import Critic
    from grm_jax.training.cold_start import Texts, until_verdict
    from grm_jax.training.run import Run

    config = json.loads((args.run / "sft" / "config.json").read_text())
    start, size = config["stage"]["cold_start"], config["setup"]["size"]
    recipe = recipes.load(f"sft.py:{size}")
    run = Run(dataclasses.replace(recipe.setup, base=str(args.base), run_dir=str(args.run)))
    templates = recipes.TemplateConfig(start["many"], start["single"], run.setup.templates.meta)
    critic = Critic(run.sampler, Texts(run.tokenizer, templates, order="one"))
    params = run.sampler.take(run.params("base", dtype=run.model.compute_dtype))
    sampling = recipes.SamplingConfig(**start["sampling"])
    drawn = critic.critiques(params, records, [0], sampling, jax.random.key(0), salt="report")
    read = [until_verdict(drawn[r.id][0], critic.prompts.template(r)) for r in records]
    values = [credit(vote([c.scores]), r.labels) for r, c in zip(records, read, strict=True)]
    return np.asarray(values), float(np.mean([c.failure is not None for c in read]))


def credits(
    records: Sequence[Preference], rows: Sequence[Critique], scalar: Path
) -> tuple[dict[str, np.ndarray], float]:
    """(credits of each method by record, the share of unparsable samples).

    Args:
      scalar: the file of the scalar RM's scores, if there is one.
    """
    known = read_scalar_scores(scalar).options() if scalar.exists() else {}
    found = aggregate(records, rows, **known)
    rules = Rules(ties="shared", unparsed="wrong")
    values = {
        method.name: np.asarray(list(method.credits(records, rules).values()))
        for method in found.methods
    }
    return values, found.rates["sampled"].failed


def write(
    args: Arguments,
    records: Sequence[Preference],
    read: int,
    methods: dict[str, np.ndarray],
    failures: dict[str, float],
    shown: Sequence[Critique],
) -> None:
    chance = np.asarray([1 / len(record.responses) for record in records])
    rows, figures = [], {}
    for name, values in methods.items():
        over = paired_difference(values, chance[: len(values)])
        guess = float(np.mean(chance[: len(values)]))
        figures[name] = {
            "records": len(values), "accuracy": float(values.mean()), "chance": guess,
            "over_chance": dataclasses.asdict(over),
        }  # fmt: skip
        cell, p = f"{100 * values.mean():.1f}", "-"
        if over.low is not None and over.high is not None:  # one record has no interval
            cell += f" [{100 * (guess + over.low):.1f}, {100 * (guess + over.high):.1f}]"
            p = f"{over.p_value:.3f}"
        rows.append(f"| {name} | {len(values)} | {cell} | {100 * guess:.1f} | {p} |")
    costs = {
        stage: (flops.updates(args.run / stage), flops.training(args.run / stage))
        for stage in (*STAGES, *RMS)
        if is_model_dir(args.run / stage / "model")
    }
    unread = ", ".join(f"{name} {100 * share:.1f}%" for name, share in failures.items())
    table = [
        "| method | records | accuracy in percent, 95% interval | chance | p |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        f"{len(records)} of {read} held-out records; the others are longer than "
        f"{args.max_characters:,} characters. Unparsable critiques: {unread}.",
        "",
        "Gradient steps, with what they waited for; the sampling of RFT and of the meta RM before "
        "them is not in these figures, RL's rollouts are in its hours:",
        "",
        "| stage | steps | tokens of a step | 10^12 FLOPs | hours |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {stage} | {of.steps} | {of.tokens:,.0f} | {total / 1e12:,.0f} | "
            f"{of.steps * of.seconds / 3600:.1f} |"
            for stage, (of, total) in costs.items()
        ),
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    results = {
        "command": " ".join(["python", "experiments/real_text/report.py", *sys.argv[1:]]),
        "versions": versions(), "unparsable": failures, "figures": figures,
        "training": {
            stage: {**dataclasses.asdict(of), "flops": total}
            for stage, (of, total) in costs.items()
        },
    }  # fmt: skip
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "critiques.md").write_text(critiques(records, shown), encoding="utf-8")
    print("\n".join(table))


def critiques(records: Sequence[Preference], rows: Sequence[Critique]) -> str:
    """Five critiques that are right and five that are not: each record's first sample."""
    by_id = {record.id: record for record in records}
    first = [row for row in rows if row.sample == 0 and row.scores is not None]
    parts = ["# Critiques of held-out records\n"]
    for right in (True, False):
        parts.append(f"## {'Right' if right else 'Wrong'}\n")
        chosen = [r for r in first if is_correct(r.scores, by_id[r.example_id].labels) == right]
        for row in chosen[:5]:
            order = ", ".join(str(place + 1) for place in row.order)
            best = best_label(by_id[row.example_id].labels) + 1
            parts.append(
                f"`{row.example_id}`, shown in the order {order}; the best is {best}\n\n"
                + "\n".join(f"> {line}" for line in row.text.splitlines())
                + "\n"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
