"""Text of other people, on its way to a terminal, a log or a page: it is shown, and never acts."""

import html
import re
import sys
from functools import cache

# What is not a character to be seen: control characters, among them those that colour a terminal or ring its bell; ends
# of lines; what turns the direction of a text around; half of a surrogate pair, which UTF-8 cannot encode.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

MARKUP = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)|:(?=//)")  # an underscore within a word is none in Markdown


def printable(text):
    """A name or a caption -> the text with its control characters written out, an escape as \\x1b."""
    return UNSEEN.sub(lambda match: ascii(match[0])[1:-1], str(text))


@cache
def warn_once(text):
    """Print a warning to stderr, each text once."""
    print(f"warning: {text}", file=sys.stderr)


def in_markdown(text):
    """A name or a caption -> Markdown that shows it, in one line, also in a cell of a table: no HTML, link or picture
    comes of it."""
    return MARKUP.sub(r"\\\g<0>", printable(text))


def from_markdown(text):
    """What `in_markdown` made -> the `printable` text."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


def in_html(text):
    """A name or a caption -> HTML that shows it."""
    return html.escape(printable(text))
