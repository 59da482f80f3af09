"""A scalar RM beside a judge in an evaluation: its scores of records, from a cache or computed.

run, model folder or repo id -> ScalarScorer -> tokens(record), scores(records) -> ScalarScores
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

import grm_jax
from grm_jax import files
from grm_jax.data.critiques import GREEDY, Critique
from grm_jax.data.examples import reply_example
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, show
from grm_jax.judge.about import LENGTH_BUCKETS, About
from grm_jax.judge.cache import SampleCache, fingerprint, record_digest
from grm_jax.judge.rows import row_lengths
from grm_jax.judge.scalar import load_scalar_rm
from grm_jax.metrics import Progress
from grm_jax.model.options import ComputeDtype
from grm_jax.model.storage import model_folder, on_devices, read_model_config, require_kind
from grm_jax.scoring.scalar_scores import ScalarScores, is_number
from grm_jax.tokenizer import load_tokenizer

CALIBRATION = "calibration.json"  # in the directory of the stage that trained it
_CHUNK = 1024  # records whose scores are kept together


class ScalarScorer:
    """A scalar RM and the cache of its scores. Its weights are only loaded for new records.

    Args:
      path: as `load_scalar_rm` takes it.
      cache: the directory of the caches.
      mesh, compute_dtype: of the judge that it stands beside.
      score_tokens: the maximum number of tokens that a device scores at once.

    Attributes:
      limit: the maximum number of tokens of a conversation with one response.
      weights: the digest of its files.
      threshold: what it compares single responses with; None if it was not calibrated.

    Raises UserError for another kind of model, and DataError for a broken calibration.json.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache: Path,
        mesh: Mesh,
        compute_dtype: ComputeDtype,
        score_tokens: int,
    ):
        folder = model_folder(path, "scalar_rm")
        require_kind(folder, scalar=True)
        self._folder, self._mesh = folder, mesh
        self._compute_dtype: ComputeDtype = compute_dtype
        self._score_tokens, self._cache = score_tokens, cache
        self._tokenizer = load_tokenizer(folder)
        model = on_devices(read_model_config(folder), mesh, compute_dtype)
        self.limit = row_lengths(About.read(folder).length_buckets or LENGTH_BUCKETS, model)[-1]
        self.weights = fingerprint(folder, cache / "digests.json")
        self.threshold = read_threshold(folder.parent / CALIBRATION)
        self._about = {
            "version": grm_jax.__version__,
            "scalar": self.weights,
            "compute_dtype": model.compute_dtype,
        }

    def tokens(self, record: Preference) -> int:
        """Tokens of the conversation with the longest of the responses."""
        return max(
            reply_example(record.turns, response, self._tokenizer).length
            for response in record.responses
        )

    def scores(self, title: str, records: Sequence[Preference]) -> ScalarScores:
        """The scores of all records; what is computed is kept as it is computed.

        title: of the progress.
        """
        cache = SampleCache(self._cache, self._about)
        digests = [record_digest(record) for record in records]
        missing = [i for i, digest in enumerate(digests) if cache.get(digest, GREEDY) is None]
        try:
            if missing:
                progress = Progress(title, len(records))
                progress.skip(len(records) - len(missing))
                # A local variable, so that the weights are gone before the judge samples.
                model = load_scalar_rm(self._folder, self._mesh, self._compute_dtype)
                for start in range(0, len(missing), _CHUNK):
                    part = missing[start : start + _CHUNK]
                    asked = [(records[i].turns, records[i].responses) for i in part]
                    found = model.scores(asked, self._mesh, self._score_tokens)
                    for i, row in zip(part, found, strict=True):
                        cache.add(digests[i], scalar_row(records[i], row))
                    cache.flush()
                    progress.update(len(part))
        finally:
            cache.close()
        rows = [cache.get(digest, GREEDY) for digest in digests]
        scores = {
            record.id: row.scores
            for record, row in zip(records, rows, strict=True)
            if row is not None and row.scores is not None
        }
        return ScalarScores(scores, self.threshold, self.weights)


def scalar_row(record: Preference, scores: Sequence[float]) -> Critique:
    """The scores of a record as the verdict of a greedy judge."""
    return Critique(
        example_id=record.id,
        sample=GREEDY,
        order=tuple(range(len(scores))),
        scores=tuple(scores),
        failure=None,
        finish_reason="stop",
    )


def read_threshold(file: Path) -> float | None:
    """The threshold for single responses in a calibration.json; None if there is none.

    Raises DataError for one that is not a finite number.
    """
    if not files.there(file):
        return None
    threshold = files.read_json(file).get("threshold")
    if threshold is not None and not is_number(threshold):
        raise DataError("threshold", show(threshold), "train the scalar RM again", str(file))
    return threshold
