"""A user of the page: opens it, logs in, asks, reads. Whatever the browser logs as an error fails the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect

PASSWORD = "correct horse battery staple"
PATIENCE = 60_000  # milliseconds, on a machine that is busy with other things
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
WIDE = {"viewport": {"width": 1280, "height": 800}}
# What a browser logs of answers that are no success, which the page has words for; and what a test asks for.
_EXPECTED = ("Failed to load resource", "Service Worker registration blocked by Playwright")
_CONTROLLED = """
navigator.serviceWorker.controller !== null || new Promise((done) => {
  navigator.serviceWorker.addEventListener("controllerchange", () => done(true), { once: true });
})
"""


@dataclass  # without slots: playwright hangs something on it
class Visitor:
    """One browser profile with one tab."""

    context: BrowserContext
    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(f"{error}\n{error.stack}"))
        self.context.on("request", self._asked)

    def open(self, path: str = "/") -> Visitor:
        self.page.goto(self.url + path)
        return self

    def login(self, name: str = "admin", password: str = PASSWORD, keep: bool = False) -> Visitor:
        self.page.locator("[name=username]").fill(name)
        self.page.locator("[name=password]").fill(password)
        self.page.locator("[name=keep]").set_checked(keep)
        self.page.locator("#login .primary").click()
        return self

    def inside(self) -> Visitor:
        """Waits until the page is the visitor's."""
        expect(self.page.locator("#app")).to_be_visible()
        expect(self.page.locator("#login")).to_be_hidden()
        return self

    def send(self, text: str) -> Visitor:
        self.page.locator("#prompt").fill(text)
        self.page.keyboard.press("Enter")
        return self

    def ask(self, text: str) -> Locator:
        """Sends, waits for the end, and returns the answer."""
        self.send(text)
        expect(self.page.locator("#send")).to_be_visible()
        return self.answer

    @property
    def answer(self) -> Locator:
        return self.page.locator(".answer").last

    @property
    def titles(self) -> list[str]:
        return self.page.locator("#conversations .name").all_inner_texts()

    def menu(self, button: str, entry: str) -> None:
        self.page.locator(button).click()
        self.page.locator("#menu button", has_text=entry).click()

    def controlled(self) -> Visitor:
        """Waits until the service worker has taken over, and with it the offline copy."""
        self.evaluate(_CONTROLLED)  # page.wait_for_function polls by eval, which the page's policy forbids
        return self

    def evaluate(self, script: str, argument: object = None) -> Any:
        return self.page.evaluate(script, argument)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not message.text.startswith(_EXPECTED):
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visitor]:
    """A visitor with nothing stored; at the end the browser must not have complained, nor asked another place."""
    context = browser.new_context(**{**WIDE, "locale": "en-GB", **options})
    context.set_default_timeout(PATIENCE)
    try:
        visitor = Visitor(context, context.new_page(), url)
        yield visitor
        unwanted = visitor.complaints + visitor.elsewhere
        assert not unwanted, unwanted
    finally:
        context.close()
