"""Spellings of a verdict that judges use, and what can not be told from a quotation."""

from __future__ import annotations

import pytest

from grm_jax.critique import parse
from grm_jax.critique.parse import last_box

READ = [
    "\\boxed{8，9}",
    "\\boxed{8、 9}",
    "\\boxed{8; 9}",
    "\\boxed{8；9}",
    "\\boxed{８,９}",
    "\\boxed｛8, 9｝",
    "\\boxed{８．０，９}",
    "\\boxed{8,\u200b9}",
    r"\boxed{8, \ 9}",
    r"\boxed{8,~9}",
    r"\boxed{8,\,9}",
    r"\boxed{8,\quad 9}",
    r"\boxed{(8, 9)}",
    r"\boxed{[8, 9]}",
    r"\boxed{\left[8, 9\right]}",
    r"\boxed{{8, 9}}",
    r"\boxed{\{8, 9\}}",
    r"\boxed{\text{8}, \text{9}}",
    r"\boxed{\text{8, 9}}",
    r"\boxed{\mathbf{8, 9}}",
    r"\boxed{\mathbf{\text{8}}, 9}",
    r"\boxed{\boxed{8}, \boxed{9}}",
    r"\boxed{8} \boxed{9}",
    r"Scores: \boxed{8}, \boxed{9}",
    "Response 1: \\boxed{8}\nResponse 2: \\boxed{9}",
    "The answer is \\boxed{42}.\nScores:\n- Response 1: \\boxed{8}\n- Response 2: \\boxed{9}",
]

NAMED = [
    ("\\boxed{8 and 9}", "separators"),
    ("\\boxed{8, and 9}", "separators"),
    ("\\boxed{8/9}", "separators"),
    ("\\boxed{8 | 9}", "separators"),
    ("\\boxed{8\n9}", "separators"),
    (r"\boxed{8\,9}", "separators"),
    # A decimal comma or a third number: it can not be told.
    ("\\boxed{8,5; 9}", "separators"),
    (r"\boxed{\text{8}\text{9}}", "separators"),
    (r"\boxed{\begin{matrix}8\\9\end{matrix}}", "markup"),
    (r"\boxed{8, 10^{1}}", "markup"),
    (r"\boxed{}", "empty"),
    (r"\boxed{,}", "empty"),
    (r"\boxed{8, 9, 7}", "wrong_count"),
    (r"\boxed{8/10, 9/10}", "not_a_number"),
]

QUOTED = [
    r"Response 1 answers \boxed{10}, Response 2 answers \boxed{1}",
    r"\boxed{10} \boxed{1} are the answers that they give.",
    "Response 2: \\boxed{10}\nResponse 1: \\boxed{1}",
    r"\boxed{7} \boxed{10} \boxed{1}",
    "the answer of 1 is \\boxed{10}\n\\boxed{1}",
    "Response 1: \\boxed{10}\nbetter than\nResponse 2: \\boxed{1}",
    # A quoted verdict stands before one that can not be read.
    r"quoted \boxed{10，1}; mine: \boxed{3 9}",
    r"quoted \boxed{10, 1}; mine: \boxed{3 | 9}",
    r"quoted \boxed{\text{10}, 1}; mine: \boxed{\frac{3}{10}, 9}",
    r"\boxed{\text{1}0} and nothing more",
]


@pytest.mark.parametrize("text", READ)
def test_reads(text: str) -> None:
    assert parse(text, 2).scores == (8, 9)
    assert parse(text, 2, truncated=True).scores == (8, 9)


@pytest.mark.parametrize("text", [r"\boxed{\mathbf{8}}", r"\boxed{\text{8}}", r"\boxed{{8}}"])
def test_reads_a_single_number_in_markup(text: str) -> None:
    assert parse(text, 1).scores == (8,)


@pytest.mark.parametrize(("text", "cause"), NAMED)
def test_names_what_is_there(text: str, cause: str) -> None:
    assert parse(text, 2).failure == cause


@pytest.mark.parametrize("text", QUOTED)
def test_a_quotation_is_no_verdict(text: str) -> None:
    assert parse(text, 2).scores is None


def test_boxes_that_do_not_close_the_text_are_several() -> None:
    assert parse(r"\boxed{8} is better than \boxed{9}", 2).failure == "several_boxes"


def test_one_box_a_response_is_the_later_verdict() -> None:
    text = "A draft: \\boxed{1, 2}\nScores:\nResponse 1: \\boxed{8}\nResponse 2: \\boxed{9}"
    assert parse(text, 2).scores == (8, 9)


def test_the_last_box_as_written() -> None:
    assert last_box("a \\boxed{1} b \\boxed{8，９ } c") == "\\boxed{8，９ }"
    assert last_box("no box") == ""
    assert len(last_box("\\boxed{" + "9" * 500 + "}")) == 80
