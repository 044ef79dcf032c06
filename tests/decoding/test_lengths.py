"""Limits of words and characters: captions fit and end where they may; without limits nothing changes."""

import pytest
import torch

from captioning.decoding import search
from captioning.decoding.confidence import Confidence, caption_with_confidence
from captioning.decoding.lengths import DANGLING_WORDS, LengthLimits
from captioning.decoding.search import Options, generate_ids
from captioning.images.preprocessing import preprocess
from captioning.model.tokenizer import CaptionTokenizer
from conftest import REPO_ROOT
from helpers.calibrated import calibrated_copy
from MyLLM_Vit_gpt2_captioning import load_captioner

SHAPES = REPO_ROOT / "examples" / "shapes"
SEARCHES = {
    "greedy": dict(deterministic=True),
    "beams": dict(num_beams=4, num_return_sequences=4),
    "draws": dict(num_return_sequences=4, seed=1, temperature=2.0),
}


@pytest.fixture(scope="module")
def shapes():
    """The captioner of examples/shapes and four of its scenes: model, tokenizer, images (4, 3, H, W)."""
    model, tokenizer = load_captioner(SHAPES)
    pixels = [preprocess(SHAPES / f"scene_{i}.png", **model.preprocessing) for i in range(4)]
    return model, tokenizer, torch.stack(pixels)


def caption(shapes, max_tokens=30, **options):
    """-> ids of the captions, and their texts."""
    model, tokenizer, images = shapes
    start = torch.full((len(images), 1), model.config.eos_token_id)
    ids = generate_ids(model, images, start, max_tokens, tokenizer=tokenizer, **options)
    return ids, [tokenizer.decode(row).strip() for row in ids.tolist()]


@pytest.mark.parametrize("limits", [dict(max_words=3), dict(max_chars=38), dict(max_words=6, max_chars=24)])
@pytest.mark.parametrize("name", SEARCHES)
def test_captions_fit(shapes, name, limits):
    """And they end behind a whole word that may be the last."""
    words, chars = limits.get("max_words", 99), limits.get("max_chars", 99)
    free, (_, fit) = caption(shapes, **SEARCHES[name])[1], caption(shapes, **SEARCHES[name], **limits)
    vocabulary = set(" ".join(free).split()) | {"below", "there", "yellow", "triangle", "square", "circle", "cross"}
    assert len(fit) == len(free) and any(len(text.split()) > words or len(text) > chars for text in free)
    for text in fit:
        assert text and len(text.split()) <= words and len(text) <= chars
        assert text.split()[-1] not in DANGLING_WORDS
        if name != "draws":  # those have invented words
            assert set(text.split()) <= vocabulary


@pytest.mark.parametrize("name", SEARCHES)
def test_limits_that_nothing_reaches_change_nothing(shapes, name):
    free = caption(shapes, **SEARCHES[name])[0]
    assert torch.equal(caption(shapes, **SEARCHES[name], max_words=99, max_chars=999)[0], free)


def test_what_max_tokens_cuts_off_ends_well_under_a_limit(shapes):
    free, limited = caption(shapes, 5, deterministic=True)[1], caption(shapes, 5, deterministic=True, max_words=9)[1]
    assert any(text.split()[-1] in DANGLING_WORDS for text in free)
    assert not any(text.split()[-1] in DANGLING_WORDS for text in limited)


def test_an_end_inside_a_word_moves_in_front_of_it():
    """Behind a whole word where beam search would like it best; with nothing in front, the caption is empty."""
    limits = LengthLimits(Options(max_chars=11), Texts(["", "the", " old", " sub", "marine"]), 1, 0, 5, "cpu")
    assert limits._best_length([1, 2, 3, 0], [1, 2, 3, 4, 0], [-1.0] * 4, [-9.0] * 5) == 2
    assert limits._best_length([3, 0], [3, 4, 0], [-1.0] * 2, [-9.0] * 3) == 0
    assert limits._best_length([1, 2, 3, 0], [1, 2, 3, 0, 0], [-1.0] * 4, [-9.0] * 5) == 3  # its own end


@pytest.mark.parametrize(
    ("tokens", "following", "may"),
    [
        ("the dog", " runs", True),
        ("the dog", "", True),
        ("the dog", ".", True),
        ("the dog runs across", " the", False),
        ("the dog runs across the", " grass", False),
        ("the dog,", " on", False),
        ("the sub", "marine", False),
        ("the dog", "'s", False),
        ("the", "", False),
        ("", " dog", False),
        ("\u72d7\u5728\u8349", "\u5730", True),  # Chinese: no spaces
        ("\u0e2b\u0e21", "\u0e32", True),
        ("\u0e17", "\u0e35\u0e48", False),  # Thai: a vowel sign belongs to its consonant
    ],
)
def test_where_a_caption_may_end(tokens, following, may):
    limits = LengthLimits(Options(max_words=9), Texts([tokens, following]), 1, 2, 3, "cpu")
    assert limits._may_end([0], 1) == may


class Texts:
    """In the place of a tokenizer: ids 0, 1, ... are these texts."""

    def __init__(self, texts):
        self.token_bytes = [text.encode() for text in texts]


@pytest.mark.parametrize("text", ["a caf\u00e9 in \u5317\u4eac \U0001f600!", "the dog's t-shirt, wet"])
def test_characters_are_counted_as_they_are_shown(bpe, text):
    for tokenizer in (bpe, CaptionTokenizer.train([text], 99, kind="word")):
        ids = tokenizer.encode(text)
        shown = tokenizer.decode(ids)
        written = b"".join(tokenizer.token_bytes[i] for i in ids).decode()
        assert written.strip() == shown
        for limit in (len(shown), len(shown) - 1):
            limits = LengthLimits(Options(max_chars=limit), tokenizer, 1, 0, len(tokenizer), "cpu")
            too_long = limits._too_long(torch.tensor([ids[:-1]]))[0, ids[-1]]
            assert bool(too_long) == (limit < len(shown))


def test_the_prompt_does_not_count(shapes):
    model, tokenizer, _ = shapes
    [caption] = search.caption_images(model, tokenizer, [SHAPES / "scene_0.png"], max_words=3, prompt="a small blue")
    assert caption == "a small blue triangle"
    [answer] = search.caption_images(model, tokenizer, [SHAPES / "scene_0.png"], max_words=3, prompt=["a small blue"])
    assert answer == "triangle"


def test_the_confidence_is_that_of_the_shorter_caption(tmp_path):
    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    model, tokenizer = load_captioner(folder)
    options = Options(deterministic=True, max_chars=22)
    [[(caption, judged)]] = caption_with_confidence(
        model, tokenizer, [SHAPES / "scene_0.png"], Confidence.load(folder), options
    )
    assert caption == "a small blue triangle" == " ".join(judged.evidence.words)
    assert 0 < judged.caption < 1 and judged.evidence.end < -1  # it would have gone on
