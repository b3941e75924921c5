"""How an answer looks while it grows and once it is there; the answers are written by the test."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from tests.api.server import Server
from tests.stack.client import until
from tests.web.conftest import Visit
from tests.web.visitor import Visitor

SAMPLE = """Here is **bold**, *italic* and `code`.

| Name | Size |
| :-- | --: |
| one | 1 |

```python
def double(x: int) -> int:
    return 2 * x
```

1. first
2. second
   - nested

$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$

It costs $5 and $6, and $a^2 + b^2 = c^2$ is old."""


def test_markdown_code_tables_and_formulas_are_typeset(reader: Visitor) -> None:
    answer = reader.ask(SAMPLE)
    expect(answer.locator("math")).to_have_count(2)
    expect(answer.locator("math").first).to_have_attribute("display", "block")
    expect(answer.locator(".hljs-keyword").first).to_have_text("def")
    expect(answer.get_by_role("table")).to_contain_text("one")
    assert answer.locator("td").last.get_attribute("align") == "right"
    expect(answer.locator("ol > li > ul > li")).to_have_text("nested")
    expect(answer.locator("> .prose")).to_contain_text("It costs $5 and $6, and")


def test_libraries_for_code_and_formulas_come_only_when_they_are_needed(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}", service_workers="block")
    asked: list[str] = []
    visitor.page.on("request", lambda request: asked.append(request.url))
    visitor.open().login().inside().ask("just words")
    assert not any("highlight" in url or "temml" in url for url in asked)
    visitor.ask("```python\n1\n```\n\n$x$")
    expect(visitor.page.locator("math")).to_be_visible()
    assert sum("highlight" in url or "temml" in url for url in asked) == 2


GROW = """async (text) => {
  const { LiveText } = await import("/web/js/livetext.js");
  const { render } = await import("/web/js/markdown.js");
  const [box, whole] = [document.createElement("div"), document.createElement("div")];
  const seen = (node) => [node.textContent.replace(/\\s+/g, " "),
    ...[...node.querySelectorAll("p, li, td, th, code, strong, em, table, .math")].map((each) => each.tagName)];
  const live = new LiveText(box);
  const firsts = new Set();
  for (let end = 1; end <= text.length; end += 3) {
    live.update(text.slice(0, end));
    if (end > 200) firsts.add(box.firstChild);
  }
  live.update(text);
  const growing = seen(box);
  live.finish(text);
  whole.append(render(text));
  return [growing, seen(box), seen(whole), firsts.size];
}"""


def test_growing_text_ends_as_the_whole_would_and_finished_blocks_are_left_alone(reader: Visitor) -> None:
    growing, finished, whole, firsts = reader.evaluate(GROW, SAMPLE)
    assert growing == finished == whole and len(whole) > 15
    assert firsts == 1


def test_emphasis_that_is_still_open_does_not_show_its_signs(reader: Visitor) -> None:
    shown = """async (text) => {
      const { LiveText } = await import("/web/js/livetext.js");
      const box = document.createElement("div");
      new LiveText(box).update(text);
      return box.innerHTML;
    }"""
    assert reader.evaluate(shown, "This is **very impor") == "<p>This is <strong>very impor</strong></p>\n"
    assert reader.evaluate(shown, "Call `pri") == "<p>Call <code>pri</code></p>\n"


def test_reasoning_is_folded_apart_with_its_time(reader: Visitor) -> None:
    answer = reader.ask("think first")
    summary = answer.locator("summary")
    expect(summary).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    expect(answer.locator(".thinking .prose")).to_be_hidden()
    summary.click()
    expect(answer.locator(".thinking .prose")).to_have_text("hm")
    expect(answer.locator("> .prose")).to_have_text("think first")


def test_waiting_shows_the_place_in_the_queue_and_can_be_stopped(reader: Visitor, echo: Server) -> None:
    reader.send("silent please")
    expect(reader.page.locator(".wait")).to_have_text("In the queue, place 1, about 1 s")
    reader.page.locator("#stop").click()
    expect(reader.answer).to_contain_text("Stopped.")
    until(lambda: echo.open_streams() == 0)


def test_an_answer_goes_on_while_another_conversation_is_read(reader: Visitor) -> None:
    reader.send("slow " + "word " * 40 + "last")
    expect(reader.answer.locator("> .prose")).to_contain_text("word word")
    reader.page.locator("#new").click()
    expect(reader.page.locator("#hello")).to_be_visible()
    expect(reader.page.locator("#conversations .pulse")).to_be_visible()
    expect(reader.page.locator("#conversations .pulse")).to_have_count(0)
    reader.page.locator("#conversations .open").click()
    expect(reader.answer.locator("> .prose")).to_have_text(re.compile(r"^slow (word )+last\s*$"))


@pytest.mark.parametrize(("sanitised", "told"), [(3, 1), (0, 0)])
def test_what_was_removed_from_a_message_is_told(reader: Visitor, sanitised: int, told: int) -> None:
    done = {"finish_reason": "stop", "usage": {"completion_tokens": 1}, "served_by": "local", "sanitised": sanitised}
    stream = f'data: {{"text": "fine", "channel": "answer"}}\n\nevent: done\ndata: {json.dumps(done)}\n\n'
    reader.page.route("**/stream", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    answer = reader.ask("a <form> of mine")
    expect(answer.locator("> .prose")).to_have_text("fine")
    expect(answer.get_by_text("3 pieces of HTML")).to_have_count(told)


def test_errors_say_what_happened_and_what_to_do(reader: Visitor) -> None:
    answer = reader.ask("refuse")
    expect(answer.get_by_role("alert")).to_contain_text("Too many people are asking just now.")
    expect(answer.get_by_role("alert")).to_contain_text("Possible again in 3 s.")
    reader.ask("bug here please now")
    expect(reader.answer).to_contain_text("bug here")  # what came is kept
    expect(reader.answer.get_by_role("alert")).to_contain_text("Something went wrong in the service")
    expect(reader.page.locator(".answer").first.get_by_role("button", name="Try again")).to_be_hidden()


def test_copying_takes_the_markdown_and_the_code(reader: Visitor) -> None:
    reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = reader.ask(SAMPLE)
    answer.get_by_role("button", name="Copy", exact=True).click()
    assert reader.evaluate("navigator.clipboard.readText()") == SAMPLE
    answer.get_by_role("button", name="Copy the code").click()
    assert reader.evaluate("navigator.clipboard.readText()").startswith("def double(x: int)")


def test_an_input_method_s_enter_sends_nothing(reader: Visitor) -> None:
    reader.page.locator("#prompt").fill("ni hao")
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    reader.evaluate(f"document.getElementById('prompt').dispatchEvent({composing})")
    expect(reader.page.locator("#prompt")).to_have_value("ni hao")
    expect(reader.page.locator(".message")).to_have_count(0)


def test_one_who_scrolled_up_is_left_there(reader: Visitor) -> None:
    reader.ask("\n\n".join(f"line {number}" for number in range(60)))
    reader.send("slow " + "\n\nword " * 30)
    expect(reader.answer.locator("> .prose")).to_contain_text("word")
    reader.page.locator("#log").evaluate("log => log.scrollTo(0, 0)")
    expect(reader.page.locator("#latest")).to_be_visible()
    expect(reader.page.locator("#send")).to_be_visible()
    assert reader.page.locator("#log").evaluate("log => log.scrollTop") < 50
    reader.page.locator("#latest").click()
    expect(reader.answer.locator(".stats")).to_be_in_viewport()
