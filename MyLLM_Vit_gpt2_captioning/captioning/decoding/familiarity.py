"""Familiarity: does a photo have parts that no training photo had anything like?

A captioner is as sure of a colour that it never saw as of those it knows: its log-probabilities only compare the words
that it learnt. Its image tokens do show that something is new, as Sun et al. (2022, "Out-of-Distribution Detection with
Deep Nearest Neighbors") found of image classifiers, whose features they scale to length 1, too. Here the neighbours are
`CENTROIDS` that stand for the tokens of training photos, and a photo is as unlike them as its `WORST` tokens, for which
one small new object is enough. How unlike others are is known from held-out photos, so what comes out is their share.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

DIM = 32  # of image tokens projected at random, which all but keeps their distances (Johnson and Lindenstrauss 1984)
CENTROIDS = 1024
WORST = 3
UNUSUAL = 0.03  # share of the held-out photos below which a photo counts as unlike those of training


@dataclass
class Familiarity:
    """`centroids` (K, DIM) of projected image tokens of training photos; `distances` (n,): those of held-out photos, as
    `distances_of` gives them, in ascending order."""

    centroids: torch.Tensor
    distances: torch.Tensor

    def __call__(self, states):
        """What the decoder blocks attend to, (B, N, embed_dim) each -> float64 array (B,): the share of the held-out
        photos that were at least as unlike the training photos, the photo itself counted: from 1 / (n + 1) to 1."""
        distances = distances_of(projected(states), self.centroids).cpu()
        closer = torch.searchsorted(self.distances, distances)  # (B,): held-out photos that are nearer
        return (len(self.distances) + 1 - closer.double().numpy()) / (len(self.distances) + 1)


@torch.inference_mode()
def projected(states):
    """What the decoder blocks attend to, (B, N, embed_dim) each -> (B, N, DIM) float32, of length 1 before they are
    projected. That of the first block is taken: the deeper the tokens, the more they are of the kinds that training
    needed."""
    # Their length is left out: a photo of noise has short tokens, and would be near to everything.
    tokens = F.normalize(states[0].float(), dim=-1)
    generator = np.random.RandomState(0)  # the same numbers in every version of NumPy
    matrix = generator.standard_normal((tokens.size(-1), DIM)).astype(np.float32) / np.float32(np.sqrt(DIM))
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 would round distances away
        return tokens @ torch.from_numpy(matrix).to(tokens.device)


@torch.inference_mode()
def distances_of(tokens, centroids):
    """Projected tokens of photos (B, N, DIM), centroids (K, DIM) -> (B,): the mean distance of a photo's WORST tokens
    from the centroid next to each."""
    with torch.autocast(tokens.device.type, enabled=False):
        nearest = torch.cdist(tokens, centroids.to(tokens)).amin(-1)  # (B, N)
    return nearest.topk(min(WORST, nearest.size(1)), dim=1).values.mean(1)


def trust(familiarity):
    """The share of `Familiarity` -> a factor of the confidence, which rises from 0 for a photo unlike all others to 1
    for a share of UNUSUAL. So of photos like those of training, 3 in 100 lose some confidence."""
    return np.minimum(1.0, np.asarray(familiarity) / UNUSUAL)


def is_strange(familiarity):
    """Whether a photo of this share, None where it is not known, counts as unlike those of training."""
    return familiarity is not None and familiarity < UNUSUAL
