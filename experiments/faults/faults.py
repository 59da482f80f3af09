"""What breaks a run, and what became of it: the fault table.

    python experiments/faults/faults.py --runs runs/faults [--only signals room_goes ...]

A small road is run undisturbed. Then it is disturbed, again and again, resumed with the same
command, and its models compared with the undisturbed ones, bit by bit:

- each stage by itself (stages.py): SIGKILL at random moments, starting up, between and during steps
  and saves; SIGTERM; a second signal right after the first; damaged checkpoints; mistakes;
- the disk (disk.py): no room, `ulimit -f`, a quota, read-only, checkpoints that can not be deleted;
- the whole road in one command (road.py): signals at random moments of each phase, sampling and
  evaluation too; room that vanishes and a quota that is reached; two commands on one directory.

Writes faults.json and faults.md beside this file; what is not tried again stays. Mounts need root.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import disk
import road
import stages
import tyro
from harness import Faults

PARTS: dict[str, Callable[[Faults], None]] = {
    "mistakes": stages.mistakes,
    "diverge": stages.diverge,
    "damaged": stages.damaged,
    "no_room": disk.no_room,
    "limit": disk.limit,
    "quota": disk.quota,
    "readonly": disk.readonly,
    "undeletable": disk.undeletable,
    "signals": road.signals,
    "room_goes": road.room_goes,
    "quota_falls": road.quota_falls,
    "two": road.two,
    "stop": stages.stop,
    "twice": stages.twice,
    "kill": stages.kill,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: Path = Path("runs/faults")
    """Where runs go. An undisturbed road of this commit that is there is used again."""
    kills: int = 20
    """SIGKILLs, and pairs of signals, of each stage."""
    only: tuple[str, ...] = tuple(PARTS)
    """Parts to try."""
    seed: int = 0


def main(args: Arguments) -> None:
    if unknown := set(args.only) - set(PARTS):
        raise SystemExit(f"--only {' '.join(unknown)}: parts are {', '.join(PARTS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    args.runs.mkdir(parents=True, exist_ok=True)
    # Of its own, since processes are killed while they write to it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(args.runs.absolute() / "programs")
    faults = Faults(args.runs, args.kills, args.seed)
    for name in args.only:
        PARTS[name](faults)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
