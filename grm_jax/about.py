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
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from grm_jax import files
from grm_jax.checkpoint import ABOUT_FILE
from grm_jax.config import JudgeDefaults
from grm_jax.critique import Template
from grm_jax.critique.template import BUILTIN, TemplateError
from grm_jax.errors import UserError
from grm_jax.sampler.critic import TemplateConfig, Templates
from grm_jax.sampler.plan import EngineConfig

# Of rows that the meta RM reads, where the file does not say.
LENGTH_BUCKETS = (1024, 2048, 4096, 8192)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


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
        about = _decode(cls, raw, str(file))
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
    _require_known(raw, names, where)
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
        _require_known(value, ["text"], where)
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


def _require_known(raw: Any, known: list[str], where: str) -> None:
    """Raise UserError unless `raw` is a JSON object with known fields only."""
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where} is {raw!r:.60}; a JSON object with the fields {', '.join(known)} is expected"
        )
    unknown = sorted(raw.keys() - set(known))
    if unknown:
        raise UserError(
            f"{where} has the fields {unknown}, which this version does not know (it knows "
            f"{', '.join(known)}); delete them there, or install the version that wrote them"
        )


def _decode(kind: type, raw: Any, where: str) -> Any:
    """A dataclass from a JSON object; fields that are not there take their defaults."""
    _require_known(raw, [field.name for field in dataclasses.fields(kind)], where)
    hints = typing.get_type_hints(kind)
    separator = ": " if where.endswith(ABOUT_FILE) else "."
    values = {
        name: _value(hints[name], value, f"{where}{separator}{name}") for name, value in raw.items()
    }
    try:
        return kind(**values)
    except UserError as error:  # of the class itself, which knows no file
        raise UserError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as `hint` has it: a number, text, None, tuple, literal or dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _value(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r:.60}; a list is expected")
        return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where} is {value!r:.60}; give one of {', '.join(map(str, arguments))}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return _decode(typing.cast(type, hint), value, where)
    right = type(value) is hint or (hint is float and type(value) is int)
    if not right or (hint is float and not math.isfinite(value)):
        raise UserError(f"{where} is {value!r:.60}; {_KINDS[hint]} is expected")
    return hint(value)
