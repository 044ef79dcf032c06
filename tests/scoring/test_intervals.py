"""Bootstrap intervals of scores, and two systems compared with each other."""

import numpy as np
import pytest

from captioning.scoring import intervals, metrics

NOUNS, PLACES = ("dog", "cat", "man", "bird"), ("road", "grass", "beach", "snow")
REFERENCES = {
    f"{noun}_{place}.jpg": [f"a {noun} runs on the {place}", f"the {noun} is near a {place}"]
    for noun in NOUNS
    for place in PLACES
}


def part_of(rng, images):
    """Statistics of a score that is a ratio of sums, as BLEU and METEOR are: matches, length."""
    length = rng.integers(5, 15, size=images)
    return intervals.Part(
        ("ratio",), np.stack([rng.binomial(length, 0.4), length], axis=1), lambda s: s[..., :1] / s[..., 1:]
    )


@pytest.mark.parametrize("kind", ["ratio", "mean"])
def test_coverage(kind):
    """95% intervals hold the true score in 93 to 97% of 500 draws of images."""
    rng, inside = np.random.default_rng(3), 0
    for _ in range(500):
        if kind == "ratio":
            part, truth = part_of(rng, 100), 0.4
        else:
            part, truth = intervals.mean_part("mean", rng.gamma(2.0, 0.3, size=100)), 0.6
        [(low, high)] = intervals.intervals([part]).values()
        inside += low <= truth <= high
    assert 465 <= inside <= 485


def test_a_resample_equals_scoring_the_drawn_images():
    """Weighted sums are the scores of a corpus in which an image stands as often as it was drawn."""
    candidates = {
        image: captions[0] if i % 2 else "a dog runs" for i, (image, captions) in enumerate(REFERENCES.items())
    }
    tokenized, references = list(candidates.values()), list(REFERENCES.values())
    rows = metrics.bleu_counts(tokenized, references)
    drawn = np.random.default_rng(0).integers(0, len(rows), size=len(rows))
    weights = np.bincount(drawn, minlength=len(rows))
    expected = metrics.bleu([tokenized[i] for i in drawn], [references[i] for i in drawn])
    np.testing.assert_allclose(metrics.bleu_scores(weights @ rows), expected, rtol=1e-12)


def test_every_score_has_an_interval_that_holds_it():
    candidates = {
        image: captions[i % 2] if i % 3 else "a cat" for i, (image, captions) in enumerate(REFERENCES.items())
    }
    scores = metrics.score_captions(candidates, REFERENCES, java=False, intervals=True)
    assert set(scores["intervals"]) == {name for name, value in scores.items() if isinstance(value, float)}
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high
    again = metrics.score_captions(candidates, REFERENCES, java=False, intervals=True)
    assert again["intervals"] == scores["intervals"]


def test_comparison_of_a_system_with_itself_and_with_a_worse_one():
    good = metrics.parts({i: captions[0] for i, captions in REFERENCES.items()}, REFERENCES)
    bad = metrics.parts(dict.fromkeys(REFERENCES, "a dog runs"), REFERENCES)
    for result in intervals.compare(good, good).values():
        assert result["difference"] == 0 and result["interval"] == [0, 0] and result["p"] == 1
    for result in intervals.compare(good, bad).values():
        assert result["difference"] < 0 and result["interval"][1] < 0 and result["p"] < 0.01


def test_p_values_of_equal_systems_are_spread_evenly():
    """Of 400 comparisons without a difference about 5% have p < 0.05."""
    rng = np.random.default_rng(1)
    small = 0
    for _ in range(400):
        pair = [intervals.mean_part("mean", rng.normal(size=50)) for _ in range(2)]
        small += intervals.compare([pair[0]], [pair[1]])["mean"]["p"] < 0.05
    assert 8 <= small <= 36
