"""Opens `zero-ds chat --page` in headless Chromium, as a person would: uploads pictures, asks, reads both answers.

Run by launch/test_page.sh. Needs playwright and a Chromium; writes a screenshot.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.named_model import find_model, load_model


def main(
    run: Annotated[str, typer.Argument(help="Run folder with a trained encoder.")],
    target: Annotated[str, typer.Option(help="Full language model.")],
    picture: Annotated[list[Path], typer.Option(help="Picture to ask about; repeatable.")],
    question: Annotated[str, typer.Option(help="What to ask.")] = "describe the image briefly.",
    screenshot: Annotated[Path, typer.Option(help="PNG file of what was seen.")] = Path("chat-page.png"),
    chromium: Annotated[str, typer.Option(help="The browser's program.")] = shutil.which("chromium") or "chromium",
) -> None:
    command = [sys.executable, "-m", "zero_ds.cli", "chat", run, "--target", target, "--page", "--port", "0"]
    page = subprocess.Popen(
        [*command, "--dtype", "float32", "--max-new-tokens", "40"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert page.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", page.stdout.readline())
        assert address is not None, "the page did not say where it is"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            visit(
                browser.new_page(viewport={"width": 1280, "height": 1120}),
                address.group(),
                run,
                target,
                picture,
                question,
                screenshot,
            )
            browser.close()
    finally:
        page.terminate()
        status = page.wait(30)
    print(f"the page ended with status {status}")


def visit(
    page: Page, address: str, run: str, target: str, pictures: list[Path], question: str, screenshot: Path
) -> None:
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    box = page.locator("#question textarea")
    box.wait_for(timeout=30_000)

    box.press("Enter")
    expect(page.get_by_text("the question is empty")).to_be_visible(timeout=20_000)
    with tempfile.TemporaryDirectory() as name:
        none = Path(name) / "none.png"
        none.write_text("no picture", encoding="utf-8")
        page.locator("#question input[type=file]").set_input_files(none)
        page.locator("#question .thumbnail-item, #question img").first.wait_for(timeout=20_000)
        box.fill(question)
        box.press("Enter")
        expect(page.get_by_text("none.png cannot be read")).to_be_visible(timeout=20_000)
    page.reload()
    box.wait_for(timeout=30_000)

    page.locator("#question input[type=file]").set_input_files(pictures)
    expect(page.locator("#question img")).to_have_count(len(pictures), timeout=20_000)
    box.fill(question)
    box.press("Enter")
    page.locator("#trajectory img").wait_for(timeout=120_000)
    found = [page.locator(f"#chat-{number} .bot.message").first.inner_text().strip() for number in range(2)]
    for number, into in enumerate((None, target)):
        talk = Conversation(load_model(find_model(run, into)), max_new_tokens=40)
        for picture in pictures:
            talk.show(picture)
        expected = "".join(talk.ask(question))
        print(f"model {number}: {found[number]!r}")
        assert found[number] == expected and expected, f"the page says {found[number]!r}, the model {expected!r}"
        assert page.locator(f"#chat-{number} .user img").count() == len(pictures)
    for radio in (page.get_by_role("radio").first, page.get_by_role("radio").last):
        shown = page.locator("#trajectory img").get_attribute("src")
        radio.check()
        changed = (
            "src => document.querySelector('#trajectory img') && document.querySelector('#trajectory img').src !== src"
        )
        page.wait_for_function(changed, arg=shown, timeout=120_000)
    for name in ("Share", "Clear"):
        assert not any(button.is_visible() for button in page.locator(f"button[aria-label={name}]").all()), name
    page.wait_for_timeout(1500)
    page.screenshot(path=screenshot, full_page=True)
    Image.open(screenshot).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        screenshot, optimize=True
    )

    box.fill("Tell me a long story about the sea.")
    box.press("Enter")
    until(page, lambda: len(answers(page, 0)) == 2)
    page.get_by_role("button", name="Stop").click()
    expect(box).to_be_editable(timeout=20_000)
    page.wait_for_timeout(1500)
    told = [answers(page, number) for number in range(2)]  # the second one's turn may not have come
    print(f"stopped after {[each[1:] for each in told]}")
    box.fill("why?")
    box.press("Enter")
    until(page, lambda: all(len(answers(page, number)) == len(told[number]) + 1 for number in range(2)))
    expect(box).to_be_editable(timeout=120_000)
    for number, before in enumerate(told):  # a word may have been on its way when it was stopped
        for now, then in zip(answers(page, number), before, strict=False):
            assert now.startswith(then), (now, then)

    others = sorted({url for url in requested if not url.startswith((address, "data:", "blob:"))})
    print(f"{len(requested)} requests, {len(others)} to other addresses; {len(errors)} errors in the page's scripts")
    assert not others, f"the page asks for {others}"
    assert not errors, errors


def answers(page: Page, number: int) -> list[str]:
    """What a model has said so far, without the sign that it is at work."""
    texts = page.locator(f"#chat-{number} .bot.message").all_inner_texts()
    return [text.strip() for text in texts if text.strip() not in ("", "Loading content")]


def until(page: Page, met: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "the page does not come to it"
        page.wait_for_timeout(50)


if __name__ == "__main__":
    typer.run(main)
