"""The picture of a judge card: all of the card stands in it, and markup in a card is text."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")

FOLDER = Path(__file__).parents[2] / "experiments" / "attacks"


@pytest.fixture(scope="module")
def picture():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("picture_of_a_card", FOLDER / "picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_a_picture_holds_the_whole_card(picture, tmp_path):
    lines = (FOLDER / "card.md").read_text(encoding="utf-8").splitlines()
    sizes = []
    for name, card in (("whole", lines), ("half", lines[: len(lines) // 2])):
        file = tmp_path / f"{name}.md"
        file.write_text("\n".join(card) + "\n", encoding="utf-8")
        args = picture.Arguments(card=file, output=file.with_suffix(".png"), width=1300)
        try:
            picture.shoot(args)
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        sizes.append(size(args.output))
    (width, height), (_, half) = sizes
    assert width == 1300 and height > half + 10 * (len(lines) // 2) > half


def test_every_table_of_the_card_is_one(picture):
    card = (FOLDER / "card.md").read_text(encoding="utf-8")
    html = picture.page(card)
    assert html.count("<table>") == card.count("| :---") > 3
    assert html.count("<tr>") == sum(
        line.startswith("|") and ":---" not in line for line in card.splitlines()
    )


def test_markup_in_a_card_is_text(picture):
    html = picture.page(
        "# Judge card: <script>x</script>\n\n|  | what |\n| :--- | ---: |\n| a | <b> |\n"
    )
    assert "<script>" not in html and "<b>" not in html and "&lt;b&gt;" in html
