"""Which captions form a batch: K captions of one image side by side, so that the image is encoded once for all K."""

from collections import Counter

import numpy as np
from torch.utils.data import Sampler


class CaptionBatchSampler(Sampler):
    """Yields lists of row indices; rows b*K .. b*K+K-1 of a batch are captions of the same image.

    An epoch visits every image: n captions make n // K groups of K different ones (which are left over changes from
    epoch to epoch), and an image with fewer than K captions makes one group in which they repeat. With K = 1 every
    caption comes once an epoch, as in a classic loader.
    """

    def __init__(self, images, batch_size, captions_per_image=1, shuffle=True, seed=0):
        """`images`: the image of every row. `batch_size` counts captions and is a multiple of `captions_per_image`."""
        if batch_size % captions_per_image:
            raise ValueError(
                f"batch_size {batch_size} counts captions and must be a multiple of captions_per_image "
                f"{captions_per_image}, for example {max(1, batch_size // captions_per_image) * captions_per_image}"
            )
        rows_of = {}
        for row, image in enumerate(images):
            rows_of.setdefault(image, []).append(row)
        self.rows_of_image = list(rows_of.values())
        self.captions_per_image = captions_per_image
        self.groups_per_batch = batch_size // captions_per_image
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch):
        """Choose the epoch's order: it depends on (seed, epoch) only."""
        self.epoch = epoch

    def __len__(self):
        groups = sum(max(1, len(rows) // self.captions_per_image) for rows in self.rows_of_image)
        return -(-groups // self.groups_per_batch)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        K = self.captions_per_image
        groups = []
        for rows in self.rows_of_image:
            rows = rng.permutation(rows) if self.shuffle else np.array(rows)
            if len(rows) < K:
                rows = np.resize(rows, K)  # repeats from the front
            groups += [rows[start : start + K] for start in range(0, len(rows) - K + 1, K)]
        order = rng.permutation(len(groups)) if self.shuffle else range(len(groups))
        for start in range(0, len(groups), self.groups_per_batch):
            yield [int(row) for g in order[start : start + self.groups_per_batch] for row in groups[g]]


def exact_captions_per_image(images, wanted):
    """`wanted` when every image's captions fill groups of that size exactly, else 1: validation counts each once."""
    return wanted if all(count % wanted == 0 for count in Counter(images).values()) else 1
