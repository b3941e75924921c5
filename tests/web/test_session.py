"""The session: across a reload and an expired token, without a secret on the disk."""

from __future__ import annotations

from pathlib import Path
from urllib.request import Request, urlopen

from playwright.sync_api import expect

from tests.api.server import Server
from tests.web.conftest import Visit
from tests.web.visitor import PASSWORD, Visitor

STORED = """async () => {
  const rows = async (name) => {
    const db = await new Promise((done) => { const r = indexedDB.open(name); r.onsuccess = () => done(r.result); });
    const all = await Promise.all([...db.objectStoreNames].map((store) => new Promise((done) => {
      const r = db.transaction(store).objectStore(store).getAll(); r.onsuccess = () => done(r.result); })));
    db.close();
    return all;
  };
  const names = (await indexedDB.databases()).map((each) => each.name);
  const cached = [];
  for (const name of await caches.keys()) for (const r of await (await caches.open(name)).keys()) cached.push(r.url);
  const kept = [{...localStorage}, {...sessionStorage}, document.cookie, cached];
  return JSON.stringify([...kept, await Promise.all(names.map(rows))]);
}"""


def logged_in(visitor: Visitor) -> dict[str, str]:
    """Logs in; the tokens that the service gave."""
    visitor.open()
    with visitor.page.expect_response("**/login") as answered:
        visitor.login().inside()
    return answered.value.json()


def test_a_wrong_password_is_shown_as_an_error_and_can_be_tried_again(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login(password="wrong")
    expect(visitor.page.locator("#login-error")).to_have_text("User name or password is wrong.")
    visitor.login().inside()


def test_no_token_is_stored_anywhere(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}")
    tokens = logged_in(visitor)
    visitor.controlled().ask("hello")
    stored = visitor.evaluate(STORED)
    assert "hello" in stored  # so it was looked at
    assert tokens["access_token"] not in stored and tokens["refresh_token"] not in stored and "eyJ" not in stored


def test_a_reload_stays_logged_in_and_shows_the_same_conversation(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login().inside().controlled()
    visitor.ask("still here")
    visitor.page.reload()
    visitor.inside()
    expect(visitor.answer.locator("> .prose")).to_have_text("still here")
    visitor.ask("and it goes on")


def test_another_tab_logs_in_for_itself(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login().inside().controlled()
    visitor.page.reload()
    visitor.inside()
    other = visitor.context.new_page()
    other.goto(visitor.url)
    expect(other.locator("#login")).to_be_visible()


def test_an_expired_token_is_renewed_without_a_word(visit: Visit, tmp_path: Path) -> None:
    with Server(tmp_path, PASSWORD, ACCESS_TTL="30") as server:
        visitor = visit(f"http://127.0.0.1:{server.port}").open().login().inside()
        with visitor.page.expect_response("**/refresh") as renewed:
            visitor.ask("one")
        assert renewed.value.status == 200
        expect(visitor.ask("two").locator("> .prose")).to_have_text("two")


def test_a_session_that_was_ended_asks_for_the_password_and_keeps_the_page(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}")
    tokens = logged_in(visitor)
    visitor.ask("before")
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    urlopen(Request(f"{visitor.url}/logout", method="POST", headers=headers), timeout=10).close()
    visitor.send("what I wrote")
    expect(visitor.page.locator("#login-error")).to_contain_text("session has ended")
    visitor.login().inside()
    visitor.answer.get_by_role("button", name="Try again").click()
    expect(visitor.answer.locator("> .prose")).to_have_text("what I wrote")
    expect(visitor.page.locator(".message")).to_have_count(4)


def test_logging_out_in_one_tab_empties_the_other(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login().inside()
    visitor.ask("seen in both")
    other = Visitor(visitor.context, visitor.context.new_page(), visitor.url).open().login().inside()
    expect(other.page.locator("#conversations .name")).to_have_text(["seen in both"])
    visitor.menu("#account", "Log out")
    expect(other.page.locator("#login")).to_be_visible()
    expect(other.page.locator("#app")).to_be_hidden()
    assert "seen in both" not in other.page.content()
