"""The page in a real browser: Chromium, without a network but this machine's."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.imaging.png_metadata import PARAMETERS
from gguf_sd.imaging.save_png import png_bytes
from gguf_sd.pipeline import Pipeline
from gguf_sd.server.guard import Rules
from tests.server.conftest import Running, picture, until
from tests.server.test_app import Start

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
expect: Any = getattr(sync_api, "expect", None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Running) -> Iterator[Any]:
    context = browser.new_context()
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url) if not ours(request.url, served.url) else None)
    opened.goto(served.url)
    ready(opened)
    yield opened
    context.close()
    assert not wrong, "errors of scripts, and requests that leave this machine"


def is_wrong(message: Any) -> bool:
    return message.type == "error" and "Failed to load resource" not in message.text  # an answer of 4xx


def ours(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))


def ready(page: Any) -> None:
    expect(page.locator("#state")).to_have_text("Ready", timeout=30_000)


def pictures(page: Any) -> list[Image.Image]:
    return [picture(image.get_attribute("src").partition(",")[2]) for image in page.locator("#gallery img").all()]


def drop(page: Any, target: str, data: bytes) -> None:
    """Drops a PNG on an element, as the desktop would."""
    transfer = page.evaluate_handle(
        """([text]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        [base64.b64encode(data).decode()],
    )
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


def fill(page: Any, **values: object) -> None:
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def test_typing_and_painting(page: Any, models: dict[str, Path]) -> None:
    expected = Pipeline.load(models["demo-q8_0"], "cpu", "float32")
    defaults = expected.model.config.defaults
    assert page.input_value("#steps") == str(defaults.steps)
    assert page.input_value("#sampler") == defaults.sampler
    fill(page, prompt="a red circle", seed=3, steps=4, guidance=3)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery img")).to_have_count(1, timeout=30_000)
    (painted,) = pictures(page)
    assert painted.tobytes() == expected("a red circle", seed=3, steps=4, guidance=3)[0].tobytes()
    assert "seed 3" in page.inner_text("figcaption")


def test_a_look_at_each_step_and_cancel(page: Any, served: Running) -> None:
    fill(page, prompt="a red circle", steps=150)
    page.click("#paint")
    look = page.locator(".job img")
    expect(look).to_be_visible(timeout=20_000)
    first = look.get_attribute("src")
    expect(look).not_to_have_attribute("src", first, timeout=20_000)
    assert " left" in page.inner_text(".job .facts")
    assert float(page.locator(".job progress").evaluate("bar => bar.value")) > 0
    page.click("#stop")
    expect(page.locator(".job")).to_have_count(0)
    ready(page)
    assert page.locator("#gallery img").count() == 0
    until(lambda: not served.server.line.open_tickets())


def test_a_mask_is_painted(page: Any) -> None:
    start = Image.new("RGB", (64, 64), "orange")
    drop(page, "#drop", png_bytes(start))
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    scale = box["width"] / 64
    page.locator("#brush").evaluate("(brush) => { brush.value = 20; }")
    page.mouse.move(box["x"] + 48 * scale, box["y"] + 4 * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + 48 * scale, box["y"] + 60 * scale, steps=6)
    page.mouse.up()
    fill(page, prompt="a red circle", steps=4, strength=1, seed=1, mask_blur=0)
    page.click("#paint")
    expect(page.locator("#gallery img")).to_have_count(1, timeout=30_000)
    (painted,) = pictures(page)
    assert painted.crop((0, 0, 30, 64)).getcolors() == [(30 * 64, (255, 165, 0))], "outside the mask"
    assert len(painted.crop((44, 0, 52, 64)).getcolors(1 << 12) or []) > 10, "inside"
    assert "with a mask" in page.inner_text("#gallery .facts")
    page.click("#clear")
    canvas.focus()
    for key in ("+", "ArrowLeft", "ArrowLeft", " "):
        page.keyboard.press(key)
    page.click("#paint")
    expect(page.locator("#gallery img")).to_have_count(2, timeout=30_000)
    by_keyboard = pictures(page)[0]
    assert by_keyboard.getpixel((62, 62)) == (255, 165, 0)
    assert by_keyboard.getpixel((25, 32)) != (255, 165, 0)


def test_a_png_fills_the_form(page: Any, models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["demo-q4_0"], "cpu", "float32")
    settings: dict[str, Any] = {"steps": 3, "sampler": "dpmpp_2m", "schedule": "karras", "seed": 11, "guidance": 4.5}
    (painted,) = pipeline("a green ring", negative_prompt="<i>red</i>", **settings)
    fill(page, prompt="something else", steps=9)
    drop(page, "#stage", png_bytes(painted, {PARAMETERS: painted.info[PARAMETERS]}))
    expect(page.locator("#prompt")).to_have_value("a green ring")
    expected = {"negative_prompt": "<i>red</i>", "steps": "3", "guidance": "4.5", "seed": "11", "schedule": "karras"}
    for name, value in (expected | {"sampler": "dpmpp_2m", "model": "demo-q4_0"}).items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    page.click("#paint")
    expect(page.locator("#gallery img")).to_have_count(1, timeout=30_000)
    assert pictures(page)[0].tobytes() == painted.tobytes()


def test_types_side_by_side(page: Any) -> None:
    fill(page, prompt="a red circle", steps=3)
    page.click("#compare-box summary")
    for tick in page.locator("#compare input").all():
        tick.check()
    page.click("#paint")
    expect(page.locator("#gallery li figure")).to_have_count(2, timeout=30_000)
    captions = sorted(page.locator("figcaption").all_inner_texts())
    assert captions[0].startswith("demo-q4_0 q4_0,")
    assert captions[1].startswith("demo-q8_0 q8_0,")
    seeds = {caption.partition("seed ")[2].partition(",")[0] for caption in captions}
    assert len(seeds) == 1


def test_prompts_are_texts(page: Any) -> None:
    prompt = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    fill(page, prompt=prompt, negative_prompt=prompt, steps=2)
    page.click("#paint")
    expect(page.locator("#gallery img")).to_have_count(1, timeout=30_000)
    assert page.inner_text("#gallery .prompt") == prompt
    assert page.title() == "gguf-sd"


def test_errors_are_told(page: Any, served: Running) -> None:
    fill(page, prompt="<lora:absent:1>")
    page.click("#paint")
    expect(page.locator("#error")).to_contain_text("which this server does not have")


def test_two_tabs_at_once(browser: Any, served: Running) -> None:
    tabs = [browser.new_page() for _ in range(2)]
    for index, tab in enumerate(tabs):
        tab.goto(served.url)
        ready(tab)
        fill(tab, prompt=f"a {('red', 'blue')[index]} circle", steps=30, seed=index)
    for tab in tabs:
        tab.click("#paint")
    for index, tab in enumerate(tabs):
        expect(tab.locator("#gallery img")).to_have_count(1, timeout=30_000)
        assert f"seed {index}" in tab.inner_text("figcaption")
    tabs[0].close()
    fill(tabs[1], steps=3)
    tabs[1].click("#paint")
    expect(tabs[1].locator("#gallery img")).to_have_count(2, timeout=30_000)
    tabs[1].close()


def test_a_tab_that_is_closed_cancels(browser: Any, served: Running) -> None:
    tab = browser.new_page()
    tab.goto(served.url)
    ready(tab)
    fill(tab, prompt="a red circle", steps=150, count=8)
    tab.click("#paint")
    expect(tab.locator(".job img")).to_be_visible(timeout=20_000)
    tab.close()
    until(lambda: not served.server.line.open_tickets())


def test_by_keyboard_alone(page: Any) -> None:
    """Every control is reached by Tab, in order, and a picture painted without a mouse."""
    page.locator("#prompt").focus()
    page.keyboard.type("a red circle")
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
    wanted = ["negative_prompt", "paint", "defaults", "model", "sampler", "steps", "guidance", "width", "seed", "count"]
    positions = [reached.index(name) for name in wanted]
    assert positions == sorted(positions)
    assert "SUMMARY" in reached
    page.locator("#steps").fill("2")
    page.locator("#paint").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#gallery img")).to_have_count(1, timeout=30_000)


def test_narrow_screens(browser: Any, served: Running) -> None:
    context = browser.new_context(viewport={"width": 340, "height": 640})
    tab = context.new_page()
    tab.goto(served.url)
    ready(tab)
    fill(tab, prompt="a" * 300, steps=2)
    tab.click("#paint")
    expect(tab.locator("#gallery img")).to_have_count(1, timeout=30_000)
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 340, "nothing sticks out"
    context.close()


def test_the_key_is_asked_for(browser: Any, server_with: Start) -> None:
    server = server_with(rules=Rules(key="sesame"))
    tab = browser.new_page()
    tab.goto(server.url)
    tab.fill("#key", "wrong")
    tab.keyboard.press("Enter")
    expect(tab.locator("#key")).to_have_value("")
    tab.fill("#key", "sesame")
    tab.keyboard.press("Enter")
    ready(tab)
    tab.close()
