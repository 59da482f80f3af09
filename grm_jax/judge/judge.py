"""The judge: a query and responses in, a verdict out; or records in, all their critiques out.

    model folder (+ meta RM folder) -> Judge.load
        -> score(query, responses)    a verdict on one query, labels or not
        -> sample(records)            greedy and k sampled critiques of every record, meta scores

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
from grm_jax.critique import Template, Turn, Vote, vote
from grm_jax.critique.template_set import Scales, TemplateConfig, Templates
from grm_jax.data.critiques import GREEDY, Critique
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.judge.about import About, JudgeDefaults
from grm_jax.judge.cache import SampleCache, record_digest
from grm_jax.judge.critiques import AdaptiveK, Critic, Rollout, chunks
from grm_jax.judge.meta import MetaRM, load_meta_rm, require_meta
from grm_jax.judge.prompts import OrderMode, Prompts
from grm_jax.metrics import Progress
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import (
    load_params,
    model_folder,
    on_devices,
    param_shardings,
    read_model_config,
    require_kind,
)
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.plan import EngineConfig
from grm_jax.tokenizer import ChatTokenizer, load_tokenizer
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
class Judgement:
    """What k critiques say of a query's responses.

    Attributes:
      verdict: the vote: totals and means by response, the best, how far critiques agree.
      critiques: every sample, readable or not.
    """

    verdict: Vote
    critiques: tuple[Critique, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """The mean score of each response; empty where no critique was readable."""
        return self.verdict.mean

    @property
    def best(self) -> int | None:
        """Index of the response with the largest sum; None where several share it or none has."""
        return self.verdict.best[0] if len(self.verdict.best) == 1 else None

    @property
    def failure(self) -> str | None:
        """Why there are no scores: the commonest failure of the critiques; None if there are."""
        if self.verdict.used:
            return None
        return collections.Counter(str(row.failure) for row in self.critiques).most_common(1)[0][0]


class Judge:
    """A generative reward model ready to sample.

    Args:
      model: shape; params: float32 or compute dtype; tokenizer, templates, engine: as trained.
      meta: scores critiques, if given.

    Parameters and meta RM may be functions: they are called when the first sample is drawn, so that
    samples from a cache need no weights. Parameters that a function returns become the judge's own:
    they are deleted when they are laid out for decoding. Those given as they are stay, and each
    rollout has a second copy.
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
        meta: MetaRM | Callable[[], MetaRM] | None = None,
    ):
        self.model = model
        self._params = params
        self._meta = meta
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.templates = templates
        self.defaults = defaults
        self.sampler = Sampler(model, tokenizer.stop_ids, engine, mesh)

    @classmethod
    def load(
        cls,
        path: str | Path,
        meta: str | Path | None = None,
        *,
        mesh: Mesh | None = None,
        score_tokens: int | None = None,
    ) -> Judge:
        """A judge from a run directory, a stage directory, a Hugging Face folder, or a repo id.

        Args:
          meta: a meta RM, from the same kinds of places.
          mesh: how devices are used; None: all of them, each with the whole weights.
          score_tokens: most tokens a device scores at once with the meta RM; None: as many as the
            sampler computes.

        Raises UserError when model and tokenizer, or judge and meta RM, do not belong together.
        Weights are read when the first sample is drawn.
        """
        mesh = mesh or make_mesh()
        folder = model_folder(path)
        require_kind(folder, scalar=False)
        about, model = About.read(folder), on_devices(read_model_config(folder), mesh)
        tokenizer = load_tokenizer(folder)
        require_rows(tokenizer.vocab_size, model.vocab_size, folder, folder)
        if meta is not None:
            require_meta(model_folder(meta, "meta_rm"), folder)
        shardings = param_shardings(param_table(model), mesh)
        return cls(
            model,
            lambda: load_params(folder, shardings=shardings, dtype=model.compute_dtype)[1],
            tokenizer,
            mesh,
            templates=about.templates or TemplateConfig(),
            engine=about.engine or EngineConfig(),
            defaults=about.judge or JudgeDefaults(),
            meta=None if meta is None else lambda: load_meta_rm(meta, mesh, score_tokens),
        )

    def score(
        self,
        query: str | Sequence[Turn],
        responses: Sequence[str],
        k: int = 8,
        *,
        reference: str | None = None,
        principles: Sequence[str] | None = None,
        k_meta: int | None = None,
        options: JudgeOptions = JudgeOptions(),
    ) -> Judgement:
        """The verdict of k sampled critiques on n >= 1 responses to a query.

        Args:
          query: the user's query, or a conversation whose last turn is the user's.
          k_meta: critiques that vote, of those the meta RM ranks highest; None: half of k.
          options: temperature, seed, length limit; `k` replaces its own, and there is no greedy
            critique.

        Raises UserError for a query, responses or prompts that can not be judged.
        """
        turns = (Turn(role="user", content=query),) if isinstance(query, str) else tuple(query)
        record = Preference(
            "query", turns, tuple(responses), (0.0,) * len(responses), reference=reference,
            principles=None if principles is None else tuple(principles),
        )  # fmt: skip
        options = dataclasses.replace(options, k=k, greedy=False)
        needed, limit = self.prompt_tokens(record, options), self.prompt_limit(options)
        if needed > limit:
            raise UserError(
                f"the prompt has {needed:,} tokens, and {limit:,} leave room for a critique; "
                "shorten the texts, or allow a critique fewer tokens"
            )
        rows = self.sample([record], options)
        meta = [row.meta for row in rows] if self.guided else None
        return Judgement(vote([row.scores for row in rows], meta=meta, k_meta=k_meta), tuple(rows))

    @functools.cached_property
    def params(self) -> Params:
        return self.sampler.take(self._params()) if callable(self._params) else self._params

    @functools.cached_property
    def meta(self) -> MetaRM:
        assert self._meta is not None
        meta = self._meta() if callable(self._meta) else self._meta
        self.sampler.budget.forget()  # it takes memory that caches were planned with
        return meta

    @property
    def stops(self) -> dict[str, int]:
        """The tokens that end a critique, and their ids."""
        ids = self.tokenizer.stop_ids
        return {self.tokenizer.decode([id], show_control=True): id for id in ids}

    @property
    def guided(self) -> bool:
        """Whether a meta RM scores its critiques."""
        return self._meta is not None

    def sample(
        self,
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
        before = self.sampler.stats.samples
        for part in chunks(records, chunk):
            digests = {record.id: record_digest(record) for record in part}
            guiding = guided and self._meta is not None
            critiques = self._chunk(part, options, progress, cache, digests, guiding)
            if guiding:
                critiques = self._guided(part, critiques, meta_cache, digests)
            rows += critiques
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
    ) -> list[Critique]:
        """Samples without meta scores; `guiding`: the meta RM will score them."""
        critic = Critic(self.sampler, self.prompts(options))
        key = jax.random.key(options.seed)
        hot = self.sampling(options)
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
                progress.update(count, self.sampler.stats.line())

        def keep(sample: int, critique: Rollout) -> None:
            row = critique.plain(sample)
            rows[row.example_id, sample] = row
            if cache is not None:
                cache.add(digests[row.example_id], row)

        cached = len(rows)
        if cached:
            total = len(records) * len(wanted)
            log.info("cache            %d of %d samples are there already", cached, total)
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
            values = self.meta.scores(
                records, [rows[i] for i in todo], self.tokenizer, self.mesh,
                self.sampler.engine.prefill_tokens,
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
