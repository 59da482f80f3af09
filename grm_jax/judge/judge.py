"""The judge: a query and responses in, a verdict out; or records in, all their critiques out.

    model folder (+ meta RM, scalar RM) -> Judge.load
        -> score(query, responses)    the verdict on one query
        -> score_many(requests)       verdicts of many, in one batch (`stream`: as they end)
        -> sample(records)            greedy and k sampled critiques of every record, meta scores

What a trained model needs besides its weights (templates, shapes) stands in `grm.json` beside them
(`about.py`); a plain Hugging Face folder gets the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.judge.about import About
from grm_jax.judge.base import JudgeModel
from grm_jax.judge.cache import fingerprint
from grm_jax.judge.meta import load_meta_rm, require_meta
from grm_jax.judge.prepared import Dealt, Whole, prepare
from grm_jax.judge.records import sample_records
from grm_jax.judge.request import JudgeDefaults, JudgeOptions, JudgeRequest, ScoreOptions
from grm_jax.judge.scalar import load_scalar_rm
from grm_jax.judge.session import JudgeSession
from grm_jax.judge.verdict import Verdict
from grm_jax.metrics import Progress
from grm_jax.model.options import ComputeDtype
from grm_jax.model.params import param_table
from grm_jax.model.storage import (
    load_params,
    model_folder,
    on_devices,
    param_shardings,
    read_model_config,
    require_kind,
)
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.options import EngineConfig
from grm_jax.sampler.plan import power_of_two
from grm_jax.tokenizer import load_tokenizer
from grm_jax.tokenizer.vocabulary import require_rows


class Judge(JudgeModel):
    """A generative reward model: load it and ask it for verdicts. Its parts: see `JudgeModel`."""

    _session: JudgeSession | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        meta: str | Path | None = None,
        scalar: str | Path | None = None,
        *,
        mesh: Mesh | None = None,
        score_tokens: int | None = None,
        compute_dtype: ComputeDtype = "auto",
    ) -> Judge:
        """A judge from a run directory, a stage directory, a Hugging Face folder, or a repo id.

        Args:
          meta: a meta RM, from the same kinds of places. scalar: a scalar RM, likewise.
          mesh: how devices are used; None: all of them, each with the whole weights.
          score_tokens: most tokens a device scores at once with the meta RM; None: as many as the
            sampler computes.
          compute_dtype: what all of its models are computed in (`model.compute_dtype`).

        Raises UserError when model and tokenizer, or judge and meta RM, do not belong together.
        Weights are read when the first sample is drawn.
        """
        mesh = mesh or make_mesh()
        folder = model_folder(path)
        require_kind(folder, scalar=False)
        about = About.read(folder)
        model = on_devices(read_model_config(folder), mesh, compute_dtype)
        tokenizer = load_tokenizer(folder)
        require_rows(tokenizer.vocabulary, model.vocab_size, folder, folder)
        folders = [folder]
        if meta is not None:
            folders.append(model_folder(meta, "meta_rm"))
            require_meta(folders[-1], folder)
        if scalar is not None:
            folders.append(model_folder(scalar, "scalar_rm"))
            require_kind(folders[-1], scalar=True)
        shardings = param_shardings(param_table(model), mesh)
        return cls(
            model,
            lambda: load_params(folder, shardings=shardings, dtype=model.compute_dtype)[1],
            tokenizer,
            mesh,
            templates=about.templates or TemplateConfig(),
            engine=about.engine or EngineConfig(),
            defaults=about.judge or JudgeDefaults(),
            meta=None
            if meta is None
            else lambda: load_meta_rm(meta, mesh, score_tokens, compute_dtype),
            scalar=None if scalar is None else lambda: load_scalar_rm(scalar, mesh, compute_dtype),
            fingerprint=lambda: fingerprint_of(folders),
        )

    def score(
        self,
        query: str | Sequence[Any],
        responses: Sequence[Any],
        k: int = 8,
        *,
        reference: str | None = None,
        principles: Sequence[str] | None = None,
        criteria: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Verdict:
        """The verdict of k sampled critiques on n >= 1 responses to a query.

        Args:
          query, responses, reference, principles, criteria: see `JudgeRequest.make`.
          options: fields of `ScoreOptions`: seed, temperature, method, adaptive, ..

        Raises UserError for a query, responses or options that can not be judged.
        """
        request = JudgeRequest.make(
            query, responses, reference=reference, principles=principles, criteria=criteria,
            options=ScoreOptions(k=k, **options),
        )  # fmt: skip
        (verdict,) = self.score_many([request])
        return verdict

    def score_many(self, requests: Iterable[JudgeRequest | Mapping[str, Any]]) -> list[Verdict]:
        """The verdicts of many requests, in their order, in one batch. See `stream`."""
        verdicts = dict(self.stream(requests))
        return [verdicts[index] for index in range(len(verdicts))]

    def stream(
        self, requests: Iterable[JudgeRequest | Mapping[str, Any]]
    ) -> Iterator[tuple[int, Verdict]]:
        """Yield (index of the request, verdict) as they end, in no particular order.

        Args:
          requests: as `JudgeRequest`, or as mappings that `JudgeRequest.from_json` reads.

        Raises UserError, before anything is sampled, for a request that can not be judged.
        """
        prepared: list[Whole | Dealt] = []
        for index, request in enumerate(requests):
            try:
                if not isinstance(request, JudgeRequest):
                    request = JudgeRequest.from_json(request)
                prepared.append(prepare(self, request))
            except UserError as error:
                raise UserError(f"requests[{index}]: {error}") from error
        if not prepared:
            return
        session = self._session_for(prepared)
        index_of = {session.add(item): index for index, item in enumerate(prepared)}
        try:
            while not session.idle:
                for ticket, verdict in session.step():
                    assert isinstance(verdict, Verdict)
                    yield index_of.pop(ticket), verdict
        finally:  # also where the caller stops early
            for ticket in index_of:
                session.cancel(ticket)

    def session(
        self, *, longest_prompt: int, max_new_tokens: int, samples: int, expected: bool = False
    ) -> JudgeSession:
        """An open-ended session, for requests that are not known yet; see `JudgeSession`."""
        self._session = None  # its caches' memory is needed
        return JudgeSession(
            self, longest_prompt=longest_prompt, max_new_tokens=max_new_tokens, samples=samples,
            expected=expected,
        )  # fmt: skip

    def _session_for(self, prepared: Sequence[Whole | Dealt]) -> JudgeSession:
        """The session of the calls before, or another one where these requests need it."""
        open_one = self._session
        longest = max(item.longest for item in prepared)
        new = max(item.sampling.max_new_tokens for item in prepared)
        expected = any(item.request.options.expected for item in prepared)
        # Rounded up, so that later calls rarely need a larger one.
        longest = max(longest, min(max(256, power_of_two(longest)), self.model.max_position - new))
        requests = [
            request
            for number, item in enumerate(prepared)
            for request in item.requests(str(number), item.upcoming)
        ]
        self.load_reward_models()  # before caches are planned, which get what is free
        also = None if open_one is None else open_one.plan
        plan = self.sampler.plan(
            self.params, requests, max_new_tokens=new, longest_prompt=longest, samples=8, also=also
        )
        watched = open_one is not None and open_one.expected is not None
        if open_one is not None and open_one.plan.covers(plan) and (watched or not expected):
            return open_one
        self._session = None  # its caches' memory is needed
        self._session = JudgeSession(
            self, longest_prompt=plan.longest, max_new_tokens=plan.limit, plan=plan,
            expected=expected or watched,
        )  # fmt: skip
        return self._session

    def sample(
        self,
        records: Sequence[Preference],
        options: JudgeOptions,
        progress: Progress | None = None,
        **caches: Any,
    ) -> list[Critique]:
        """The greedy critique and the k samples of every record, meta scores included.

        Args:
          caches: samples that are not drawn again, and more; see `records.sample_records`.
        """
        self._session = None  # its caches' memory is needed
        return sample_records(self, records, options, progress, **caches)


def fingerprint_of(folders: Sequence[Path]) -> str:
    """A digest of model folders. What was read once is remembered in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grm_jax"
    base.mkdir(parents=True, exist_ok=True)
    return "-".join(fingerprint(folder, base / "fingerprints.json") for folder in folders)
