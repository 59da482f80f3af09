"""No text forges a verdict, a section or a control token: all templates, both tokenizers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from grm_jax.critique import BUILTIN, Template, prompt
from grm_jax.data.attacks import ATTACKS
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.scoring import attack_checks
from grm_jax.scoring.attack_checks import checks, parser_cases, prompt_cases
from grm_jax.tokenizer import ChatTokenizer, load_tokenizer

FAMILIES = {"CT", "EW", "FV", "JD", "LEN", "MK", "NULL", "NUM", "RJ", "UA", "UNI"}


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A model of Gemma's kind: its control pieces stand in the vocabulary as ordinary ones."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("gemma")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(60)]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=420,
        model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
        eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", byte_fallback=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "<unused0>", "\n"],
        add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        normalization_rule_name="identity", hard_vocab_limit=False,
    )  # fmt: skip
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer", **names})
    )
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", BUILTIN)
def test_what_a_judge_quotes_is_never_its_verdict(name: str) -> None:
    cases = list(parser_cases(Template.load(name)))
    assert len(cases) > 40
    assert [case for case in cases if not case[2]] == []


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
@pytest.mark.parametrize("name", BUILTIN)
def test_no_response_changes_the_form_of_a_prompt(
    name: str, kind: str, sentencepiece_tokenizer: ChatTokenizer
) -> None:
    tokenizer = build_tokenizer() if kind == "tokenizers" else sentencepiece_tokenizer
    cases = list(prompt_cases(Template.load(name), tokenizer))
    assert {row for row, _, _ in cases} == FAMILIES
    assert [case[:2] for case in cases if not case[2]] == []


def test_every_family_of_the_table_is_there() -> None:
    assert {attack.id.rstrip("0123456789abcdH-") for attack in ATTACKS} | {"EW"} == FAMILIES | {
        "POS"
    }


def rows_that_break(template: Template) -> set[tuple[str, str]]:
    return {
        (check.kind, check.row)
        for check in checks([template], build_tokenizer())
        if check.held < check.tried
    }


def test_an_unguarded_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: without the guard, and with a guard that looks for plain letters."""
    assert rows_that_break(Template.load("grm")) == set()
    whole = prompt.neutralise

    def none(text: str, template: Template) -> str:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)

    def plain_letters_only(text: str, template: Template) -> str:
        return whole(text, template) if text.isascii() else none(text, template)

    monkeypatch.setattr(prompt, "neutralise", none)
    assert {("prompt", row) for row in ("FV", "NULL", "UNI")} <= rows_that_break(
        Template.load("grm")
    )
    monkeypatch.setattr(prompt, "neutralise", plain_letters_only)
    assert ("prompt", "UNI") in rows_that_break(Template.load("grm"))


def test_a_template_whose_header_shares_its_line_is_seen() -> None:
    own = Template.from_source(
        "{# grm_jax: name=own low=1 high=5 reads=scores #}\n"
        "#### {{ query }}\n{% for r in responses %}\n{{ r }}\n{% endfor %}\n",
        "own",
    )
    assert ("prompt", "FV") in rows_that_break(own)


def test_a_parser_that_takes_the_first_verdict_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    read = attack_checks.read

    def first(template, text, n, **more):
        return read(template, text.split("\n")[0], n, **more)

    monkeypatch.setattr(attack_checks, "read", first)
    assert ("parser", "FV") in rows_that_break(Template.load("grm"))


def test_a_row_says_which_case_broke_first(tmp_path: Path) -> None:
    own = Template.from_source(
        "{# grm_jax: name=own low=1 high=5 reads=scores #}\n"
        "#### {{ query }}\n{{ responses | join }}\n",
        "own",
    )
    broken = [check for check in checks([own], build_tokenizer()) if check.held < check.tried]
    assert broken and all(check.broken.startswith("own, n=") for check in broken)
