"""Removes from what users send the HTML that can act (`active`), or every HTML element (`strip`).

Text is read as a browser's tokenizer reads it (HTML Living Standard, 13.2.5). Code in fences and backticks is skipped.
"""

from __future__ import annotations

import re
from functools import cache
from html import unescape
from typing import Literal

import bleach

Policy = Literal["active", "strip", "off"]

# Raw: without markup inside, so that a quote in one could hide what follows. Of SVG's children none is in the lists:
# `path`, `line` and `set` are words of code.
_RAW = "script|style|iframe|textarea|title|xmp|plaintext|noembed|noframes|noscript"
_ACTING = f"{_RAW}|applet|base|button|datalist|embed|form|frame|frameset|input|isindex|keygen|link|object|optgroup"
_ACTING += "|option|output|portal|select"
_INERT = """
    a abbr acronym address area article aside audio b basefont bdi bdo bgsound big blink blockquote body br canvas
    caption center cite code col colgroup data dd del details dfn dialog dir div dl dt em fieldset figcaption figure
    font footer h1 h2 h3 h4 h5 h6 head header hgroup hr html i image img ins kbd label layer legend li listing main map
    mark marquee math menu menuitem meta meter nav nobr ol p param picture pre progress q rp rt ruby s samp search
    section slot small source span strike strong sub summary sup svg table tbody td template tfoot th thead time tr
    track tt u ul var video wbr"""
_BARE = "allowfullscreen|async|autofocus|autoplay|checked|controls|default|defer|disabled|hidden|inert|ismap|itemscope"
_BARE += "|loop|multiple|muted|nomodule|novalidate|open|playsinline|readonly|required|reversed|selected"
_ACTING_NAMES = frozenset(_ACTING.split("|"))
_NAMES = _ACTING_NAMES | frozenset(_INERT.split())

# All that repeats is possessive and every token ends at the end of the text at the latest: the time is linear.
_S = r"[ \t\n\r\f]"
_NAME = r"(?:=[^ \t\n\r\f/>=]*+|[^ \t\n\r\f/>=]++)"
_VALUE = rf"""(?:{_S}*+={_S}*+(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z)|[^ \t\n\r\f"'>][^ \t\n\r\f>]*+|))"""
_ATTRIBUTE = re.compile(rf"[ \t\n\r\f/]*+(?P<name>{_NAME})(?P<value>{_VALUE}?+)")
_TOKEN = re.compile(
    rf"""<(?: !--(?P<comment>-?>|.*?(?:--!?>|(?P<open>\Z)))
            | (?:[!?]|/(?![a-z]))[^>]*+>?+
            | (?P<name>/?[a-z][^ \t\n\r\f/>]*+)(?P<attributes>(?:[ \t\n\r\f/]++|{_NAME}{_VALUE}?+)*+)(?P<end>>?+) )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_PROPER = re.compile(rf"(?:[ \t\n\r\f/]++(?:[a-z_:@][\w:.-]*+{_VALUE}|(?:{_BARE})(?![\w-])))*+[ \t\n\r\f/]*+", re.I)
_OPENED = re.compile(rf"<!--|</?(?:{_ACTING})(?![\w,-])", re.I)
_HANDLER = re.compile(r"on(?!(?:ce|e|ly|line|to)\Z)[a-z]|http-equiv\Z|srcdoc\Z", re.I)  # `i <n && once = a > b`
_SUSPECT = re.compile(r"on[a-z]|[:&]|http-equiv|srcdoc", re.I)  # attributes without any of it need no second look
_ADDRESS = re.compile(r"(?:\A|;)(?:javascript|vbscript|data:text/html)\b", re.I)
_TYPE = re.compile(rf"(?<=\w)<(?!(?i:{_RAW})>)(?:[A-Z][a-z0-9]*+|object)>|(?<=#include )<\w++>")  # List<Form>
_FOREIGN = re.compile(r"<(?:svg|math)\b", re.I)

_MASK = "\ue000"  # stands for a piece of code while the rest is read; private use
_CODE = re.compile(
    rf"""^[ \t>*+-]*+(`{{3,}}+|~{{3,}}+)[^`\n]*+(?:\Z|\n(?:.*\n)*?[ \t>]*+\1[`~]*+[ \t]*+$|\n(?s:.*))
       | (?<!`)(`{{1,3}}+)(?!`)(?:[^`\n]++|\n(?![ \t\r]*+\n)|(?!\2(?!`))`++)*+\2(?!`)
       | {_MASK}""",
    re.MULTILINE | re.VERBOSE,
)
_ROUNDS = 5  # removing a piece may join two others to a tag; nothing but an attack needs more


def sanitise(text: str, policy: Policy) -> tuple[str, int]:
    """The cleaned text, and how many elements' tags, attributes and comments were removed from it."""
    total = 0
    for _ in range(_ROUNDS):
        if policy == "off" or "<" not in text:
            return text, total
        text, removed = _once(text, policy)
        if not removed:
            return text, total
        total += removed
    return text.replace("<", ""), total + text.count("<")


def _once(text: str, policy: Policy) -> tuple[str, int]:
    code = [match[0] for match in _CODE.finditer(text)] if re.search(f"[`~{_MASK}]", text) else []
    masked = _CODE.sub(_MASK, text) if code else text
    foreign = _FOREIGN.search(masked) is not None
    cleaned: dict[str, tuple[str, int]] = {}
    pieces: list[str] = []
    position = total = 0
    for token in _TOKEN.finditer(masked):  # one at a time, so that other threads run in between
        if token[0] not in cleaned:
            cleaned[token[0]] = _clean(token, policy, foreign)
        kept, removed = cleaned[token[0]]
        start, end = token.span()
        if removed and not _TYPE.match(masked, start):
            pieces += [masked[position:start], kept if start else kept.lstrip("\n")]
            position, total = end, total + removed
    hidden = iter(code)
    return re.sub(_MASK, lambda _: next(hidden), "".join([*pieces, masked[position:]])), total


def _clean(token: re.Match[str], policy: Policy, foreign: bool) -> tuple[str, int]:
    """What stays of a token, and how many things were removed from it."""
    text, name = token[0], (token["name"] or "").lower()
    element, attributes, ends = name.lstrip("/"), token["attributes"] or "", token["end"] or not name
    acts = element in _ACTING_NAMES
    if token["open"] is not None or (acts and not ends):
        return _OPENED.subn("", text)
    kept, removed = _clean_attributes(attributes) if _SUSPECT.search(attributes) else (attributes, 0)
    if policy == "strip" and ends:
        proper = element in _NAMES and _PROPER.fullmatch(attributes) is not None
        acts = acts or proper or removed > 0 or text[:9].lower() == "<!doctype"
    if acts or token["comment"]:
        return (_left(name) if element in _NAMES else "") + _MASK * text.count(_MASK), 1
    if foreign and text.startswith("<![CDATA["):
        return text.removeprefix("<![CDATA["), 1
    if removed:
        return f"<{token['name']}{kept}{token['end']}", removed
    rest, removed = _OPENED.subn("", text[1:])  # other parsers see a tag within a tag: `<b <script>`
    return "<" + rest, removed


def _clean_attributes(text: str) -> tuple[str, int]:
    parts = list(_ATTRIBUTE.finditer(text))
    acting = [_acts(part) for part in parts]
    kept = [_MASK * part[0].count(_MASK) if acts else part[0] for part, acts in zip(parts, acting, strict=True)]
    return "".join(kept) + text[parts[-1].end() if parts else 0 :], sum(acting)


def _acts(attribute: re.Match[str]) -> bool:
    value = attribute["value"]
    if not value or _HANDLER.match(attribute["name"]):
        return bool(value)
    if ":" not in value and "&" not in value:
        return False
    return _ADDRESS.search(re.sub(r"[\x00-\x20]+", "", unescape(value)).lstrip("=\"'")) is not None


@cache
def _left(name: str) -> str:
    """What bleach leaves of a tag: a line break where a block begins, so that words stay apart; else nothing."""
    return str(bleach.clean(f"<b><{name}>", tags=[], strip=True))  # <b>, because it breaks no line for the first tag
