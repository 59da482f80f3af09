"""All critiques of many records: what evaluation asks a judge for.

    records -> those in a cache | those drawn now -> (meta RM) -> `Critique`s, in the records' order

Samples and meta scores are kept as they end, and are not drawn again.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import jax

from grm_jax.data.critiques import GREEDY, Critique
from grm_jax.data.preferences import Preference
from grm_jax.judge.base import JudgeModel
from grm_jax.judge.cache import SampleCache, record_digest
from grm_jax.judge.critiques import AdaptiveK, Critic, Rollout, chunks
from grm_jax.judge.request import JudgeOptions
from grm_jax.metrics import Progress

log = logging.getLogger("grm_jax")


def sample_records(
    judge: JudgeModel,
    records: Sequence[Preference],
    options: JudgeOptions,
    progress: Progress | None = None,
    *,
    cache: SampleCache | None = None,
    meta_cache: SampleCache | None = None,
    guided: bool = True,
    chunk: int = 4096,
) -> list[Critique]:
    """The greedy critique and the k samples of every record, meta scores included.

    Args:
      cache: samples that it holds are not drawn again; new ones are added as they end. Not
        with `options.adaptive`, whose samples depend on one another.
      meta_cache: the same for meta scores: rows of it hold them.
      guided: False leaves the meta RM out.
    """
    if cache is not None and options.adaptive is not None:
        raise ValueError("adaptive sampling can not be cached; leave the cache out")
    rows: list[Critique] = []
    before = judge.sampler.stats.samples
    for part in chunks(records, chunk):
        digests = {record.id: record_digest(record) for record in part}
        guiding = guided and judge.guided
        critiques = _critiques(judge, part, options, progress, cache, digests, guiding)
        if guiding:
            critiques = _guided(judge, part, critiques, meta_cache, digests)
        rows += critiques
    if judge.sampler.stats.samples > before:
        log.info("sampler          %s", judge.sampler.summary())
    return rows


def _critiques(
    judge: JudgeModel,
    records: Sequence[Preference],
    options: JudgeOptions,
    progress: Progress | None,
    cache: SampleCache | None,
    digests: Mapping[str, str],
    guiding: bool,
) -> list[Critique]:
    """Samples without meta scores; `guiding`: the meta RM will score them."""
    critic = Critic(judge.sampler, judge.prompts(options))
    key = jax.random.key(options.seed)
    hot = judge.sampling(options)
    cold = dataclasses.replace(hot, temperature=0.0)
    rows: dict[tuple[str, int], Critique] = {}
    missing: dict[tuple[int, ...], list[Preference]] = collections.defaultdict(list)
    wanted = [*([GREEDY] if options.greedy else []), *range(options.k)]
    for record in records:
        held = {
            sample: row
            for sample in wanted
            if cache is not None and (row := cache.get(digests[record.id], sample)) is not None
        }
        rows |= {(record.id, sample): row for sample, row in held.items()}
        if left := tuple(sample for sample in wanted if sample not in held):
            missing[left].append(record)
        if held and progress is not None:
            progress.skip(len(held))

    def advance(count: int) -> None:
        if progress is not None:
            progress.update(count, judge.sampler.stats.line())

    def keep(sample: int, critique: Rollout) -> None:
        row = critique.plain(sample)
        rows[row.example_id, sample] = row
        if cache is not None:
            cache.add(digests[row.example_id], row)

    cached = len(rows)
    if cached:
        total = len(records) * len(wanted)
        log.info("cache            %d of %d samples are there already", cached, total)
    params = judge.params if missing else {}  # weights are read when they are needed
    if missing and guiding:
        _ = judge.meta  # before caches are planned, which get what is free
    adaptive = None
    if options.adaptive is not None:
        adaptive = AdaptiveK(options.adaptive, threshold=options.threshold)
    started = time.perf_counter()
    try:
        for left, part in missing.items():
            if GREEDY in left:
                critic.critiques(
                    params, part, [0], cold, key, progress=advance,
                    each=lambda critique: keep(GREEDY, critique),
                )  # fmt: skip
            if samples := [sample for sample in left if sample != GREEDY]:
                critic.critiques(
                    params, part, samples, hot, key, progress=advance,
                    adaptive=adaptive,
                    each=lambda critique: keep(critique.sample, critique),
                )  # fmt: skip
    finally:  # also when it is stopped
        if cache is not None and len(rows) > cached:
            cache.spent(len(rows) - cached, time.perf_counter() - started)
    return [
        rows[record.id, sample]
        for sample in wanted
        for record in records
        if (record.id, sample) in rows
    ]


def _guided(
    judge: JudgeModel,
    records: Sequence[Preference],
    rows: Sequence[Critique],
    cache: SampleCache | None,
    digests: Mapping[str, str],
) -> list[Critique]:
    """The rows with the meta RM's logits of the readable ones."""
    scored_rows: list[Critique] = []
    todo: list[int] = []
    for index, row in enumerate(rows):
        held = None if cache is None else cache.get(digests[row.example_id], row.sample)
        scored_rows.append(row if held is None else dataclasses.replace(row, meta=held.meta))
        if held is None and row.scores is not None:
            todo.append(index)
    values: list[float] = []
    if todo:
        values = judge.meta.scores(
            records, [rows[i] for i in todo], judge.tokenizer, judge.mesh,
            judge.sampler.engine.prefill_tokens,
        )  # fmt: skip
    for index, value in zip(todo, values, strict=True):
        scored_rows[index] = dataclasses.replace(rows[index], meta=value)
        if cache is not None:
            # Without the text, which is in the cache of samples.
            scored = dataclasses.replace(scored_rows[index], text="")
            cache.add(digests[rows[index].example_id], scored)
    if cache is not None:
        cache.flush()
    return scored_rows
