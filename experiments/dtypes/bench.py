"""float32 and bfloat16 on a CPU, beside llama.cpp and torch at each of their dtypes.

    python experiments/sampler/make_model.py MODEL          (with `gguf` installed, for llama.cpp)
    python experiments/dtypes/bench.py MODEL --llamacpp PYTHON --torch PYTHON --threads 1

PYTHON is the interpreter of a virtual environment that has the peer (llama-cpp-python, transformers
with torch); a peer that is not given is left out. The same random Gemma-2 of 138 million
parameters, the same prompts and rows for all; samplers run in turn, and so do trainers, two at a
time, since more would not fit in 24 GB. Figures are medians. Threads are pinned by `taskset`.
Writes results.json and table.md beside this file; what is not measured again stays.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))

import tyro
from host import Worker
from product_ceiling import ceiling

from grm_jax.model.compute_dtype import bfloat16_speedup
from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parent
TOKENS = 8 * 512  # of a training step
DTYPES = ("float32", "bfloat16")
CEILING = "matrix products alone"
BESIDE = "grm_jax bfloat16 in the same race, tokens_per_second"
SAMPLERS = ((512, 128, 8), (512, 128, 32), (1024, 64, 16))  # prompt, new tokens, k


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[Path]
    llamacpp: Path | None = None
    torch: Path | None = None
    threads: tuple[int, ...] = (1, 2)
    samplers: tuple[int, ...] = (8, 32, 16)
    """The k of the settings to measure."""
    ceilings: bool = True
    """Also how fast a sampler's matrix products are alone."""
    losses: tuple[str, ...] = ("sft", "grpo")
    rows: int = 4
    """Rows that a trainer computes at a time."""
    repeats: int = 5


class Entrant(NamedTuple):
    """Who is measured: its name in the table, its interpreter, script and options."""

    name: str
    python: Path
    script: Path
    options: tuple[str, ...]


def main(args: Arguments) -> None:
    file = HERE / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["about"] = {
        "processor": processor(),
        "bfloat16 products over float32 (the probe)": round(bfloat16_speedup(), 2),
        "versions": versions(),
    }
    commits = results.setdefault("commits", {})

    def keep(key: str, found: dict[str, Any]) -> None:
        results[key], commits[key] = found, output(["git", "rev-parse", "--short", "HEAD"])
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    for threads in args.threads:
        for prompt, new, k in SAMPLERS:
            if k in args.samplers:
                given = [str(args.model), *f"--k {k} --prompt {prompt} --new {new}".split()]
                key = f"sampler, prompt {prompt}, new {new}, k {k}, {threads} threads"
                keep(key, race(samplers(args), given, threads, args.repeats, k * new))
        if args.ceilings:
            ks = sorted({k for *_, k in SAMPLERS})
            found = {dtype: ceiling(threads, args.model, dtype, rows=ks) for dtype in DTYPES}
            keep(f"{CEILING}, {threads} threads", found)
        for loss in args.losses:
            given = [str(args.model), "--loss", loss, "--device-batch", str(args.rows)]
            key = f"{loss} step, 8 x 512 tokens, {threads} threads"
            keep(key, pairs(trainers(args), given, threads, args.repeats))
    (HERE / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def samplers(args: Arguments) -> list[Entrant]:
    folder = EXPERIMENTS / "sampler" / "workers"
    own, peer = Path(sys.executable), args.llamacpp
    found = [
        Entrant(f"grm_jax {dtype}", own, folder / "run_grm.py", ("--dtype", dtype))
        for dtype in reversed(DTYPES)
    ]
    files = ("F32", "BF16", "Q8_0") if peer is not None else ()
    return found + [
        Entrant(f"llama.cpp {kind}", peer or own, folder / "run_llamacpp.py", ("--dtype", kind))
        for kind in files
    ]


def trainers(args: Arguments) -> list[Entrant]:
    """The first is measured beside each of the others."""
    folder = EXPERIMENTS / "training" / "workers"
    own, peer = Path(sys.executable), args.torch
    found = [
        Entrant(f"grm_jax {dtype}", own, folder / "run_grm.py", ("--dtype", dtype))
        for dtype in reversed(DTYPES)
    ]
    kinds = (("float32", "float32"), ("autocast to bfloat16", "bfloat16")) if peer else ()
    return found + [
        Entrant(f"torch {kind}", peer or own, folder / "run_torch.py", ("--dtype", dtype))
        for kind, dtype in kinds
    ]


def race(
    entrants: Sequence[Entrant], given: Sequence[str], threads: int, repeats: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Runs in turn; of each entrant, medians."""
    common = [*given, "--threads", str(threads)]
    workers = {e.name: Worker(e.python, e.script, [*common, *e.options], threads) for e in entrants}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for repeat in range(repeats):
        for name, worker in workers.items():
            answers[name].append(worker.run(repeat))
            rate = tokens / answers[name][-1]["seconds"]
            print(f"{name}: {' '.join(common[1:])}: {rate:.0f} tokens/s", flush=True)
    for worker in workers.values():
        worker.close()
    return {
        name: {
            "tokens_per_second": round(
                tokens / statistics.median(answer["seconds"] for answer in found), 1
            ),
            "seconds": [round(answer["seconds"], 3) for answer in found],
            "figures": [answer["figure"] for answer in found],
            "peak_gib": round(max(answer["peak_gib"] for answer in found), 2),
        }
        for name, found in answers.items()
    }


def pairs(
    entrants: Sequence[Entrant], given: Sequence[str], threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """The first entrant in a race with each of the others. Others have its rate beside them, with
    which they are compared; its own entry is of the first race."""
    own, *others = entrants
    found: dict[str, dict[str, Any]] = {}
    for other in others:
        pair = race([own, other], given, threads, repeats, TOKENS)
        mine = pair.pop(own.name)
        found.setdefault(own.name, mine)
        found[other.name] = pair[other.name] | {BESIDE: mine["tokens_per_second"]}
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: every setting with all entrants, the fastest first."""
    about = results["about"]
    lines = [
        f"{about['processor']}; its products in bfloat16 are "
        f"{about['bfloat16 products over float32 (the probe)']} times as fast as in float32.",
    ]
    for key, found in results.items():
        if key in ("about", "commits"):
            continue
        title = f"{key} (commit {results['commits'][key]})"
        if key.startswith(CEILING):
            lines += ["", f"{title}, tokens/s:", "", f"| | {' | '.join(found['float32'])} |"]
            lines += ["| :--- |" + " ---: |" * len(found["float32"])]
            for dtype, rates in found.items():
                lines.append(f"| {dtype} | {' | '.join(f'{r:.0f}' for r in rates.values())} |")
            continue
        own = found["grm_jax bfloat16"]["tokens_per_second"]
        lines += ["", f"{title}:", ""]
        lines += [
            "| | tokens/s | grm_jax in bfloat16 is (its rate in the same race) | peak memory, GiB |"
        ]
        lines += ["| :--- | ---: | ---: | ---: |"]
        for name, entry in sorted(found.items(), key=lambda e: -e[1]["tokens_per_second"]):
            rate, mine = entry["tokens_per_second"], entry.get(BESIDE, own)
            compared = f"{mine / rate:.2f}x" + (f" ({mine:.0f})" if BESIDE in entry else "")
            lines.append(f"| {name} | {rate:.0f} | {compared} | {entry['peak_gib']:.1f} |")
    return "\n".join(lines) + "\n"


def output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def processor() -> str:
    """Its family and what it has for bfloat16, as `lscpu` says."""
    said = output(["lscpu"])
    fields = dict(re.findall(r"^(.+?):\s+(.*)$", said, re.MULTILINE))
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in said]
    return (
        f"{fields.get('Model name')} (family {fields.get('CPU family')}, model "
        f"{fields.get('Model')}; {', '.join(flags) or 'no instructions for bfloat16'})"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
