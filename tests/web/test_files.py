"""The page's files: vendored ones are unchanged, and our own follow the project's rules."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import pytest

from api.routes.page import WEB

OWN = [path for path in WEB.rglob("*.*") if "vendor" not in path.parts and path.suffix in {".js", ".css", ".html"}]
VENDORED = re.findall(r"^([0-9a-f]{64})  (\S+)$", (WEB / "vendor/README.md").read_text(), re.M)


def test_vendored_files_are_as_they_were_packed_and_have_their_licence() -> None:
    listed = {name for _, name in VENDORED}
    assert listed == {str(path.relative_to(WEB / "vendor")) for path in WEB.glob("vendor/*/*js")}
    for digest, name in VENDORED:
        assert sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest, name
        assert (WEB / "vendor" / Path(name).parent / "LICENSE").stat().st_size > 500


@pytest.mark.parametrize("path", OWN, ids=lambda path: str(path.relative_to(WEB)))
def test_our_own_files_are_short_and_request_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 250 and all(len(line) <= 200 for line in text.splitlines())
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert path.suffix != ".html" or not re.search(r"\sstyle=|<style|\son\w+=\"", text)


def test_every_script_and_style_of_the_page_is_a_file_of_its_own() -> None:
    html = (WEB / "index.html").read_text()
    assert not re.findall(r"<script(?![^>]*\ssrc=)", html)
    for address in re.findall(r'(?:src|href)="((?!#)[^"]+)"', html):
        assert (WEB.parent / address).is_file(), address  # relative: the page may lie under a path


def test_every_icon_that_is_used_is_drawn() -> None:
    drawn = set(re.findall(r'<symbol id="i-(\w+)"', (WEB / "index.html").read_text()))
    text = "".join(path.read_text() for path in OWN)
    used = set(re.findall(r'#i-(\w+)"|icon(?:Button)?\("(\w+)"|icon: "(\w+)"', text))
    assert drawn == {name for names in used for name in names if name}


def words(language: str) -> dict[str, str]:
    text = (WEB / f"js/words/{language}.js").read_text()
    return dict(re.findall(r'^  "?([\w.]+)"?: "(.*)",$', text, re.M))


def test_both_languages_say_the_same_things() -> None:
    en, zh = words("en"), words("zh")
    assert list(en) == list(zh) and len(en) > 100
    for key, text in en.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", zh[key])), key


def test_every_message_that_is_used_exists_and_none_is_left_over() -> None:
    text = "".join(path.read_text() for path in OWN if path.parent.name != "words")
    en = words("en")
    asked = set(re.findall(r'(?:say|button)\("([\w.]+)"|data-say(?:-hint|-label)?="([\w.]+)"', text))
    assert {key for keys in asked for key in keys if key} <= set(en)
    made = re.compile(r"^(when|model|theme|hello)\.|\.hint$")  # put together from a name
    left = [key for key in en if f'"{key}"' not in text and not made.search(key)]
    assert left == []
