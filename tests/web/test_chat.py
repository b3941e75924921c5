"""The main job at the page, with the demo model: log in, ask, read as it comes, stop, try again."""

from __future__ import annotations

import json
import re
from urllib.request import urlopen

from playwright.sync_api import expect

from tests.stack.client import until
from tests.web.conftest import Visit
from tests.web.visitor import PHONE, Visitor


def running(service: str) -> float:
    with urlopen(f"{service}/metrics", timeout=10) as answer:
        found = re.search(r"^llm_requests_running ([\d.]+)", answer.read().decode(), re.M)
    return float(found[1]) if found else 0.0


def short(visitor: Visitor, tokens: int = 16) -> None:
    """Limits answers, so that the tests are quick."""
    visitor.page.locator("#tune").click()
    visitor.page.locator("[name=max_new_tokens]").fill(str(tokens))
    visitor.page.locator("#tuning .primary").click()


def test_a_first_question_shows_that_the_model_loads_and_is_answered(visit: Visit, service: str) -> None:
    visitor = visit(service).open().login().inside()
    model = visitor.page.locator("#model")
    expect(model).to_contain_text("smollm2-135m-instruct")
    short(visitor)
    visitor.send("Why is the sky blue?")
    expect(visitor.page.locator(".wait")).to_contain_text(re.compile(r"loading: \d+ %|first word|queue"))
    expect(model).to_contain_text(re.compile(r"loading \d+ %"))
    expect(visitor.answer.locator(".stats")).to_contain_text(re.compile(r"\d+ tokens · [\d.,]+ tokens/s · first after"))
    assert len(visitor.answer.locator("> .prose").inner_text()) > 10
    expect(model.locator(".dot")).to_have_attribute("data-stage", "ready")
    assert visitor.titles == ["Why is the sky blue?"]


def test_text_comes_while_it_is_made_and_stop_frees_the_slot(visit: Visit, service: str) -> None:
    visitor = visit(service).open().login().inside()
    visitor.send("Tell a very long story about the sea and its many ships.")
    expect(visitor.answer.locator("> .prose")).to_contain_text(re.compile(r"\w+ \w+"))
    assert visitor.answer.get_attribute("aria-busy") == "true"
    assert running(service) == 1
    visitor.page.keyboard.press("Escape")
    until(lambda: running(service) == 0, seconds=5)
    expect(visitor.answer).to_contain_text("Stopped.")
    expect(visitor.page.locator("#send")).to_be_visible()


def test_trying_again_replaces_the_answer_and_a_seed_repeats_it(visit: Visit, service: str) -> None:
    visitor = visit(service).open().login().inside()
    short(visitor)
    visitor.page.locator("#tune").click()
    visitor.page.locator("[name=seed]").fill("7")
    visitor.page.locator("#tuning .primary").click()
    first = visitor.ask("Name a colour.").locator("> .prose").inner_text()
    visitor.answer.get_by_role("button", name="Try again").click()
    expect(visitor.answer.locator(".stats")).to_contain_text("from the cache")
    assert visitor.answer.locator("> .prose").inner_text() == first
    assert visitor.page.locator(".message").count() == 2


def test_a_conversation_goes_on_with_what_was_said(visit: Visit, service: str) -> None:
    visitor = visit(service).open().login().inside()
    short(visitor)
    visitor.ask("My name is Ada.")
    with visitor.page.expect_request("**/stream") as asked:
        visitor.ask("What is my name?")
    turns = json.loads(asked.value.post_data or "")["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == "My name is Ada." and turns[1]["content"]


def test_a_conversation_longer_than_the_context_leaves_out_the_oldest(visit: Visit, service: str) -> None:
    visitor = visit(service).open().login().inside()
    short(visitor, 8)
    for _ in range(2):
        visitor.ask("Read this: " + "The sea is wide and deep and blue. " * 60)
    expect(visitor.answer).to_contain_text("oldest messages were left out")
    expect(visitor.answer.locator(".stats")).to_be_visible()


def test_on_a_phone_everything_is_within_reach(visit: Visit, service: str) -> None:
    visitor = visit(service, **PHONE).open().login().inside()
    short(visitor, 8)
    visitor.ask("Say hello.")
    assert visitor.evaluate("document.documentElement.scrollWidth") == 390
    visitor.page.locator("#open-sidebar").tap()
    expect(visitor.page.locator("#conversations .open")).to_have_text("Say hello.")
    visitor.page.locator("#new").tap()
    expect(visitor.page.locator("#hello")).to_be_visible()
    expect(visitor.page.locator("#sidebar")).to_be_hidden()


def test_the_page_speaks_chinese(visit: Visit, service: str) -> None:
    visitor = visit(service, locale="zh-CN").open().login().inside().controlled()
    expect(visitor.page.locator("#hello h2")).to_contain_text(re.compile("想了解什么"))
    assert visitor.evaluate("document.documentElement.lang") == "zh-CN"
    visitor.menu("#account", "English")
    expect(visitor.page.locator("#hello h2")).to_have_text("What would you like to know?")
    visitor.page.reload()
    visitor.inside()
    expect(visitor.page.locator("#hello h2")).to_have_text("What would you like to know?")
