"""Each stage by itself: killed, stopped, stopped twice, damaged, started wrongly."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from harness import (
    STAGES,
    Faults,
    complaint,
    finish,
    run,
    start,
    until,
    whole_checkpoints,
)


def kill(faults: Faults) -> None:
    """SIGKILL at random moments of the time that each stage takes."""
    for stage in STAGES:
        same = tried = saving = 0
        while tried < faults.kills:
            run_dir = faults.fresh(stage)
            process = start(stage, run_dir)
            try:
                process.communicate(
                    timeout=faults.random.uniform(0.1, 1.0) * faults.of_stage(stage)
                )
                continue  # it was done before
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            tried += 1
            folder = run_dir / stage / "checkpoints"
            saving += folder.exists() and any("tmp" in path.name for path in folder.iterdir())
            done = run(stage, run_dir)
            same += done.returncode == 0 and faults.same(stage, run_dir)
        outcome = f"{same} of {tried} ended with the undisturbed run's bits ({saving} died saving)"
        faults.add("SIGKILL", stage, outcome, same == tried)


def stop(faults: Faults) -> None:
    """SIGTERM as soon as steps are logged."""
    for stage in STAGES:
        run_dir = faults.fresh(stage)
        process = start(stage, run_dir)
        log = run_dir / stage / "metrics.jsonl"
        until(process, lambda log=log: log.exists() and log.stat().st_size > 0)
        process.send_signal(signal.SIGTERM)
        first = finish(process)
        lines = first.stdout.splitlines()
        said = next((line for line in lines if "saved at step" in line), "nothing")
        done = run(stage, run_dir)
        good = first.returncode == 0 and done.returncode == 0 and faults.same(stage, run_dir)
        outcome = f'exit {first.returncode}, "{said}"; resumed: same bits {good}'
        faults.add("SIGTERM", stage, outcome, good)


def twice(faults: Faults) -> None:
    """A second signal at once after the first."""
    for stage in STAGES:
        same = immediate = 0
        slowest = 0.0
        for _ in range(faults.kills):
            run_dir = faults.fresh(stage)
            process = start(stage, run_dir)
            log = run_dir / stage / "metrics.jsonl"
            until(process, lambda log=log: log.exists() and log.stat().st_size > 0)
            time.sleep(faults.random.uniform(0, 0.5))
            process.send_signal(signal.SIGINT)
            time.sleep(faults.random.uniform(0, 0.02))
            sent = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            first = finish(process)
            # Where the step ended between the two signals, the first one alone was needed.
            immediate += first.returncode == 128 + signal.SIGTERM
            slowest = max(slowest, time.perf_counter() - sent)
            quiet = "Traceback" not in first.stderr and first.returncode in (130, 143)
            listed = whole_checkpoints(run_dir / stage)
            whole = len(listed) == len(list((run_dir / stage / "checkpoints").glob("*.json")))
            done = run(stage, run_dir)
            same += quiet and whole and done.returncode == 0 and faults.same(stage, run_dir)
        outcome = (
            f"{immediate} of {faults.kills} ended at once (exit 143), the slowest after "
            f"{slowest:.2f} s, the others by the first signal (exit 130); {same} of "
            f"{faults.kills}: all listed checkpoints whole, resumed: same bits"
        )
        faults.add("SIGTERM right after SIGINT", stage, outcome, same == faults.kills)


def damaged(faults: Faults) -> None:
    """The newest checkpoint with other bytes than were written."""
    for how in ("a changed byte", "half a file", "a file less"):
        run_dir = faults.fresh("rl")
        process = start("rl", run_dir)
        until(process, lambda run_dir=run_dir: len(whole_checkpoints(run_dir / "rl")) > 1)
        process.kill()
        process.communicate()
        newest = max(whole_checkpoints(run_dir / "rl"), key=int)
        folder = run_dir / "rl" / "checkpoints" / newest
        victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(victim.read_bytes())
        if how == "a changed byte":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        elif how == "half a file":
            victim.write_bytes(data[: len(data) // 2])
        else:
            victim.unlink()
        done = run("rl", run_dir)
        named = f"checkpoint {folder.absolute()} is damaged" in done.stdout
        good = done.returncode == 0 and named and faults.same("rl", run_dir)
        outcome = f"named and moved aside {named}, the one before taken: same bits {good}"
        faults.add(f"checkpoint with {how}", "rl", outcome, good)


def mistakes(faults: Faults) -> None:
    """Exit 1, a message, nothing changed."""
    run_dir = faults.begun("rl")
    _refused(
        faults, "a changed option", "rl", run_dir, "kl_coef: 0.02 -> 0.5", "--rl.kl-coef", "0.5"
    )
    data = faults.runs / "records.jsonl"
    lines = (faults.clean / "world" / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    given = ("--preferences", str(data), "--tokenizer", str(faults.clean / "world" / "tokenizer"))
    run_dir = faults.fresh("scalar_rm")
    process = start("scalar_rm", run_dir, *given)
    until(process, lambda: (run_dir / "scalar_rm" / "checkpoints").exists())
    process.kill()
    process.communicate()
    data.write_text("".join(lines[1:]))
    _refused(faults, "a changed data file", "scalar_rm", run_dir, "other data", *given)
    blocked = faults.runs / "a file"
    blocked.write_text("")
    _refused(faults, "no run directory can be made", "sft", blocked / "run", "a file")


def _refused(
    faults: Faults, fault: str, stage: str, run_dir: Path, wanted: str, *more: str
) -> None:
    before = _stamps(run_dir)
    done = run(stage, run_dir, *more)
    good = done.returncode == 1 and wanted in done.stderr and _stamps(run_dir) == before
    message = " ".join(done.stderr.split())
    faults.add(fault, stage, f"exit {done.returncode}: {message[:160]}", good)


def _stamps(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def diverge(faults: Faults) -> None:
    """A learning rate with which no step is finite."""
    run_dir = faults.fresh("sft")
    rate = ("--sft.fitting.optimizer.learning-rate", "1e30", "--guard.patience", "4")
    done = run("sft", run_dir, *rate)
    back = done.stdout.count("back to step")
    good = done.returncode == 1 and back == 3 and "did not help" in done.stderr
    outcome = f"went back {back} times, then exit {done.returncode}: {complaint(done)[:160]}"
    faults.add("steps that are not finite (learning rate 1e30)", "sft", outcome, good)
