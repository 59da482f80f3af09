"""Template files: headers, variables, the messages about wrong ones."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from grm_jax.critique import BUILTIN, Template, TemplateError, hint_text, render

HEADER = "{# grm_jax: name=mine low=1 high=5 reads=scores #}\n"
BODY = "{{ query }}\n{% for response in responses %}\n{{ response }}\n{% endfor %}\n"


def test_every_built_in_template_loads_and_every_data_file_is_built_in() -> None:
    files = resources.files("grm_jax.critique") / "templates"
    assert {file.name for file in files.iterdir()} == {f"{name}.jinja" for name in BUILTIN}
    for name in BUILTIN:
        template = Template.load(name)
        assert template.name == name
        assert template.uses >= {"query", "responses", "hint", "reference", "principles"}
        assert template.low == (0 if "single" in name else 1)
    assert Template.load("grm").high == 10
    assert Template.load("single").high == 1
    assert Template.load("judge").reads == "index"
    assert math.isinf(Template.load("judge").high)
    assert Template.load("compact").labels == "letter"


def test_critique_needs_no_jax() -> None:
    code = "import sys, grm_jax.critique; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(("\ufeff" + HEADER + BODY).replace("\n", "\r\n").encode())
    template = Template.load(path)
    assert (template.name, template.low, template.high) == ("mine", 1, 5)
    assert template == Template.load(str(path)) and hash(template) == hash(Template.load(path))
    assert render(path, "q", ["a", "b"])[0]["content"] == "q\na\nb\n"
    assert template.digest != Template.load("grm").digest
    assert pickle.loads(pickle.dumps(template)) == template


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BODY, r"mine\.jinja:1: .*no header.*first line"),
        ("", r"mine\.jinja:1: .*no header"),
        ("{# a comment #}\n" + BODY, "no header"),
        ("\n" + HEADER + BODY, "no header"),
        (HEADER.replace("reads=scores", "") + BODY, "reads is missing"),
        (HEADER.replace("name=mine", "") + BODY, "name is missing"),
        (HEADER.replace("scores", "score") + BODY, "reads=score, but it is one of scores, index"),
        (HEADER.replace("high=5", "high=1") + BODY, "low=1 is not below high=1"),
        (HEADER.replace("high=5", "high=five") + BODY, "high=five is not a number"),
        (HEADER.replace("high=5", "high=nan") + BODY, "high=nan is not a number"),
        (HEADER.replace("scores", "index") + BODY, "low=1 high=n"),
        (HEADER.replace("low=1", "low=1 low=2") + BODY, "low is given twice"),
        (HEADER.replace("low=1", "low=1 colour=red") + BODY, "unknown field 'colour'.*fields are"),
        (HEADER.replace("low=1", "low=1 bare") + BODY, "'bare' is not key=value"),
        (HEADER.replace("low=1", 'low=1 guard="<a') + BODY, "unbalanced quotes"),
        (HEADER.replace("low=1", 'low=1 guard="<"') + BODY, "two characters or more"),
        (HEADER + BODY + "{{ answer }}", r"jinja:6: unknown variable 'answer'.*may use query"),
        (HEADER + "{{ query }}", "never uses 'responses'"),
        (HEADER + BODY + "{% if %}", r"mine\.jinja:6: template syntax"),
    ],
)
def test_wrong_file_is_named_with_its_line(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        Template.load(path)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"no template 'grn'.*grm, single, meta, judge, short, short_single"
    ):
        Template.load("grn")
    with pytest.raises(TemplateError, match="neither a file"):
        Template.load(tmp_path / "missing.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(TemplateError, match="UTF-8"):
        Template.load(tmp_path / "latin.jinja")


def test_template_code_is_sandboxed() -> None:
    template = Template.from_source(HEADER + BODY + "{{ query.__class__.__mro__ }}", "evil.jinja")
    with pytest.raises(TemplateError, match=r"evil\.jinja: rendering failed"):
        render(template, "q", ["a"])


def test_hint_text() -> None:
    assert hint_text(1, 3) == "The best response is: Response 2"
    assert hint_text(1, 3, style="letter") == "best [B]"
    assert Template.load("compact").hint_text(0, 2) == "best [A]"
    single = {hint_text(0, 1, (1,)), hint_text(0, 1, (0,))}
    assert len(single) == 2
    assert hint_text(0, 1, (1,), style="letter") == "best [A]"
    assert hint_text(0, 1, (0,), style="letter") == "best none"
    for best, n, labels in [(3, 3, None), (-1, 3, None), (0, 1, None), (0, 1, (7,))]:
        with pytest.raises(ValueError, match=r"0-based|labels="):
            hint_text(best, n, labels)


@pytest.mark.parametrize(
    ("header", "scale", "threshold"),
    [
        ("low=0 high=1 reads=scores", (0, 1), None),  # the scores are the labels
        ("low=0 high=100 reads=scores", (0, 100), 50),
        ("low=1 high=10 reads=scores", (1, 10), 5.5),
        ("low=1 high=n reads=index", (0, 1), None),  # read as 1 at the index, 0 elsewhere
    ],
)
def test_the_scale_says_where_a_single_response_is_right(header, scale, threshold) -> None:
    source = f"{{# grm_jax: name=mine {header} #}}\n{{{{ query }}}}\n{{{{ responses }}}}\n"
    template = Template.from_source(source, "mine.jinja")
    assert template.scale == scale and template.threshold == threshold
