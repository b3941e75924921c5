"""Pictures of the page in each state, for looking at: `make screenshots`.

The demo model answers; the formatted answers, which it cannot write, come from the scripted backend.
"""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from ops.stack import ROOT, Stack, program
from tests.api.server import Server
from tests.stack.client import Door, until
from tests.stack.conftest import LOADING, SMALL, with_model
from tests.web.visitor import PASSWORD, PATIENCE, PHONE, Visitor, visiting

ANSWER = (Path(__file__).parent / "sample.md").read_text()
EARLIER = ("Translate a letter into French", "How does a heat pump work?", "Plan a week of lunches")
CHINESE = {"locale": "zh-CN"}
DARK = {"color_scheme": "dark"}


def picture(visitor: Visitor, folder: Path, name: str) -> None:
    visitor.page.wait_for_load_state("networkidle")
    visitor.page.mouse.move(0, 0)
    visitor.page.screenshot(path=folder / f"{name}.png", animations="disabled")


def picture_now(visitor: Visitor, folder: Path, name: str) -> None:
    visitor.page.screenshot(path=folder / f"{name}.png")


def scripted(browser: Browser, url: str, folder: Path, name: str, **options: Any) -> None:
    """Every state that needs a written answer, with one kind of screen."""
    with visiting(browser, url, **options) as visitor:
        visitor.open()
        expect(visitor.page.locator("#login")).to_be_visible()
        picture(visitor, folder, f"{name}-login")
        visitor.login().inside()
        picture(visitor, folder, f"{name}-hello")
        for question in (*EARLIER, ANSWER):
            fresh(visitor)
            visitor.ask(question)
        expect(visitor.page.locator("math").first).to_be_visible()
        visitor.answer.evaluate("answer => answer.scrollIntoView({block: 'start'})")
        picture(visitor, folder, f"{name}-answer")
        panels(visitor, folder, name)
        visitor.page.reload()
        visitor.page.locator("#login:visible, #app:visible").wait_for()
        if visitor.page.locator("#login").is_visible():
            visitor.login()
        trouble(visitor.inside(), folder, name)


def panels(visitor: Visitor, folder: Path, name: str) -> None:
    """What opens over a conversation."""
    visitor.page.locator("#tune").click()
    picture(visitor, folder, f"{name}-settings")
    visitor.page.keyboard.press("Escape")
    if visitor.page.locator("#open-sidebar").is_visible():
        visitor.page.locator("#open-sidebar").click()
        expect(visitor.page.locator("#close-sidebar")).to_be_in_viewport(ratio=1)
        picture(visitor, folder, f"{name}-list")
    visitor.page.locator("#search").fill("merge")
    expect(visitor.page.locator("#conversations mark")).to_be_visible()
    picture(visitor, folder, f"{name}-search")
    visitor.page.locator("#account").click()
    picture(visitor, folder, f"{name}-menu")


def trouble(visitor: Visitor, folder: Path, name: str) -> None:
    """Reasoning, waiting, and an error."""
    fresh(visitor)
    visitor.ask("think about a dinner for six").locator("summary").click()
    visitor.ask("refuse")
    picture(visitor, folder, f"{name}-error")
    fresh(visitor)
    visitor.send("silent")
    expect(visitor.page.locator(".wait")).to_contain_text("1")
    picture_now(visitor, folder, f"{name}-waiting")
    visitor.page.locator("#stop").click()
    expect(visitor.page.locator("#send")).to_be_visible()


def fresh(visitor: Visitor) -> None:
    visitor.evaluate("document.getElementById('new').click()")  # on a phone it is out of sight


def real(browser: Browser, url: str, folder: Path) -> None:
    """The demo model: loading, answering, and what it said."""
    with visiting(browser, url, device_scale_factor=1.5) as visitor:
        visitor.open().login().inside()
        visitor.page.locator("#tune").click()
        for field, value in (("max_new_tokens", "96"), ("seed", "3")):
            visitor.page.locator(f"[name={field}]").fill(value)
        visitor.page.locator("#tuning .primary").click()
        visitor.send("Why is the sky blue?")
        expect(visitor.page.locator(".wait")).to_be_visible()
        picture_now(visitor, folder, "model-loading")
        expect(visitor.answer.locator("> .prose")).to_contain_text(re.compile(r"\w+ \w+"), timeout=LOADING * 1000)
        picture_now(visitor, folder, "model-streaming")
        expect(visitor.answer.locator(".stats")).to_be_visible()
        picture(visitor, folder, "model-answer")


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    expect.set_options(timeout=PATIENCE)
    with ExitStack() as running, tempfile.TemporaryDirectory() as place:
        browser = running.enter_context(sync_playwright()).chromium.launch(
            executable_path=program("chromium"), args=["--no-sandbox"]
        )
        running.callback(browser.close)
        echo = running.enter_context(
            Server(Path(place), PASSWORD, application="tests.web.served:create()", SANITISE="off")
        )
        url = f"http://127.0.0.1:{echo.port}"
        scripted(browser, url, folder, "wide-light")
        scripted(browser, url, folder, "wide-dark-zh", **DARK, **CHINESE)
        scripted(browser, url, folder, "phone-light-zh", **PHONE, **CHINESE)
        scripted(browser, url, folder, "phone-dark", **PHONE, **DARK)
        own = {
            "DATA_DIR": str(with_model(ROOT / "data", Path(place) / "model")),
            "REDIS_URL": "",
            "TRUSTED_PROXIES": "0",
        }
        settings = SMALL | own | {"ADMIN_PASSWORD": PASSWORD}
        stack = running.enter_context(Stack(Path(place) / "stack", settings, 0, None, parts=["gunicorn"]))
        until(lambda: Door(stack).direct("/healthz").status == 200, seconds=LOADING)
        real(browser, f"http://127.0.0.1:{stack.app}", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots"))
