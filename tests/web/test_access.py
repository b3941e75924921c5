"""Accessibility: axe-core finds nothing serious in any state, the keyboard reaches all, and answers are read aloud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.api.server import Server
from tests.web.conftest import Visit
from tests.web.test_answers import SAMPLE
from tests.web.visitor import PHONE, Visitor

AXE = (Path(__file__).parent / "vendor/axe-core/axe.min.js").read_text()
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def assert_accessible(visitor: Visitor) -> None:
    """No rule of WCAG 2.2 AA is broken in a way that axe calls serious or critical."""
    visitor.evaluate(f"{AXE}; null")  # not as a script of the page: the policy would refuse it
    found: dict[str, Any] = visitor.evaluate(
        "rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", RULES
    )
    grave = [broken for broken in found["violations"] if broken["impact"] in {"serious", "critical"}]
    assert not grave, [(broken["id"], [node["failureSummary"] for node in broken["nodes"]]) for broken in grave]
    assert len(found["passes"]) > 10  # so it has looked


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [{}, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing_serious(visit: Visit, echo: Server, scheme: str, screen: dict[str, Any]) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}", color_scheme=scheme, reduced_motion="reduce", **screen).open()
    expect(visitor.page.locator("#login")).to_be_visible()
    assert_accessible(visitor)
    visitor.login().inside()
    assert_accessible(visitor)
    visitor.ask(SAMPLE)
    visitor.ask("refuse")
    visitor.ask("think hard")
    expect(visitor.page.locator("math").first).to_be_visible()
    assert_accessible(visitor)
    visitor.page.locator("#tune").click()
    assert_accessible(visitor)
    visitor.page.keyboard.press("Escape")
    if screen:
        visitor.page.locator("#open-sidebar").click()
    visitor.page.locator("#account").click()
    expect(visitor.page.locator("#menu")).to_be_visible()
    assert_accessible(visitor)


def focused(visitor: Visitor) -> str:
    return visitor.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def test_the_whole_of_it_works_without_a_mouse(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open()
    keys = visitor.page.keyboard
    expect(visitor.page.locator("[name=username]")).to_be_focused()
    keys.type("admin")
    keys.press("Tab")
    keys.type("correct horse battery staple")
    keys.press("Enter")
    visitor.inside()
    expect(visitor.page.locator("#prompt")).to_be_focused()
    keys.type("first line")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    expect(visitor.page.locator(".bubble")).to_have_text("first line\nsecond line")
    expect(visitor.answer.locator(".stats")).to_be_visible()
    keys.press("Control+k")
    expect(visitor.page.locator("#search")).to_be_focused()
    keys.press("Control+Shift+O")
    expect(visitor.page.locator("#hello")).to_be_visible()
    expect(visitor.page.locator("#prompt")).to_be_focused()


def test_menus_open_move_and_close_by_keys_and_give_the_focus_back(reader: Visitor) -> None:
    reader.page.locator("#account").focus()
    reader.page.keyboard.press("Enter")
    assert focused(reader) == "Theme: as the device"
    reader.page.keyboard.press("ArrowDown")
    assert focused(reader) == "中文"
    reader.page.keyboard.press("ArrowUp")
    reader.page.keyboard.press("ArrowUp")
    assert focused(reader) == "Log out"
    reader.page.keyboard.press("Escape")
    expect(reader.page.locator("#menu")).to_be_hidden()
    assert focused(reader) == "account"


def test_the_first_tab_leads_past_the_list(reader: Visitor) -> None:
    reader.evaluate("document.activeElement.blur()")
    reader.page.locator(".skip").focus()
    expect(reader.page.locator(".skip")).to_be_in_viewport()
    reader.page.keyboard.press("Enter")
    expect(reader.page.locator("#prompt")).to_be_focused()


def test_an_answer_is_read_in_sentences(reader: Visitor) -> None:
    reader.ask("One sentence is here. Another follows it.")
    voice = reader.page.locator("#voice")
    expect(voice).to_have_attribute("aria-live", "polite")
    expect(voice.locator("p")).to_have_text(
        ["The answer begins.", "One sentence is here. Another follows it.", "The answer is complete."]
    )


def test_on_a_phone_the_list_takes_the_focus_and_gives_it_back(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}", **PHONE).open().login().inside()
    visitor.page.locator("#open-sidebar").click()
    expect(visitor.page.locator("#close-sidebar")).to_be_focused()
    assert visitor.page.locator("#main").evaluate("main => main.inert")
    visitor.page.keyboard.press("Escape")
    expect(visitor.page.locator("#open-sidebar")).to_be_focused()


def test_a_chosen_theme_stays(reader: Visitor) -> None:
    reader.menu("#account", "Theme")
    reader.menu("#account", "Theme")
    assert reader.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    reader.open("/?again")
    assert reader.evaluate("document.documentElement.dataset.theme") == "dark"
