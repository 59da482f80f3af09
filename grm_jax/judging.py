"""A judge from files: records in, every sample of every record out.

    model folder (+ meta RM folder) -> Judge -> greedy and k sampled critiques, meta scores

What a trained model needs besides its weights (templates, shapes) stands in `grm.json` beside them;
a plain Hugging Face folder gets the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grm_jax import checkpoint
from grm_jax.benchmarks.samples import GREEDY, SampleRow
from grm_jax.config import JudgeDefaults
from grm_jax.critique import Template, shuffle
from grm_jax.data.loader import Example
from grm_jax.data.preferences import Preference
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, param_table
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.critic import AdaptiveK, Critic, Critique, OrderMode, TemplateConfig, chunks
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.plan import EngineConfig
from grm_jax.sampler.scoring import score_examples
from grm_jax.tokenizer import ChatTokenizer, load_tokenizer
from grm_jax.training.examples import meta_example
from grm_jax.training.run import load_params, read_model_config
from grm_jax.training.step import param_shardings

log = logging.getLogger("grm_jax")

# Called with how many samples were finished since the last call, and figures to show.
ProgressUpdate = Callable[[int, Mapping[str, float]], None]


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
    seed: int = 0
    greedy: bool = True
    """Also judge once greedily."""
    adaptive: float | None = None
    """Stop sampling a record at this probability of a change of verdict; None: draw all k."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A meta RM: parameters with a scalar head, and the template it reads."""

    model: ModelConfig
    params: Params
    template: Template
    buckets: tuple[int, ...]
    batch_size: int = 128


class Judge:
    """A generative reward model ready to sample.

    Args:
      model: shape; params: float32 or compute dtype; tokenizer, templates, engine: as trained.
      meta: scores critiques, if given.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: ChatTokenizer,
        mesh: Mesh,
        *,
        templates: TemplateConfig,
        engine: EngineConfig,
        defaults: JudgeDefaults = JudgeDefaults(),
        meta: Scorer | None = None,
    ):
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.templates = templates
        self.defaults = defaults
        self.meta = meta
        self.sampler = Sampler(model, tokenizer.stop_ids, engine, mesh)

    def rows(
        self,
        records: Sequence[Preference],
        options: JudgeOptions,
        progress: ProgressUpdate | None = None,
        chunk: int = 4096,
    ) -> list[SampleRow]:
        """The greedy critique and the k samples of every record, meta scores included."""

        def advance(count: int) -> None:
            if progress is not None:
                progress(count, self.sampler.stats.line())

        critic = Critic(
            self.sampler, self.tokenizer, self.templates, order=options.order, seed=options.seed
        )
        key = jax.random.key(options.seed)
        temperature, limit = options.temperature, options.max_new_tokens
        hot = SamplingConfig(
            temperature=self.defaults.temperature if temperature is None else temperature,
            max_new_tokens=limit or self.defaults.max_new_tokens,
        )
        cold = dataclasses.replace(hot, temperature=0.0)
        rows: list[SampleRow] = []
        for part in chunks(records, chunk):
            found: list[tuple[int, Critique]] = []
            if options.greedy:
                greedy = critic.critiques(self.params, part, [0], cold, key, progress=advance)
                found += [(GREEDY, c) for group in greedy.values() for c in group]
            if options.k:
                drawn = critic.critiques(
                    self.params,
                    part,
                    range(options.k),
                    hot,
                    key,
                    adaptive=None if options.adaptive is None else AdaptiveK(options.adaptive),
                    progress=advance,
                )
                found += [(c.index, c) for group in drawn.values() for c in group]
            scores = self._meta_scores(part, [c for _, c in found])
            rows += [
                SampleRow(
                    example_id=critique.example_id,
                    sample=sample,
                    order=critique.order,
                    scores=critique.scores,
                    failure=critique.failure,
                    finish_reason=critique.finish_reason,
                    text=critique.text,
                    meta=score,
                    tokens=len(critique.tokens),
                )
                for (sample, critique), score in zip(found, scores, strict=True)
            ]
        log.info("sampler          %s", self.sampler.summary())
        return rows

    def _meta_scores(
        self, records: Sequence[Preference], critiques: Sequence[Critique]
    ) -> list[float | None]:
        """The meta RM's logit of each readable critique; None without one."""
        if self.meta is None:
            return [None] * len(critiques)
        meta, by_id = self.meta, {record.id: record for record in records}
        readable = [i for i, critique in enumerate(critiques) if critique.scores is not None]
        examples: list[Example] = []
        for i in readable:
            critique = critiques[i]
            record = by_id[critique.example_id]
            shown = shuffle(record.responses, critique.order)
            examples.append(
                meta_example(record.turns, shown, critique.text, self.tokenizer, meta.template)
            )
        values = score_examples(
            meta.params, meta.model, examples, meta.buckets, meta.batch_size, self.mesh
        )
        scores: list[float | None] = [None] * len(critiques)
        for i, value in zip(readable, values.tolist(), strict=True):
            scores[i] = value
        return scores


def read_about(path: Path) -> dict[str, Any]:
    """`grm.json` of a model folder; {} for a plain one."""
    file = path / checkpoint.ABOUT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def load_scorer(path: str | Path, mesh: Mesh) -> Scorer:
    """A meta RM from a run directory, its meta_rm stage, or a Hugging Face folder."""
    folder = checkpoint.model_folder(path, "meta_rm")
    about, model = read_about(folder), read_model_config(folder)
    table = param_table(model, num_labels=1)
    _, params = load_params(folder, shardings=param_shardings(table, mesh))
    return Scorer(
        model,
        params,
        Template.load(about.get("templates", {}).get("meta", TemplateConfig().meta)),
        tuple(about.get("length_buckets", (1024, 2048, 4096, 8192))),
    )


def load_judge(path: str | Path, mesh: Mesh, *, meta: str | Path | None = None) -> Judge:
    """A judge from a run directory, a stage directory, or a Hugging Face folder."""
    folder = checkpoint.model_folder(path)
    about, model = read_about(folder), read_model_config(folder)
    engine = about.get("engine", {})
    unknown = engine.keys() - {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown:
        raise ValueError(
            f"{folder / checkpoint.ABOUT_FILE}: engine has the fields {sorted(unknown)}, which "
            "this version does not know; delete them there"
        )
    _, params = load_params(folder, shardings=param_shardings(param_table(model), mesh))
    return Judge(
        model,
        params,
        load_tokenizer(folder),
        mesh,
        templates=TemplateConfig(**about.get("templates", {})),
        engine=EngineConfig(**engine),
        defaults=JudgeDefaults(**about.get("judge", {})),
        meta=None if meta is None else load_scorer(meta, mesh),
    )


def sample_rows(
    model: Path,
    records: Sequence[Preference],
    options: JudgeOptions,
    progress: ProgressUpdate,
    *,
    meta: Path | None = None,
) -> list[SampleRow]:
    """Load a judge on all devices and sample it: a greedy row and k sampled ones a record."""
    return load_judge(model, make_mesh(), meta=meta).rows(records, options, progress)


def model_info(model: Path) -> dict[str, Any]:
    """What is known of a model folder; `trained` is False for one that no stage has written.

    A Hugging Face folder counts as trained unless this project's own tools made it at random; its
    figures speak for themselves, so `trained` is None there: not known.
    """
    folder = checkpoint.model_folder(model)
    about = read_about(folder)
    return {"path": str(folder), "stage": about.get("stage"), "trained": about.get("trained")}
