"""A model as the judge of a benchmark: long prompts, samples from a cache or drawn, probes.

model folder (+ meta RM, scalar RM) -> BenchmarkSampler -> fit(records)
    -> judge(records) -> rows, probe rows
    -> scalar(records) -> scores of the scalar RM
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grm_jax import files
from grm_jax.critique import Template
from grm_jax.critique.template_set import Scales
from grm_jax.data.critiques import Critique
from grm_jax.data.examples import meta_example
from grm_jax.data.long_prompts import LongPrompts
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.judge.about import model_info
from grm_jax.judge.cache import SampleCache, fingerprint
from grm_jax.judge.judge import Judge
from grm_jax.judge.meta import meta_template
from grm_jax.judge.prompts import OrderMode, Prompts
from grm_jax.judge.request import JudgeOptions
from grm_jax.metrics import Progress
from grm_jax.model import storage
from grm_jax.model.options import ComputeDtype
from grm_jax.model.storage import read_model_config
from grm_jax.scoring.benchmark import Benchmark
from grm_jax.scoring.bias import identical
from grm_jax.scoring.items import BenchmarkRecords
from grm_jax.scoring.long_prompts import fit
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.scalar_rm import ScalarScorer
from grm_jax.scoring.scalar_scores import ScalarScores


class BenchmarkSampler:
    """A judge, its meta RM and its scalar RM, loaded from files, with a cache of what they say.

    Args:
      model, meta, scalar: as `Judge.load` takes them.
      options: how the judge is sampled; order and rating follow the benchmark.
      cache: the directory of the caches.
      probes: the number of records with identical responses that are judged too.
      long_prompts, max_prompt_tokens: see `data.long_prompts`.
      mesh: how devices are used; None: each device has the whole weights.
      score_tokens: the maximum number of tokens that a device scores at once; None: as many as the
        sampler prefills.
      compute_dtype: what its models are computed in (`model.compute_dtype`).

    Attributes:
      about: what results.json says about the model.
    """

    def __init__(
        self,
        model: Path,
        options: JudgeOptions,
        *,
        meta: Path | None = None,
        scalar: Path | None = None,
        cache: Path,
        probes: int = 0,
        long_prompts: LongPrompts = "error",
        max_prompt_tokens: int | None = None,
        mesh: Mesh | None = None,
        score_tokens: int | None = None,
        compute_dtype: ComputeDtype = "auto",
    ):
        self._judge = Judge.load(
            model, meta, mesh=mesh, score_tokens=score_tokens, compute_dtype=compute_dtype
        )
        self.about = {**model_info(model), "stops": self._judge.stops}
        self._options, self._cache, self._probes = options, cache, probes
        self._policy: LongPrompts = long_prompts
        self._most = max_prompt_tokens
        memory = cache / "digests.json"
        self._weights = fingerprint(storage.model_folder(model), memory)
        self._meta: dict[str, str] = {}
        self._meta_limit: tuple[Template, int] | None = None
        if meta is not None:
            folder, template = storage.model_folder(meta, "meta_rm"), meta_template(meta)
            self._meta = {
                "meta": fingerprint(folder, memory),
                "template": template.digest,
                # Earlier scores were of prompts without a record's reference and principles.
                "reads": "query, responses, reference, principles",
            }
            self._meta_limit = (template, read_model_config(folder).max_position)
        self._caches: dict[str, SampleCache] = {}
        self._scalar: ScalarScorer | None = None
        if scalar is not None:
            self._scalar = ScalarScorer(
                scalar,
                cache=cache,
                mesh=self._judge.mesh,
                compute_dtype=compute_dtype,
                score_tokens=score_tokens or self._judge.sampler.engine.prefill_tokens,
            )

    def options(self, benchmark: Benchmark, rules: Rules) -> JudgeOptions:
        order: OrderMode = self._options.order if rules.order == "random" else "given"
        return dataclasses.replace(
            self._options, order=order, rating=benchmark.rating, threshold=rules.threshold
        )

    def fit(
        self, benchmark: Benchmark, records: BenchmarkRecords, rules: Rules
    ) -> BenchmarkRecords:
        """The records whose prompts fit, after applying the policy for long prompts."""
        options = self.options(benchmark, rules)
        limit, room = self._limit(options), "a smaller --max-new-tokens"
        if limit < 1:
            new = self._judge.sampling(options).max_new_tokens
            raise UserError(
                f"critiques of up to {new:,} tokens leave no room for a prompt: the model has "
                f"{self._judge.model.max_position:,} positions; give {room}"
            )
        if limit == self._most:
            room = "a larger --max-prompt-tokens"
        return fit(records, lambda record: self._tokens(record, options), limit, self._policy, room)

    def _limit(self, options: JudgeOptions) -> int:
        limit = self._judge.prompt_limit(options)
        return limit if self._most is None else min(limit, self._most)

    def _tokens(self, record: Preference, options: JudgeOptions) -> int:
        """Tokens of the record's longest prompt; more if a limit of another model is tighter.

        The meta RM reads the record and a critique, and the scalar RM the record with each
        response, so that these too must fit their positions.
        """
        tokens = self._judge.prompt_tokens(record, options)
        if self._scalar is not None:
            above = self._scalar.tokens(record) - self._scalar.limit
            tokens = max(tokens, self._limit(options) + above)
        if self._meta_limit is None:
            return tokens
        template, most = self._meta_limit
        example = meta_example(
            record.turns, record.responses, "", self._judge.tokenizer, template,
            reference=record.reference, principles=record.principles,
        )  # fmt: skip
        spare = (
            most
            - self._judge.sampling(options).max_new_tokens
            - len(example.prompt)
            - len(example.completion)
        )
        return max(tokens, self._limit(options) - spare)

    def scales(self, benchmark: Benchmark, rules: Rules) -> Scales:
        """The ranges of the judge's scores."""
        return self._judge.scales(self.options(benchmark, rules))

    def judge(
        self, benchmark: Benchmark, records: Sequence[Preference], rules: Rules
    ) -> tuple[list[Critique], list[Critique]]:
        """The critiques of the records, and those of the probes."""
        options = self.options(benchmark, rules)
        asked = dataclasses.replace(options, k=min(options.k, 8), order="balanced")
        probes = [probe for probe in identical(records, self._probes) if self.fits(probe, asked)]
        rows = self.ask(f"judging {benchmark.name}", records, options, guided=True)
        return rows, self.ask(f"identical pairs {benchmark.name}", probes, asked)

    def scalar(self, benchmark: Benchmark, records: Sequence[Preference]) -> ScalarScores | None:
        """The scalar RM's scores of the records; None without a scalar RM."""
        if self._scalar is None:
            return None
        return self._scalar.scores(f"scalar RM {benchmark.name}", records)

    def ask(
        self, title: str, records: Sequence[Preference], options: JudgeOptions, guided: bool = False
    ) -> list[Critique]:
        """Samples of records, from the cache or drawn.

        title: of the progress. guided: the meta RM scores them.
        """
        progress = Progress(title, len(records) * (options.k + options.greedy))
        cache, meta_cache = self._open(options)
        if not records:
            return []
        return self._judge.sample(
            records, options, progress, cache=cache, meta_cache=meta_cache if guided else None,
            guided=guided,
        )  # fmt: skip

    def fits(self, record: Preference, options: JudgeOptions) -> bool:
        """Whether its prompts leave room for a critique."""
        return self._judge.prompt_tokens(record, options) <= self._limit(options)

    def prompts(self, options: JudgeOptions) -> Prompts:
        """What it reads: templates and tokenizer."""
        return self._judge.prompts(options)

    def provenance(self, options: JudgeOptions) -> dict[str, Any]:
        """Which judge it is: place, stage, digests of weights, templates and training data."""
        folder = Path(self.about["path"])
        found = {**self.about, "weights": self._weights, **self._judge.about(options)}
        made_from = folder.parent / "config.json"  # of the stage that wrote the model
        if self.about.get("stage") and made_from.is_file():
            found["made from"] = files.read_json(made_from).get("content")
        if self._meta:
            found["meta"] = self._meta["meta"]
        if self._scalar is not None:
            found["scalar"] = self._scalar.weights
        return found

    def seconds_per_sample(self, benchmark: Benchmark, rules: Rules) -> float | None:
        """The mean cost of a sample, as the cache has recorded it; None if unknown."""
        cache, _ = self._open(self.options(benchmark, rules))
        return None if cache is None else cache.seconds_per_sample()

    def kept(self) -> int:
        """The number of samples in the caches of this run."""
        return sum(len(cache) for cache in self._caches.values())

    def _open(self, options: JudgeOptions) -> tuple[SampleCache | None, SampleCache | None]:
        """The caches of samples and of meta scores; None for adaptive sampling."""
        if options.adaptive is not None:
            return None, None
        about = {**self._judge.about(options), "weights": self._weights}
        caches: list[SampleCache | None] = []
        for contents in (about, {**about, **self._meta}):
            if caches and not self._meta:
                caches.append(None)
                continue
            name = json.dumps(contents, sort_keys=True)
            if name not in self._caches:
                self._caches[name] = SampleCache(self._cache, contents)
            caches.append(self._caches[name])
        return caches[0], caches[1]
