"""Whether RL of an earlier commit left more to votes than RL of today, from one RFT model.

Earlier runs of the whole pipeline had more at 32 votes (`experiments/spct/earlier_runs.md`), but
every stage of theirs was another. Here RL alone differs: the earlier commit's code, in a worktree
of it, and this code train from the same RFT model of each seed, with the same recipe, in float32,
which is all that the earlier code computes in.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import evidence
import paired
import voting
from claim import Claim, Found
from roads import Road

from grm_jax.errors import UserError
from grm_jax.model.storage import is_model_dir

EARLIER = "af59121"
ROOT = Path(__file__).resolve().parents[2]


def runs(road: Road) -> None:
    road.pipeline()
    road.judged(_today(road))
    road.judged(_earlier(road))


def _today(road: Road) -> Path:
    """The directory of the rl stage by this code."""
    return road.branch("rl-float32", "rl", "--compute-dtype", "float32") / "rl"


def _earlier(road: Road) -> Path:
    """The directory of the rl stage by the earlier commit's code."""
    settings, seed = road.settings, str(road.seed)
    directory = settings.runs.absolute() / f"{seed}-rl-of-{EARLIER}"
    stage, start = directory / "rl", directory / "rft-exported"
    if is_model_dir(stage / "model"):
        return stage
    code = settings.runs.absolute() / f"code-{EARLIER}"
    if road.runs_commands:
        _checkout(code)
    if not start.exists():  # the earlier code does not know today's model directories
        given, made = road.directory / "rft" / "model", str(start)
        road.run(["-m", "grm_jax.convert", "export", "--input", str(given), "--output", made])
    road.run(
        [
            "-m", "grm_jax.train", "--config", "rl.py", "--run-dir", str(directory),
            "--init", str(start), "--tokenizer", str(start),
            "--preferences", str((road.directory / "world" / "train.jsonl").absolute()),
            "--mesh.cpu-devices", "1", "--seed", seed,
        ],
        code=code,
    )  # fmt: skip
    if road.runs_commands:
        _take_engine(stage / "model", road.directory / "rft" / "model")
    return stage


def _take_engine(model: Path, source: Path) -> None:
    """Gives a model the sampler's options of another one: today's code does not know all of the
    earlier code's. What a model writes does not depend on them."""
    file, other = model / "grm.json", source / "grm.json"
    about, known = (json.loads(f.read_text(encoding="utf-8")) for f in (file, other))
    about["engine"] = known["engine"]
    file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _checkout(folder: Path) -> None:
    """A worktree of the earlier commit."""
    if (folder / "grm_jax").exists():
        return
    command = ["git", "worktree", "add", "--force", "--detach", str(folder), EARLIER]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        raise UserError(
            f"no worktree of commit {EARLIER}: {found.stderr.strip()}; in a shallow clone: "
            "git fetch --unshallow"
        )


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = tuple(dict.fromkeys((1, min(8, most), most)))
    earlier, today = f"RL by {EARLIER}", "RL by this code"
    found = {"RFT, before RL": [voting.read_stage(road, "rft") for road in roads]}
    for name, stage in ((today, _today), (earlier, _earlier)):
        found[name] = [
            evidence.read_samples(road.records(), road.judged(stage(road)), None, most)
            for road in roads
        ]
    credits = {name: evidence.credits(seeds, ks) for name, seeds in found.items()}
    tests = {
        f"{earlier} against {today}, votes of {k}": paired.difference(
            credits[earlier][k], credits[today][k]
        )
        for k in ks
    }
    rows = [
        [
            name,
            *(paired.over_seeds(credits[name][k]).cell() for k in ks),
            f"{sum(map(voting.effective, seeds)) / len(seeds):.1f}",
        ]
        for name, seeds in found.items()
    ]
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval.\n",
            paired.table(["judge", *(f"k = {k}" for k in ks), f"{most} critiques amount to"], rows),
            paired.tests_table(tests),
        ]
    )
    accuracy = paired.as_json(paired.estimates(credits))
    return Found(text, {"accuracy": accuracy, "differences": paired.as_json(tests)})


CLAIM = Claim(
    "earlier_rl",
    "Does RL of an earlier commit leave more to votes than RL of today, from one RFT model?",
    runs,
    read,
)
