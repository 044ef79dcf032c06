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
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils.data
from filelock import FileLock
from PIL import UnidentifiedImageError

from captioning.common.files import write_atomically
from captioning.common.progress import progress_bar
from captioning.data.conventions import COLUMN_NAMES, IMAGE_SUFFIXES, LONGEST_CAPTION, NOT_UTF8, SPLIT_NAMES, SPLITS
from captioning.images import tar_members
from captioning.images.preprocessing import load_image

MANIFEST_FILE, COUNTS_FILE, PROGRESS_FILE = "manifest.json", "counts.json", "progress.jsonl"
NAME = re.compile(r"(?:(?P<words>.*)[-_.])?\d+\.tar")  # train-000012.tar, cc3m-val-0001.tar, 00012.tar
METADATA = re.compile(r"(?:.*/)?__[^/]*__(?:[./]|$)")  # members of such names belong to no sample
LARGEST_TEXT = 2**20  # bytes of a .json or .txt member
CAPTION_KEYS = ("captions", "caption", *COLUMN_NAMES["caption"])
PROMPT_KEYS = ("prompts", "prompt", *COLUMN_NAMES["prompt"])
READ_BYTES = 2**20  # at once, when photos are read one after the other
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
