"""The whole road in one command, disturbed at random moments of each of its phases."""

from __future__ import annotations

import collections
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from disk import Quota, tmpfs
from harness import (
    PHASES,
    Faults,
    complaint,
    finish,
    handles_signals,
    kept,
    lost,
    phase,
    run,
    start,
    until,
)

HITS = 2  # of each phase, at least


class Chain:
    """A road that is disturbed and resumed again and again, to its end.

    Args:
      disturb: does it; returns how to undo it.
      expect: what is wrong with how the command ended; empty if nothing.

    Attributes:
      hits: how often each phase was disturbed.
      wrong: everything that was not as it should be.
      said: the last line of each disturbed command, by phase.
    """

    def __init__(
        self,
        faults: Faults,
        disturb: Callable[[subprocess.Popen[str]], Callable[[], None]],
        expect: Callable[[subprocess.CompletedProcess[str]], str],
    ):
        self._faults, self._disturb, self._expect = faults, disturb, expect
        self.hits: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.said: dict[str, str] = {}

    def go(self, run_dir: Path, phases: list[str]) -> None:
        """Disturb each of these phases once, in their order, then let the road end."""
        held = []
        for wanted in phases:
            since = time.time()
            process = start("spct", run_dir)
            self._wait(process, run_dir, wanted, since)
            now = phase(run_dir, since)
            if process.poll() is not None or now == "done":
                self._check_undisturbed(finish(process))
                continue
            undo = self._disturb(process)
            done = finish(process)
            undo()
            if phase(run_dir, since) == "done" and done.returncode == 0:
                continue  # it came too late
            self.hits[now] += 1
            if wrong := self._expect(done):
                self.wrong.append(f"{now}: {wrong}")
            lines = (done.stderr or done.stdout).strip().splitlines() or [""]
            self.said[now] = (lines if done.stderr else lines[-2:])[0]
            print(
                f"  {now} (wanted {wanted}): exit {done.returncode}, {self.said[now]}", flush=True
            )
            held.append(kept(run_dir))
        self._check_undisturbed(run("spct", run_dir))
        self.wrong += [f"other than undisturbed: {name}" for name in self._faults.differs(run_dir)]
        self.wrong += lost(run_dir, held)

    def _wait(
        self, process: subprocess.Popen[str], run_dir: Path, wanted: str, since: float
    ) -> None:
        seconds, random = self._faults.seconds, self._faults.random
        if wanted == "starting":
            until(process, lambda: handles_signals(process))
        else:
            last = PHASES.index(wanted)
            # Or a later one, where that one was done already.
            until(process, lambda: phase(run_dir, since) in (*PHASES[last:], "done"))
        time.sleep(random.uniform(0.02, 1.0) * seconds[wanted])

    def _check_undisturbed(self, done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode:
            self.wrong.append(f"resumed: exit {done.returncode}: {complaint(done)}")

    def outcome(self, claim: str) -> str:
        """Phases with their hits; then what was wrong, or what was right."""
        told = ", ".join(f"{name} {count}" for name, count in self.hits.items())
        found = f"WRONG: {'; '.join(self.wrong)[:1500]}" if self.wrong else claim
        return f"{self.hits.total()} by phase ({told}). {found}"


def signals(faults: Faults) -> None:
    """SIGTERM, some SIGINT, at 20 random moments or more."""
    sent: collections.Counter[str] = collections.Counter()
    last = signal.SIGTERM

    def disturb(process: subprocess.Popen[str]) -> Callable[[], None]:
        nonlocal last
        last = faults.random.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
        sent[last.name] += 1
        process.send_signal(last)
        return lambda: None

    def expect(done: subprocess.CompletedProcess[str]) -> str:
        if done.returncode != (0 if last == signal.SIGTERM else 130):
            return f"exit {done.returncode} after {last.name}: {done.stderr[-300:]}"
        if "Go on with the same command:" not in done.stdout:
            return f"nothing said: {done.stdout[-200:]}"
        return f"also said {done.stderr[-300:]}" if done.stderr.strip() else ""

    chain = Chain(faults, disturb, expect)
    for number in range(4):
        short = [name for name in ("starting", *PHASES) if chain.hits[name] < HITS]
        if not short:
            break
        if chain.hits.total() < 20:
            short = ["starting", *PHASES]
        run_dir = faults.runs / f"signals-{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        chain.go(run_dir, short)
    how = ", ".join(f"{count} {name}" for name, count in sorted(sent.items()))
    claim = (
        "Each: exit 0 or 130 with the command to go on. Every road ended with the undisturbed "
        "one's bits in all models, its evaluation samples and figures; whole chunks and samples on "
        "disk were not sampled again"
    )
    outcome = f"{how}; {chain.outcome(claim)}"
    good = not chain.wrong and chain.hits.total() >= 20
    faults.add("signals at random moments", "spct", outcome, good)


def room_goes(faults: Faults) -> None:
    """The disk is filled by others while the road goes on, once in each phase."""
    run_dir = faults.runs / "full"
    with tmpfs(run_dir, "400m"):
        filler = run_dir / "filler"

        def disturb(process: subprocess.Popen[str]) -> Callable[[], None]:
            with filler.open("wb") as file:
                while free := shutil.disk_usage(run_dir).free:
                    try:
                        os.posix_fallocate(file.fileno(), file.seek(0, 2), free)
                    except OSError:  # taken in the meantime
                        continue
            return filler.unlink

        _room(faults, "room that vanishes", disturb, run_dir, list(PHASES))


def quota_falls(faults: Faults) -> None:
    """A quota is reached while the road goes on."""
    if shutil.which("mkfs.btrfs") is None:
        print("no mkfs.btrfs: a quota was not tried")
        return
    with Quota(faults.runs / "quota", faults.runs / "quota.img") as disk:

        def disturb(process: subprocess.Popen[str]) -> Callable[[], None]:
            disk.limit(0)
            return lambda: disk.limit(None)

        _room(
            faults, "a quota that is reached (Btrfs)", disturb, disk.folder,
            ["rft sampling", "rl", "evaluation"],
        )  # fmt: skip


def _room(
    faults: Faults,
    fault: str,
    disturb: Callable[[subprocess.Popen[str]], Callable[[], None]],
    run_dir: Path,
    phases: list[str],
) -> None:
    def expect(done: subprocess.CompletedProcess[str]) -> str:
        said = complaint(done)
        good = done.returncode == 1 and not said.startswith("!!")
        return "" if good else f"exit {done.returncode}: {said}"

    chain = Chain(faults, disturb, expect)
    chain.go(run_dir, phases)
    told = "; ".join(f"{name}: {line[:200]}" for name, line in chain.said.items())
    claim = (
        "Each: exit 1, one sentence; with room the road ended with the undisturbed one's bits, "
        "nothing sampled again"
    )
    outcome = f"{chain.outcome(claim)}. Said: {told}"
    faults.add(fault, "spct", outcome, not chain.wrong and len(chain.hits) > len(phases) // 2)


def two(faults: Faults) -> None:
    """A second command on the run directory of a first, at once and later."""
    for what, ready in (("at once", "starting"), ("later", "rft sampling")):
        run_dir = faults.runs / "two"
        shutil.rmtree(run_dir, ignore_errors=True)
        since = time.time()
        first = start("spct", run_dir)
        if ready != "starting":
            until(first, lambda ready=ready, since=since, run_dir=run_dir:
                  phase(run_dir, since) == ready)  # fmt: skip
        second = run("spct", run_dir)
        ended = finish(first)
        # Either may be the one that has the directory, when they start at once.
        done, refused = (ended, second) if ended.returncode == 0 else (second, ended)
        said = complaint(refused)
        differs = faults.differs(run_dir) if done.returncode == 0 else ["everything"]
        good = refused.returncode == 1 and not said.startswith("!!") and not differs
        outcome = (
            f"exit {refused.returncode}: {said[:300]}; the other ended with exit "
            f"{done.returncode}, other than undisturbed: {', '.join(differs) or 'nothing'}"
        )
        faults.add(f"two commands on one run directory, the second {what}", "spct", outcome, good)
