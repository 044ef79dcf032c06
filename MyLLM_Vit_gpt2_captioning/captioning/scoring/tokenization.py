"""The tokens that scores are computed from: words, as the COCO caption evaluation has them, or for languages that are
written without spaces characters, as it is usual for Chinese."""

import re

from captioning.common.printable import warn_once
from captioning.model.tokenizer import CHARACTER_SCRIPTS, split_characters
from captioning.scoring import ptb_tokenization

TOKENS = ("words", "characters")
SPACELESS_SHARE = 0.2  # of the letters of the references, above which words are no words


def tokenize(captions, by="words"):
    """captions: list of str -> list of str, the lowercased tokens of each joined by spaces, without punctuation.

    By "words" as `ptb_tokenization.tokenize`. By "characters" each letter of a script without spaces, with its marks,
    is a token; what other scripts write is still split into words.
    """
    if by == "words":
        return ptb_tokenization.tokenize(captions)
    return [
        " ".join(token for token in split_characters(caption.lower()) if any(map(str.isalnum, token)))
        for caption in captions
    ]


def warn_of_sentences_as_words(references):
    """Say, once, when reference captions are in a language that is written without spaces: by words each of their
    clauses is one word, and a caption that equals its reference gets BLEU-4 0."""
    text = "".join(references)
    if text.isascii():
        return
    letters = sum(map(str.isalpha, text))
    spaceless = sum(map(str.isalpha, re.findall(CHARACTER_SCRIPTS, text)))
    if spaceless > SPACELESS_SHARE * letters:
        warn_once(
            f"{spaceless / letters:.0%} of the letters of the reference captions are of a script without spaces "
            "between words, and whole clauses are scored as words: score characters, with --score_tokens characters"
        )
