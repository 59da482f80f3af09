"""k-way sampling beside other samplers, on the CPU: tokens/s, cost against k, memory.

    python experiments/sampler/make_model.py MODEL          (with `gguf` installed, for llama.cpp)
    python experiments/sampler/bench.py MODEL --llamacpp PYTHON --tunix PYTHON --hf PYTHON

PYTHON is the interpreter of a virtual environment that has the peer (llama-cpp-python,
google-tunix, transformers with torch); a peer that is not given is left out. All are given the same
weights, prompt and settings (float32, temperature 1) and run in turn, a run each, so that a noisy
machine is noisy for all; figures are medians. Threads are pinned by `taskset`. Writes results.json,
table.md and table.png beside this file. Settings (k, threads) can be measured one after the other:
what is not measured again stays.
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
from matplotlib.figure import Figure
from product_ceiling import ceiling

from grm_jax.model.config import ModelConfig, model_config
from grm_jax.model.storage import read_model_config
from grm_jax.sampler.options import EngineConfig
from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
PEERS = ("grm", "llamacpp", "tunix", "hf")


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[Path | None] = None
    device: Literal["cpu", "gpu"] = "cpu"
    """gpu: the size below on the accelerator, without peers; see device.py."""
    size: str = "2b"
    llamacpp: Path | None = None
    tunix: Path | None = None
    hf: Path | None = None
    k: tuple[int, ...] = (8, 32)
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 5
    prompt: int = 512
    new: int = 128
    cost: bool = True
    """Also time(k=32) / time(k=1) at a prompt of 1,024 and 64 new tokens, beside transformers."""
    cost_threads: int = 2
    output: Path = HERE / "results.json"


def main(args: Arguments) -> None:
    if args.device == "gpu":
        import device

        bench = device.DeviceBench(model_config(args.size), EngineConfig())
        found = {"commit": git_commit(), **bench.about(), "new_tokens": args.new, "settings": []}
        for setting in device.SETTINGS:
            found["settings"].append(bench.measure(setting, args.new, args.repeats))
            print(found["settings"][-1], flush=True)
            save(HERE / f"device_{args.size}.json", found)
        return
    if args.model is None:
        raise SystemExit("give the folder that make_model.py wrote")
    python = {"grm": Path(sys.executable), "llamacpp": args.llamacpp, "tunix": args.tunix}
    python["hf"] = args.hf
    present = {name: path for name, path in python.items() if path is not None}
    results: dict[str, Any] = load(args.output)
    results |= {
        "commit": git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    for threads in args.threads:
        key = f"ceiling, {threads} threads"
        results[key] = ceiling(threads, args.model, "float32")
        for k in args.k:
            key = f"prompt {args.prompt}, new {args.new}, k {k}, {threads} threads"
            found = compare(present, args, k, threads, args.prompt, args.new)
            results[key] = results.get(key, {}) | found
            save(args.output, results)
    if args.cost:
        some = {name: path for name, path in present.items() if name in ("grm", "hf")}
        for k in (1, 32):
            key = f"prompt 1024, new 64, k {k}, {args.cost_threads} threads"
            found = compare(some, args, k, args.cost_threads, 1024, 64)
            results[key] = results.get(key, {}) | found
            save(args.output, results)
        results["cost"] = cost(results, read_model_config(args.model), args.cost_threads)
        save(args.output, results)
    (HERE / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    plot(results)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def git_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def start(name: str, python: Path, args: Arguments, k: int, threads: int, sizes) -> Worker:
    prompt, new = sizes
    given = [str(args.model), "--k", str(k), "--prompt", str(prompt), "--new", str(new)]
    given += ["--threads", str(threads)]
    return Worker(python, HERE / "workers" / f"run_{name}.py", given, threads)


def compare(
    present: dict[str, Path], args: Arguments, k: int, threads: int, prompt: int, new: int
) -> dict[str, Any]:
    """Runs in turn; of each sampler, medians."""
    workers = {
        name: start(name, python, args, k, threads, (prompt, new))
        for name, python in present.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    last: dict[str, dict[str, float]] = {}
    for repeat in range(args.repeats):
        for name, worker in workers.items():
            last[name] = worker.run(repeat)
            seconds[name].append(last[name]["seconds"])
            rate = k * new / last[name]["seconds"]
            print(f"{name}: k {k}, {threads} threads, {rate:.0f} tokens/s", flush=True)
    found = {}
    for name, worker in workers.items():
        worker.close()
        assert last[name]["figure"] == k * new
        middle = statistics.median(seconds[name])
        found[name] = {
            "sampler": worker.ready["ready"],
            "seconds": [round(s, 3) for s in seconds[name]],
            "tokens_per_second": round(k * new / middle, 1),
            "peak_gib": round(last[name]["peak_gib"], 2),
        }
    return found


MACHINE = """
import json, statistics, time
import jax, jax.numpy as jnp
def seconds(function, *given):
    function = jax.jit(function)
    jax.block_until_ready(function(*given))
    times = []
    for _ in range(9):
        started = time.perf_counter()
        jax.block_until_ready(function(*given))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
a = jax.random.normal(jax.random.key(0), (2048, 2048))
flops = 2 * 2048**3 / seconds(lambda a: a @ a, a)
rows = jax.random.normal(jax.random.key(0), (64, 1 << 20))
# A vector times a matrix of 256 MiB: reads it once.
read = rows.nbytes / seconds(lambda r: jnp.ones(64) @ r, rows)
print(json.dumps({"flops": flops, "bytes": read}))
"""


def cost(results: dict[str, Any], config: ModelConfig, threads: int) -> dict[str, Any]:
    """time(k=32) / time(k=1), of each sampler and of the floor; and the share of the floor reached.

    The floor: counted FLOPs and bytes, of the prompt's tokens and of each step, over the machine's
    measured FLOP/s of a large product and bytes/s of reading a large array, whichever is more.
    """
    command = ["taskset", "-c", ",".join(map(str, range(threads))), sys.executable, "-c", MACHINE]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    machine = json.loads(out.stdout)
    found: dict[str, Any] = {"machine": machine, "floor": {}}
    measured: dict[str, dict[int, float]] = {}
    for k in (1, 32):
        entries = results[f"prompt 1024, new 64, k {k}, {threads} threads"]
        floor = floor_seconds(config, 1024, 64, k, machine)
        found["floor"][f"k {k}"] = round(floor, 3)
        for entry in entries.values():
            measured.setdefault(entry["sampler"], {})[k] = statistics.median(entry["seconds"])
    floor = found["floor"]
    found["floor"]["ratio"] = round(floor["k 32"] / floor["k 1"], 2)
    for name, seconds in measured.items():
        share = {
            f"share of the floor, k {k}": round(floor[f"k {k}"] / s, 3) for k, s in seconds.items()
        }
        found[name] = {"ratio": round(seconds[32] / seconds[1], 2), **share}
    return found


def floor_seconds(
    config: ModelConfig, prompt: int, new: int, k: int, machine: dict[str, float]
) -> float:
    """The least time that k samples of one prompt can take."""
    c, width = config, 4
    attention = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.embed_dim
    layers = c.num_layers * (attention + 3 * c.embed_dim * c.hidden_dim)
    head = c.embed_dim * c.vocab_size
    key_value = 2 * c.num_kv_heads * c.head_dim * width
    pair = 4 * c.num_heads * c.head_dim  # FLOPs of a query and a key, both products

    def seen(before: int) -> int:
        """Keys that a token sees, all layers, with so many before it."""
        near = min(before + 1, c.sliding_window)
        return c.num_layers // 2 * (near + before + 1)

    def seconds(flops: float, read: float) -> float:
        return max(flops / machine["flops"], read / machine["bytes"])

    total = seconds(
        2 * layers * prompt + pair * sum(map(seen, range(prompt))) + 2 * head,
        (layers + head) * width,
    )
    for step in range(1, new):
        keys = seen(prompt + step - 1)
        own = min(keys, c.num_layers * step)  # not shared
        read = (layers + head) * width + key_value * (keys - own + k * own)
        total += seconds(k * (2 * (layers + head) + pair * keys), read)
    return total


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    settings = [key for key in results if key.startswith("prompt")]
    for key in settings:
        found = results[key]
        own = found.get("grm", {}).get("tokens_per_second")
        lines += [f"{key}:", "", "| sampler | tokens/s | grm_jax is | peak memory, GiB |"]
        lines += ["| :--- | ---: | ---: | ---: |"]
        for entry in sorted(found.values(), key=lambda e: -e["tokens_per_second"]):
            rate = entry["tokens_per_second"]
            ratio = f"{own / rate:.2f}x" if own else "-"
            lines.append(f"| {entry['sampler']} | {rate:.0f} | {ratio} | {entry['peak_gib']:.1f} |")
        lines.append("")
    ceilings = {key: value for key, value in results.items() if key.startswith("ceiling")}
    for key, value in ceilings.items():
        lines.append(f"{key}, matrix products alone: {value} tokens/s")
    if "cost" in results:
        lines += [
            "",
            "| prompt 1024, new 64 | time(k=32) / time(k=1) | share of the floor, k=1 | k=32 |",
        ]
        lines += ["| :--- | ---: | ---: | ---: |"]
        for name, found in results["cost"].items():
            if name != "machine":
                shares = [found.get(f"share of the floor, k {k}", 1.0) for k in (1, 32)]
                shown = " | ".join(f"{100 * share:.0f}%" for share in shares)
                lines.append(f"| {name} | {found['ratio']} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> None:
    """Tokens/s of every sampler, a group of bars for each k and number of threads."""
    settings = [key for key in results if key.startswith("prompt 512")]
    names = [n for n in PEERS if any(n in results[key] for key in settings)]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        found = [(i, results[key][name]) for i, key in enumerate(settings) if name in results[key]]
        x = [i + place / (len(names) + 1) for i, _ in found]
        rates = [entry["tokens_per_second"] for _, entry in found]
        bars = axes.bar(x, rates, 1 / (len(names) + 1), label=found[0][1]["sampler"])
        axes.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=7)
    labels = [key.split(", ", 2)[2] for key in settings]
    axes.set_xticks(
        [i + (len(names) - 1) / 2 / (len(names) + 1) for i in range(len(labels))], labels
    )
    axes.set_ylabel("new tokens/s")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "table.png", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
