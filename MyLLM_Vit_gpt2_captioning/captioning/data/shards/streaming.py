"""Training on tar shards: photos are read one after the other, shard by shard, and mixed in a shuffle buffer.

The order of an epoch follows from seed, epoch and number of ranks alone. A rank reads its part of the shuffled shards,
a buffer mixes the groups of captions that it reads, and data workers only decode the batches. So the photos come in the
same order with any number of workers, and a resumed run computes where it stopped without reading the shards before.
"""

import os
import random
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch.utils.data

from captioning.common.printable import printable
from captioning.data.batching import LOOKED_AT, build_loader, warn_of_unknown_words
from captioning.data.shards.reading import decode_photo, has_shards, read_rows, read_samples, training_shards
from captioning.data.unreadable_photos import GREY, UnreadableFlags
from captioning.images import tar_members
from captioning.images.augmentation import opening_of

READ_AHEAD = 4  # batches that a thread reads before they are asked for
TOKENIZER_CAPTIONS = 1_000_000  # at most, that a tokenizer is trained on

# --- which folder, which captions -------------------------------------------------------------------------------------


def streamed_folder(df):
    """The folder of the shards that training streams, or None: `sources.load_usable` reads only the validation split of
    shards, so a frame from shards without a training row means that the training shards are still to be read."""
    tar = None if (df["split"] == "train").any() else tar_members.tar_of(df["image"].iloc[0])
    return tar.parent if tar else None


def training_texts(df, unescape=True, case="lower"):
    """Yields captions and prompts of the training split; of shards those of the first million captions, as
    `read_samples` reads them."""
    if folder := streamed_folder(df):
        yield from islice(_shard_texts(folder, unescape, case), TOKENIZER_CAPTIONS)
    training = df[df["split"] == "train"]
    for column in ("caption", "prompt"):
        yield from training.get(column, ())


def _shard_texts(folder, unescape, case):
    for _, caption, _, prompt in read_rows(folder, ["train"], unescape, case):
        yield from filter(None, (caption, prompt))


# --- the dataset ------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """K captions of one photo, with what a data worker needs to make items of them."""

    name: str
    photo_index: int  # in the training split
    seed: list[int]  # of its augmentation
    photo: bytes
    captions: list[str]
    prompts: list[str]
    texts: list[str]  # all captions and prompts of the photo: they decide how it may be augmented


class UnreadableSamples(UnreadableFlags):
    """The photos of a stream that cannot be read, and the samples and shards that the stream had to leave out.

    A shard that breaks off is one file, and counts as one, however many photos are lost with it.
    """

    def __init__(self, folder, photos, max_bad_images):
        """`photos`: how many there are; `max_bad_images`: how many of them, and shards, may be unreadable."""
        super().__init__(photos, max_bad_images)
        self.folder = folder
        self.photos_lost_with = {}  # {name of a sample or shard that the stream left out: photos lost}

    def report(self, name, reason, photos=1):
        """Print, once for a name, that the stream leaves out a sample or shard with this many photos."""
        if str(name) not in self.photos_lost_with:
            self.photos_lost_with[str(name)] = photos
            lost = f" {photos:,} of its photos are lost." if photos > 1 else ""
            print(f"\nwarning: {name}: {reason}.{lost} {self.consequence}", file=sys.stderr)

    def load(self, group, **opening):
        """A `Group` -> upright RGB pixels (H, W, 3) uint8; grey ones for an unreadable photo."""

        def decode():
            try:
                return decode_photo(group.photo, **opening)
            except ValueError as error:
                raise ValueError(f"{group.name}: {error}") from error

        return self.load_or_grey(group.photo_index, decode)

    def count(self):
        return super().count() + len(self.photos_lost_with)

    def _check(self, count):
        if not has_shards(self.folder):
            raise FileNotFoundError(
                f"{self.folder}: the shards have vanished; bring them back and start again. Everything written so far "
                "is kept"
            )
        lost = super().count() + sum(list(self.photos_lost_with.values()))  # a list: the reading thread may add to it
        if count > self.max_bad_images or lost >= len(self.flags):
            raise ValueError(
                f"{self.folder}: {count:,} photos and shards cannot be read, {lost:,} of {len(self.flags):,} photos "
                f"are lost (max_bad_images is {self.max_bad_images}): prepare_data.py --check FOLDER lists them. Write "
                "shards again, or allow more with --max_bad_images N. Everything written so far is kept"
            )


class StreamedDataset(torch.utils.data.Dataset):
    """Stands in for the script's `Dataset` in the training loader; its photos come with their batch.

    `images` and `captions`, by which a resumed run recognises its dataset, are the shards and their counts.
    """

    def __init__(self, folder, shards, dataset, max_bad_images, unescape=True, case="lower"):
        """`dataset`: a `Dataset` without rows, which knows transforms and tokenizer; `unescape` and `case`
        as in `read_samples`."""
        self.cleaning = dict(unescape=unescape, case=case)
        self.dataset, self.tokenizer, self.tfms = dataset, dataset.tokenizer, dataset.tfms
        self.captions_per_image, self.seed = dataset.captions_per_image, dataset.seed
        self.images = [shard.path.name for shard in shards]
        self.captions = [f"{shard.samples} photos, {sorted(shard.captions.items())}" for shard in shards]
        self.prompts, self.captions_of, self.token_caches = [""] * len(shards), {}, []
        self.total_captions = sum(count * photos for shard in shards for count, photos in shard.captions.items())
        self.unreadable_photos = UnreadableSamples(folder, sum(shard.samples for shard in shards), max_bad_images)

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch)

    def __len__(self):
        return self.total_captions

    def __getitems__(self, groups):
        """`Group`s, or None where the stream could not read one -> K items (image, token_ids, labels) for each."""
        return [item for group in groups for item in self._items(group)]

    def _items(self, group):
        K = self.captions_per_image
        if group is None:  # without labels that count, but every rank has to make the same number of steps
            group, pixels = Group("", 0, [0], b"", [""] * K, [""] * K, []), GREY
        else:
            pixels = self.unreadable_photos.load(group, **opening_of(self.tfms))  # (H, W, 3) uint8
        image = self.tfms(image=pixels, captions=group.texts, seed=group.seed)["image"]
        pairs = zip(group.captions, group.prompts, strict=True)
        return [(image, *self.dataset.tokens(caption, prompt, pixels is not GREY)) for caption, prompt in pairs]


# --- the order of an epoch --------------------------------------------------------------------------------------------


class ShardBatchSampler:
    """Yields batches of `Group`s for a `StreamedDataset`: every group of K captions once an epoch over all ranks.

    The shuffled shards, one behind the other, are cut into as many parts as there are ranks, within a shard where need
    be, so that all have the same number of batches. None takes the place of a group that the stream cannot read.
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
        self.shards, self.unreadable_photos = shards, dataset.unreadable_photos
        self.cleaning = getattr(dataset, "cleaning", {})
        self.groups_per_batch, self.buffer, self.window = batch_size // K, buffer, max(1, window)
        self.rank, self.world_size = 0, 1
        self.K = self.captions_per_image = K
        self.seed, self.epoch = dataset.seed, 0
        self.groups_in = [shard.groups(K) for shard in shards]
        self.first_photo_of = np.cumsum([0] + [shard.samples for shard in shards])  # its index in the training split
        self.skip_batches = 0  # of the next epoch, because a resumed run has trained on them

    def set_rank(self, rank, world_size, saved_world_size=None):
        """Read the part of the shards that belongs to process `rank` of `world_size`. Raises ValueError when a run is
        resumed that had another number of processes, `saved_world_size`: they had other parts."""
        if saved_world_size not in (None, world_size):
            raise ValueError(
                f"a run on tar shards goes on with as many processes as it had: start {saved_world_size}, not "
                f"{world_size}, or leave out --resume"
            )
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch):
        """Choose the epoch's order: it depends on (seed, epoch, number of ranks) only."""
        self.epoch = epoch

    @property
    def groups_per_rank(self):
        """Groups of the rank that has most of them; the others are filled up with None."""
        return -(-sum(self.groups_in) // self.world_size)

    def __len__(self):
        return -(-self.groups_per_rank // self.groups_per_batch)

    def photos_in_smallest_batch(self):
        """How many photos the smallest batch has."""
        return (self.groups_per_rank - 1) % self.groups_per_batch + 1

    def __iter__(self):
        skip, self.skip_batches = self.skip_batches, 0
        yield from read_ahead(self._batches(skip), READ_AHEAD)

    def _batches(self, skip):
        """Yields the rank's batches without the first `skip`. The groups of a window are sorted by length, cut into
        batches, and these shuffled."""
        window_groups = self.window * self.groups_per_batch
        first_window = skip // self.window
        groups = self._shuffled_groups(first_window * window_groups)
        for number in range(first_window, -(-self.groups_per_rank // window_groups)):
            window = list(islice(groups, window_groups))
            if self.window > 1:
                window.sort(key=_longest_caption)  # stable
            starts = np.arange(0, len(window), self.groups_per_batch)
            if self.window > 1:  # the same on all ranks: batches of similar length meet in one step
                starts = np.random.default_rng([self.seed, self.epoch, number]).permutation(starts)
            for start in starts[skip - first_window * self.window if number == first_window else 0 :]:
                yield window[start : start + self.groups_per_batch]

    def _shuffled_groups(self, skip):
        """Yields the rank's groups as they leave the shuffle buffer, without the first `skip`."""
        generator = random.Random(f"{self.seed} {self.epoch} {self.rank} {self.world_size}")
        order = buffered_order(self.groups_per_rank, self.buffer, generator)
        skipped = np.zeros(self.groups_per_rank, dtype=bool)
        for position in islice(order, skip):
            skipped[position] = True
        stream = self._stream(int(skipped.argmin()))  # opens no shard in front of the first group that is needed
        buffer = {}  # {position in the stream: group with its raw photo}
        for position in order:
            while position not in buffer:
                read_position, group = next(stream)
                if not skipped[read_position]:
                    buffer[read_position] = group
            yield buffer.pop(position)

    def _stream(self, begin):
        """Yields (position, group or None) in the order in which the rank reads them, from the start of the shard that
        holds position `begin`."""
        total, end = sum(self.groups_in), 0
        own_start, own_end = (total * rank // self.world_size for rank in (self.rank, self.rank + 1))
        for i in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards)):
            start, end = end, end + self.groups_in[i]
            low, high = max(start, own_start), min(end, own_end)
            if low < high and high - own_start > begin:
                yield from enumerate(self._groups_of_shard(i, low - start, high - start), low - own_start)
        while True:
            yield self.groups_per_rank - 1, None  # for a rank that has one group less than another

    def _groups_of_shard(self, i, low, high):
        """Yields the groups low..high-1 of shard i; None for those that it turns out not to have."""
        shard, broken, seen, end = self.shards[i], [], 0, high

        def report(name, reason):
            broken.append(name)
            self.unreadable_photos.report(name, reason)

        reason = "holds fewer photos than the manifest says"
        try:
            samples = read_samples(shard.path, report, with_photos=True, **self.cleaning)
            samples = (sample for sample in samples if sample.captions)
            for n, sample in enumerate(samples):
                groups = list(self._groups_of_photo(sample, self.first_photo_of[i] + min(n, shard.samples - 1), shard))
                yield from groups[max(0, low - seen) : max(0, end - seen)]
                seen += len(groups)
                if seen >= end:
                    return
        except (OSError, ValueError) as error:
            reason, broken = error, []
        if not broken:
            groups_per_photo = self.groups_in[i] / shard.samples
            self.unreadable_photos.report(shard.path, reason, round((high - max(low, seen)) / groups_per_photo))
        for _ in range(max(low, seen), high):
            yield None

    def _groups_of_photo(self, sample, photo_index, shard):
        """K different captions each, drawn anew in every epoch; those of a photo with fewer repeat."""
        order = np.random.default_rng([self.seed, self.epoch, photo_index]).permutation(len(sample.captions))
        order = np.resize(order, max(self.K, len(order)))
        texts = sample.captions + [prompt for prompt in sample.prompts if prompt]
        name = f"{shard.path}{os.sep}{printable(sample.name)}"
        for start in range(0, len(order) - self.K + 1, self.K):
            chosen = order[start : start + self.K]
            captions, prompts = [sample.captions[k] for k in chosen], [sample.prompts[k] for k in chosen]
            seed = [self.seed, self.epoch, int(photo_index), start]
            yield Group(name, int(photo_index), seed, sample.photo, captions, prompts, texts)


def _longest_caption(group):
    """Words of a group's longest caption, which decide how long its rows in a batch are."""
    return max(caption.count(" ") for caption in group.captions) if group else 0


def buffered_order(count, size, generator):
    """Yields 0..count-1 in the order in which they leave a shuffle buffer of `size` places: a random one of those in it
    leaves, and the next number takes its place."""
    buffer = list(range(min(size, count)))
    for new in range(len(buffer), count):
        place = int(generator.random() * len(buffer))
        yield buffer[place]
        buffer[place] = new
    generator.shuffle(buffer)
    yield from buffer


def read_ahead(items, count):
    """Yields the items of an iterator; a thread reads `count` of them in advance, so that training does not wait for
    the disk."""
    end = object()
    with ThreadPoolExecutor(1, "shards") as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


# --- the loader -------------------------------------------------------------------------------------------------------


def _first_captions(path, **cleaning):
    """The captions of a shard's first photos."""
    captions = (c for sample in read_samples(path, lambda *fault: None, **cleaning) for c in sample.captions)
    try:
        return list(islice(captions, LOOKED_AT))
    except (OSError, ValueError):  # it is said when the shard is read
        return []


def build_stream_loader(folder, dataset, collate_fn, config, case="lower"):
    """The training DataLoader of shards. `dataset`: a `Dataset` of the script without rows; `config`: the train_config.

    Raises ValueError for features that need photos by random access: a token cache and self-critical training.
    """
    for constant in ("cache_tokens", "scst_epochs"):
        if getattr(config, constant):
            raise ValueError(
                f"{constant} needs photos in any order, and those of tar shards ({folder}) are read as a stream: leave "
                f"it out, or train with --data_dir on the dataset that the shards were written from"
            )
    shards = training_shards(folder)
    print(f"train: {sum(shard.samples for shard in shards):,} photos in {len(shards):,} shards, read as a stream")
    cleaning = dict(unescape=config.unescape_captions, case=case)
    warn_of_unknown_words(dataset.tokenizer, _first_captions(shards[0].path, **cleaning))
    streamed = StreamedDataset(folder, shards, dataset, config.max_bad_images, **cleaning)
    sampler = ShardBatchSampler(shards, streamed, config.batch_size, config.shuffle_buffer, config.length_window)
    return build_loader(streamed, sampler, collate_fn, config)
