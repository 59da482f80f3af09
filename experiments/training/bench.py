"""A gradient step beside torch and tunix on the CPU: tokens/s and peak memory.

    python experiments/sampler/make_model.py MODEL
    python experiments/training/bench.py MODEL --torch PYTHON --tunix PYTHON

PYTHON is the interpreter of a virtual environment that has the peer (transformers with torch,
google-tunix); a peer that is not given is left out. All train all parameters of the same random
Gemma-2 on the same 8 x 512 tokens, in float32 with AdamW and clipped gradients. This project and
one peer take a step in turn (all at once would not fit in 24 GB); figures are medians. Each runs as
its own program starts it: this project with huge pages (`grm_jax.parallel.host`), or with what
GLIBC_TUNABLES says, which then holds for all. tunix has no GRPO
step that can be called alone: it is in the SFT rows. `--rows 4` computes a step's gradient in two
halves, here and in torch. With `--memory small` the peers recompute
their layers, and this project does so, too (`remat=block`), or computes 4 rows at a time. Writes
results.json and table.md beside this file; what is not measured again stays.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))

import tyro
from host import Worker

from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
TOKENS = 8 * 512


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[Path]
    torch: Path | None = None
    tunix: Path | None = None
    losses: tuple[str, ...] = ("sft", "grpo")
    memory: tuple[Literal["any", "small"], ...] = ("any", "small")
    rows: int = 0
    """Rows that this project and torch compute at a time, with `--memory any`; 0: all eight."""
    threads: int = 1
    repeats: int = 5
    output: Path = HERE / "results.json"


def main(args: Arguments) -> None:
    results: dict[str, Any] = {}
    if args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    commit = ["git", "rev-parse", "--short", "HEAD"]
    about = {
        "commit": subprocess.run(commit, capture_output=True, text=True, cwd=HERE).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    for loss in args.losses:
        for memory in args.memory:
            for peer in ("torch", "tunix"):
                python = getattr(args, peer)
                if python is None or (peer == "tunix" and loss == "grpo"):
                    continue
                key = f"{loss}, {memory} memory, {args.threads} threads, beside {peer}"
                key += f", {args.rows} rows at a time" if args.rows and memory == "any" else ""
                trainers = compare(args, loss, memory, peer, python)
                results[key] = {**about, "trainers": trainers}
                args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = table(results)
    (HERE / "table.md").write_text(text, encoding="utf-8")
    print(text)


def compare(
    args: Arguments, loss: str, memory: str, peer: str, python: Path
) -> dict[str, dict[str, Any]]:
    """Steps in turn; of each, medians."""
    here, small = Path(sys.executable), memory == "small"
    recompute = ["--remat"] if small else []
    split = ["--device-batch", str(args.rows)] if args.rows and not small else []
    started = {"grm": (here, "grm", ["--device-batch", "4"] if small else split)}
    if small:
        started["grm remat"] = (here, "grm", recompute)
    started[peer] = (python, peer, [*recompute, *(split if peer == "torch" else [])])
    given = [str(args.model), "--loss", loss, "--threads", str(args.threads)]
    workers = {
        name: Worker(path, HERE / "workers" / f"run_{who}.py", [*given, *more], args.threads)
        for name, (path, who, more) in started.items()
    }
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for repeat in range(args.repeats):
        for name, worker in workers.items():
            answer = worker.run(repeat)
            answers[name].append(answer)
            print(
                f"{name}: {loss}, {memory} memory, {TOKENS / answer['seconds']:.1f} tokens/s, "
                f"loss {answer['figure']:.4f}, {answer['peak_gib']:.1f} GiB",
                flush=True,
            )
    found = {}
    for name, worker in workers.items():
        worker.close()
        seconds = [answer["seconds"] for answer in answers[name]]
        found[name] = {
            "trainer": " ".join([worker.ready["ready"], *started[name][2]]),
            "seconds": [round(s, 3) for s in seconds],
            "losses": [answer["figure"] for answer in answers[name]],
            "tokens_per_second": round(TOKENS / statistics.median(seconds), 1),
            "peak_gib": round(max(answer["peak_gib"] for answer in answers[name]), 2),
        }
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    for key, found in results.items():
        trainers = found["trainers"]
        own = trainers["grm"]["tokens_per_second"]
        lines += [f"{key}:", "", "| trainer | tokens/s | grm_jax is | peak memory, GiB |"]
        lines += ["| :--- | ---: | ---: | ---: |"]
        for entry in sorted(trainers.values(), key=lambda e: -e["tokens_per_second"]):
            rate = entry["tokens_per_second"]
            lines.append(
                f"| {entry['trainer']} | {rate:.1f} | {own / rate:.2f}x | {entry['peak_gib']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
