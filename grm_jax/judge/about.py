"""grm.json: what is known of a model besides its weights. It travels with the model.

    {
      "stage": "rl", "trained": true,
      "templates": {"many": {"text": "{# grm_jax: .. #}.."}, "single": .., "meta": ..},
      "judge": {"temperature": 0.5, "max_new_tokens": 1024},
      "engine": {..}, "length_buckets": [1024, 2048]
    }

The text of each template is in it, so a model is judged with the same prompts wherever it lies and
whatever becomes of the file that the template was read from. In older files a template is the name
of a built-in one or a path; both are read. A field that is not there takes its default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grm_jax import files, typed
from grm_jax.critique import Template
from grm_jax.critique.template import BUILTIN, TemplateError
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.storage import ABOUT_FILE, model_folder
from grm_jax.sampler.options import EngineConfig

# Of rows that the meta RM reads, where the file does not say.
LENGTH_BUCKETS = (1024, 2048, 4096, 8192)


@dataclasses.dataclass(frozen=True)
class About:
    """What `grm.json` says of a model; None is what it does not say.

    Attributes:
      stage: the training stage that wrote the model.
      trained: False for random weights.
      templates: what it was trained with. judge: how it is sampled. engine: how its sampler used
        the machine. length_buckets: of the rows it was trained on.
    """

    stage: str | None = None
    trained: bool | None = None
    templates: Templates | None = None
    judge: JudgeDefaults | None = None
    engine: EngineConfig | None = None
    length_buckets: tuple[int, ...] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> About:
        """What the folder's `grm.json` says; nothing where there is none.

        Raises UserError naming the file, the field and what to do: broken JSON, an unknown field, a
        value of another type, a template that is not there or not one.
        """
        file = Path(folder) / ABOUT_FILE
        if not files.there(file):
            return cls()
        raw = dict(files.read_json(file))
        templates = raw.pop("templates", None)
        about = typed.decode(cls, raw, str(file))
        _check(about, str(file))
        if templates is not None:
            about = dataclasses.replace(about, templates=_read_templates(templates, file))
        return about

    def write(self, folder: str | Path) -> None:
        """Write `grm.json`, templates as texts, without what is None."""
        said: dict[str, Any] = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        if self.templates is not None:
            said["templates"] = {
                name: {"text": template.source} for name, template in self.templates.items()
            }
        for name in ("judge", "engine"):
            if name in said:
                said[name] = dataclasses.asdict(said[name])
        text = json.dumps(said, indent=2, sort_keys=True) + "\n"
        with files.written_whole(Path(folder) / ABOUT_FILE) as partial:
            partial.write_text(text, encoding="utf-8")


def _read_templates(raw: Any, file: Path) -> Templates:
    where = f"{file}: templates"
    names = [field.name for field in dataclasses.fields(Templates)]
    typed.require_known(raw, names, where)
    defaults = TemplateConfig()
    return Templates(
        **{
            name: _read_template(raw[name], f"{where}.{name}", file.parent)
            if name in raw
            else Template.load(getattr(defaults, name))
            for name in names
        }
    )


def _read_template(value: Any, where: str, folder: Path) -> Template:
    """A template: its text, or as older files have it a built-in's name or a path."""
    if isinstance(value, Mapping):
        typed.require_known(value, ["text"], where)
        value = value.get("text")
        if not isinstance(value, str):
            raise UserError(f'{where} is {value!r:.60}; give {{"text": the template}}')
        return Template.from_source(value, where)
    if not isinstance(value, str) or not value:
        raise UserError(
            f'{where} is {value!r:.60}; give {{"text": the template}}, or the name of a built-in '
            f"one: {', '.join(BUILTIN)}"
        )
    if value in BUILTIN:
        return Template.load(value)
    # Beside the model first: a folder that was moved has its own there.
    for path in (folder / value, folder / Path(value).name, Path(value).expanduser()):
        if files.there(path) and not path.is_dir():
            return Template.from_source(files.read_text(path, TemplateError), str(path))
    raise TemplateError(
        f"{where} is {value!r}, and there is no such template, here or in {folder}; copy the file "
        f"to {folder / Path(value).name}, or give its path or the name of a built-in one "
        f"({', '.join(BUILTIN)}) in {ABOUT_FILE}"
    )


def _check(about: About, where: str) -> None:
    """Raise UserError for values that no model is sampled or scored with."""
    if about.judge is not None:
        if about.judge.temperature < 0:
            raise UserError(
                f"{where}: judge.temperature is {about.judge.temperature}; give 0 or more"
            )
        if about.judge.max_new_tokens < 1:
            raise UserError(
                f"{where}: judge.max_new_tokens is {about.judge.max_new_tokens}; give 1 or more"
            )
    buckets = about.length_buckets
    if buckets is not None and (
        not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets))
    ):
        raise UserError(
            f"{where}: length_buckets is {list(buckets)}; give lengths of 1 or more, each larger "
            "than the one before"
        )


def model_info(model: Path) -> dict[str, Any]:
    """What is known of a model folder; `trained` is False for one that no stage has written.

    A Hugging Face folder counts as trained unless this project's own tools made it at random; its
    figures speak for themselves, so `trained` is None there: not known.
    """
    folder = model_folder(model)
    about = About.read(folder)
    return {"path": str(folder), "stage": about.stage, "trained": about.trained}
