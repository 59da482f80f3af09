"""The paper's claims on the embedded world: `python experiments/claims/run.py --all`.

    --all          every claim, five seeds
    --quick        the main claims, one seed: no intervals
    --only NAME    one claim; may be given more than once
    --dry          print the commands that are missing
    --plan SLICE   ask whether the training commands fit a slice of accelerators

Each claim is a module: the runs that it needs (`roads.py`: commands that a user types, resumable),
and what it reads from them (`evidence.py`, `paired.py`). Writes NAME.json, NAME.md and NAME.png
beside this file, or, with --quick, another --config, or --heldout, to RUNS/results.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import ablations
import adaptive_k
import baselines
import ceiling
import compute
import direct
import earlier_rl
import expected
import generalisation
import guidance
import headline
import hybrid
import matplotlib
import policy
import responses
import sizes
import temperature
import tyro
import unseen
import voting
from claim import Claim, write
from roads import Road, Settings

from grm_jax.errors import UserError
from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        headline.CLAIM,
        voting.CLAIM,
        temperature.CLAIM,
        baselines.CLAIM,
        hybrid.CLAIM,
        compute.CLAIM,
        guidance.CLAIM,
        expected.CLAIM,
        direct.CLAIM,
        adaptive_k.CLAIM,
        ablations.CLAIM,
        generalisation.CLAIM,
        unseen.CLAIM,
        responses.CLAIM,
        ceiling.CLAIM,
        earlier_rl.CLAIM,
        sizes.CLAIM,
        policy.CLAIM,
    )
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()
    all: bool = False
    """Every claim."""
    quick: bool = False
    """The main claims with the first seed."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """These claims."""


def main(args: Arguments) -> None:
    names = [n for n, claim in CLAIMS.items() if args.all or (args.quick and claim.quick)]
    names += [name for name in args.only if name not in names]
    if not names or (unknown := set(names) - set(CLAIMS)):
        asked = f"{', '.join(sorted(unknown))}: no such claim; " if names else ""
        raise UserError(f"{asked}give --all, --quick, or --only with one of {', '.join(CLAIMS)}")
    settings = args.settings
    if args.quick:
        settings = dataclasses.replace(settings, seeds=settings.seeds[:1])
    roads = [Road(settings, seed) for seed in settings.seeds]
    matplotlib.use("Agg")
    for claim in (CLAIMS[name] for name in names):
        for road in roads:
            claim.runs(road)
        if settings.dry or settings.plan:
            continue
        found = claim.read(roads)
        about = {
            "command": " ".join(["python", "experiments/claims/run.py", *sys.argv[1:]]),
            "commit": commit(),
            "versions": versions(),
            "settings": {"seeds": settings.seeds, "k": settings.k, "options": settings.options},
        }
        write(claim, found, about, output(args))
        print(f"\n# {claim.name}\n\n{found.text}", flush=True)


def output(args: Arguments) -> Path:
    """Where results go: those that the repository holds are of all seeds on the embedded world."""
    settings, usual = args.settings, Settings()
    same = (settings.config, settings.heldout) == (usual.config, usual.heldout)
    return HERE if same and not args.quick else settings.runs / "results"


def commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=HERE).stdout.strip()


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
