"""grm.json: templates travel as texts, defaults are filled in, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from grm_jax.critique import Template
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.errors import UserError
from grm_jax.judge.about import About
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.storage import ABOUT_FILE
from grm_jax.sampler.options import EngineConfig

INPUTS = Path(__file__).parents[1] / "reports" / "inputs"
MINE = "{# grm_jax: name=mine low=0 high=100 reads=scores #}\n{{ query }}\r\n{{ responses }} é\n"


def put(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / ABOUT_FILE).write_text(text, encoding="utf-8")
    return folder


def whole(templates: Templates) -> About:
    return About(
        stage="rl",
        trained=True,
        templates=templates,
        judge=JudgeDefaults(temperature=0.7, max_new_tokens=80),
        engine=EngineConfig(max_rows=64, spare=0.25, cache_bytes=1000),
        length_buckets=(64, 256),
    )


def test_written_then_read_is_the_same(tmp_path):
    templates = Templates.load(TemplateConfig("compact", "compact_single", "compact_meta"))
    whole(templates).write(tmp_path)
    again = About.read(tmp_path)
    assert dataclasses.replace(again, templates=None) == dataclasses.replace(
        whole(templates), templates=None
    )
    assert again.templates is not None
    for (_, new), (_, old) in zip(again.templates.items(), templates.items(), strict=True):
        assert new == dataclasses.replace(old, origin=new.origin) and new.digest == old.digest
    again.write(tmp_path / "again")
    assert About.read(tmp_path / "again").templates is not None


def test_a_template_travels_as_its_text(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbf" + MINE.encode())
    monkeypatch.chdir(tmp_path)
    templates = Templates.load(TemplateConfig(many="mine.jinja"))
    whole(templates).write(tmp_path / "model")
    (tmp_path / "mine.jinja").unlink()
    (tmp_path / "model").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    found = About.read(tmp_path / "moved").templates
    assert found is not None
    assert found.many.source == MINE and found.many.digest == templates.many.digest
    assert (found.many.low, found.many.high) == (0, 100)
    assert found.single.source == Template.load("single").source


def test_what_is_not_said_is_not_written(tmp_path):
    assert About.read(tmp_path) == About()
    About(trained=False).write(tmp_path)
    assert json.loads((tmp_path / ABOUT_FILE).read_text()) == {"trained": False}
    assert About.read(tmp_path) == About(trained=False)


def test_fields_that_an_older_file_lacks_take_their_defaults(tmp_path):
    content = {"engine": {"page": 48}, "judge": {}, "templates": {"many": "compact"}}
    found = About.read(put(tmp_path, content))
    assert found.engine == EngineConfig(page=48) and found.judge == JudgeDefaults()
    assert found.templates is not None
    assert found.templates.many == Template.load("compact")
    assert found.templates.meta == Template.load("meta")
    assert found.stage is found.length_buckets is None


def test_paths_of_older_files(tmp_path, monkeypatch):
    model = put(tmp_path / "model", {"templates": {"many": "own/mine.jinja"}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        About.read(model)
    for words in ("grm.json: templates.many is 'own/mine.jinja'", "no such template", "copy the"):
        assert words in str(error.value)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.jinja").write_text(MINE)
    assert About.read(Path("model")).templates.many.name == "mine"  # type: ignore[union-attr]
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="no such template"):
        About.read(model)
    (model / "mine.jinja").write_text(MINE)  # what the message says
    assert About.read(model).templates.many.name == "mine"  # type: ignore[union-attr]


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / ABOUT_FILE).write_bytes(b"\xef\xbb\xbf" + b'{"trained": true}')
    assert About.read(tmp_path).trained


BROKEN = [
    ("", "not valid JSON"),
    ('{"engine": {"page": 4', "not valid JSON"),
    ("[]", "a JSON object is expected, not list"),
    ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ({"colour": 1}, "['colour']"),
    ({"judge": {"top_p": 0.9}}, "judge has the fields ['top_p']"),
    ({"engine": {"future": 1, "page": 1}}, "engine has the fields ['future']"),
    ({"judge": []}, "judge is []"),
    ({"engine": "fast"}, "engine is 'fast'"),
    ({"judge": {"temperature": "hot"}}, "judge.temperature is 'hot'; a number is expected"),
    ({"judge": {"temperature": True}}, "judge.temperature is True"),
    ({"judge": {"temperature": -1}}, "judge.temperature is -1"),
    ({"judge": {"max_new_tokens": 0}}, "judge.max_new_tokens is 0"),
    ({"judge": {"max_new_tokens": 1.5}}, "judge.max_new_tokens is 1.5"),
    ({"judge": {"max_new_tokens": None}}, "judge.max_new_tokens is None"),
    ('{"judge": {"temperature": NaN}}', "judge.temperature is nan"),
    ({"engine": {"page": "48"}}, "engine.page is '48'; an integer is expected"),
    ({"engine": {"page": 0}}, "engine.page=0"),
    ({"engine": {"share": 1}}, "engine.share is 1; true or false is expected"),
    ({"length_buckets": 256}, "length_buckets is 256; a list is expected"),
    ({"length_buckets": []}, "length_buckets is []"),
    ({"length_buckets": [256, 128]}, "length_buckets is [256, 128]"),
    ({"length_buckets": [0, 128]}, "length_buckets is [0, 128]"),
    ({"length_buckets": ["a"]}, "length_buckets[0] is 'a'"),
    ({"stage": 3}, "stage is 3; a text is expected"),
    ({"trained": "yes"}, "trained is 'yes'"),
    ({"templates": "compact"}, "templates is 'compact'"),
    ({"templates": ["compact"]}, "templates is ['compact']"),
    ({"templates": {"most": "compact"}}, "templates has the fields ['most']"),
    ({"templates": {"many": 3}}, "templates.many is 3"),
    ({"templates": {"many": None}}, "templates.many is None"),
    ({"templates": {"many": ""}}, "templates.many is ''"),
    ({"templates": {"many": "."}}, "templates.many is '.'"),
    ({"templates": {"many": {"text": 3}}}, "templates.many is 3"),
    ({"templates": {"many": {}}}, "templates.many is None"),
    ({"templates": {"many": {"text": "x", "path": "y"}}}, "templates.many has the fields ['path']"),
    ({"templates": {"many": {"text": "no header"}}}, "templates.many:1: the template has no head"),
    ({"templates": {"many": {"text": MINE + "{% if %}"}}}, "templates.many:4: template syntax"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_what_is_wrong_is_named_with_its_file(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        About.read(put(tmp_path, content))
    assert str(error.value).startswith(str(tmp_path / ABOUT_FILE))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("05_grm_cut_off.json", "not valid JSON"), ("05_grm_unknown_judge_field.json", "top_p")],
)
def test_the_users_files(tmp_path, name, words):
    content = (INPUTS / name).read_text()
    with pytest.raises(UserError, match=words) as error:
        About.read(put(tmp_path, content))
    assert str(error.value).startswith(str(tmp_path / ABOUT_FILE))


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / ABOUT_FILE).symlink_to("gone")
    with pytest.raises(UserError, match=r"grm.json: a link to gone"):
        About.read(tmp_path)
