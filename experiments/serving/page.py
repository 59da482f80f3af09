"""Pictures of the server's page with a verdict on it, in both colour schemes.

    python -m grm_jax.serve --model RUN --meta RUN --scalar RUN &
    python experiments/serving/page.py --rows RUN/world/heldout.jsonl

Writes page-light.png and page-dark.png beside this file. Needs playwright and a Chromium.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import tyro
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    rows: Path
    """Preferences in JSONL; one of them is judged."""
    row: int = 4
    k: int = 8
    url: str = "http://127.0.0.1:8000"
    output: Path = HERE


def shoot(page: Page, args: Arguments, query: str, responses: list[str], file: Path) -> None:
    page.goto(args.url)
    page.get_by_label("Query").fill(query)
    for _ in range(len(responses) - 2):
        page.get_by_role("button", name="Add a response").click()
    for i, text in enumerate(responses):
        page.get_by_label(f"Response {i + 1}", exact=True).fill(text)
    page.locator("#k").fill(str(args.k))
    page.get_by_role("button", name="Judge").click()
    page.locator("#winner").wait_for(timeout=300_000)
    page.locator(".critique summary").first.click()
    page.screenshot(path=file, full_page=True)


def main() -> None:
    args = tyro.cli(Arguments, description=__doc__)
    row = json.loads(args.rows.read_text(encoding="utf-8").splitlines()[args.row])
    query, responses = row["turns"][-1]["content"], row["responses"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 800})
            shoot(page, args, query, responses, args.output / f"page-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
