"""Without a network: the page opens, what is on the device can be read; and a new version is announced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from playwright.sync_api import Response, expect

from api.routes.page import WEB
from tests.api.server import Server
from tests.web.conftest import Visit
from tests.web.visitor import PASSWORD, Visitor

CACHED = """async () => (await Promise.all((await caches.keys()).map(async (name) =>
  [name, (await (await caches.open(name)).keys()).map((request) => new URL(request.url).pathname)])))"""


def test_the_page_opens_and_reads_without_the_service(visit: Visit, tmp_path: Path) -> None:
    with Server(tmp_path, PASSWORD) as server:
        visitor = visit(f"http://127.0.0.1:{server.port}").open().login().inside().controlled()
        visitor.ask("# To be read later\n\n```python\nprint(1)\n```\n\n$x^2$")
        expect(visitor.page.locator("math")).to_be_visible()
    visitor.page.reload()
    visitor.inside()
    expect(visitor.answer.get_by_role("heading", name="To be read later")).to_be_visible()
    expect(visitor.answer.locator(".hljs-built_in, math")).to_have_count(2)
    expect(visitor.page.locator("#notice")).to_contain_text("Offline.")
    visitor.page.locator("#search").fill("later")
    expect(visitor.page.locator("#conversations .name")).to_have_count(1)
    visitor.send("are you there")
    expect(visitor.answer.get_by_role("alert")).to_contain_text("cannot be reached")
    visitor.complaints.clear()


def test_a_browser_that_was_closed_opens_it_offline_too(visit: Visit, tmp_path: Path) -> None:
    with Server(tmp_path, PASSWORD) as server:
        visitor = visit(f"http://127.0.0.1:{server.port}").open().login().inside().controlled()
        visitor.ask("written before")
        visitor.page.goto("about:blank")
    page = visitor.context.new_page()
    page.goto(visitor.url)
    page.locator("#conversations .open").click()
    expect(page.locator(".bubble")).to_have_text("written before")
    expect(page.locator("#notice")).to_contain_text("Offline.")
    visitor.complaints.clear()


def test_the_api_is_never_cached_and_never_passes_the_worker(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login().inside().controlled()
    visitor.page.reload()
    served: dict[str, bool] = {}

    def note(response: Response) -> None:
        served[response.url.removeprefix(visitor.url)] = response.from_service_worker

    visitor.page.on("response", note)
    visitor.inside().ask("hello")
    with visitor.page.expect_response("**/v1/models"):
        visitor.page.reload()
    assert served["/web/js/main.js"] is True
    api = {path: worker for path, worker in served.items() if not path.startswith(("/web/", "/#")) and path != "/"}
    assert {"/readyz", "/stream", "/refresh"} <= set(api) and not any(api.values())
    ((name, paths),) = visitor.evaluate(CACHED)
    assert name.startswith("flask-llm-/-")
    assert set(paths) >= {"/", "/web/js/main.js"} and all(path == "/" or path.startswith("/web/") for path in paths)
    assert visitor.evaluate("navigator.serviceWorker.ready.then(r => r.scope)") == f"{visitor.url}/"


def test_the_page_can_be_installed_as_an_app(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open()
    found = visitor.context.new_cdp_session(visitor.page).send("Page.getAppManifest")
    assert found["errors"] == [] and found["url"].endswith("/web/manifest.webmanifest")
    manifest = json.loads(found["data"])
    assert (manifest["start_url"], manifest["scope"], manifest["display"]) == ("../", "../", "standalone")
    for icon in manifest["icons"]:
        answer = visitor.page.request.get(f"{visitor.url}/web/{icon['src']}")
        assert answer.ok and answer.headers["content-type"].startswith(icon["type"])
    assert {"192x192", "512x512"} <= {icon["sizes"] for icon in manifest["icons"]}


def test_a_new_version_is_announced_and_taken_with_a_reload(visit: Visit, tmp_path: Path) -> None:
    web = shutil.copytree(WEB, tmp_path / "web")
    with Server(tmp_path, PASSWORD, application=f"tests.web.served:create('{web}')") as server:
        visitor = visit(f"http://127.0.0.1:{server.port}").open().login().inside().controlled()
        ((before, _),) = visitor.evaluate(CACHED)
        words = web / "js/words/en.js"
        words.write_text(words.read_text().replace("What would you like to know?", "What is new?"))
        visitor.evaluate("navigator.serviceWorker.getRegistration().then(r => r.update()).then(() => null)")
        toast = visitor.page.locator(".toast", has_text="new version")
        expect(toast).to_be_visible()
        expect(visitor.page.locator("#hello h2")).to_have_text("What would you like to know?")
        toast.get_by_role("button", name="Reload").click()
        expect(visitor.page.locator("#hello h2")).to_have_text("What is new?")
        ((after, _),) = visitor.evaluate(CACHED)
        assert after != before
        assert signed_in(visitor)


def signed_in(visitor: Visitor) -> bool:
    """Whether the session went over to the new version."""
    visitor.inside()
    return visitor.ask("hello").locator(".stats").is_visible()
