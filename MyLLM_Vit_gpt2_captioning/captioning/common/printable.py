"""Text of other people, on its way to a terminal, a log or a page: it is shown, and never acts."""

import re

# What is not a character to be seen: control characters, among them those that colour a terminal or ring its bell; ends
# of lines; what turns the direction of a text around; half of a surrogate pair, which UTF-8 cannot encode.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """A name or a caption -> the text with its control characters written out, an escape as \\x1b."""
    return UNSEEN.sub(lambda match: ascii(match[0])[1:-1], str(text))
