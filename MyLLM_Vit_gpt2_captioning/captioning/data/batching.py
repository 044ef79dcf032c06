"""Batches of captions: K captions of one image side by side, so that the image is encoded once for all K, and captions
of similar length together, so that little of a batch is padding."""

import itertools
import sys

import numpy as np
import torch
from torch.utils.data import Sampler

from captioning.common.distributed import rank_and_world_size
from captioning.data.unreadable_photos import CheckedLoader
from captioning.model.front import FrontOutput
from captioning.model.tokenizer import encode_caption

LOOKED_AT = 2000  # captions in which unknown words are counted
UNKNOWN_SHARE = 0.2  # of the words, above which it is said


class CaptionBatchSampler(Sampler):
    """Yields lists of row indices; rows b*K .. b*K+K-1 of a batch are captions of the same image.

    An epoch visits every image: n captions make n // K groups of K different ones (the captions left over change from
    epoch to epoch), and an image with fewer than K captions makes one group in which they repeat. With K = 1 every
    caption comes once an epoch, as in a classic loader.
    """

    def __init__(
        self, images, batch_size, captions_per_image=1, shuffle=True, seed=0, lengths=None, window=1, leave_out=True
    ):
        """`images`: the image of every row. `batch_size` counts captions; ValueError when it is not a multiple of
        `captions_per_image`. Without `leave_out` no caption is left over: those of an image that do not fill a last
        group repeat in it, and a `Dataset` can leave the repetitions out of the loss.

        With `lengths`, one per row, the groups of `window` batches are sorted by their longest caption before they are
        cut into batches; batches then come in random order again.
        """
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
        self.shuffle, self.seed, self.epoch, self.leave_out = shuffle, seed, 0, leave_out
        self.skip_batches = 0  # of the next epoch, because a resumed run has trained on them
        self.lengths, self.window = lengths, window
        self.set_rank(0, 1)

    def set_rank(self, rank, world_size, saved_world_size=None):
        """Yield the part of every batch that belongs to process `rank` of `world_size`.

        A batch of all processes together, and a window, is `world_size` times as large. A run that is resumed with
        another number of processes keeps batches `saved_world_size` times as large, so that a step keeps its captions.
        """
        self.rank, self.world_size, self.batch_world_size = rank, world_size, saved_world_size or world_size

    def set_epoch(self, epoch):
        """Choose the epoch's order: it depends on (seed, epoch) only."""
        self.epoch = epoch

    def __len__(self):
        return len(self._batch_starts(sum(map(self._groups, self.rows_of_image))))

    def photos_in_smallest_batch(self):
        """How many photos the smallest batch of any process has."""
        groups = sum(map(self._groups, self.rows_of_image))
        starts = self._batch_starts(groups)
        return min(end - start for start, end in zip(starts, [*starts[1:], groups], strict=True)) // self.world_size

    def _groups(self, rows):
        """How many groups the captions of an image make."""
        n, K = len(rows), self.captions_per_image
        return max(1, n // K) if self.leave_out else -(-n // K)

    def _batch_starts(self, groups):
        """The first group of each batch of all processes. A last batch with too few groups for all of them is joined to
        the one before."""
        starts = np.arange(0, groups, self.groups_per_batch * self.batch_world_size)
        if groups < self.world_size:
            raise ValueError(f"{groups} photos cannot be shared by {self.world_size} processes: start fewer")
        return starts[:-1] if groups - starts[-1] < self.world_size else starts

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        K = self.captions_per_image
        groups = []
        for rows in self.rows_of_image:
            rows = rng.permutation(rows) if self.shuffle else np.array(rows)
            for start in range(0, self._groups(rows) * K, K):
                groups.append(np.resize(rows[start : start + K], K))  # repeats from the front where there are fewer
        order = rng.permutation(len(groups)) if self.shuffle else np.arange(len(groups))
        starts = self._batch_starts(len(groups))
        ends = dict(zip(starts, [*starts[1:], len(groups)], strict=True))
        if self.lengths is not None and self.window > 1:
            longest = np.array([max(self.lengths[row] for row in rows) for rows in groups])
            size = self.window * self.groups_per_batch * self.batch_world_size
            windows = [order[start : start + size] for start in range(0, len(order), size)]
            order = np.concatenate([window[np.argsort(longest[window], kind="stable")] for window in windows])
            starts = rng.permutation(starts) if self.shuffle else starts
        skip, self.skip_batches = self.skip_batches, 0
        for start in starts[skip:]:
            own = order[start : ends[start]][self.rank :: self.world_size]
            yield [int(row) for group in own for row in groups[group]]


def build_caption_loader(dataset, collate_fn, config, training):
    """A DataLoader of the batches of `CaptionBatchSampler`, as `config`, the train_config, wants them: shuffled in
    `training`, else with every caption."""
    lengths = [caption.count(" ") for caption in dataset.captions]  # in words, near enough to sort by
    sampler = CaptionBatchSampler(
        dataset.images,
        config.batch_size,
        dataset.captions_per_image,
        shuffle=training,
        seed=config.seed,
        lengths=lengths,
        window=config.length_window,
        leave_out=training,
    )
    if training:
        every = max(1, len(dataset.captions) // LOOKED_AT)
        warn_of_unknown_words(dataset.tokenizer, dataset.captions[::every])
    return build_loader(dataset, sampler, collate_fn, config)


def build_loader(dataset, batch_sampler, collate_fn, config):
    """A DataLoader of a caption dataset, with the workers and the device of `config`, the train_config. With several
    processes each loads its part."""
    batch_sampler.set_rank(*rank_and_world_size())
    warn_of_cut_captions(dataset)
    return CheckedLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=config.device.startswith("cuda"),
    )


def warn_of_cut_captions(dataset):
    """Say how many captions of a `Dataset` are longer than its `max_length`, and which length would hold them all."""
    if not getattr(dataset, "captions_of", None):
        return  # those of a stream are not known yet, self-critical training has none
    captions = dataset.captions
    lengths = []  # in tokens, of those that may be too long: a token has at least one byte
    for caption, prompt in zip(captions, dataset.prompts, strict=True):
        if len(caption.encode()) + len(prompt.encode()) + 3 > dataset.max_length:
            lengths.append(len(encode_caption(dataset.tokenizer, caption, sys.maxsize, prompt)))
    cut = sum(length > dataset.max_length for length in lengths)
    if cut:
        print(
            f"warning: {cut:,} of {len(captions):,} captions ({cut / len(captions):.0%}) have more than seq_len "
            f"{dataset.max_length} tokens and are cut off there; --seq_len {max(lengths)} would hold them all"
        )


def warn_of_unknown_words(tokenizer, captions):
    """Say when more than a fifth of the words in these training captions is none that the tokenizer, a word list,
    knows: the model would learn to write none of them."""
    unknown = getattr(tokenizer, "unk_token_id", None)  # tokenizers of transformers may lack it
    if unknown is None or unknown < 0:
        return
    ids = [number for caption in captions for number in tokenizer.encode(caption)]
    share = ids.count(unknown) / max(1, len(ids))
    if share > UNKNOWN_SHARE:
        print(
            f"warning: {share:.0%} of the words in the training captions are not in the tokenizer's word list and are "
            "not learnt: train with --tokenizer bpe, which knows all words, or with a larger --vocab_size, and without "
            "a captioner to start from that has a word list of other captions"
        )


def stack(inputs):
    """Inputs of the model for single photos -> for a batch: images (3, H, W) -> (B, 3, H, W), lists of the tokens
    (N, C) of each encoder level -> a list of (B, N, C), and `FrontOutput`s -> one."""
    if isinstance(inputs[0], FrontOutput):
        return FrontOutput(*map(stack, zip(*inputs, strict=True)))
    if isinstance(inputs[0], list):
        return [torch.stack(level) for level in zip(*inputs, strict=True)]
    return torch.stack(inputs)


def to_device(inputs, device):
    """A tensor, a `FrontOutput`, or a list of tensors and lists, copied to the device without waiting for it."""
    if isinstance(inputs, FrontOutput):
        return FrontOutput(*to_device([*inputs], device))
    if isinstance(inputs, (list, tuple)):
        return [to_device(part, device) for part in inputs]
    return inputs.to(device, non_blocking=True)


def grouped(loader, count):
    """Yields lists of `count` batches, which make one step together; the last list may be shorter."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, count)):
        yield group
