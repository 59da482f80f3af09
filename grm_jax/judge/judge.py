"""A judge from files: records in, every sample of every record out.

    model folder (+ meta RM folder) -> Judge -> greedy and k sampled critiques, meta scores

What a trained model needs besides its weights (templates, shapes) stands in `grm.json` beside them
(`about.py`); a plain Hugging Face folder gets the defaults.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import grm_jax
from grm_jax import files
from grm_jax.critique import Template, shuffle
from grm_jax.critique.template_set import Scales, TemplateConfig, Templates
from grm_jax.data.collate import Example
from grm_jax.data.examples import meta_example
from grm_jax.data.preferences import Preference
from grm_jax.judge.about import LENGTH_BUCKETS, About, JudgeDefaults
from grm_jax.judge.cache import SampleCache, record_digest
from grm_jax.judge.critiques import AdaptiveK, Critic, Critique, chunks
from grm_jax.judge.prompts import OrderMode, Prompts
from grm_jax.judge.samples import GREEDY, SampleRow
from grm_jax.judge.scalar import score_examples
from grm_jax.metrics import Progress
from grm_jax.model import storage
from grm_jax.model.attention_backends import choose
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import token_ids
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import load_params, param_shardings, read_model_config, require_kind
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.plan import EngineConfig
from grm_jax.tokenizer import ChatTokenizer, TokenizerError, load_tokenizer
from grm_jax.tokenizer.vocabulary import require_rows

log = logging.getLogger("grm_jax")


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """How a judge is sampled."""

    k: int = 8
    """Samples a record, besides the greedy one."""
    temperature: float | None = None
    """Of the k samples; None: what the judge was trained to be sampled at."""
    max_new_tokens: int | None = None
    """Length limit of a critique; None: the judge's own."""
    order: OrderMode = "balanced"
    """How the k samples see the responses."""
    rating: bool = False
    """Rate single responses 1-10 too, with the template for several, as the paper does."""
    seed: int = 0
    greedy: bool = True
    """Also judge once greedily."""
    adaptive: float | None = None
    """Stop sampling a record at this probability of a change of verdict; None: draw all k."""
    threshold: float | None = None
    """With `adaptive`: single responses are decided against it; None: the middle of the range."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A meta RM: parameters with a scalar head, and the template it reads."""

    model: ModelConfig
    params: Params
    template: Template
    buckets: tuple[int, ...]
    batch_size: int = 128
    tokens: int | None = None
    """Most tokens a device scores at once; None: the sampler's `prefill_tokens`."""


class Judge:
    """A generative reward model ready to sample.

    Args:
      model: shape; params: float32 or compute dtype; tokenizer, templates, engine: as trained.
      meta: scores critiques, if given.

    Parameters and meta RM may be functions: they are called when the first sample is drawn, so that
    samples from a cache need no weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params | Callable[[], Params],
        tokenizer: ChatTokenizer,
        mesh: Mesh,
        *,
        templates: TemplateConfig | Templates,
        engine: EngineConfig,
        defaults: JudgeDefaults = JudgeDefaults(),
        meta: Scorer | Callable[[], Scorer] | None = None,
    ):
        self.model = model
        self._params = params
        self._meta = meta
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.templates = templates
        self.defaults = defaults
        self.sampler = Sampler(model, tokenizer.stop_ids, engine, mesh)

    @functools.cached_property
    def params(self) -> Params:
        return self._params() if callable(self._params) else self._params

    @functools.cached_property
    def meta(self) -> Scorer:
        assert self._meta is not None
        found = self._meta() if callable(self._meta) else self._meta
        self.sampler.budget.forget()  # it takes memory that caches were planned with
        return found

    @property
    def stops(self) -> dict[str, int]:
        """The tokens that end a critique, and their ids."""
        ids = self.tokenizer.stop_ids
        return {self.tokenizer.decode([id], show_control=True): id for id in ids}

    @property
    def guided(self) -> bool:
        """Whether a meta RM scores its critiques."""
        return self._meta is not None

    def rows(
        self,
        records: Sequence[Preference],
        options: JudgeOptions,
        progress: Progress | None = None,
        *,
        cache: SampleCache | None = None,
        meta_cache: SampleCache | None = None,
        guided: bool = True,
        chunk: int = 4096,
    ) -> list[SampleRow]:
        """The greedy critique and the k samples of every record, meta scores included.

        Args:
          cache: samples that it holds are not drawn again; new ones are added as they end. Not
            with `options.adaptive`, whose samples depend on one another.
          meta_cache: the same for meta scores: rows of it hold them.
          guided: False leaves the meta RM out.
        """
        if cache is not None and options.adaptive is not None:
            raise ValueError("adaptive sampling can not be cached; leave the cache out")
        rows: list[SampleRow] = []
        before = self.sampler.stats.samples
        for part in chunks(records, chunk):
            digests = {record.id: record_digest(record) for record in part}
            guiding = guided and self._meta is not None
            found = self._chunk(part, options, progress, cache, digests, guiding)
            if guiding:
                found = self._guided(part, found, meta_cache, digests)
            rows += found
        if self.sampler.stats.samples > before:
            log.info("sampler          %s", self.sampler.summary())
        return rows

    def _chunk(
        self,
        records: Sequence[Preference],
        options: JudgeOptions,
        progress: Progress | None,
        cache: SampleCache | None,
        digests: Mapping[str, str],
        guiding: bool,
    ) -> list[SampleRow]:
        """Samples without meta scores; `guiding`: the meta RM will score them."""
        critic = Critic(self.sampler, self.prompts(options))
        key = jax.random.key(options.seed)
        hot = self.sampling(options)
        cold = dataclasses.replace(hot, temperature=0.0)
        rows: dict[tuple[str, int], SampleRow] = {}
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
                progress.update(count, self.sampler.stats.line())

        def keep(sample: int, critique: Critique) -> None:
            row = sample_row(critique, sample)
            rows[row.example_id, sample] = row
            if cache is not None:
                cache.add(digests[row.example_id], row)

        known = len(rows)
        if known:
            total = len(records) * len(wanted)
            log.info("cache            %d of %d samples are there already", known, total)
        params = self.params if missing else {}  # weights are read when they are needed
        if missing and guiding:
            _ = self.meta  # before caches are planned, which get what is free
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
                        each=lambda critique: keep(critique.index, critique),
                    )  # fmt: skip
        finally:  # also when it is stopped
            if cache is not None and len(rows) > known:
                cache.spent(len(rows) - known, time.perf_counter() - started)
        return [
            rows[record.id, sample]
            for sample in wanted
            for record in records
            if (record.id, sample) in rows
        ]

    def prompts(self, options: JudgeOptions) -> Prompts:
        """What the judge reads."""
        templates = self.templates
        if options.rating:
            templates = dataclasses.replace(templates, single=templates.many)
        return Prompts(self.tokenizer, templates, order=options.order, seed=options.seed)

    def sampling(self, options: JudgeOptions) -> SamplingConfig:
        """How the k samples are drawn."""
        temperature, limit = options.temperature, options.max_new_tokens
        return SamplingConfig(
            temperature=self.defaults.temperature if temperature is None else temperature,
            max_new_tokens=self.defaults.max_new_tokens if limit is None else limit,
        )

    def prompt_tokens(self, record: Preference, options: JudgeOptions) -> int:
        """Tokens of a record's longest prompt, over the orders in which samples show it."""
        prompts = self.prompts(options)
        shown = {tuple(range(len(record.responses))), *prompts.orders(record, max(options.k, 1))}
        return max(len(prompts.ids(record, order)) for order in shown)

    def scales(self, options: JudgeOptions) -> Scales:
        """Ranges of the scores that its templates ask for."""
        templates = self.prompts(options)
        return Scales(templates.many.scale, templates.single.scale)

    def prompt_limit(self, options: JudgeOptions) -> int:
        """Most tokens of a prompt that leave room for a critique."""
        return self.model.max_position - self.sampling(options).max_new_tokens

    def about(self, options: JudgeOptions) -> dict[str, Any]:
        """What samples depend on besides weights and records, for a `SampleCache`."""
        templates = {
            name: Template.load(getattr(self.templates, name)).digest for name in ("many", "single")
        }
        return {
            "version": grm_jax.__version__,
            "templates": templates,
            "sampling": dataclasses.asdict(self.sampling(options)),
            "int8": [self.sampler.engine.int8_weights, self.sampler.engine.int8_cache],
            "order": options.order,
            "rating": options.rating,
            "seed": options.seed,
        }

    def _guided(
        self,
        records: Sequence[Preference],
        rows: Sequence[SampleRow],
        cache: SampleCache | None,
        digests: Mapping[str, str],
    ) -> list[SampleRow]:
        """The rows with the meta RM's logits of the readable ones."""
        found: list[SampleRow] = []
        todo: list[int] = []
        for index, row in enumerate(rows):
            held = None if cache is None else cache.get(digests[row.example_id], row.sample)
            found.append(row if held is None else dataclasses.replace(row, meta=held.meta))
            if held is None and row.scores is not None:
                todo.append(index)
        values = self._meta_scores(records, [rows[i] for i in todo]) if todo else []
        for index, value in zip(todo, values, strict=True):
            found[index] = dataclasses.replace(rows[index], meta=value)
            if cache is not None:
                scored = dataclasses.replace(found[index], text="")  # the samples' cache has it
                cache.add(digests[rows[index].example_id], scored)
        if cache is not None:
            cache.flush()
        return found

    def _meta_scores(self, records: Sequence[Preference], rows: Sequence[SampleRow]) -> list[float]:
        """The meta RM's logit of each readable critique."""
        meta, by_id = self.meta, {record.id: record for record in records}
        examples: list[Example] = []
        for row in rows:
            record = by_id[row.example_id]
            shown = shuffle(record.responses, row.order)
            examples.append(
                meta_example(
                    record.turns, shown, row.text, self.tokenizer, meta.template,
                    reference=record.reference, principles=record.principles,
                )
            )  # fmt: skip
        values = score_examples(
            meta.params, meta.model, examples, meta.buckets, meta.batch_size, self.mesh,
            meta.tokens or self.sampler.engine.prefill_tokens,
        )  # fmt: skip
        return values.tolist()


def sample_row(critique: Critique, sample: int) -> SampleRow:
    """A critique as a row; `sample` is its index, or GREEDY."""
    return SampleRow(
        example_id=critique.example_id,
        sample=sample,
        order=critique.order,
        scores=critique.scores,
        failure=critique.failure,
        finish_reason=critique.finish_reason,
        text=critique.text,
        tokens=len(critique.tokens),
    )


def load_scorer(path: str | Path, mesh: Mesh, tokens: int | None = None) -> Scorer:
    """A meta RM from a run directory, its meta_rm stage, a Hugging Face folder, or a repo id.

    Args:
      tokens: most tokens a device scores at once; None: as many as the judge's sampler computes.
    """
    folder = storage.model_folder(path, "meta_rm")
    about, model = About.read(folder), _on(mesh, read_model_config(folder))
    where = param_shardings(param_table(model, num_labels=1), mesh)
    _, params = load_params(folder, shardings=where, dtype=model.compute_dtype)
    buckets = list(about.length_buckets or LENGTH_BUCKETS)
    while buckets[-1] < model.max_position:  # as trained, and up to what it can read
        buckets.append(min(2 * buckets[-1], model.max_position))
    return Scorer(model, params, meta_template(path), tuple(buckets), tokens=tokens)


def meta_template(path: str | Path) -> Template:
    """The template that a meta RM reads."""
    templates = About.read(storage.model_folder(path, "meta_rm")).templates
    return (templates or Templates.load(TemplateConfig())).meta


def load_judge(
    path: str | Path,
    mesh: Mesh,
    *,
    meta: str | Path | None = None,
    score_tokens: int | None = None,
) -> Judge:
    """A judge from a run directory, a stage directory, a Hugging Face folder, or a repo id.

    Raises UserError when model and tokenizer, or judge and meta RM, do not belong together. Weights
    are read when the first sample is drawn.
    """
    folder = storage.model_folder(path)
    require_kind(folder, scalar=False)
    about, model = About.read(folder), _on(mesh, read_model_config(folder))
    tokenizer = load_tokenizer(folder)
    require_rows(tokenizer.vocab_size, model.vocab_size, folder, folder)
    if meta is not None:
        _require_meta(storage.model_folder(meta, "meta_rm"), folder)
    shardings = param_shardings(param_table(model), mesh)
    return Judge(
        model,
        lambda: load_params(folder, shardings=shardings, dtype=model.compute_dtype)[1],
        tokenizer,
        mesh,
        templates=about.templates or TemplateConfig(),
        engine=about.engine or EngineConfig(),
        defaults=about.judge or JudgeDefaults(),
        meta=None if meta is None else lambda: load_scorer(meta, mesh, score_tokens),
    )


def _on(mesh: Mesh, model: ModelConfig) -> ModelConfig:
    """The model with the attention of the devices that it is loaded on."""
    device = mesh.devices.flat[0]
    return model.replace(attention=choose("auto", device.platform, device.device_kind))


def _require_meta(meta: Path, judge: Path) -> None:
    """Raise UserError unless `meta` is a meta RM that reads the ids that the judge writes."""
    require_kind(meta, scalar=True)
    ids, own = token_ids(judge), token_ids(meta)
    rows = read_model_config(meta).vocab_size
    require_rows(max(ids.values(), default=-1) + 1, rows, judge, meta)
    # Of one vocabulary in two formats, pieces may be written in two ways.
    alike = files.there(meta / "tokenizer.json") == files.there(judge / "tokenizer.json")
    if own and alike and own != ids:
        other = sorted(own.items() ^ ids.items(), key=lambda pair: pair[1])[0][1]
        raise TokenizerError(
            f"{meta}: its tokenizer is not that of {judge} (id {other} differs, for one): the meta "
            "RM would read other words than the judge wrote; give one that was trained with it"
        )


def model_info(model: Path) -> dict[str, Any]:
    """What is known of a model folder; `trained` is False for one that no stage has written.

    A Hugging Face folder counts as trained unless this project's own tools made it at random; its
    figures speak for themselves, so `trained` is None there: not known.
    """
    folder = storage.model_folder(model)
    about = About.read(folder)
    return {"path": str(folder), "stage": about.stage, "trained": about.trained}
