"""Opens `zero-ds chat --page` in headless Chromium as a person would: uploads images, asks, reads both answers.

launch/test_page.sh runs it. It needs playwright and Chromium, and writes a screenshot.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from zero_ds.grafting.chat import Conversation
from zero_ds.grafting.named_model import find_model, load_model

TOKENS = 40
"""Longest answer, in tokens."""


def main(
    run: Annotated[str, typer.Argument(help="Run folder with a trained encoder.")],
    target: Annotated[str, typer.Option(help="Full language model.")],
    images: Annotated[list[Path], typer.Option("--image", help="Image to ask about; repeatable.")],
    question: Annotated[str, typer.Option(help="Question to ask.")] = "describe the image briefly.",
    screenshot: Annotated[Path, typer.Option(help="PNG file for a screenshot of the page.")] = Path("chat-page.png"),
    chromium: Annotated[str, typer.Option(help="Path of the browser.")] = shutil.which("chromium") or "chromium",
) -> None:
    """Open the page of a run and its graft, use it, and compare its answers with those of the models."""
    command = [sys.executable, "-m", "zero_ds.cli", "chat", run, "--target", target, "--page", "--port", "0"]
    command += ["--dtype", "float32", "--max-new-tokens", str(TOKENS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert address is not None, "the page did not print its address"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1120})
            with only_requests_to(page, address.group()):
                open_page(page, address.group())
                check_refusals(page, question)
                page.reload()
                page.locator("#question textarea").wait_for(timeout=30_000)
                check_answers(page, run, target, images, question)
                check_trajectories(page)
                save_screenshot(page, screenshot)
                check_stop(page)
            browser.close()
    finally:
        server.terminate()
        status = server.wait(30)
    print(f"the page ended with status {status}")


@contextmanager
def only_requests_to(page: Page, address: str) -> Iterator[None]:
    """Checks that the page requests nothing from other addresses, and that its scripts raise no errors."""
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield
    others = sorted({url for url in requested if not url.startswith((address, "data:", "blob:"))})
    print(f"{len(requested)} requests, {len(others)} to other addresses; {len(errors)} errors in the page's scripts")
    assert not others, f"the page asks for {others}"
    assert not errors, errors


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    page.locator("#question textarea").wait_for(timeout=30_000)


def check_refusals(page: Page, question: str) -> None:
    """Asks an empty question, then about a file that is not an image: the page says why it refuses."""
    box = page.locator("#question textarea")
    box.press("Enter")
    expect(page.get_by_text("the question is empty")).to_be_visible(timeout=20_000)
    with tempfile.TemporaryDirectory() as name:
        none = Path(name) / "none.png"
        none.write_text("not an image", encoding="utf-8")
        page.locator("#question input[type=file]").set_input_files(none)
        page.locator("#question .thumbnail-item, #question img").first.wait_for(timeout=20_000)
        box.fill(question)
        box.press("Enter")
        expect(page.get_by_text("none.png cannot be read")).to_be_visible(timeout=20_000)


def check_answers(page: Page, run: str, target: str, images: list[Path], question: str) -> None:
    """Asks about the images: both answers on the page are those of the models."""
    box = page.locator("#question textarea")
    page.locator("#question input[type=file]").set_input_files(images)
    expect(page.locator("#question img")).to_have_count(len(images), timeout=20_000)
    box.fill(question)
    box.press("Enter")
    page.locator("#trajectory img").wait_for(timeout=120_000)
    found = [page.locator(f"#chat-{number} .bot.message").first.inner_text().strip() for number in range(2)]
    for number, into in enumerate((None, target)):
        talk = Conversation(load_model(find_model(run, into)), max_new_tokens=TOKENS)
        for image in images:
            talk.show(image)
        expected = "".join(talk.ask(question))
        print(f"model {number}: {found[number]!r}")
        assert found[number] == expected and expected, f"the page says {found[number]!r}, the model {expected!r}"
        assert page.locator(f"#chat-{number} .user img").count() == len(images)


def check_trajectories(page: Page) -> None:
    """Switches between the models: the plot changes. Buttons that publish or clear a chat are hidden."""
    for radio in (page.get_by_role("radio").first, page.get_by_role("radio").last):
        shown = page.locator("#trajectory img").get_attribute("src")
        radio.check()
        changed = (
            "src => document.querySelector('#trajectory img') && document.querySelector('#trajectory img').src !== src"
        )
        page.wait_for_function(changed, arg=shown, timeout=120_000)
    for name in ("Share", "Clear"):
        assert not any(button.is_visible() for button in page.locator(f"button[aria-label={name}]").all()), name


def save_screenshot(page: Page, path: Path) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=path, full_page=True)
    image = Image.open(path).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


def check_stop(page: Page) -> None:
    """Stops an answer and asks again: both models answer, and their earlier answers are still there."""
    box = page.locator("#question textarea")
    box.fill("Tell me a long story about the sea.")
    box.press("Enter")
    until(page, lambda: len(answers(page, 0)) == 2)
    page.get_by_role("button", name="Stop").click()
    expect(box).to_be_editable(timeout=20_000)
    page.wait_for_timeout(1500)
    told = [answers(page, number) for number in range(2)]  # the second model may not have begun
    print(f"stopped after {[each[1:] for each in told]}")
    box.fill("why?")
    box.press("Enter")
    until(page, lambda: all(len(answers(page, number)) == len(told[number]) + 1 for number in range(2)))
    expect(box).to_be_editable(timeout=120_000)
    for number, before in enumerate(told):  # a last word may have come after the click
        for now, then in zip(answers(page, number), before, strict=False):
            assert now.startswith(then), (now, then)


def answers(page: Page, number: int) -> list[str]:
    """Returns a model's answers so far, without the sign that it is still working."""
    texts = page.locator(f"#chat-{number} .bot.message").all_inner_texts()
    return [text.strip() for text in texts if text.strip() not in ("", "Loading content")]


def until(page: Page, met: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until a condition is met."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "the page did not get there in time"
        page.wait_for_timeout(50)


if __name__ == "__main__":
    typer.run(main)
