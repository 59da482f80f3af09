"""A record as the prompts that a judge reads: which template, which order, which tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from grm_jax.critique import Template, orders, render, shuffle
from grm_jax.critique.prompt import Message
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.preferences import Preference
from grm_jax.tokenizer import Tokenizer

OrderMode = Literal["balanced", "random", "given", "one"]


class Prompts:
    """Prompts of records.

    Args:
      order: how the k samples of a record see its responses: "balanced" or "random" (see
        `critique.orders`), "one" (one random order for all samples: a GRPO group), "given" (as in
        the record), or a number m: sample i sees balanced order i % m.
      seed: of the orders.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: TemplateConfig | Templates,
        *,
        order: OrderMode | int = "balanced",
        seed: int = 0,
    ):
        self.tokenizer = tokenizer
        self.order: OrderMode | int = order
        self.seed = seed
        self.many = Template.load(templates.many)
        self.single = Template.load(templates.single)

    def template(self, record: Preference) -> Template:
        return self.single if len(record.responses) == 1 else self.many

    def orders(self, record: Preference, count: int, salt: str = "") -> list[tuple[int, ...]]:
        """The order of the responses in each of `count` samples; depends on seed, salt and id."""
        n = len(record.responses)
        if self.order == "given":
            return [tuple(range(n))] * count
        digest = hashlib.blake2b(f"{self.seed} {salt} {record.id}".encode(), digest_size=8)
        seed = int.from_bytes(digest.digest(), "little")
        if isinstance(self.order, str) and self.order != "one":
            return orders(n, count, mode=self.order, seed=seed)
        several = 1 if self.order == "one" else self.order
        chosen = orders(n, several, mode="balanced", seed=seed)
        return [chosen[i % several] for i in range(count)]

    def hint(self, record: Preference, order: Sequence[int]) -> str:
        """The hint that gives the best of the responses in `order` away (RFT)."""
        shown = shuffle(record.labels, order)
        return self.template(record).hint_text(order.index(record.best), len(order), shown)

    def messages(
        self, record: Preference, order: Sequence[int], *, hinted: bool = False
    ) -> list[Message]:
        """The prompt for the record's responses in `order`."""
        return render(
            self.template(record),
            record.turns,
            shuffle(record.responses, order),
            hint=self.hint(record, order) if hinted else None,
            reference=record.reference,
            principles=record.principles,
        )

    def ids(
        self, record: Preference, order: Sequence[int], *, hinted: bool = False
    ) -> tuple[int, ...]:
        """The prompt's token ids."""
        return tuple(self.tokenizer.chat(self.messages(record, order, hinted=hinted)))
