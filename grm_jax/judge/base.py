"""What a judge is made of: weights, prompts, settings, and the models that stand beside it.

`judge.Judge` adds loading and judging; sessions and samples of records need only this.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

import grm_jax
from grm_jax.critique import Template
from grm_jax.critique.template_set import Scales, TemplateConfig, Templates
from grm_jax.data.preferences import Preference
from grm_jax.judge.labels import LabelReader
from grm_jax.judge.meta import MetaRM
from grm_jax.judge.prompts import Prompts
from grm_jax.judge.request import JudgeDefaults, JudgeOptions, ScoreOptions
from grm_jax.judge.rows import row_lengths
from grm_jax.judge.scalar import ScalarRM
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.tokenizer import ChatTokenizer


class JudgeModel:
    """A generative reward model, ready to sample.

    Args:
      model: the shape of the model.
      params: in float32 or in the compute dtype.
      tokenizer, templates, engine: those of the training.
      defaults: how critiques are sampled where nobody says otherwise.
      meta: scores critiques, if given.
      scalar: scores responses, if given.
      fingerprint: gives a digest of weights and templates, for verdicts.

    Parameters, meta RM and scalar RM may be functions: they are called when the first sample is
    drawn, so that samples from a cache need no weights. Parameters that a function returns become
    the judge's own: they are deleted when they are laid out for decoding. Those given as they are
    stay, and each session of the sampler has a second copy.
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
        scalar: ScalarRM | Callable[[], ScalarRM] | None = None,
        fingerprint: Callable[[], str] = lambda: "",
    ):
        self.model = model
        self._params = params
        self._meta = meta
        self._scalar = scalar
        self._fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.templates = templates
        self.defaults = defaults
        self.sampler = Sampler(model, tokenizer.stop_ids, engine, mesh)

    @functools.cached_property
    def params(self) -> Params:
        return self.sampler.take(self._params()) if callable(self._params) else self._params

    @functools.cached_property
    def meta(self) -> MetaRM:
        assert self._meta is not None
        meta = self._meta() if callable(self._meta) else self._meta
        self.sampler.budget.forget()  # it takes memory that caches were planned with
        return meta

    @functools.cached_property
    def scalar(self) -> ScalarRM:
        assert self._scalar is not None
        scalar = self._scalar() if callable(self._scalar) else self._scalar
        self.sampler.budget.forget()  # it takes memory that caches were planned with
        return scalar

    def load_reward_models(self) -> None:
        """Load meta RM and scalar RM, if there are any."""
        if self.guided:
            _ = self.meta
        if self.has_scalar:
            _ = self.scalar

    @property
    def has_scalar(self) -> bool:
        """Whether a scalar RM scores responses beside it."""
        return self._scalar is not None

    @functools.cached_property
    def labels(self) -> LabelReader:
        """Reads the probabilities of chosen tokens behind prompts."""
        engine = self.sampler.engine
        return LabelReader(
            self.model, self.params, self.tokenizer, self.mesh,
            row_lengths((engine.page,), self.model), tokens=engine.prefill_tokens,
        )  # fmt: skip

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of weights, meta RM, scalar RM and templates; "" where it is not known."""
        return self._fingerprint()

    @property
    def stops(self) -> dict[str, int]:
        """The tokens that end a critique, and their ids."""
        ids = self.tokenizer.stop_ids
        return {self.tokenizer.decode([id], show_control=True): id for id in ids}

    @property
    def guided(self) -> bool:
        """Whether a meta RM scores its critiques."""
        return self._meta is not None

    def prompts(self, options: JudgeOptions | ScoreOptions) -> Prompts:
        """What the judge reads."""
        templates = self.templates
        if options.rating:
            templates = dataclasses.replace(templates, single=templates.many)
        return Prompts(self.tokenizer, templates, order=options.order, seed=options.seed)

    def sampling(self, options: JudgeOptions | ScoreOptions) -> SamplingConfig:
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
            "compute_dtype": self.model.compute_dtype,
            "int8": [self.sampler.engine.int8_weights, self.sampler.engine.int8_cache],
            "order": options.order,
            "rating": options.rating,
            "seed": options.seed,
        }
