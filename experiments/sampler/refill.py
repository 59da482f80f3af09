"""Continuous batching, shared beginnings, sharing at all: the same engine with and without.

    python experiments/sampler/refill.py

A random Gemma-2 of 17 million parameters on the CPU; what is compared runs in turn, figures are
medians. Stop ids are a random 64th of the vocabulary, so lengths are near geometric with mean 64.
Writes refill.json, refill.md and refill.png.

- refill: 64 prompts of 64 to 1,024 tokens, 8 samples each, 32 lanes; each run has other prompts and
  lengths, and what later runs compile is counted.
- heads: items whose orders of responses begin with the same 512 of 768 tokens, with and without
  sharing those pages.
- gate: k samples of one prompt that share it, against k copies of it.
- depth: prompts of 700 tokens, alone and beside one of 4,000: what that one costs the others.
- int8: effect of 8-bit weights and caches on log-probabilities of the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from bench import git_commit
from matplotlib.figure import Figure

from grm_jax.model.config import ModelConfig
from grm_jax.model.params import init_params, param_table
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler import plan
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request
from grm_jax.scoring.results import versions

HERE = Path(__file__).resolve().parent
MODEL = ModelConfig(
    num_layers=6,
    embed_dim=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=96,
    hidden_dim=1536,
    query_pre_attn_scalar=96,
    vocab_size=8192,
    sliding_window=256,
    max_position=4096,
)


PARTS = ("refill", "heads", "gate", "depth", "int8")


@dataclasses.dataclass(frozen=True)
class Arguments:
    repeats: int = 5
    parts: tuple[str, ...] = PARTS
    """What is measured; of the others the last figures stay."""


def main(args: Arguments) -> None:
    params = jax.jit(lambda key: init_params(param_table(MODEL), key))(jax.random.key(0))
    file = HERE / "refill.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    results |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions()}
    measure = {"refill": refill, "heads": heads, "gate": gate, "depth": depth, "int8": int8}
    for part in args.parts:
        results[part] = measure[part](params, args.repeats)
        results[f"commit of {part}"] = git_commit()
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (HERE / "refill.md").write_text(table(results), encoding="utf-8")
    plot(results)
    print(table(results))


def sampler(stop_ids: Sequence[int], **settings: Any) -> Sampler:
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    return Sampler(MODEL, stop_ids, EngineConfig(**settings), mesh)


def prompts(lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(4, MODEL.vocab_size, n).tolist()) for n in lengths]


def timed(run: Callable[[], int]) -> float:
    """Tokens/s of one run that returns how many were drawn."""
    started = time.perf_counter()
    drawn = run()
    return drawn / (time.perf_counter() - started)


def in_turn(runs: dict[str, Callable[[int], int]], repeats: int) -> dict[str, float]:
    """Median tokens/s of each; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            rate = timed(lambda run=run, repeat=repeat: run(repeat))
            print(f"{name}: round {repeat} of {repeats}, {rate:.0f} tokens/s", flush=True)
            if repeat:
                rates[name].append(rate)
    return {name: round(statistics.median(found), 1) for name, found in rates.items()}


def refill(params: Any, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    stop_ids = rng.choice(np.arange(4, MODEL.vocab_size), MODEL.vocab_size // 64, False).tolist()
    settings = SamplingConfig(max_new_tokens=512)

    def requests(seed: int) -> list[Request]:
        lengths = np.random.default_rng(seed).integers(64, 1025, 64).tolist()
        found = prompts(lengths, seed)
        return [Request(f"{seed}-{i}", p, tuple(range(8))) for i, p in enumerate(found)]

    samplers = {
        name: sampler(stop_ids, max_rows=32, page=256, chunk=32, min_lanes=4, refill=on)
        for name, on in (("refill", True), ("batches", False))
    }
    compiled: dict[str, list[int]] = {name: [] for name in samplers}

    def run(name: str) -> Callable[[int], int]:
        def once(seed: int) -> int:
            key = jax.random.key(seed)
            found = samplers[name].sample(params, requests(seed), settings, key)
            drawn = sum(len(sample.tokens) for sample in found)
            compiled[name].append(len(samplers[name].programs.compilations))
            return drawn

        return once

    rates = in_turn({name: run(name) for name in samplers}, repeats)
    return {
        "tokens_per_second": rates,
        "ratio": round(rates["refill"] / rates["batches"], 2),
        "occupancy": {name: round(s.stats.occupancy, 3) for name, s in samplers.items()},
        "compilations": {n: [c[0], c[-1] - c[0]] for n, c in compiled.items()},
        "mean_length": round(
            samplers["refill"].stats.decode_tokens / samplers["refill"].stats.samples, 1
        ),
    }


def heads(params: Any, repeats: int) -> list[dict[str, Any]]:
    """Sharing off against on, whatever the plan would choose."""
    return [
        heads_of(params, repeats, *sizes) for sizes in ((8, 4, 2), (8, 2, 4), (8, 2, 8), (4, 2, 16))
    ]


def heads_of(params: Any, repeats: int, items: int, orders: int, each: int) -> dict[str, Any]:
    """Items with so many orders of their responses, and so many samples of each order."""
    settings = SamplingConfig(max_new_tokens=64)
    head, tails = prompts([512] * items, 2), prompts([256] * items * orders, 3)
    requests = [
        Request(f"{i}", head[i] + tails[orders * i + j], tuple(range(each * j, each * (j + 1))))
        for i in range(items)
        for j in range(orders)
    ]
    samplers = {
        name: sampler([MODEL.vocab_size], max_rows=128, page=256, prefill_tokens=2048, share=on)
        for name, on in (("shared", True), ("apart", False))
    }

    def run(name: str) -> Callable[[int], int]:
        def once(seed: int) -> int:
            found = samplers[name].sample(params, requests, settings, jax.random.key(seed))
            return sum(len(sample.tokens) for sample in found)

        return once

    with unittest.mock.patch.object(plan, "CPU_READERS", 1024):
        rates = in_turn({name: run(name) for name in samplers}, repeats)
    return {
        "items": items,
        "orders": orders,
        "samples an order": each,
        "tokens_per_second": rates,
        "ratio": round(rates["shared"] / rates["apart"], 2),
        "prefill_tokens": {n: s.stats.prefill_tokens // (repeats + 1) for n, s in samplers.items()},
        "cache_mib": {n: round(s.stats.cache_bytes / 2**20, 1) for n, s in samplers.items()},
    }


def gate(params: Any, repeats: int) -> list[dict[str, Any]]:
    found = []
    for length in (32, 128, 512):
        for k in (2, 8, 32):
            (prompt,) = prompts([length], length)
            page = min(512, length)
            settings = SamplingConfig(max_new_tokens=64)
            both = {
                "shared": [Request("p", prompt, tuple(range(k)))],
                "repeated": [Request("p", prompt, (i,)) for i in range(k)],
            }
            samplers = {
                name: sampler(
                    [MODEL.vocab_size], max_rows=k, page=page, prefill_tokens=8192, share=False
                )
                for name in both
            }

            def run(name: str, both=both, samplers=samplers, settings=settings):
                def once(seed: int) -> int:
                    key = jax.random.key(seed)
                    drawn = samplers[name].sample(params, both[name], settings, key)
                    return sum(len(sample.tokens) for sample in drawn)

                return once

            rates = in_turn({name: run(name) for name in both}, repeats)
            ratio = round(rates["shared"] / rates["repeated"], 2)
            found.append({"prompt": length, "k": k, "tokens_per_second": rates, "ratio": ratio})
    return found


def depth(params: Any, repeats: int) -> dict[str, Any]:
    """Prompt tokens/s of 32 prompts in 3 pages each, alone and beside one in 16."""
    short, settings = prompts([700] * 32, 7), SamplingConfig(max_new_tokens=1)
    queues = {"alone": short, "beside": [*short, *prompts([4000], 8)]}
    samplers = {name: sampler([MODEL.vocab_size], max_rows=64, page=256) for name in queues}

    def run(name: str) -> Callable[[int], int]:
        requests = [Request(str(i), prompt, (0,)) for i, prompt in enumerate(queues[name])]

        def once(seed: int) -> int:
            list(samplers[name].sample(params, requests, settings, jax.random.key(seed)))
            return sum(map(len, queues[name]))

        return once

    rates = in_turn({name: run(name) for name in samplers}, repeats)
    return {"tokens_per_second": rates, "ratio": round(rates["beside"] / rates["alone"], 2)}


def int8(params: Any, repeats: int) -> dict[str, Any]:
    """Greedy decoding of 16 prompts: how far log-probabilities move, how often the token does."""
    found = prompts([256] * 16, 5)
    requests = [Request(str(i), p, (0,)) for i, p in enumerate(found)]
    settings = SamplingConfig(temperature=0.0, max_new_tokens=32)

    def draw(**options: bool) -> dict[str, Any]:
        one = sampler([MODEL.vocab_size], max_rows=16, page=256, **options)
        return {s.example_id: s for s in one.sample(params, requests, settings, jax.random.key(0))}

    exact, results = draw(), {}
    for name in ("int8_weights", "int8_cache"):
        other = draw(**{name: True})
        gaps, first = [], []
        for id, sample in exact.items():
            same = int(np.cumprod(sample.tokens == other[id].tokens).sum())
            first.append(same / len(sample.tokens))
            # While the texts agree, the same tokens were given the same history.
            gaps += np.abs(sample.logprobs[:same] - other[id].logprobs[:same]).tolist()
        results[name] = {
            "mean_logprob_gap": round(float(np.mean(gaps)), 4),
            "max_logprob_gap": round(float(np.max(gaps)), 4),
            "same_text": round(float(np.mean(first)), 3),
        }
    return results


def table(results: dict[str, Any]) -> str:
    r = results["refill"]
    lines = ["| 64 prompts x 8 | tokens/s | lanes busy | programs, first run | later |"]
    lines += ["| :--- | ---: | ---: | ---: | ---: |"]
    for name in ("refill", "batches"):
        first, later = r["compilations"][name]
        rate, busy = r["tokens_per_second"][name], r["occupancy"][name]
        lines.append(f"| {name} | {rate:.0f} | {100 * busy:.0f}% | {first} | {later} |")
    lines += ["", f"Refill is {r['ratio']}x; mean length {r['mean_length']} tokens.", ""]
    lines += ["| items x orders x samples | beginnings shared, tokens/s | apart | ratio "]
    lines[-1] += "| prompt tokens computed |"
    lines += ["| :--- | ---: | ---: | ---: | ---: |"]
    for row in results["heads"]:
        rates, computed = row["tokens_per_second"], row["prefill_tokens"]
        lines.append(
            f"| {row['items']} x {row['orders']} x {row['samples an order']} "
            f"| {rates['shared']:.0f} | {rates['apart']:.0f} | {row['ratio']}x "
            f"| {computed['shared']} against {computed['apart']} |"
        )
    lines += ["", "| prompt | k | shared, tokens/s | repeated | ratio |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: |"]
    for row in results["gate"]:
        rates = row["tokens_per_second"]
        lines.append(
            f"| {row['prompt']} | {row['k']} | {rates['shared']:.0f} | {rates['repeated']:.0f} "
            f"| {row['ratio']}x |"
        )
    d = results["depth"]["tokens_per_second"]
    lines += [
        "",
        f"32 prompts of 700 tokens: {d['alone']:,.0f} prompt tokens/s; with one of 4,000 ",
    ]
    lines[-1] += f"beside them {d['beside']:,.0f} ({results['depth']['ratio']}x)."
    lines += ["", "| option | mean gap of log-probabilities | largest | same greedy text |"]
    lines += ["| :--- | ---: | ---: | ---: |"]
    for name, row in results["int8"].items():
        lines.append(
            f"| {name} | {row['mean_logprob_gap']} | {row['max_logprob_gap']} "
            f"| {100 * row['same_text']:.0f}% |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> None:
    """Left: continuous batching; right: what sharing a prompt gains over repeating it."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    r = results["refill"]
    bars = left.bar(list(r["tokens_per_second"]), list(r["tokens_per_second"].values()), width=0.5)
    busy = [f"lanes {100 * share:.0f}% busy" for share in r["occupancy"].values()]
    left.bar_label(bars, busy)
    left.set_ylabel("tokens/s")
    left.margins(y=0.15)
    for length in sorted({row["prompt"] for row in results["gate"]}):
        rows = [row for row in results["gate"] if row["prompt"] == length]
        ks, ratios = [row["k"] for row in rows], [row["ratio"] for row in rows]
        right.plot(ks, ratios, "o-", label=f"prompt {length}")
    right.axhline(1, color="gray", lw=0.8)
    right.set_xscale("log", base=2)
    right.set_xlabel("k")
    right.set_ylabel("shared over repeated, tokens/s")
    right.legend()
    figure.savefig(HERE / "refill.png", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
