"""Tokenizers and chat templates as people have them: read rightly, or refused by file and fix."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grm_jax.tokenizer import ChatTokenizer, TokenizerError, load_tokenizer
from grm_jax.tokenizer.chat_template import GEMMA_TEMPLATE

INPUTS = Path(__file__).parent / "inputs"
BROKEN = INPUTS / "17_tokenizers"
MINE = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def spec() -> dict[str, Any]:
    """A byte-level tokenizer.json of 600 ids with Gemma's control tokens."""
    found = json.loads((BROKEN / "version_2.0.tokenizer.json").read_text(encoding="utf-8"))
    return found | {"version": "1.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer folder without a chat template."""
    root = tmp_path / "model"
    root.mkdir()
    write(root / "tokenizer.json", spec())
    write(root / "tokenizer_config.json", NAMES)
    return root


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def shown(tokenizer: ChatTokenizer) -> str:
    return tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}]), show_control=True)


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# ------------------------------------------------------------------------------- chat templates


def config_field(value: Any) -> Callable[[Path], None]:
    return lambda root: write(root / "tokenizer_config.json", NAMES | {"chat_template": value})


def own_file(name: str, content: bytes) -> Callable[[Path], None]:
    def put(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)

    return put


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "put",
    [
        config_field(MINE),
        config_field({"default": MINE, "rag": "x"}),
        config_field({"default": MINE}),
        config_field([{"name": "rag", "template": "x"}, {"name": "default", "template": MINE}]),
        config_field([{"name": "default", "template": MINE}]),
        config_field("\ufeff" + MINE),
        own_file("chat_template.jinja", MINE.encode()),
        own_file("chat_template.jinja", b"\xef\xbb\xbf" + MINE.encode()),
        own_file("chat_template.json", as_json(chat_template=MINE)),
        own_file("chat_template.json", as_json(chat_template={"default": MINE})),
        own_file("chat_template.json", b"\xef\xbb\xbf" + as_json(chat_template=MINE)),
        own_file("additional_chat_templates/default.jinja", MINE.encode()),
    ],
)
def test_every_form_of_a_chat_template_is_read(folder, put, caplog):
    put(folder)
    tokenizer = load_tokenizer(folder)
    assert shown(tokenizer) == "<bos>[hi]"
    assert "no chat template" not in caplog.text
    tokenizer.save(folder.parent / "saved")
    assert shown(load_tokenizer(folder.parent / "saved")) == "<bos>[hi]"


@pytest.mark.parametrize(
    ("put", "file", "words"),
    [
        (config_field(["x"]), "tokenizer_config.json", "chat_template[0] is 'x'"),
        (config_field([{"template": "x"}]), "tokenizer_config.json", "[0] is {'template': 'x'}"),
        (config_field([]), "tokenizer_config.json", "is empty"),
        (config_field({}), "tokenizer_config.json", "is empty"),
        (config_field(""), "tokenizer_config.json", "is empty"),
        (config_field(7), "tokenizer_config.json", "is 7"),
        (config_field({"default": None}), "tokenizer_config.json", "'default' is None"),
        (config_field({"default": ["x"]}), "tokenizer_config.json", "'default' is ['x']"),
        (config_field({"a": "x", "b": "y"}), "tokenizer_config.json", "none is named 'default'"),
        (config_field({"rag": "x"}), "tokenizer_config.json", "has one entry, 'rag', and none"),
        (config_field("{% if %}"), "model", "does not compile"),
        (own_file("chat_template.jinja", "é".encode("latin-1")), "chat_template.jinja", "UTF-8"),
        (own_file("chat_template.jinja", b" \n"), "chat_template.jinja", "is empty"),
        (own_file("chat_template.json", b"{}"), "chat_template.json", "is None"),
        (own_file("chat_template.json", b"[1]"), "chat_template.json", "a JSON object is expected"),
        (own_file("chat_template.json", b'{"chat_'), "chat_template.json", "not valid JSON"),
        (own_file("additional_chat_templates/rag.jinja", b"x"), "additional_chat", "'rag'"),
        (
            own_file("chat_template.jinja", b"version https://git-lfs.github.com/spec/v1\n"),
            "chat_template.jinja",
            "git lfs pull",
        ),
    ],
)
def test_a_template_that_is_not_understood_is_never_replaced(folder, put, file, words):
    put(folder)
    refused(folder, file, words)


def test_a_folder_without_any_template_gets_gemmas_and_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert "no chat template; using Gemma's" in caplog.text
    write(folder / "tokenizer_config.json", NAMES | {"chat_template": GEMMA_TEMPLATE})
    assert shown(tokenizer) == shown(load_tokenizer(folder))


def test_of_two_templates_the_first_is_used_and_the_other_named(folder, caplog):
    own_file("chat_template.jinja", MINE.encode())(folder)
    config_field(GEMMA_TEMPLATE)(folder)
    with caplog.at_level(logging.WARNING):
        assert shown(load_tokenizer(folder)) == "<bos>[hi]"
    assert "tokenizer_config.json: chat_template: another chat template than" in caplog.text


@pytest.mark.parametrize(
    "name", ["14_chat_template.json", "14_tokenizer_config_dict_template.json"]
)
def test_the_users_templates(folder, name):
    target = "chat_template.json" if name == "14_chat_template.json" else "tokenizer_config.json"
    shutil.copyfile(INPUTS / name, folder / target)
    assert shown(load_tokenizer(folder)) == (
        "<bos><start_of_turn>USER hi<end_of_turn><start_of_turn>MODEL "
    )


def test_a_byte_order_mark_in_a_template_is_no_part_of_a_prompt(folder):
    shutil.copyfile(INPUTS / "05_chat_template_with_bom.jinja", folder / "chat_template.jinja")
    assert shown(load_tokenizer(folder)).startswith("<bos>")


# ------------------------------------------------------------------------------ the vocabulary


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown_pre_tokenizer", "PreTokenizer"),
        ("version_2.0", "2.0"),
        ("added_token_without_fields", "missing field"),
    ],
)
def test_a_tokenizer_of_another_version_is_one_line(folder, name, words):
    shutil.copyfile(BROKEN / f"{name}.tokenizer.json", folder / "tokenizer.json")
    refused(folder, "tokenizer.json: tokenizers 0.", "can not read it: ", "pip install", words)


def test_a_pointer_in_place_of_the_tokenizer(folder):
    shutil.copyfile(BROKEN / "git_lfs_pointer.tokenizer.json", folder / "tokenizer.json")
    refused(folder, "tokenizer.json: a Git LFS pointer", "git lfs pull")


def changed(**fields: Any) -> dict[str, Any]:
    return spec() | fields


def model(**fields: Any) -> dict[str, Any]:
    return changed(model=spec()["model"] | fields)


@pytest.mark.parametrize(
    "content",
    [
        changed(normalizer={"type": "Newest"}),
        changed(decoder={"type": "Newest"}),
        changed(decoder=[]),
        changed(model=None),
        changed(model=[]),
        changed(model={"vocab": 3}),
        changed(added_tokens={"a": 1}),
        changed(added_tokens=["<pad>"]),
        changed(added_tokens=[{"id": "0", "content": "<pad>"}]),
        changed(added_tokens=[{"content": "<pad>"}]),
        model(type="Newest"),
        model(merges=["a"]),
        model(merges=[1]),
        model(merges=[["a", "b", "c"]]),
        model(merges=3),
        model(vocab={}),
        model(vocab={"a": "0"}),
        model(vocab={"a": None}),
        model(vocab=[["a"]]),
        model(vocab=["a"]),
        {},
    ],
)
def test_no_structure_of_tokenizer_json_is_a_traceback(folder, content):
    write(folder / "tokenizer.json", content)
    refused(folder, "tokenizer.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token": 5}, "eos_token is 5"),
        ({"eos_token": {"special": True}}, "eos_token is {'special': True}"),
        ({"bos_token": ["<bos>"]}, "bos_token is ['<bos>']"),
    ],
)
def test_ill_typed_names_of_tokens(folder, fields, words):
    write(folder / "tokenizer_config.json", NAMES | fields)
    refused(folder, "tokenizer_config.json", words)


@pytest.mark.parametrize("content", [b"", b"junk", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_broken_sentencepiece_model(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path, name)
    assert "not a sentencepiece model" in message or "git lfs pull" in message


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json", "generation_config.json", "config.json",
    ],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_an_error_by_name(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/gone")
    refused(folder, f"{name}: a link to ../../blobs/gone, which is not there")


# ------------------------------------------------------------------------------------ stop ids


def test_stop_ids_are_read_from_every_file(folder):
    def stops(generation: Any = None, config: Any = None) -> tuple[int, ...]:
        for name, value in (("generation_config.json", generation), ("config.json", config)):
            (folder / name).unlink(missing_ok=True)
            if value is not None:
                write(folder / name, {"eos_token_id": value})
        return load_tokenizer(folder).stop_ids

    assert stops() == (1, 4)
    assert stops(config=[1, 4, 9]) == (1, 4, 9)
    assert stops(config=9) == (1, 4, 9)
    assert stops(generation=[1, 4, 9]) == (1, 4, 9)
    assert stops(generation=[4, 7], config=[1, 4, 9]) == (1, 4, 7)  # as transformers has it
    write(folder / "generation_config.json", {"eos_token_id": None})
    assert load_tokenizer(folder).stop_ids == (1, 4, 9)
    for wrong in ("1", [1, "x"], [True], -1, 1.5, {"a": 1}):
        write(folder / "config.json", {"eos_token_id": wrong})
        refused(folder, "config.json: eos_token_id", "correct it")


def test_a_stop_id_beyond_the_vocabulary_is_said(folder, caplog):
    write(folder / "config.json", {"eos_token_id": [1, 999]})
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder)
    assert "eos_token_id [999] is beyond the vocabulary of 600 ids" in caplog.text


@pytest.mark.parametrize(
    "body",
    ["{{ 1 // 0 }}", "{{ range(10 ** 9) | list }}", "{{ messages[7].content }}", "{{ '%d' % 'a' }}",
     "{{ strftime_now(3) }}", "{% include 'x' %}", "{{ raise_exception('no') }}"],
)  # fmt: skip
def test_a_template_that_fails_is_refused_by_name(folder, body):
    config_field("{{ bos_token }}" + body)(folder)
    with pytest.raises(TokenizerError, match="the chat template refused roles"):
        load_tokenizer(folder).chat([{"role": "user", "content": "hi"}])
