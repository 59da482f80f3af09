"""What the tie rule of the RL reward does: `python experiments/spct/tie_rule.py`.

Trains RL from a finished road's RFT model with `--rl.tie paper` (a tie is wrong), takes the road's
own RL with `--rl.tie expected` (a tie counts at its expectation under the shuffle), and compares
accuracy with the share of false alarms: checks of criteria that a response meets, judged violated.
Writes tie_rule.json and tie_rule.md.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro

from grm_jax.benchmarks import synthetic
from grm_jax.judge.request import JudgeOptions
from grm_jax.metrics import setup_logging
from grm_jax.recipes import RLRecipe, load
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import mean_interval
from grm_jax.train import setup_devices
from grm_jax.training.final_evaluation import audit_rows, make_judge
from grm_jax.training.run import Run

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path = Path("runs/seeds/0")
    """A finished road on the embedded world; its RL stage has the `expected` rule."""
    paper: Path = Path("runs/tie_paper")
    """Where the run with the `paper` rule goes."""
    k: int = 16


def main(args: Arguments) -> None:
    command = [sys.executable, "-m", "grm_jax.train", "--config", "rl.py", "--rl.tie", "paper"]
    command += ["--init", str(args.run / "rft" / "model"), "--run-dir", str(args.paper)]
    subprocess.run(command, check=True)
    recipe = load("rl.py")
    assert isinstance(recipe, RLRecipe)
    setup_devices(recipe.setup.mesh.cpu_devices)
    setup_logging()
    records = [r for r in synthetic.BENCHMARK.load(args.run) if r.domain == synthetic.FRESH]
    found = {}
    for rule, folder in (("expected", args.run), ("paper", args.paper)):
        setup = dataclasses.replace(recipe.setup, run_dir=str(folder))
        judge = make_judge(Run(setup), "rl", guided=False)
        rows = judge.sample(records, JudgeOptions(k=args.k))
        checked = audit_rows(records, rows)
        methods = aggregate(records, rows).methods
        strict = {m.name: m.credits(records, Rules(ties="wrong")) for m in methods}
        soft = {m.name: m.credits(records) for m in methods}
        found[rule] = {
            "false_alarm_rate": checked.false_alarm_rate,
            "recall": checked.recall,
            "strict sample@1": vars(mean_interval(list(strict["sample@1"].values()))),
            **{
                name: vars(mean_interval(list(soft[name].values())))
                for name in ("sample@1", "vote@8", f"vote@{args.k}")
            },
        }
    (HERE / "tie_rule.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    names = list(found["paper"])
    lines = [f"| tie rule | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for rule, values in found.items():
        cells = [v if isinstance(v, float) else v["value"] for v in values.values()]
        lines.append(f"| `{rule}` | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |")
    table = "\n".join(lines) + "\n"
    (HERE / "tie_rule.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
