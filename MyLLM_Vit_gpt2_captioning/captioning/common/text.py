"""How captions and prompts are cleaned, the same for those that train a captioner and those that it is given."""

import html
import re
from html.entities import html5

NOT_UTF8 = "\ufffd"  # stands in a text for bytes that are not UTF-8
# "lower_turkish" is also for Azerbaijani: there I with a dot and I without one are two letters. "keep": as written.
CASES = ("lower", "lower_turkish", "keep")
ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # of a terminal: it changes colours, moves the cursor
CONTROL = dict.fromkeys(i for i in (*range(32), *range(127, 160)) if not chr(i).isspace())
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphen, spaces of no width: where a web page may break
# A tag may have attributes, each with its value, so that "<a man and a dog>" is none.
ATTRIBUTES = r"""(?:\s+[\w-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*\s*/?>"""
BREAK = re.compile(rf"<!--.*?-->|</?(?:br|p|div|li|ul|ol|tr|td|h[1-6]|hr|pre){ATTRIBUTES}", re.I | re.S)
TAG = re.compile(
    r"</?(?:a|abbr|b|big|center|cite|code|del|em|font|i|img|ins|mark|q|s|script|small|span|strike|strong|style|sub|sup"
    rf"|tt|u){ATTRIBUTES}",
    re.I,
)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|([a-zA-Z][a-zA-Z0-9]{1,31}));")


def clean_text(text, case="lower"):
    """A caption or prompt as every reader returns it: valid UTF-8, one space between words, without control characters,
    in the `case` that is one of CASES."""
    text = as_utf8(text)
    if not text.isprintable():
        text = ESCAPE_SEQUENCE.sub("", text).translate(CONTROL)
    return in_case(" ".join(text.split()), case)


def in_case(text, case):
    """A text in lower case, by the rules of Unicode or of Turkish, or as it is: see CASES."""
    if case == "keep":
        return text
    if case == "lower_turkish":
        text = text.replace("I\u0307", "i").replace("\u0130", "i").replace("I", "\u0131")
    return text.lower()


def without_markup(text):
    """A text that was written for a web page -> what the page shows: &amp; is &, once; tags, comments and invisible
    characters are left out."""
    if text.isascii() and "<" not in text and "&" not in text:
        return text
    text = TAG.sub("", BREAK.sub(" ", text))

    def character(entity):
        shown = html5.get(f"{entity[1]};", entity[0]) if entity[1] else html.unescape(entity[0])
        return shown.replace(NOT_UTF8, "")  # what HTML makes of a number that is no character

    return INVISIBLE.sub("", ENTITY.sub(character, text))


def with_markup(text):
    """A text of which `without_markup` makes `text`; the text itself where that is so."""
    return text if without_markup(text) == text else html.escape(text, quote=False)


def as_utf8(text):
    """The text with NOT_UTF8 in place of lone surrogates, which JSON can escape and UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
