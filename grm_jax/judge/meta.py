"""The meta RM: a scalar head that says how far a critique can be trusted (section 4).

record, critique -> prompt of the meta RM | critique -> one logit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from grm_jax import files
from grm_jax.critique import Template, shuffle
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.collate import Example
from grm_jax.data.critiques import Critique
from grm_jax.data.examples import meta_example
from grm_jax.data.preferences import Preference
from grm_jax.judge.about import LENGTH_BUCKETS, About
from grm_jax.judge.rows import row_lengths
from grm_jax.judge.scalar import score_examples
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import CheckpointError, token_ids
from grm_jax.model.options import ComputeDtype
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import (
    load_params,
    model_folder,
    on_devices,
    param_shardings,
    read_model_config,
    require_kind,
)
from grm_jax.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from grm_jax.tokenizer.files import folder_ids, read_folder
from grm_jax.tokenizer.vocabulary import require_rows


@dataclasses.dataclass(frozen=True)
class MetaRM:
    """A meta RM: parameters with a scalar head, and the template it reads."""

    model: ModelConfig
    params: Params
    template: Template
    buckets: tuple[int, ...]
    batch_size: int = 128
    tokens: int | None = None
    """Most tokens a device scores at once; None: the sampler's `prefill_tokens`."""
    tokenizer: Tokenizer | None = None
    """Its own, with its chat template; None: the judge's."""
    pad_id: int | None = None
    """The token that its rows do not end with; None: they may end with any."""

    def example(self, record: Preference, row: Critique, tokenizer: Tokenizer) -> Example:
        """What it reads: the record as the critique saw it, and the critique.

        Args:
          tokenizer: the judge's; for a meta RM that has none of its own.
        """
        example = meta_example(
            record.turns, shuffle(record.responses, row.order), row.text,
            self.tokenizer or tokenizer, self.template,
            reference=record.reference, principles=record.principles,
        )  # fmt: skip
        completion = example.completion
        while completion and completion[-1] == self.pad_id:
            completion = completion[:-1]
        return dataclasses.replace(example, completion=completion)

    @property
    def longest(self) -> int:
        """Most tokens of a row that it reads."""
        return self.buckets[-1]

    def scores(
        self,
        records: Sequence[Preference],
        rows: Sequence[Critique],
        tokenizer: Tokenizer,
        mesh: Mesh,
        tokens: int,
    ) -> list[float]:
        """The logit of each readable critique of some of these records.

        Args:
          tokenizer: the judge's; for a meta RM that has none of its own.
          tokens: most tokens a device scores at once, where `self.tokens` does not say.
        """
        by_id = {record.id: record for record in records}
        examples = [self.example(by_id[row.example_id], row, tokenizer) for row in rows]
        return self.logits(examples, mesh, tokens)

    def logits(self, examples: Sequence[Example], mesh: Mesh, tokens: int) -> list[float]:
        """The logits of what `example` made; `tokens` as in `scores`."""
        return score_examples(
            self.params, self.model, examples, self.buckets, self.batch_size, mesh,
            self.tokens or tokens,
        ).tolist()  # fmt: skip


def load_meta_rm(
    path: str | Path, mesh: Mesh, tokens: int | None = None, compute_dtype: ComputeDtype = "auto"
) -> MetaRM:
    """A meta RM from a run directory, its meta_rm stage, a Hugging Face folder, or a repo id.

    Args:
      tokens: most tokens a device scores at once; None: as many as the judge's sampler computes.
      compute_dtype: what it is computed in (`model.compute_dtype`).
    """
    folder = model_folder(path, "meta_rm")
    about = About.read(folder)
    model = on_devices(read_model_config(folder), mesh, compute_dtype)
    shardings = param_shardings(param_table(model, num_labels=1), mesh)
    _, params = load_params(folder, shardings=shardings, dtype=model.compute_dtype)
    own = read_folder(folder)[0].get("chat_template") is not None
    return MetaRM(
        model,
        params,
        meta_template(path),
        row_lengths(about.length_buckets or LENGTH_BUCKETS, model),
        tokens=tokens,
        tokenizer=load_tokenizer(folder) if own else None,
        # A row of ours ends with the token that ended it in training, whatever pads.
        pad_id=None if about.stage else _pad_id(folder),
    )


def _pad_id(folder: Path) -> int | None:
    """The id that transformers takes for padding in a scalar model's rows.

    It reads the score at the last other token: where a row ends with the token that pads, as it may
    where no token is for padding alone, the score is that of the token before.
    """
    file = folder / "config.json"
    if files.there(file):
        return files.read_json(file, CheckpointError).get("pad_token_id", 0)  # Gemma2Config's
    pad = folder_ids(folder).get("pad_token_id")
    return pad if isinstance(pad, int) else None


def meta_template(path: str | Path) -> Template:
    """The template that a meta RM reads."""
    templates = About.read(model_folder(path, "meta_rm")).templates
    return (templates or Templates.load(TemplateConfig())).meta


def require_meta(meta: Path, judge: Path) -> None:
    """Raise UserError unless `meta` is a meta RM that reads the ids that the judge writes."""
    require_kind(meta, scalar=True)
    judge_ids, meta_ids = token_ids(judge), token_ids(meta)
    rows = read_model_config(meta).vocab_size
    require_rows(judge_ids, rows, judge, meta)
    # Of one vocabulary in two formats, pieces may be written in two ways.
    alike = files.there(meta / "tokenizer.json") == files.there(judge / "tokenizer.json")
    if meta_ids and alike and meta_ids != judge_ids:
        other = sorted(meta_ids.items() ^ judge_ids.items(), key=lambda pair: pair[1])[0][1]
        raise TokenizerError(
            f"{meta}: its tokenizer is not that of {judge} (id {other} differs, for one): the meta "
            "RM would read other words than the judge wrote; give one that was trained with it"
        )
