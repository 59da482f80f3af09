"""The options of `grm_jax.evaluate`, and their checks, which run before anything is sampled."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from grm_jax.benchmarks import BENCHMARKS
from grm_jax.critique.adaptive import BOUND
from grm_jax.data.critiques import Critique
from grm_jax.data.long_prompts import LongPrompts
from grm_jax.data.rows import MAX_BAD_SHARE
from grm_jax.errors import UserError
from grm_jax.files import expanded
from grm_jax.model.options import ComputeDtype
from grm_jax.parallel.options import MeshConfig
from grm_jax.scoring.judges import JudgeName
from grm_jax.scoring.rules import Form, OrderRule, Protocol, TieRule, UnparsedRule
from grm_jax.scoring.statistics import RESAMPLES

K = 32
PROBES = 32
ATTACK_RECORDS = 60
ATTACK_K = 4
CACHE = Path("runs/cache")
# The least value of each numeric option.
LEAST = {
    "k": 0, "probes": 0, "attack_records": 1, "attack_k": 0, "seed": 0, "k_meta": 1,
    "resamples": 1, "limit": 1, "max_new_tokens": 1, "max_prompt_tokens": 1, "score_tokens": 1,
    "scalar_weight": 0,
}  # fmt: skip
PATHS = ("data", "samples", "compare", "cache", "output")  # models are resolved by the hub module
# Options that have no effect without --model.
OF_MODELS = (
    "temperature", "max_new_tokens", "long_prompts", "max_prompt_tokens", "adaptive", "probes",
    "cache", "score_tokens", "compute_dtype",
)  # fmt: skip
_BENCH = (
    "A benchmark, several separated by commas, or `all` that --data holds: "
    f"{', '.join(BENCHMARKS)}. Needed unless --attacks is given, whose default is synthetic."
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exactly one of --model, --judge and --samples says who judges."""

    bench: Annotated[str, tyro.conf.arg(help=_BENCH)] = ""
    data: Path | None = None
    """The benchmark's file or directory, or a directory that holds the directories of several
    benchmarks. Default: downloaded from the Hugging Face hub if the benchmark is there; for the
    embedded world, the run to which the model belongs."""
    model: Path | None = None
    """A generative reward model: a run directory, a model directory, a Hugging Face directory or a
    repo id of the hub."""
    meta: Path | None = None
    """A meta RM that guides the votes; only with --model."""
    scalar: Path | None = None
    """A scalar RM (`scalar_rm.py`); only with --model. Adds the rows `scalar`, the scalar RM alone,
    and `hybrid@k`, votes plus its scores."""
    scalar_weight: float | None = None
    """The weight of the scalar RM's scores beside the mean scores of a vote. Default: 0.5."""
    judge: JudgeName | None = None
    """A judge without a model: `longer` (more characters win) or `random`."""
    samples: Path | None = None
    """The samples.jsonl of an earlier evaluation, or its directory: its figures are computed again
    and nothing is sampled."""
    k: Annotated[int | None, tyro.conf.arg(aliases=("-k",))] = None
    """The number of samples for each record, besides the greedy one; 0 draws only the greedy one.
    Default: 32; with --samples, all that were drawn."""
    temperature: float | None = None
    """The temperature of the k samples. Default: the judge's own, else 0.5 as in the paper."""
    max_new_tokens: int | None = None
    """The length limit of a critique in tokens. Default: the judge's own, else 1024."""
    long_prompts: LongPrompts | None = None
    """What to do with prompts that are longer than --max-prompt-tokens: stop before sampling
    (error, the default), cut the middle out of the longest texts (truncate-middle), or leave the
    item out (skip). Both are counted in the results."""
    max_prompt_tokens: int | None = None
    """The maximum prompt length in tokens. Default: the model's positions less --max-new-tokens."""
    adaptive: float | None = None
    """Stop sampling a record once the probability that further samples, up to k, change its verdict
    is at most this, for example 0.01; 0 stops only when they cannot change it. Not cached."""
    adaptive_bound: float = BOUND
    """The same probability for the row `adaptive@k`, which is computed from k samples."""
    k_meta: tuple[int, ...] = ()
    """The numbers of samples that guided votes keep, besides half of their k as in the paper."""
    protocol: Protocol = "authors"
    """The rules for ties, unparsable critiques, order and form: those of each benchmark's authors,
    or those of the paper for all benchmarks. The next five options replace single rules."""
    ties: TieRule | None = None
    """What a verdict earns if several responses share the top score: nothing (wrong), half, one
    over their number (shared, random), or it does not count (excluded)."""
    unparsed: UnparsedRule | None = None
    """What a verdict without any parsable critique earns: nothing (wrong), half, one over the
    number of responses (chance), or it does not count (excluded)."""
    order: OrderRule | None = None
    """The order of the responses: as in the file (fixed), shuffled (random), or each pair in both
    orders (both)."""
    form: Form | None = None
    """What one question shows, if the benchmark leaves a choice: all responses (list), two of them
    (pairs), or one (single)."""
    threshold: float | None = None
    """A single response is called correct if its mean score is above this. Default: the middle of
    the range of the judge's template for single responses."""
    compare: Path | None = None
    """The directory of an earlier evaluation, to report paired differences to it."""
    limit: int | None = None
    """The number of items to judge: a random sample in which every section is present."""
    attacks: bool = False
    """Also attack the judge, and write a judge card: its provenance, accuracy, attacks, biases and
    calibration."""
    attack_records: int | None = None
    """With --attacks: the number of records that every attack is tried on. Default: 60."""
    attack_k: int | None = None
    """With --attacks: the number of samples for each attacked prompt, besides the greedy one.
    Default: 4, or -k if that is smaller."""
    probes: int | None = None
    """The number of records with two identical responses that a model also judges, for the bias
    table. Default: 32."""
    cache: Path | None = None
    """The directory in which a model's samples are kept. Default: runs/cache."""
    mesh: MeshConfig = MeshConfig()
    """How a model uses the devices, as in training: `--mesh.tensor 2` splits it over two."""
    compute_dtype: ComputeDtype = "auto"
    """The dtype that models are computed in. auto: the checkpoint's own, unless it is bfloat16 and
    this is a CPU that is not at least 1.5 times as fast in it."""
    score_tokens: int | None = None
    """The maximum number of tokens that the meta RM and the scalar RM score at once on a device.
    Default: as many as the judge's sampler prefills at once (8192, or as trained)."""
    output: Path | None = None
    """The directory of the results. Default: runs/evaluate/JUDGE, or the directory of --samples."""
    resamples: int = RESAMPLES
    """The number of bootstrap resamples for the intervals."""
    seed: int = 0
    """The seed of the samples, the orders of the responses, --limit and the bootstrap."""
    skip_bad_rows: bool = False
    """Leave bad rows out and count them, instead of stopping at the first."""
    max_bad_share: float = MAX_BAD_SHARE
    """Stop even with --skip-bad-rows if more than this share of the rows is bad."""


def check(args: Arguments) -> None:
    """Raise UserError for options that are out of range, contradict or have no effect."""
    given = [name for name in ("model", "judge", "samples") if getattr(args, name) is not None]
    if len(given) != 1:
        what = " and ".join(f"--{name}" for name in given) or "none of them"
        raise UserError(f"give exactly one of --model, --judge and --samples, not {what}")
    if args.meta is not None and args.model is None:
        raise UserError("--meta guides the votes of a model; give --model too")
    if args.scalar is not None and args.model is None:
        raise UserError("--scalar stands beside the votes of a model; give --model too")
    if args.scalar_weight is not None and args.scalar is None and args.samples is None:
        raise UserError("--scalar-weight is of the scalar RM's scores; give --scalar too")
    for name, least in LEAST.items():
        value = getattr(args, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and one < least:
                raise UserError(f"{_option(name)} {one}: give {least} or more")
    if len(set(args.k_meta)) < len(args.k_meta):
        raise UserError(f"--k-meta {' '.join(map(str, args.k_meta))}: give each number once")
    for name in ("threshold", "temperature", "adaptive", "adaptive_bound", "scalar_weight"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{_option(name)} {value}: give a number")
    if args.model is None:
        for name in OF_MODELS:
            if getattr(args, name) != getattr(Arguments, name):
                raise UserError(f"{_option(name)} is for --model, which samples")
        if args.mesh != MeshConfig():
            raise UserError("--mesh is for --model, which is computed on devices")
    if args.samples is not None and args.k is not None:
        raise UserError(
            f"--k {args.k}: samples that were drawn are all used; give --model to draw others"
        )
    if not args.bench and not args.attacks:
        raise UserError("give --bench: a benchmark, several with commas, or `all`")
    if args.attacks and args.samples is not None:
        raise UserError("--attacks asks the judge anew; give --model or --judge, not --samples")
    for name in ("attack_records", "attack_k"):
        if getattr(args, name) is not None and not args.attacks:
            raise UserError(f"{_option(name)} is of --attacks; give that too")
    if args.score_tokens is not None and args.meta is None and args.scalar is None:
        raise UserError(
            "--score-tokens is of the meta RM and the scalar RM; give --meta or --scalar"
        )
    if args.k_meta and args.samples is None:
        if args.meta is None:
            raise UserError("--k-meta is of votes that a meta RM guides; give --meta too")
        k = K if args.k is None else args.k
        if max(args.k_meta) > k:
            raise UserError(f"--k-meta {max(args.k_meta)} of --k {k} samples")
    if not 0 <= args.max_bad_share <= 1:
        raise UserError(f"--max-bad-share {args.max_bad_share} is a share, 0 to 1")
    if not 0 <= args.adaptive_bound < 1:
        raise UserError(
            f"--adaptive-bound {args.adaptive_bound} is a probability, 0 or more and below 1"
        )
    if args.adaptive is not None and not 0 <= args.adaptive < 1:
        raise UserError(f"--adaptive {args.adaptive} is a probability, 0 or more and below 1")
    for name in ("meta", "scalar"):
        if args.adaptive is not None and getattr(args, name) is not None:
            raise UserError(f"--adaptive is for plain votes of a model: leave --{name} out")
    if args.temperature is not None and not args.temperature > 0:
        raise UserError(
            f"--temperature {args.temperature}: samples of a vote need one above 0; -k 0 judges "
            "greedily only"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def resolved(args: Arguments) -> Arguments:
    """The arguments with defaults filled in and `~` in paths expanded."""
    named = {name: getattr(args, name) for name in PATHS}
    paths = {name: expanded(path) for name, path in named.items() if path is not None}
    args = dataclasses.replace(args, **paths)
    k = K if args.k is None else args.k
    return dataclasses.replace(
        args,
        bench=args.bench or "synthetic",
        k=k,
        attack_records=ATTACK_RECORDS if args.attack_records is None else args.attack_records,
        attack_k=min(k, ATTACK_K) if args.attack_k is None else args.attack_k,
        probes=PROBES if args.probes is None else args.probes,
        long_prompts=args.long_prompts or "error",
        cache=args.cache or CACHE,
    )


def check_k_meta(k_meta: Sequence[int], rows: Sequence[Critique], file: Path) -> None:
    """Raise UserError unless the samples have meta scores, and at least max(k_meta) are there."""
    if not k_meta:
        return
    if all(row.meta is None for row in rows):
        raise UserError(f"--k-meta: {file} has no scores of a meta RM; give --model and --meta")
    drawn = max(row.sample for row in rows) + 1
    if max(k_meta) > drawn:
        raise UserError(f"--k-meta {max(k_meta)}: {file} has {drawn} samples a record")


def require_writable(directory: Path, option: str) -> None:
    """Raise UserError if the directory cannot be written or created; creates nothing."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {directory}: {place} is no directory; give another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {directory}: {place} can not be written; give another")
