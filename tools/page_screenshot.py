"""Paints the picture of the server's page that stands in the README.

    gguf-sd serve --type q8_0,q4_1,q4_0 --port 7860 &
    python -m tools.page_screenshot http://127.0.0.1:7860 docs/serve.png

Needs playwright and Chromium (``CHROMIUM``, else /usr/bin/chromium).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

PROMPT = "a yellow triangle left of a purple ring"
NEXT = "a red circle above a blue square"


def paint(page: Any, prompt: str, seed: int, steps: int, models: int) -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#steps", str(steps))
    for index, tick in enumerate(page.locator("#compare input").all()):
        tick.set_checked(index < models)
    page.click("#paint")


def main(url: str, target: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 920})
        page.goto(url)
        page.click("#compare-box summary")
        paint(page, PROMPT, 3, 20, 3)
        expect(page.locator("#gallery img")).to_have_count(3, timeout=60_000)
        expect(page.locator("#state")).to_have_text("Ready", timeout=60_000)
        paint(page, NEXT, 1, 100, 1)
        expect(page.locator(".job .facts")).to_contain_text(re.compile("step [3-7][0-9] "), timeout=60_000)
        page.locator("#form").evaluate("form => { form.scrollTop = 0; scrollTo(0, 0); }")
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
