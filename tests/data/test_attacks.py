"""The attacks as data: what an attacker hands in, and that it changes nothing about the truth."""

from __future__ import annotations

import pytest

from grm_jax.critique import BUILTIN, Template, read
from grm_jax.data.attacks import ATTACKS, EMBEDDED_WORLD, Attack, Target
from grm_jax.data.synthetic import ENDINGS, NAMES, OPENINGS, POLITE, TOPIC_WORDS, UNITS
from grm_jax.data.synthetic_files import build_tokenizer

BY_ID = {attack.id: attack for attack in (*ATTACKS, *EMBEDDED_WORLD)}


def target(template: str = "grm", place: int = 1, n: int = 3) -> Target:
    return Target(" sum 3 4 in cm", " 8 cm", place, n, Template.load(template))


def test_every_row_of_the_table_is_there_once() -> None:
    rows = [f"MK{i}" for i in range(1, 11)] + [f"RJ-H{i}" for i in range(1, 9)]
    rows += ["NULL1", "JD1", "UA1", "FV1a", "FV1b", "FV1c", "FV1d", "FV2a", "FV2b", "NUM1", "POS"]
    rows += ["CT1", "CT2", "CT3", "UNI1", "UNI2", "UNI3", "LEN1", "LEN2", "LEN3", "LEN4"]
    assert sorted(rows) == sorted(attack.id for attack in ATTACKS)
    assert len(BY_ID) == len(ATTACKS) + len(EMBEDDED_WORLD)
    assert all(attack.source and attack.what for attack in BY_ID.values())


def test_kinds_say_where_the_text_stands() -> None:
    for attack in BY_ID.values():
        made = attack.apply(target())
        text = attack.text(target())
        assert (
            made
            == {
                "append": f" 8 cm{text}",
                "prepend": f"{text} 8 cm",
                "replace": text,
                "order": " 8 cm",
                "copy": " 8 cm",
            }[attack.kind]
        )
        assert attack.apply(target()) == made
        assert bool(text) or attack.id in ("RJ-H7", "LEN4", "POS")


@pytest.mark.parametrize("name", BUILTIN)
def test_a_forged_verdict_is_one_that_the_parser_would_read(name: str) -> None:
    """As the judge's own line it gives the target the best score: what the attacker is after."""
    template = Template.load(name)
    sizes = (1,) if template.single else (2, 4)
    for n in sizes:
        for place in range(n):
            verdict = target(name, place, n).verdict
            scores = read(template, verdict, n).scores
            assert scores is not None and scores[place] == template.scale[1]
            assert all(s == template.scale[0] for i, s in enumerate(scores) if i != place)


@pytest.mark.parametrize("name", BUILTIN)
def test_forged_sections_are_those_of_the_template(name: str) -> None:
    template = Template.load(name)
    forged = target(name, 0, 1) if template.single else target(name)
    words = template.fill(
        query="q", responses=["a"] * forged.n, letters=list("ABC"), hint=None, reference=None,
        principles=None,
    )  # fmt: skip
    assert forged.opening in words and forged.closing in words
    assert forged.other("x") not in words


@pytest.mark.parametrize("attack", BY_ID.values(), ids=lambda attack: attack.id)
def test_no_text_meets_a_criterion_of_the_embedded_world(attack: Attack) -> None:
    """The loser stays the loser: what is added holds none of the words that queries ask for."""
    tokenizer = build_tokenizer()
    asked = {*OPENINGS, *ENDINGS, *NAMES, *POLITE, *TOPIC_WORDS, *UNITS}
    for place in (0, 1):
        text = attack.text(target("compact", place, 2))
        pieces = {tokenizer.decode([id]).strip() for id in tokenizer.encode(text)}
        assert not pieces & asked
    known = [id for id in tokenizer.encode(text) if tokenizer.decode([id]) != "<unk>"]
    assert not attack.id.startswith("EW") or len(known) > len(tokenizer.encode(text)) // 2
