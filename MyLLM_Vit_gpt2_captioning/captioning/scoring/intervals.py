"""How certain a score is, and whether two systems differ: the bootstrap over images (Efron 1979; Koehn 2004).

Every score is a function of sums over images. A resample draws as many images as there are, with replacement: each
image gets a weight, how often it was drawn, and the score is computed from the weighted sums. So no caption is scored
twice; CIDEr keeps the document frequencies of all references. Intervals are percentiles.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
BLOCK = 100  # resamples at a time, so that their weights stay small


@dataclass
class Part:
    """Scores that share their statistics: `names` of n scores; `rows` (images, k), the statistics of each image;
    `score`: sums of rows (..., k) -> scores (..., n)."""

    names: tuple
    rows: np.ndarray
    score: Any

    def total(self):
        """-> {name: score of all images}."""
        return dict(zip(self.names, map(float, self.score(self.rows.sum(axis=0))), strict=True))


def mean_part(name, values):
    """The `Part` of a score that is a mean over images, from the value of each."""
    return ratio_part(name, values, np.ones(len(values)))


def ratio_part(name, counts, of):
    """The `Part` of a score that is a sum over images, of `counts`, divided by another, `of`; 0 where that is 0."""
    rows = np.stack([counts, of], axis=1).astype(float)
    return Part((name,), rows, lambda sums: sums[..., :1] / np.maximum(sums[..., 1:], np.finfo(float).tiny))


def resampled(systems, resamples=RESAMPLES, seed=0):
    """[[Part, ...] of each system], all with the same images -> [{name: (resamples,) scores} of each system]. Every
    system is scored on the same draws."""
    images, rng = len(systems[0][0].rows), np.random.default_rng(seed)
    found = [{name: [] for part in parts for name in part.names} for parts in systems]
    for start in range(0, resamples, BLOCK):
        count = min(BLOCK, resamples - start)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=count).astype(float)  # (count, images)
        for scores, parts in zip(found, systems, strict=True):
            for part in parts:
                for name, column in zip(part.names, part.score(weights @ part.rows).T, strict=True):
                    scores[name].append(column)
    return [{name: np.concatenate(blocks) for name, blocks in scores.items()} for scores in found]


def percentiles(scores, level=LEVEL):
    """Scores of the resamples -> [low, high]."""
    return [float(value) for value in np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])]


def intervals(parts):
    """[Part, ...] -> {name: [low, high]}, 95% intervals."""
    [scores] = resampled([parts])
    return {name: percentiles(values) for name, values in scores.items()}


def compare(parts, others):
    """Two systems on the same images -> {name: {"scores": [first, second], "difference": second - first, "interval":
    [low, high] of the difference, "p": two-sided p-value of there being no difference}}.

    p is twice the smaller share of resamples in which the difference is at most, or at least, zero; with the observed
    sample counted as one of them it is never zero (Davison and Hinkley 1997).
    """
    first, second = resampled([parts, others])
    totals = [{name: value for part in system for name, value in part.total().items()} for system in (parts, others)]
    result = {}
    for name in first:
        differences = second[name] - first[name]
        tail = min((differences <= 0).sum(), (differences >= 0).sum())
        scores = [total[name] for total in totals]
        result[name] = {
            "scores": scores,
            "difference": scores[1] - scores[0],
            "interval": percentiles(differences),
            "p": float(min(1.0, 2 * (tail + 1) / (len(differences) + 1))),
        }
    return result


def mean_interval(values, level=LEVEL):
    """Mean of a score over two or more training runs, and the interval that Student's t gives it -> (mean, low, high).

    For so few values the bootstrap would give intervals that are much too narrow.
    """
    from scipy import stats

    values = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return mean, float(mean - half), float(mean + half)
