"""The three templates of a judge: for several responses, for one, and for the meta RM."""

from __future__ import annotations

import dataclasses

from grm_jax.critique.template import Template


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
    """Prompt templates: names of built-in ones, or paths of your own files."""

    many: str = "grm"
    """For two responses or more (scores 1-10)."""
    single: str = "single"
    """For single responses in training and where their label is 0 or 1 (score 0 or 1)."""
    meta: str = "meta"
    """For the meta RM, which reads it before the critique."""


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates that a `TemplateConfig` names, read once, so that later changes of their files
    have no effect."""

    many: Template
    single: Template
    meta: Template

    @classmethod
    def load(cls, names: TemplateConfig) -> Templates:
        """Read the templates. Raises TemplateError for a name that is not a template."""
        return cls(*map(Template.load, (names.many, names.single, names.meta)))

    def items(self) -> list[tuple[str, Template]]:
        """(field name, template) for each template."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Scales:
    """The ranges of scores: for several responses, and for single ones."""

    many: tuple[float, float] = (1.0, 10.0)
    single: tuple[float, float] = (0.0, 1.0)
