"""The three prompts of a judge: for several responses, for one, and the meta RM's."""

from __future__ import annotations

import dataclasses

from grm_jax.critique.template import Template


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
    """Prompts: names of built-in templates, or paths of your own."""

    many: str = "grm"
    """For two responses or more (scores 1-10)."""
    single: str = "single"
    """For single responses in training and where their label is 0 or 1 (score 0 or 1)."""
    meta: str = "meta"
    """What the meta RM reads before the critique."""


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates that a `TemplateConfig` names, read once: what is done with them later does
    not depend on their files."""

    many: Template
    single: Template
    meta: Template

    @classmethod
    def load(cls, names: TemplateConfig) -> Templates:
        """Raises TemplateError for a name that is no template."""
        return cls(*map(Template.load, (names.many, names.single, names.meta)))

    def items(self) -> list[tuple[str, Template]]:
        """(field, template) of each."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Scales:
    """Ranges of a score: of several responses, and of single ones."""

    many: tuple[float, float] = (1.0, 10.0)
    single: tuple[float, float] = (0.0, 1.0)
