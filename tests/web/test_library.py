"""Conversations on the device: found, renamed, deleted, exported, imported, and gone after logging out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from playwright.sync_api import expect

from accounts.roles import Role
from accounts.users import Users
from db import Database
from tests.api.server import Server
from tests.web.conftest import Visit
from tests.web.visitor import PASSWORD, Visitor

DATABASES = "indexedDB.databases().then(all => all.map(each => each.name))"


def save(visitor: Visitor, button: str, entry: str, folder: Path) -> Path:
    with visitor.page.expect_download() as download:
        visitor.menu(button, entry)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def load(visitor: Visitor, path: Path) -> None:
    visitor.page.locator("#import").set_input_files(path)
    expect(visitor.page.locator(".toast").last).to_contain_text("imported")


def shown(visitor: Visitor) -> tuple[str, str]:
    """What was asked and what was answered."""
    return visitor.page.locator(".bubble").inner_text(), visitor.answer.locator("> .prose").inner_text()


def talk(visitor: Visitor, *questions: str) -> None:
    for question in questions:
        visitor.page.locator("#new").click()
        visitor.ask(question)


def test_the_list_has_the_newest_first_and_opens_any(reader: Visitor) -> None:
    talk(reader, "first things", "second things")
    expect(reader.page.locator("#conversations .name")).to_have_text(["second things", "first things"])
    reader.page.locator("#conversations .open", has_text="first").click()
    expect(reader.answer.locator("> .prose")).to_have_text("first things")
    reader.page.go_back()
    expect(reader.answer.locator("> .prose")).to_have_text("second things")


def test_search_looks_into_titles_and_texts_in_any_script(reader: Visitor) -> None:
    talk(reader, "Whales\n\nare mammals", "Sharks\n\nare fish", "鲸鱼\n\n是哺乳动物")
    search = reader.page.locator("#search")
    search.press_sequentially("MAMMAL")
    expect(reader.page.locator("#conversations .name")).to_have_text(["Whales"])
    expect(reader.page.locator("#conversations mark")).to_have_text("mammal")
    search.fill("哺乳")
    expect(reader.page.locator("#conversations .name")).to_have_text(["鲸鱼"])
    search.fill("nowhere")
    expect(reader.page.locator("#conversations")).to_have_text("Nothing found.")
    search.press("Escape")
    expect(reader.page.locator("#conversations .name")).to_have_count(3)


def test_renaming_and_deleting_with_second_thoughts(reader: Visitor) -> None:
    talk(reader, "some words")
    reader.menu("#more", "Rename")
    reader.page.locator("#rename input").fill("A better name")
    reader.page.keyboard.press("Enter")
    expect(reader.page.locator("#title")).to_have_text("A better name")
    reader.menu("#more", "Delete")
    expect(reader.page.locator("#conversations")).to_contain_text("will be listed here")
    reader.page.get_by_role("button", name="Undo").click()
    expect(reader.page.locator("#conversations .name")).to_have_text(["A better name"])


def test_editing_a_question_asks_it_anew(reader: Visitor) -> None:
    talk(reader, "what is one")
    reader.ask("and two")
    reader.page.locator(".user").first.hover()
    reader.page.locator(".user").first.get_by_role("button", name="Edit").click()
    expect(reader.page.locator("#prompt")).to_have_value("what is one")
    reader.ask("what is three")
    expect(reader.page.locator(".message")).to_have_count(2)
    expect(reader.answer.locator("> .prose")).to_have_text("what is three")


@pytest.mark.parametrize(("entry", "kind"), [("Export as Markdown", ".md"), ("Export as JSON", ".json")])
def test_a_conversation_is_exported_and_imported_unchanged(
    reader: Visitor, tmp_path: Path, entry: str, kind: str
) -> None:
    talk(reader, "think of this\n\n## A heading <!-- user -->\n\n```python\nprint(1)\n```")
    said = shown(reader)
    path = save(reader, "#more", entry, tmp_path)
    assert path.suffix == kind and "print(1)" in path.read_text()
    reader.menu("#more", "Delete")
    expect(reader.page.locator("#conversations")).to_contain_text("will be listed here")
    load(reader, path)
    reader.page.locator("#conversations .open").click()
    expect(reader.page.locator(".message")).to_have_count(2)
    assert shown(reader) == said
    assert reader.page.locator(".answer .thinking").count() == 1


def test_everything_is_exported_and_imported_at_once(reader: Visitor, tmp_path: Path) -> None:
    talk(reader, "one", "two")
    path = save(reader, "#account", "Export all", tmp_path)
    assert len(json.loads(path.read_text())["conversations"]) == 2
    load(reader, path)
    expect(reader.page.locator("#conversations .name")).to_have_count(4)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "flask-llm conversations 1", "conversations": [{"head": {}, "messages": [{}]}]}']
)
def test_a_file_that_is_no_export_is_refused_with_a_message(reader: Visitor, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    reader.page.locator("#import").set_input_files(tmp_path / "bad.json")
    expect(reader.page.locator(".toast")).to_contain_text("bad.json could not be read")
    expect(reader.page.locator("#conversations .name")).to_have_count(0)


def test_plain_markdown_becomes_a_conversation_of_one_message(reader: Visitor, tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("# Notes\n\nSome *words*.\n")
    load(reader, tmp_path / "note.md")
    reader.page.locator("#conversations .open", has_text="Notes").click()
    expect(reader.page.locator(".bubble")).to_have_text("Some *words*.")


def test_settings_belong_to_one_conversation(reader: Visitor) -> None:
    talk(reader, "mine")
    reader.page.locator("#tune").click()
    reader.page.locator("[name=system]").fill("Be brief.")
    reader.page.locator("[name=temperature]").fill("0")
    reader.page.locator("#tuning .primary").click()
    with reader.page.expect_request("**/stream") as asked:
        reader.ask("again")
    body = json.loads(asked.value.post_data or "")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["temperature"] == 0
    reader.page.locator("#new").click()
    with reader.page.expect_request("**/stream") as asked:
        reader.ask("another")
    assert json.loads(asked.value.post_data or "")["temperature"] == 0.6


@pytest.mark.promise("P27", injected="a conversation that was not to be kept, and a logout")
def test_nothing_private_is_left_after_logging_out(reader: Visitor, counted: Callable[..., None]) -> None:
    talk(reader, "a secret of mine")
    before = [name for name in reader.evaluate(DATABASES) if name.startswith("flask-llm:")]
    reader.menu("#account", "Log out")
    expect(reader.page.locator("#login")).to_be_visible()
    after = [name for name in reader.evaluate(DATABASES) if name.startswith("flask-llm:")]
    places = "[{...localStorage}, {...sessionStorage}, document.title, location.href, document.body.innerText]"
    words = {word for word in ("secret", "admin") if word in str(reader.evaluate(places))}
    counted(databases_before=len(before), databases_after=len(after), words_left=len(words))
    assert (len(before), after, words) == (1, [], set())
    reader.login().inside()
    expect(reader.page.locator("#conversations")).to_contain_text("will be listed here")


def test_what_one_chose_to_keep_is_there_again(visit: Visit, echo: Server) -> None:
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login(keep=True).inside()
    talk(visitor, "to be kept")
    visitor.menu("#account", "Log out")
    expect(visitor.page.locator("#login")).to_be_visible()
    visitor.login(keep=True).inside()
    expect(visitor.page.locator("#conversations .name")).to_have_text(["to be kept"])


def test_another_user_of_the_device_sees_nothing(visit: Visit, echo: Server) -> None:
    users = Users(Database.in_folder(echo.log.parent / "data"))
    users.add("grace", Role.USER, PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD))
    visitor = visit(f"http://127.0.0.1:{echo.port}").open().login().inside()
    talk(visitor, "the secret of admin")
    visitor.page.close()  # without logging out
    other = Visitor(visitor.context, visitor.context.new_page(), visitor.url).open().login("grace").inside()
    expect(other.page.locator("#conversations")).to_contain_text("will be listed here")
    assert "flask-llm:admin" not in other.evaluate(DATABASES)
