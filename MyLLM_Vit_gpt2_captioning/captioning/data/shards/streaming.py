"""Training on tar shards: photos are read one after the other, shard by shard, and mixed in a buffer."""

import os
import random
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data

from captioning.data.batching import build_loader
from captioning.data.shards.reading import are_in, decode, read_rows, read_samples, training_shards
from captioning.data.unreadable_photos import GREY
from captioning.images import tar_members

READ_AHEAD = 4  # batches that a thread has read when they are asked for


TOKENIZER_CAPTIONS = 1_000_000  # of which a tokenizer is learnt, at most


def streamed_folder(df):
    """The folder whose shards are to be streamed in training, or None: a frame that `sources.load_usable` has read
    from shards holds their validation split only."""
    tar = None if (df["split"] == "train").any() else tar_members.tar_of(df["image"].iloc[0])
    return tar.parent if tar else None


def training_texts(df):
    """Yields captions and prompts of the training split, of shards those of the first million captions."""
    if folder := streamed_folder(df):
        yield from islice(_texts(folder), TOKENIZER_CAPTIONS)
    training = df[df["split"] == "train"]
    for column in ("caption", "prompt"):
        yield from training.get(column, ())


def _texts(folder):
    for _, caption, _, prompt in read_rows(folder, ["train"]):
        yield from filter(None, (caption, prompt))


class Group(NamedTuple):
    """K captions of one photo, with what a data worker needs to make them ready."""

    name: str
    number: int  # of the photo in the training split
    seed: list[int]  # of its augmentation
    photo: bytes
    captions: list[str]
    prompts: list[str]
    texts: list[str]  # all captions and prompts of the photo: they decide how it may be augmented


class BadSamples:
    """Photos and shards that cannot be read, for a stream: as `bad_images.BadImages`.

    A shard that breaks off is one file, and counts as one, however many photos are lost with it.
    """

    def __init__(self, folder, samples, most):
        """`samples`: how many photos there are; `most`: how many of them, and shards, may be broken."""
        self.folder, self.most, self.known = folder, most, 0
        self.flags = torch.zeros(samples, dtype=torch.bool).share_memory_()  # shared: data workers set them
        self.lost = {}  # {name of what the stream left out: photos lost}

    def report(self, name, reason, photos=1):
        """The stream leaves something out; it is named once."""
        if str(name) not in self.lost:
            self.lost[str(name)] = photos
            what = f" {photos:,} of its photos are lost." if photos > 1 else ""
            print(f"\nwarning: {name}: {reason}.{what} Training goes on without it", file=sys.stderr)

    def load(self, group, least_side=None):
        """A `Group` -> (upright RGB pixels (H, W, 3) uint8, whether they are real); grey for an unreadable photo."""
        if self.flags[group.number]:
            return GREY, False
        try:
            return np.asarray(decode(group.photo, least_side)), True
        except ValueError as error:
            self.flags[group.number] = True
            print(f"\nwarning: {group.name}: {error}. Training goes on without it", file=sys.stderr)
            return GREY, False

    def check(self):
        """Raise FileNotFoundError when the shards have vanished, ValueError when more is broken than `most`, or no
        photo is left."""
        count = int(self.flags.sum()) + len(self.lost)
        if count == self.known:
            return
        self.known = count
        if not are_in(self.folder):
            raise FileNotFoundError(
                f"{self.folder}: the shards have vanished; bring them back and start again. What the run has written "
                "so far stays"
            )
        lost = int(self.flags.sum()) + sum(list(self.lost.values()))  # a list: the thread that reads may add to it
        if count > self.most or lost >= len(self.flags):
            raise ValueError(
                f"{self.folder}: {count:,} photos and shards cannot be read, {lost:,} of {len(self.flags):,} photos "
                f"are lost (max_bad_images is {self.most}): prepare_data.py --check FOLDER lists them. Write shards "
                "again, or allow more with --max_bad_images N. What the run has written so far stays"
            )


class StreamedDataset(torch.utils.data.Dataset):
    """What the script's `Dataset` is for the training loader, for photos that come with their batch.

    `images` and `captions`, from which `run_state.fingerprint` tells datasets apart, are the shards and their counts.
    """

    def __init__(self, folder, shards, dataset, max_bad_images):
        """`dataset`: a `Dataset` without rows, which knows transforms and tokenizer."""
        self.dataset, self.tokenizer, self.tfms = dataset, dataset.tokenizer, dataset.tfms
        self.captions_per_image, self.seed = dataset.captions_per_image, dataset.seed
        self.images = [shard.path.name for shard in shards]
        self.captions = [f"{shard.samples} photos, {sorted(shard.captions.items())}" for shard in shards]
        self.prompts, self.captions_of, self.token_caches = [""] * len(shards), {}, []
        self.total = sum(count * photos for shard in shards for count, photos in shard.captions.items())
        self.bad_images = BadSamples(folder, sum(shard.samples for shard in shards), max_bad_images)

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch)

    def __len__(self):
        return self.total

    def __getitems__(self, groups):
        """`Group`s, or None for one that is lost -> K items (image, token_ids, labels) for each."""
        return [item for group in groups for item in self._items(group)]

    def _items(self, group):
        K, readable = self.captions_per_image, False
        if group is None:  # nothing in it counts, but every rank has to make the same number of steps
            group = Group("", 0, [0], b"", [""] * K, [""] * K, [])
            pixels = GREY
        else:
            pixels, readable = self.bad_images.load(group, getattr(self.tfms, "least_side", None))
        image = self.tfms(image=pixels, captions=group.texts, seed=group.seed)["image"]
        pairs = zip(group.captions, group.prompts, strict=True)
        return [(image, *self.dataset.tokens(caption, prompt, readable)) for caption, prompt in pairs]


class ShardBatchSampler:
    """Yields batches of `Group`s for a `StreamedDataset`: every group of K captions once an epoch over all ranks.

    The shuffled shards, one behind the other, are cut into as many parts as there are ranks, within a shard where need
    be, so that all have the same number of batches. What the stream cannot read leaves a None in its place.
    """

    def __init__(self, shards, dataset, batch_size, buffer, window=1):
        """`buffer`: groups that are mixed with each other; `window`: as in `batching.CaptionBatchSampler`.

        Raises ValueError when `batch_size` is no multiple of the captions per image or the buffer holds nothing.
        """
        K = dataset.captions_per_image
        if batch_size % K:
            raise ValueError(f"batch_size {batch_size} must be a multiple of captions_per_image {K}")
        if buffer < 1:
            raise ValueError(f"shuffle_buffer {buffer}: at least 1, which does not shuffle")
        self.shards, self.dataset, self.bad_images = shards, dataset, dataset.bad_images
        self.groups_per_batch, self.buffer, self.window = batch_size // K, buffer, max(1, window)
        self.rank, self.ranks = 0, 1
        self.K, self.seed, self.epoch = K, dataset.seed, 0
        self.sizes = [shard.groups(K) for shard in shards]
        self.numbers = np.cumsum([0] + [shard.samples for shard in shards])  # of the first photo in each shard
        self.first = 0  # batches that the next epoch leaves out, because a run that goes on has seen them

    def share(self, rank, ranks, shares=None):
        """This is process `rank` of `ranks`: it reads its part of the shards. Raises ValueError when a run is to go on
        that had another number of processes, `shares`: its processes had other parts."""
        if shares not in (None, ranks):
            raise ValueError(
                f"a run on tar shards goes on with as many processes as it had: start {shares}, not {ranks}, or leave "
                "out --resume"
            )
        self.rank, self.ranks = rank, ranks

    def set_epoch(self, epoch):
        """Choose the epoch's order: it depends on (seed, epoch, number of ranks) only."""
        self.epoch = epoch

    @property
    def longest(self):
        """Groups of the rank that has most of them; the others are filled up with None."""
        return -(-sum(self.sizes) // self.ranks)

    def __len__(self):
        return -(-self.longest // self.groups_per_batch)

    def __iter__(self):
        first, self.first = self.first, 0
        yield from read_ahead(self._batches(first), READ_AHEAD)

    def _batches(self, first):
        size = self.window * self.groups_per_batch
        done = first // self.window
        groups = self._mixed(done * size)
        for number in range(done, -(-self.longest // size)):
            window = list(islice(groups, size))
            if self.window > 1:
                window.sort(key=_words)  # stable
            starts = np.arange(0, len(window), self.groups_per_batch)
            if self.window > 1:  # the same on all ranks: batches of like length meet in one step
                starts = np.random.default_rng([self.seed, self.epoch, number]).permutation(starts)
            for start in starts[first - done * self.window if number == done else 0 :]:
                yield window[start : start + self.groups_per_batch]

    def _mixed(self, skip):
        """Yields the rank's groups as they leave the buffer, without the first `skip`."""
        generator = random.Random(f"{self.seed} {self.epoch} {self.rank} {self.ranks}")
        order = buffered_order(self.longest, self.buffer, generator)
        seen = np.zeros(self.longest, dtype=bool)
        for place in islice(order, skip):
            seen[place] = True
        stream = self._stream(int(seen.argmin()))  # shards in front of the first place that is needed are not opened
        waiting = {}  # the buffer: raw photos
        for place in order:
            while place not in waiting:
                read, group = next(stream)
                if not seen[read]:
                    waiting[read] = group
            yield waiting.pop(place)

    def _stream(self, begin):
        """Yields (place, group or None) as the rank reads them, from the shard on that holds the place `begin`."""
        total, ends = sum(self.sizes), 0
        start, stop = (total * rank // self.ranks for rank in (self.rank, self.rank + 1))  # this rank's part
        for i in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards)):
            begins, ends = ends, ends + self.sizes[i]
            low, high = max(begins, start), min(ends, stop)
            if low < high and high - start > begin:
                yield from enumerate(self._part(i, low - begins, high - begins), low - start)
        while True:
            yield self.longest - 1, None  # a rank that has one group less than another

    def _part(self, i, low, high):
        """Yields the groups low..high-1 of a shard; behind those that there are, None."""
        shard, broken, place, stop = self.shards[i], [], 0, high

        def report(name, reason):
            broken.append(name)
            self.bad_images.report(name, reason)

        reason = "holds fewer photos than the manifest says"
        try:
            for n, sample in enumerate(self._samples(shard, report)):
                groups = list(self._groups(sample, self.numbers[i] + min(n, shard.samples - 1), shard))
                yield from groups[max(0, low - place) : max(0, stop - place)]
                place += len(groups)
                if place >= stop:
                    return
        except (OSError, ValueError) as error:
            reason, broken = error, []
        if not broken:
            groups_of_photo = self.sizes[i] / shard.samples
            self.bad_images.report(shard.path, reason, round((high - max(low, place)) / groups_of_photo))
        for _ in range(max(low, place), high):
            yield None

    def _samples(self, shard, report):
        return (sample for sample in read_samples(shard.path, report, content=True) if sample.captions)

    def _groups(self, sample, number, shard):
        """K different captions of a photo each, drawn anew in every epoch; those of a photo with fewer repeat."""
        order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(sample.captions))
        order = np.resize(order, max(self.K, len(order)))
        texts = sample.captions + [prompt for prompt in sample.prompts if prompt]
        name = f"{shard.path}{os.sep}{sample.name}"
        for start in range(0, len(order) - self.K + 1, self.K):
            captions, prompts = (
                [of[k] for k in order[start : start + self.K]] for of in (sample.captions, sample.prompts)
            )
            seed = [self.seed, self.epoch, int(number), start]
            yield Group(name, int(number), seed, sample.photo, captions, prompts, texts)


def _words(group):
    """Words of a group's longest caption, which decide how long its rows in a batch are."""
    return max(caption.count(" ") for caption in group.captions) if group else 0


def buffered_order(count, size, generator):
    """Yields 0..count-1 in the order in which they leave a shuffle buffer of `size` places: any of those in it leaves,
    and the next that comes takes its place."""
    buffer = list(range(min(size, count)))
    for new in range(len(buffer), count):
        place = int(generator.random() * len(buffer))
        yield buffer[place]
        buffer[place] = new
    generator.shuffle(buffer)
    yield from buffer


def read_ahead(items, count):
    """Yields what the iterator `items` yields, `count` of them read before they are asked for, in a thread: training
    does not wait for the disk."""
    end = object()
    with ThreadPoolExecutor(1, "shards") as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


def build_stream_loader(folder, dataset, collate_fn, config):
    """The training DataLoader of shards. `dataset`: a `Dataset` of the script without rows; `config`: the train_config.

    Raises ValueError for what needs photos by random access: a token cache and self-critical training.
    """
    for constant in ("cache_tokens", "scst_epochs"):
        if getattr(config, constant):
            raise ValueError(
                f"{constant} needs photos in any order, and those of tar shards ({folder}) are read as a stream: leave "
                f"it out, or train with --data_dir on the dataset that the shards were written from"
            )
    shards = training_shards(folder)
    print(f"train: {sum(shard.samples for shard in shards):,} photos in {len(shards):,} shards, read as a stream")
    streamed = StreamedDataset(folder, shards, dataset, config.max_bad_images)
    sampler = ShardBatchSampler(shards, streamed, config.batch_size, config.shuffle_buffer, config.length_window)
    return build_loader(streamed, sampler, collate_fn, config)
