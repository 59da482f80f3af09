"""The picture of a judge card: its Markdown as a page, taken by a headless browser.

    python experiments/attacks/picture.py [--card CARD.md] [--output CARD.png]

Needs markdown-it-py, playwright and a Chromium.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import tyro
from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STYLE = """
body { margin: 24px 20px; font: 13px/1.5 "DejaVu Sans", sans-serif; color: #1d1f24; }
h1 { font-size: 22px; margin: 0 0 28px; }
p:has(+ table) { font-size: 16px; font-weight: bold; margin: 28px 0 6px; }
table { border-collapse: collapse; }
th, td { padding: 3px 8px; border-bottom: 1px solid #dfe1e6; white-space: nowrap; }
th { color: #5c616b; }
/* Numbers stand below one another, texts begin at the left. */
tr > :nth-child(2):last-child { text-align: left !important; }
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    card: Path = HERE / "card.md"
    """What `python -m grm_jax.evaluate --attacks` wrote."""
    output: Path = HERE / "card.png"
    width: int = 1160
    """In pixels, unless a table needs more; the height is the card's."""


def page(card: str) -> str:
    """The card as an HTML page. Markup that stands in the card is shown as text."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    return (
        "<!doctype html><meta charset=utf-8><title>Judge card</title>"
        f"<style>{STYLE}</style>{markdown.render(card)}"
    )


def shoot(args: Arguments) -> None:
    """Raises playwright's Error where there is no browser."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        window = browser.new_page(
            viewport={"width": args.width, "height": 100}, java_script_enabled=False
        )
        window.set_content(page(args.card.read_text(encoding="utf-8")))
        window.screenshot(path=args.output, full_page=True)
        browser.close()


if __name__ == "__main__":
    shoot(tyro.cli(Arguments, description=__doc__))
