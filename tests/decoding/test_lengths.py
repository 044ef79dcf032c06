"""Limits of words and characters: captions fit and end where they may; without limits nothing changes."""

import pytest
import torch

from captioning.decoding import search
from captioning.decoding.confidence import caption_with_confidence
from captioning.decoding.lengths import DANGLING_WORDS, LengthLimits
from captioning.decoding.search import Options, generate_ids
from captioning.model.tokenizer import CaptionTokenizer
from conftest import REPO_ROOT, tiny_model_of
from helpers.calibrated import calibrated_copy

SHAPES = REPO_ROOT / "examples" / "shapes"
SEARCHES = {
    "greedy": dict(deterministic=True),
    "beams": dict(num_beams=4, num_return_sequences=4),
    "draws": dict(num_return_sequences=4, seed=1, temperature=2.0),
}
ENGLISH = ["the dog runs across the grass with a ball", "an old unbelievable submarine, on top of the water."] * 3


@pytest.fixture
def wordy(script):
    """A captioner of random weights with a vocabulary of pieces of words, and its tokenizer."""
    tokenizer = CaptionTokenizer.train(ENGLISH, 300)
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_model_of(tokenizer)).eval()
    with torch.no_grad():
        model.gpt.tok_emb.weight.mul_(20)  # other captions for other images
        for i, text in enumerate(tokenizer.token_bytes):  # few tokens that are no letters
            model.gpt.tok_emb.weight[i] *= 1.5 if text.strip().isalpha() else 0.3
    return model, tokenizer


def captions(model, tokenizer, ids, start=1):
    return [tokenizer.decode(row[start:]).strip() for row in ids.tolist()]


@pytest.mark.parametrize(
    "limits", [dict(max_words=3), dict(max_chars=20), dict(max_words=6, max_chars=14, min_tokens=3)]
)
@pytest.mark.parametrize("name", SEARCHES)
def test_captions_fit(wordy, name, limits):
    """And they end behind a whole word that may be the last."""
    model, tokenizer = wordy
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    start = torch.full((6, 1), model.config.eos_token_id)
    free = generate_ids(model, images, start, 20, **SEARCHES[name])
    ids = generate_ids(model, images, start, 20, **SEARCHES[name], **limits, tokenizer=tokenizer)
    assert len(ids) == len(free)
    fit = captions(model, tokenizer, ids)
    for text in fit:
        assert len(text.split()) <= limits.get("max_words", 99) and len(text) <= limits.get("max_chars", 99)
        assert not text or text.split()[-1].strip(".") not in DANGLING_WORDS | {","}
    assert len(set(fit)) > 1 and any(fit)
    assert any(len(text.split()) > limits.get("max_words", 99) or len(text) > limits.get("max_chars", 99)
               for text in captions(model, tokenizer, free))  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_limits_that_nothing_reaches_change_nothing(wordy, name):
    model, tokenizer = wordy
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.gpt.tok_emb.weight[model.config.eos_token_id] *= 8
    start = torch.full((6, 1), model.config.eos_token_id)
    free = generate_ids(model, images, start, 20, **SEARCHES[name])
    ends = [row for row, ids in enumerate(free[:, 1:]) if model.config.eos_token_id in ids]
    assert len(ends) > len(free) / 3
    ids = generate_ids(model, images, start, 20, **SEARCHES[name], max_words=99, max_chars=999, tokenizer=tokenizer)
    assert torch.equal(ids[ends], free[ends])  # the others were cut off by max_tokens


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
    limits = LengthLimits(Options(max_words=9, tokenizer=Texts([tokens, following])), 1, 2, 3, "cpu")
    assert limits._may_end([0], 1) == may


class Texts:
    """In the place of a tokenizer: ids 0, 1, ... are these texts."""

    def __init__(self, texts):
        self.token_bytes = [text.encode() for text in texts]


@pytest.mark.parametrize("text", ["a caf\u00e9 in \u5317\u4eac \U0001f600!", "the dog's t-shirt, wet"])
def test_characters_are_counted_as_they_are_shown(bpe, words_tokenizer, text):
    for tokenizer in (bpe, words_tokenizer):
        ids = tokenizer.encode(text)
        shown = tokenizer.decode(ids)
        written = b"".join(tokenizer.token_bytes[i] for i in ids).decode()
        assert written.strip() == shown
        for limit in (len(shown), len(shown) - 1):
            limits = LengthLimits(Options(max_chars=limit, tokenizer=tokenizer), 1, 0, len(tokenizer), "cpu")
            too_long = limits._too_long(torch.tensor([ids[:-1]]))[0, ids[-1]]
            assert bool(too_long) == (limit < len(shown))


def test_the_prompt_does_not_count(script):
    model, tokenizer = script.load_captioner(SHAPES)
    [caption] = search.caption_images(model, tokenizer, [SHAPES / "scene_0.png"], max_words=3, prompt="a small blue")
    assert caption == "a small blue triangle"
    [answer] = search.caption_images(model, tokenizer, [SHAPES / "scene_0.png"], max_words=3, prompt=["a small blue"])
    assert answer == "triangle"


def test_the_confidence_is_that_of_the_shorter_caption(script, tmp_path):
    from captioning.decoding.confidence import Confidence

    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    model, tokenizer = script.load_captioner(folder)
    options = Options(deterministic=True, max_chars=22, tokenizer=tokenizer)
    [[(caption, judged)]] = caption_with_confidence(
        model, tokenizer, [SHAPES / "scene_0.png"], Confidence.load(folder), options
    )
    assert caption == "a small blue triangle" == " ".join(judged.evidence.words)
    assert 0 < judged.caption < 1 and judged.evidence.end < -1  # it would have gone on
