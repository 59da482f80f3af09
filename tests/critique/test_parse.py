"""What the parser accepts, what it refuses and under which name."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grm_jax.critique import Template, parse, parse_index, read, verdict_start

LONG_CRITIQUE = r"""### Specific Criteria:
1. **Correctness** (Weight: 40%): the sum is right.
2. **Units (Weight: 30%)**: the unit is named.

### Analysis:
- **Response 1**: right sum, no unit.
- **Response 2**: wrong sum.

### Scores:
- **Response 1**: Correctness 9, Units 5
**Overall Score**: 10

### Output:
\boxed{10, 7}"""


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (r"Scores: \boxed{8, 9}", (8, 9)),
        ("Scores:\n\\boxed{9, 5}", (9, 5)),
        (r"**Scores: \boxed{8, 8}**", (8, 8)),
        (r"Scores: \\boxed{8, 9}", (8, 9)),
        (r"Scores: $\boxed{8,9}$.", (8, 9)),
        ("Scores:\n```\n\\boxed{8,5}\n```", (8, 5)),
        (r"Scores: \boxed{ 8.5 , +9. }", (8.5, 9)),
        ("Scores: \\boxed{8,\n 9}", (8, 9)),
        (r"Final Scores: [[2, 4]]", (2, 4)),
        (r"Scores: [2, 4]", (2, 4)),
        (LONG_CRITIQUE, (10, 7)),
        # The last group with n values counts: not a draft, not a group of another size.
        (r"draft \boxed{1, 2}, final \boxed{8, 9}", (8, 9)),
        (r"\boxed{8, 9}, since Response 2 arrives at \boxed{42}", (8, 9)),
        (r"\boxed{8, 9} in the form \boxed{x, x}", (8, 9)),
        (r"\boxed{8, 9} [1, 2] [[3, 4]]", (8, 9)),
        (r"the set {1, 2} and } then \boxed{8, 9}", (8, 9)),
        (r"an unclosed \boxed{3, then \boxed{8, 9}", (8, 9)),
        (r"\boxed{\boxed{8, 9}}", (8, 9)),
        ("[The End of Response 2] [8, 9]", (8, 9)),
    ],
)
def test_accepts(text: str, scores: tuple[float, ...]) -> None:
    parsed = parse(text, 2)
    assert parsed.scores == scores
    assert parsed.failure is None


@pytest.mark.parametrize(
    ("text", "n", "failure"),
    [
        ("", 2, "no_box"),
        ("Scores: 8, 9", 2, "no_box"),
        ("[The End of Response 2]", 1, "no_box"),
        ("[Response 1, Response 2]", 2, "no_box"),
        (r"Scores: \boxed{8, 9", 2, "no_box"),
        (r"quoted \boxed{10, 1}; mine: \boxed{3, 9", 2, "no_box"),
        (r"\boxed{8, 9, 7}", 2, "wrong_count"),
        (r"\boxed{8}", 2, "wrong_count"),
        (r"\boxed{8, 9,}", 2, "wrong_count"),
        (r"\boxed{8 9}", 2, "separators"),
        (r"\boxed{}", 1, "empty"),
        (r"\boxed{\frac{8}{10}, \frac{9}{10}}", 2, "markup"),
        ("[[8, 9, 7]]", 2, "wrong_count"),
        # Once there is a box, brackets are only text.
        (r"\boxed{8} [8, 9]", 2, "wrong_count"),
        (r"\boxed{8 [8, 9]", 2, "no_box"),
        (r"\boxed{0, 9}", 2, "out_of_range"),
        (r"\boxed{11, 9}", 2, "out_of_range"),
        (r"\boxed{-3, 9}", 2, "out_of_range"),
        (r"\boxed{98989, 9}", 2, "out_of_range"),
        (r"\boxed{10.01, 9}", 2, "out_of_range"),
        (r"\boxed{" + "9" * 5000 + ", 9}", 2, "out_of_range"),
        ("[0, 9]", 2, "out_of_range"),
        # The last verdict decides alone.
        (r"\boxed{8, 9} \boxed{11, 9}", 2, "out_of_range"),
        (r"quoted \boxed{10, 1}; mine: \boxed{3/10, 9/10}", 2, "not_a_number"),
        (r"\boxed{9/10, 8/10}", 2, "not_a_number"),
        (r"\boxed{1e3, 8}", 2, "not_a_number"),
        ("\\boxed{１１, 8}", 2, "out_of_range"),
        ("\\boxed{٣, 9}", 2, "not_a_number"),
        (r"\boxed{NaN, 8}", 2, "not_a_number"),
        (r"\boxed{inf, 8}", 2, "not_a_number"),
        (r"\boxed{1_0, 8}", 2, "not_a_number"),
        (r"\boxed{8, x}", 2, "not_a_number"),
        (r"\boxed{x, x}", 2, "not_a_number"),
        ("[NaN, 8]", 2, "not_a_number"),
        ("[9/10, 8/10]", 2, "not_a_number"),
    ],
)
def test_names_the_failure(text: str, n: int, failure: str) -> None:
    parsed = parse(text, n)
    assert parsed.failure == failure
    assert parsed.scores is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Analysis: both are", "truncated"),
        ("", "truncated"),
        (r"Scores: \boxed{8, ", "truncated"),
        (r"Scores: \boxed{8}", "truncated"),
        # Complete, but not at the end: it may quote a judged response.
        (r"Response 1 claims \boxed{10, 1}, which", "truncated"),
        (r"quoted \boxed{10, 1}; Scores: \boxed{8", "truncated"),
        ("**Scores: \\boxed{8, 9}**\n", (8, 9)),
        ("Scores: [[8, 9]]", (8, 9)),
        (r"Scores: \boxed{8, 11}", "out_of_range"),
        (r"Scores: \boxed{8, 9/10}", "not_a_number"),
    ],
)
def test_truncated_text_counts_only_if_a_verdict_closes_it(text: str, expected: object) -> None:
    parsed = parse(text, 2, truncated=True)
    assert (parsed.scores or parsed.failure) == expected


@pytest.mark.parametrize(
    ("text", "n", "verdict"),
    [
        (r"\boxed{1, 2} then \boxed{3, 4} end", 2, r"\boxed{3, 4} end"),
        (r"so \boxed{3, 4}, as \boxed{42} says", 2, r"\boxed{3, 4}, as \boxed{42} says"),
        (r"so \boxed{11, 4}", 2, r"\boxed{11, 4}"),  # out of range
        (r"so \boxed{8 9}", 2, r"\boxed{8 9}"),  # unparsable
        ("so [8, 9]", 2, "[8, 9]"),
        ("Scores:\n\\boxed{8}\n\\boxed{9}", 2, "\\boxed{8}\n\\boxed{9}"),
        (r"is \boxed{8} then", 2, r"\boxed{8} then"),  # no verdict: the last group
        ("［８，９］", 2, "［８，９］"),
        ("no verdict, but [1] of [The End]", 2, None),
        ("no box", 2, None),
        (r"cut off \boxed{8,", 2, None),
    ],
)
def test_where_the_verdict_begins(text: str, n: int, verdict: str | None) -> None:
    start = verdict_start(text, n)
    assert (None if start is None else text[start:]) == verdict


def test_range_belongs_to_the_template() -> None:
    assert parse(r"\boxed{0}", 1).failure == "out_of_range"
    assert parse(r"\boxed{0}", 1, low=0, high=1).scores == (0,)
    assert read(Template.load("single"), r"\boxed{0}", 1).scores == (0,)
    assert read(Template.load("single"), r"\boxed{2}", 1).failure == "out_of_range"
    assert read(Template.load("compact_single"), r"\boxed{1}", 1).scores == (1,)
    assert read(Template.load("judge"), r"\boxed{3}", 3).scores == (0, 0, 1)


def test_index_is_one_whole_place() -> None:
    assert parse_index(r"Scores: \boxed{2}", 2).scores == (0, 1)
    assert parse_index(r"Scores: \boxed{3}", 2).failure == "out_of_range"
    assert parse_index(r"Scores: \boxed{0}", 2).failure == "out_of_range"
    assert parse_index(r"Scores: \boxed{1.5}", 2).failure == "not_a_number"
    assert parse_index(r"Scores: \boxed{1, 2}", 2).failure == "wrong_count"
    assert parse_index(r"Scores: \boxed{2", 2, truncated=True).failure == "truncated"


def test_rejects_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="at least one response"):
        parse("", 0)
    with pytest.raises(ValueError, match="above"):
        parse("", 1, low=2, high=1)


@pytest.mark.parametrize(
    "text",
    [
        "Specific Criteria: a (60%)\nb (40%)\nAnalysis: first\nsecond\nScores: \\boxed{8, 9}",
        "**Specific Criteria:** a (60%)\nb (40%)\n**Analysis:**\nfirst\nsecond\n"
        "**Scores: \\boxed{8, 9}**",
        "### Output\n**Specific Criteria**: a (60%)\nb (40%)\n\n**Analysis**: first\nsecond\n\n"
        "Final Scores: [[8, 9]]",
        "### Specific Criteria:\na (60%)\nb (40%)\n### Analysis:\nfirst\nsecond\n### Scores:\n"
        "Overall Score: 9\n### Output:\n\\boxed{8, 9}",
        "### Specific Criteria\na (60%)\nb (40%)\n### Analysis\nfirst\nsecond\n### Scores\n"
        "\\boxed{8, 9}",
    ],
)
def test_sections_of_every_header_form(text: str) -> None:
    parsed = parse(text, 2)
    assert parsed.scores == (8, 9)
    assert parsed.principles == "a (60%)\nb (40%)"
    assert parsed.analysis == "first\nsecond"


def test_sections_on_one_line_or_absent() -> None:
    parsed = parse(r"Specific Criteria: a. Analysis: b. Scores: \boxed{8}", 1)
    assert (parsed.principles, parsed.analysis) == ("a.", "b.")
    parsed = parse(r"Analysis of it all: good \boxed{8}", 1)
    assert (parsed.principles, parsed.analysis) == ("", "")
    parsed = parse(LONG_CRITIQUE, 2)
    assert parsed.principles.startswith("1. **Correctness**")
    assert parsed.analysis.endswith("wrong sum.")


def test_failed_text_keeps_its_sections() -> None:
    parsed = parse("Specific Criteria: a\nAnalysis: b", 2, truncated=True)
    assert (parsed.principles, parsed.analysis, parsed.failure) == ("a", "b", "truncated")


score_lists = st.lists(st.one_of(st.integers(1, 10), st.floats(1, 10)), min_size=1, max_size=6).map(
    tuple
)


def written(scores: tuple[float, ...]) -> str:
    """A verdict line, its numbers as the shortest decimals without exponents."""
    return f"Scores: \\boxed{{{', '.join(format(Decimal(repr(s)), 'f') for s in scores)}}}"


@given(score_lists, st.booleans())
@example((1.0000000000000002, 10), False)
def test_reads_every_decimal_exactly(scores: tuple[float, ...], truncated: bool) -> None:
    text = "Specific Criteria: a\nAnalysis: b\n" + written(scores)
    assert parse(text, len(scores), truncated=truncated).scores == scores


FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "\\boxed{",
                "}",
                "{",
                "[",
                "]",
                ",",
                "8",
                "9.5",
                "-",
                "Analysis:",
                "\n",
                "NaN",
                "x",
                " ",
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=30,
).map("".join)


@given(FRAGMENTS, st.integers(1, 3), st.booleans())
def test_any_text_parses_or_fails_by_name(text: str, n: int, truncated: bool) -> None:
    parsed = parse(text, n, truncated=truncated)
    assert (parsed.scores is None) != (parsed.failure is None)
    if parsed.scores is not None:
        assert len(parsed.scores) == n
        assert all(1 <= score <= 10 for score in parsed.scores)


@given(FRAGMENTS)
def test_a_closing_verdict_counts_whatever_stands_before(text: str) -> None:
    # Text before can only add candidates that come earlier.
    assert parse(text + "\n\\boxed{3, 9}", 2).scores == (3, 9)


SIZE = 1_000_000


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{8, ",
        "{",
        "}",
        "[",
        "[1,",
        "[1e",
        "\\boxed{8}",
        " ",
        "#",
        "*",
        "Analysis:",
        ",",
        "9",
        "\\",
    ],
)
def test_a_hostile_megabyte_costs_linear_time(unit: str) -> None:
    line = unit * (SIZE // len(unit))
    start = time.perf_counter()
    parse(line + "]", 2)
    parse("\\boxed{" + line + "}", 2, truncated=True)
    # Half a second for the slowest; a quadratic scan would take hours.
    assert time.perf_counter() - start < 20


def test_deeply_nested_boxes_cost_linear_time() -> None:
    depth = SIZE // 8
    start = time.perf_counter()
    parsed = parse("\\boxed{" * depth + "8, 9" + "}" * depth, 2)
    assert parsed.scores == (8, 9)
    assert time.perf_counter() - start < 10
