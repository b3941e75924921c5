"""Takes HTML out of what users send and leaves everything else byte for byte.

Is not what keeps a page safe: that is output encoding, DOMPurify and the CSP. Ordinary text is full of `<` and `&`
(code, maths, `<think>`), and bleach alone would escape it; so bleach is shown only what really is a tag.
"""

from __future__ import annotations

import re

import bleach

# The elements of HTML, obsolete ones among them. SVG's children are not: `path`, `line` and `set` are words of code.
_NAMES = """
    a abbr acronym address applet area article aside audio b base basefont bdi bdo bgsound big blink blockquote body br
    button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed
    fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe
    image img input ins isindex kbd keygen label layer legend li link listing main map mark marquee math menu menuitem
    meta meter nav nobr noembed noframes noscript object ol optgroup option output p param picture plaintext portal pre
    progress q rp rt ruby s samp script section select slot small source span strike strong style sub summary sup svg
    table tbody td template textarea tfoot th thead time title tr track tt u ul var video wbr xmp
"""
_BARE = "allowfullscreen|async|autofocus|autoplay|checked|controls|default|defer|disabled|hidden|inert|ismap|itemscope"
_BARE += "|loop|multiple|muted|nomodule|novalidate|open|playsinline|readonly|required|reversed|selected"
_LOADS = "action|data|formaction|href|http-equiv|src|srcdoc|srcset|style"
_VALUE = r"""(?:"[^"]*+"|'[^']*+'|[^\s"'<>=`]++)"""
_NAME = "|".join(sorted(_NAMES.split(), key=len, reverse=True))
_SPACE = r"[ \t\r\n\f/]"  # between attributes, as HTML has it
_TAIL = r"(?:[^<>]*+>|[^<>\n]*+)"  # to the end of the tag, or of the line when it has none

# What repeats is possessive or ends at the next `<` or quote, so the time stays linear whatever is sent.
_MARKUP = re.compile(
    rf"""
    <(?=[a-z/!])(?:
      (?P<whole>                                  # well-formed: bleach strips it
        !--(?!-?>)[^<]*?--!?>                     # a comment; tags inside went a round earlier
      | !doctype\b[^<>]*+>
      | (?<!\#include\ <)                         # `#include <map>`
        (?!(?<=\w<)(?:(?-i:[A-Z][a-z0-9]*+)|object)>)   # a type parameter: `List<Object>`
        /?(?:{_NAME})                             # `a<b and c>d` has no attribute worth the name
        (?:{_SPACE}++(?:[a-z_:@][\w:.-]*+\s*+=\s*+{_VALUE}|(?:{_BARE})(?![\w-])))*+{_SPACE}*+>
      )
    | /?script(?:(?![\w,-]){_TAIL})?              # dangerous in any form: bleach would escape it, so it is cut here
    | /?(?:style|iframe|svg|math)(?![\w,-]){_TAIL}
    | (?:{_NAME}){_SPACE}[^<>]*?(?<=[\s/"'`])(?:{_LOADS})\s*+=(?!=){_TAIL}
    | [a-z][\w:.-]*+{_SPACE}[^<>]*?(?<=[\s/"'`])(?:on[a-z]{{2,40}}|xlink:href)\s*+=(?!=){_TAIL}
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ROUNDS = 5  # a tag cut out of a tag leaves a tag: `<scr<b>ipt>`; nobody honest nests deeper
_GAP = "\ue000"  # private use; one inside a tag goes away with it


def sanitise(text: str) -> str:
    """`text` without HTML elements, comments and doctypes; what stood between the tags stays."""
    for _ in range(_ROUNDS):
        tags = {match["whole"] for match in _MARKUP.finditer(text)}
        if not tags:
            return text
        text = _cut(text, [tag for tag in tags if tag])
    return text.replace("<", "")  # a puzzle made of tags: without `<` none of it is one


def _cut(text: str, whole: list[str]) -> str:
    """One round: well-formed tags become what bleach leaves of them, the broken ones nothing."""
    left = _bleached(whole) if whole else {}
    return _MARKUP.sub(lambda match: left.get(match["whole"], "") if match.start() else "", text)


def _bleached(tags: list[str]) -> dict[str, str]:
    """A line break for a block (`<p>`, `<div>`) that does not begin the text, so that words stay apart; else nothing.

    One call for all tags: the call has a price, a tag hardly any. The `<b>` is there because bleach breaks no line
    for the first tag that it sees.
    """
    joined = "<b>" + "".join(f"{_GAP}<{tag.replace(_GAP, '')}" for tag in tags)
    return dict(zip(tags, bleach.clean(joined, tags=[], strip=True).split(_GAP)[1:], strict=True))
