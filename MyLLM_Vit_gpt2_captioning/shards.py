"""Tar shards in the WebDataset layout, for datasets that are too large for random access: photos are read one after
the other, shard by shard, and mixed in a buffer.

    train-000000.tar, train-000001.tar, ..., val-000000.tar, ...
        000123.jpg       a photo
        000123.json      {"captions": ["...", ...]}, or {"caption": "..."} as img2dataset writes it
        000123.txt       in place of the json: a caption a line
    manifest.json        what `prepare_data.py --shards` wrote: for each shard its counts, size in bytes and hash
    counts.json          the same for shards from elsewhere, counted once

The order of an epoch follows from seed, epoch and number of ranks alone: a rank reads its part of the shuffled shards,
a buffer mixes what it reads, and whichever data worker comes next decodes a batch. So the same photos come in the same
order with any number of workers, and where a run goes on is computed without reading what it has seen.
Layout and library: Aizman et al. 2019, High Performance I/O For Large Scale Deep Learning; github.com/webdataset.
"""

import io
import json
import os
import random
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data
from filelock import FileLock
from PIL import UnidentifiedImageError

import tar_members
from bad_images import GREY
from batching import build_loader
from captioning.common.files import write_atomically
from captioning.data.conventions import COLUMN_NAMES, IMAGE_SUFFIXES, LONGEST_CAPTION, NOT_UTF8, SPLIT_NAMES, SPLITS
from preprocessing import load_image
from progress import progress_bar

MANIFEST_FILE, COUNTS_FILE, PROGRESS_FILE = "manifest.json", "counts.json", "progress.jsonl"
NAME = re.compile(r"(?:(?P<words>.*)[-_.])?\d+\.tar")  # train-000012.tar, cc3m-val-0001.tar, 00012.tar
METADATA = re.compile(r"(?:.*/)?__[^/]*__(?:[./]|$)")  # members of such names belong to no sample
LARGEST_TEXT = 2**20  # bytes of a .json or .txt member
CAPTION_KEYS = ("captions", "caption", *COLUMN_NAMES["caption"])
PROMPT_KEYS = ("prompts", "prompt", *COLUMN_NAMES["prompt"])
READ_BYTES = 2**20  # at once, when photos are read one after the other
READ_AHEAD = 4  # batches that a thread has read when they are asked for
TOKENIZER_CAPTIONS = 1_000_000  # of which a tokenizer is learnt, at most


# --- what is in a folder ----------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    path: Path
    samples: int  # photos with at least one usable caption
    captions: dict[int, int]  # {captions of a photo: how many photos have so many}
    bytes: int

    def groups(self, K):
        """How many groups of K captions of one photo; see `batching.CaptionBatchSampler`."""
        return sum(photos * max(1, count // K) for count, photos in self.captions.items())


def are_in(folder):
    """Whether a folder holds shards."""
    return any(NAME.fullmatch(path.name) for path in Path(folder).glob("*.tar"))


def files_of(folder):
    """{split: [shards]} by their names, in order. Shards whose names have no split are for training, and where none is
    for validation, the last of them is.

    Raises ValueError when the shards are not all written, there is only one, or webdataset is not installed.
    """
    library()
    folder, files = Path(folder), {}
    if (folder / PROGRESS_FILE).exists():
        raise ValueError(
            f"{folder}: its shards are not all written yet; the command that writes them (prepare_data.py --shards "
            "DATASET --to FOLDER) goes on where it stopped"
        )
    for path in sorted(folder.glob("*.tar")):
        if match := NAME.fullmatch(path.name):
            words = [SPLIT_NAMES.get(word, word) for word in re.split(r"[-_.]", match["words"] or "")]
            split = next((word for word in reversed(words) if word in SPLITS), "train")
            files.setdefault(split, []).append(path)
    if "val" not in files:
        if len(files.get("train", ())) < 2:
            raise ValueError(f"{folder}: nothing is left for validation; name one shard or more val-000000.tar")
        files["val"] = [files["train"].pop()]
    return files


def read_manifest(folder):
    """{shard name: its entry} as the writer left it; empty when there is no manifest. Raises ValueError for a damaged
    one."""
    return _read_entries(Path(folder) / MANIFEST_FILE)


def _read_entries(path):
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_bytes())["shards"]
        for entry in entries.values():
            _as_shard(path, entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it, and the shards are counted anew") from error
    return entries


def _as_shard(path, entry):
    captions = {int(count): int(photos) for count, photos in entry["captions"].items()}
    return Shard(path, int(entry["samples"]), captions, int(entry["bytes"]))


def training_shards(folder):
    """[Shard, ...] of the training split: counts from the manifest; shards that it does not name are counted once.

    Raises FileNotFoundError when shards of the manifest are not there, ValueError when no photo has a caption.
    """
    folder = Path(folder)
    entries, paths = read_manifest(folder), files_of(folder).get("train", [])
    missing = [name for name in entries if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]}: not there, though {MANIFEST_FILE} names it ({len(missing):,} such shards): bring "
            f"them back, or remove {MANIFEST_FILE}"
        )
    unknown = [path for path in paths if path.name not in entries]
    if unknown:
        entries = entries | _count(folder, unknown)
    shards = [_as_shard(path, entries[path.name]) for path in paths]
    if not sum(shard.samples for shard in shards):
        raise ValueError(f"{folder}: no photo of its training shards has a usable caption beside it (.json or .txt)")
    return shards


def _count(folder, paths):
    """Count shards, unless `counts.json` knows them as they are -> {name: entry}."""
    try:
        lock = FileLock(folder / ".lock").acquire()  # one rank counts, the others wait and read
    except OSError:  # a folder that may only be read
        lock = nullcontext()
    with lock:
        try:
            known = _read_entries(folder / COUNTS_FILE)
        except ValueError:
            known = {}
        new = [path for path in paths if known.get(path.name, {}).get("identity") != _identity(path)]
        if new:
            workers = min(os.cpu_count(), len(new) // 8)
            loader = torch.utils.data.DataLoader(
                _Counting(new), batch_size=None, num_workers=workers, generator=torch.Generator()
            )
            bar = progress_bar(len(new), "counting shards")
            for path, (entry, problems) in zip(new, loader, strict=True):
                known[path.name] = entry
                for problem in problems[:1]:
                    print(f"\nwarning: {problem}{f' (and {len(problems) - 1:,} more)' if len(problems) > 1 else ''}")
                bar.update(1)
            bar.close()
            content = json.dumps({"shards": known}, indent=1) + "\n"
            try:
                write_atomically(folder / COUNTS_FILE, lambda path: path.write_text(content))
            except OSError as error:
                print(f"warning: {error}. The shards are counted again at the next start")
    entries = {path.name: known[path.name] for path in paths}
    left_out = sum(entry["without_caption"] for entry in entries.values())
    if left_out:
        print(f"warning: {folder}: left out {left_out:,} photos without a usable caption")
    return entries


def _identity(path):
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


class _Counting(torch.utils.data.Dataset):
    """Shards; an item is (entry, [what is wrong with samples, ...]) of one."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return count(self.paths[i])


def count(path):
    """A shard -> (its entry in counts.json, [what is wrong in it, ...]); photos themselves are not read."""
    captions, problems, without = Counter(), [], 0
    try:
        for sample in read_samples(path, lambda name, reason: problems.append(f"{name}: {reason}")):
            if sample.captions:
                captions[len(sample.captions)] += 1
            else:
                without += 1
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {error}")
    entry = dict(samples=sum(captions.values()), captions={str(k): n for k, n in sorted(captions.items())})
    identity = _identity(path)
    return entry | dict(bytes=identity[0], without_caption=without, identity=identity), problems


def find_damage(folder):
    """What is wrong with shards -> ["train-000003.tar: ...", ...]: not there, another size or hash than the manifest
    says, a tar that breaks off, samples that cannot be read."""
    import hashlib

    folder, entries, cases = Path(folder), read_manifest(folder), []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            cases.append(f"{name}: not there")
            continue
        with open(path, "rb") as file:
            if path.stat().st_size != entry["bytes"]:
                cases.append(f"{name}: {path.stat().st_size:,} bytes instead of {entry['bytes']:,}")
            elif hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                cases.append(f"{name}: another hash than in {MANIFEST_FILE}")
    for paths in files_of(folder).values():
        for path in paths:
            cases += [problem.removeprefix(f"{folder}{os.sep}") for problem in count(path)[1]]
    return cases


# --- samples of a shard -----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    name: str  # of the photo's member
    photo: bytes | None  # as it is in the file
    captions: list[str]  # those that can be used; lowercased, like those of other sources
    prompts: list[str]  # the question of each, "" where there are none


def read_samples(path, report, content=False):
    """Yields the `Sample`s of a shard in their order, with the bytes of their photos if `content`.

    A broken one is left out: `report(name, reason)` is called. Raises OSError when the shard cannot be opened,
    ValueError when it breaks off.
    """
    group_by_keys = library().tariterators.group_by_keys
    with open(path, "rb", buffering=READ_BYTES if content else io.DEFAULT_BUFFER_SIZE) as file:
        found = (
            dict(fname=name, data=place, __url__=path)
            for name, *place in tar_members.members(file)
            if not METADATA.match(name)
        )
        for group in group_by_keys(found, lcase=False, handler=lambda error: True):  # of a double name, the first
            try:
                yield _sample(file, group, content)
            except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in ...
                report(f"{path}{os.sep}{group['__key__']}", str(error))


def library():
    """webdataset. Raises ValueError that says how to install it."""
    try:
        import webdataset
    except ImportError:
        raise ValueError("tar shards need the library webdataset: pip install -r requirements-extra.txt") from None
    return webdataset


def _sample(file, group, content):
    """Members of one name {suffix: (offset, size)} -> Sample. Raises ValueError that says what is wrong with them."""
    members = {suffix.rpartition(".")[2].lower(): suffix for suffix in group if not suffix.startswith("__")}
    photo = next((suffix for kind, suffix in members.items() if f".{kind}" in IMAGE_SUFFIXES), None)
    if photo is None:
        raise ValueError("has no photo")
    offset, size = group[photo]
    if size > tar_members.LARGEST:
        raise ValueError(f"its photo has {size:,} bytes")

    def text(kind):
        if group[members[kind]][1] > LARGEST_TEXT:
            raise ValueError(f"its .{kind} has {group[members[kind]][1]:,} bytes")
        return tar_members.read(file, *group[members[kind]]).decode("utf-8-sig", errors="replace")

    captions, prompts = [], ""
    if "json" in members:
        record = json.loads(text("json"))
        if not isinstance(record, dict):
            raise ValueError("its .json is no object with captions")
        captions, prompts = (_first(record, keys) for keys in (CAPTION_KEYS, PROMPT_KEYS))
    if not captions and "txt" in members:
        captions = text("txt").replace("\r\n", "\n").split("\n")
    captions = captions if isinstance(captions, list) else [captions]
    prompts = prompts if isinstance(prompts, list) else [prompts] * len(captions)
    if len(prompts) != len(captions):
        raise ValueError(f"has {len(captions)} captions and {len(prompts)} prompts")
    pairs = [(_cleaned(caption), _cleaned(prompt)) for caption, prompt in zip(captions, prompts, strict=True)]
    usable = [pair for pair in pairs if pair[0] and NOT_UTF8 not in pair[0] and len(pair[0]) <= LONGEST_CAPTION]
    photo_bytes = tar_members.read(file, offset, size) if content and usable else None
    name = f"{group['__key__']}.{photo}"
    return Sample(name, photo_bytes, [caption for caption, _ in usable], [prompt for _, prompt in usable])


def decode(content, least_side=None):
    """The bytes of a photo -> upright RGB image. Raises ValueError that says why it is none."""
    try:
        return load_image(io.BytesIO(content), least_side)
    except ValueError as error:
        reason = error.__cause__  # which names the bytes by their place in memory where it does not know them at all
        known = not isinstance(reason, UnidentifiedImageError)
        raise ValueError(f"not a readable image ({reason if known else 'of no known format'})") from error


def _first(record, keys):
    return next((record[key] for key in keys if record.get(key)), "")


def _cleaned(text):
    if not isinstance(text, str | None):
        raise ValueError(f"the caption {text!r} is not a text")
    text = (text or "").encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # halves of surrogate pairs
    return " ".join(text.split()).lower()


def read_rows(folder, splits):
    """Yields (shard and photo "val-000000.tar/000123.jpg", caption, split, prompt or None) for each caption of these
    splits; what is broken is named in a warning. Raises ValueError when no shard is of these splits."""

    def warn(name, reason):
        print(f"warning: {name}: {reason}; it is left out")

    files = files_of(folder)
    if not files.keys() & set(splits):
        there = ", ".join(f"{len(paths):,} of {split}" for split, paths in files.items())
        raise ValueError(f"{folder}: no shard is of the split {' or '.join(splits)}; there are {there}")
    for split, paths in files.items():
        for path in paths if split in splits else ():
            try:
                for sample in read_samples(path, warn):
                    for caption, prompt in zip(sample.captions, sample.prompts, strict=True):
                        yield f"{path.name}/{sample.name}", caption, split, prompt or None
            except ValueError as error:
                warn(path, error)


# --- training ---------------------------------------------------------------------------------------------------------


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
