"""Tar shards in the WebDataset layout, for datasets that are read as a stream because random access would be too slow:
their files, how many photos are in them, and the samples of one.

    train-000000.tar, train-000001.tar, ..., val-000000.tar, ...
        000123.jpg       a photo
        000123.json      {"captions": ["...", ...]}, or {"caption": "..."} as img2dataset writes it
        000123.txt       in place of the json: a caption a line
    manifest.json        written by `prepare_data.py --shards`: for each shard its counts, size in bytes and hash
    counts.json          the same for shards from elsewhere, counted once

The members of a sample lie side by side, and their names are the same up to the first dot. Where several photos are,
`photo.v1.jpg` and `photo.v2.jpg`, each belongs to the captions whose name is the same up to the last dot.

Layout and library: Aizman et al. 2019, High Performance I/O For Large Scale Deep Learning; github.com/webdataset.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import UnidentifiedImageError

from captioning.common.files import is_litter, read_json, write_atomically
from captioning.common.form import check
from captioning.common.locks import LOCK_FILE, after_other_writers
from captioning.common.printable import printable
from captioning.common.text import clean_text, without_markup
from captioning.data import resumable_work
from captioning.data.conventions import COLUMN_NAMES, IMAGE_SUFFIXES, SPLIT_NAMES, SPLITS, is_usable
from captioning.images import tar_members
from captioning.images.preprocessing import load_image

MANIFEST_FILE, COUNTS_FILE, PROGRESS_FILE = "manifest.json", "counts.json", "progress.jsonl"
SHARD_NAME = re.compile(r"(?:(?P<words>.*)[-_.])?\d+\.tar")  # train-000012.tar, cc3m-val-0001.tar, 00012.tar
METADATA_NAME = re.compile(r"(?:.*/)?__[^/]*__(?:[./]|$)")  # members of such names belong to no sample
CAPTION_KEYS = ("captions", "caption", *COLUMN_NAMES["caption"])
PROMPT_KEYS = ("prompts", "prompt", *COLUMN_NAMES["prompt"])
LARGEST_TEXT = 2**20  # bytes of a .json or .txt member
ENTRY = {"samples": int, "captions": {str: int}, "bytes": int}  # of a shard, in manifest.json and counts.json
MOST_PHOTOS = 10**9  # in a shard
READ_BYTES = 2**20  # at once, when photos are read one after the other

# --- the shards of a folder -------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A file, and what its entry in manifest.json or counts.json says of it."""

    path: Path
    samples: int  # photos with at least one usable caption
    captions: dict[int, int]  # {captions of a photo: how many photos have so many}
    bytes: int

    def groups(self, K):
        """How many groups of K captions of one photo; see `batching.CaptionBatchSampler`."""
        return sum(photos * max(1, count // K) for count, photos in self.captions.items())


def import_webdataset():
    """The library. Raises ValueError that says how to install it."""
    try:
        import webdataset
    except ImportError:
        raise ValueError("tar shards need the library webdataset: pip install -r requirements-extra.txt") from None
    return webdataset


def has_shards(folder):
    """Whether a folder holds shards."""
    return any(True for _ in _shard_names(folder))


def _shard_names(folder):
    """Yields (path, match of its name) of the shards in a folder, sorted."""
    for path in filter(Path.is_file, sorted(Path(folder).glob("*.tar"))):  # not a pipe, which would never end
        if not is_litter(path.name) and (match := SHARD_NAME.fullmatch(path.name)):
            yield path, match


def shards_by_split(folder):
    """{split: [path, ...]}, sorted, with the splits that the names of the shards tell. A name without a split means
    training; without a shard for validation the last training shard is used for it.

    Raises ValueError when the shards are not all written, there is only one, or webdataset is not installed.
    """
    import_webdataset()
    folder, paths_of = Path(folder), {}
    if (folder / PROGRESS_FILE).exists():
        raise ValueError(
            f"{folder}: its shards are not all written yet; the command that writes them (prepare_data.py --shards "
            "DATASET --to FOLDER) goes on where it stopped"
        )
    for path, match in _shard_names(folder):
        words = [SPLIT_NAMES.get(word, word) for word in re.split(r"[-_.]", match["words"] or "")]
        split = next((word for word in reversed(words) if word in SPLITS), "train")
        paths_of.setdefault(split, []).append(path)
    if "val" not in paths_of and "train" in paths_of:
        if len(paths_of["train"]) < 2:
            raise ValueError(f"{folder}: nothing is left for validation; name one shard or more val-000000.tar")
        paths_of["val"] = [paths_of["train"].pop()]
    return paths_of


def training_shards(folder):
    """[Shard, ...] of the training split: counts from the manifest; shards that are not in it are counted once.

    Raises FileNotFoundError when shards of the manifest are not there, ValueError when no photo has a caption.
    """
    folder = Path(folder)
    entries, paths = read_manifest(folder), shards_by_split(folder).get("train", [])
    missing = [name for name in entries if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]}: not there, though {MANIFEST_FILE} names it ({len(missing):,} such shards): bring "
            f"them back, or remove {MANIFEST_FILE}"
        )
    uncounted = [path for path in paths if path.name not in entries]
    if uncounted:
        entries = entries | _count_shards(folder, uncounted)
    shards = [_as_shard(path, entries[path.name]) for path in paths]
    if not sum(shard.samples for shard in shards):
        raise ValueError(f"{folder}: no photo of its training shards has a usable caption beside it (.json or .txt)")
    return shards


def read_manifest(folder):
    """{shard name: its entry} as the writer left it; empty when there is no manifest. Raises ValueError for a damaged
    one."""
    return _read_entries(Path(folder) / MANIFEST_FILE)


def _read_entries(path):
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        check(content, {"shards": {str: dict}})
        for name, entry in content["shards"].items():
            check_entry(name, entry)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: damaged ({reason}); remove it, and the shards are counted anew") from error
    return content["shards"]


def check_entry(name, entry, form=ENTRY):
    """Raise ValueError unless a shard's name and its entry are such as `count_shard` or `writing.write_shard` makes
    them: the name of a file in the folder, counts that are possible."""
    if not SHARD_NAME.fullmatch(name) or Path(name).name != name:
        raise ValueError(f"{printable(name)[:60]!r} is not the name of a shard")
    check(entry, form, name)
    counts = {**entry["captions"], "1": entry["samples"]}
    if entry["bytes"] < 0 or not all(
        re.fullmatch("[1-9][0-9]{0,8}", captions) and 0 <= photos <= MOST_PHOTOS for captions, photos in counts.items()
    ):
        raise ValueError(f"{name}: its counts are impossible")


def _as_shard(path, entry):
    captions = {int(count): photos for count, photos in entry["captions"].items()}
    return Shard(path, entry["samples"], captions, entry["bytes"])


def _count_shards(folder, paths):
    """Count the shards whose counts are not in `counts.json`, or that changed since -> {name: entry} of all."""
    with ExitStack() as stack:
        with suppress(OSError):  # the folder is read-only
            stack.enter_context(after_other_writers(folder / LOCK_FILE))  # one rank counts, the others wait and read
        try:
            counted = _read_entries(folder / COUNTS_FILE)
            check(counted, {str: {"without_caption": int}})
        except ValueError:
            counted = {}
        new = [path for path in paths if counted.get(path.name, {}).get("identity") != tar_members.file_identity(path)]
        if new:
            num_workers = min(os.cpu_count(), len(new) // 8)
            for path, (entry, problems) in resumable_work.run_jobs(count_shard, new, num_workers, "counting shards"):
                counted[path.name] = entry | dict(problems=_shortened(problems))
            content = json.dumps({"shards": counted}, indent=1) + "\n"
            try:
                write_atomically(folder / COUNTS_FILE, lambda path: path.write_text(content))
            except OSError as error:
                print(f"warning: {error}. The shards are counted again at the next start")
    entries = {path.name: counted[path.name] for path in paths}
    for entry in entries.values():  # also those that were found at an earlier start
        for problem in entry.get("problems", ()):
            print(f"\nwarning: {problem}")
    without_caption = sum(entry["without_caption"] for entry in entries.values())
    if without_caption:
        print(f"warning: {folder}: left out {without_caption:,} photos without a usable caption")
    return entries


def _shortened(problems):
    """What is wrong in a shard, a text each -> the first of them, which says how many more there are, in a list."""
    more = f" (and {len(problems) - 1:,} more: prepare_data.py --check FOLDER lists them)" if len(problems) > 1 else ""
    return [problem + more for problem in problems[:1]]


def count_shard(path):
    """A shard -> (its entry in counts.json, [what is wrong in it, ...]); photos themselves are not read."""
    captions, problems, without_caption = Counter(), [], 0
    try:
        for sample in read_samples(path, lambda name, reason: problems.append(f"{name}: {reason}")):
            if sample.captions:
                captions[len(sample.captions)] += 1
            else:
                without_caption += 1
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {printable(error)}")
    entry = dict(samples=sum(captions.values()), captions={str(k): n for k, n in sorted(captions.items())})
    identity = tar_members.file_identity(path)
    return entry | dict(bytes=identity[0], without_caption=without_caption, identity=identity), problems


def find_damage(folder):
    """The faults of shards -> (["train-000003.tar: ...", ...]: not there, another size or hash than in the manifest, a
    tar that breaks off, samples that cannot be read or told apart; and likewise how many photos have no captions)."""
    folder, entries, cases, without_captions = Path(folder), read_manifest(folder), [], []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            cases.append(f"{name}: not there")
            continue
        with open(path, "rb") as file:
            if path.stat().st_size != entry["bytes"]:
                cases.append(f"{name}: {path.stat().st_size:,} bytes instead of {entry['bytes']:,}")
            elif hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
                cases.append(f"{name}: another hash than in {MANIFEST_FILE}")
    for paths in shards_by_split(folder).values():
        for path in paths:
            entry, problems = count_shard(path)
            cases += [problem.removeprefix(f"{folder}{os.sep}") for problem in problems]
            if entry["without_caption"]:
                without_captions.append(f"{path.name} ({entry['without_caption']:,} photos)")
    return cases, without_captions


# --- the samples of a shard -------------------------------------------------------------------------------------------


class ShardSample(NamedTuple):
    """A photo with its captions."""

    name: str  # of the photo's member
    photo: bytes | None  # as it is in the file
    captions: list[str]  # the usable ones; lowercased, like those of other sources
    prompts: list[str]  # the question of each, "" where there are none


class _Member(NamedTuple):
    name: str
    place: tuple  # offset and size of its bytes in the tar

    @property
    def key(self):
        """What the members of a sample have in common: the name up to the first dot, as the WebDataset layout says."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def stem(self):
        return self.name.rpartition(".")[0]

    @property
    def kind(self):
        return self.name.rpartition(".")[2].lower()

    @property
    def is_photo(self):
        return f".{self.kind}" in IMAGE_SUFFIXES

    @property
    def is_text(self):
        return self.kind in ("json", "txt")


def read_samples(path, report, with_photos=False, unescape=True, case="lower"):
    """Yields the `ShardSample`s of a shard in their order, the bytes of their photos only `with_photos`; with
    `unescape` the captions as a web page shows them, in the `case` that is one of `text.CASES`.

    A sample that is broken, or cannot be told from another one, is left out, and `report(name, reason)` is called.
    Raises OSError when the shard cannot be opened, ValueError when it breaks off.
    """
    photos_alone, texts_alone = {}, {}  # {stem: key of the sample}; they may be the parts of a sample that is torn
    with open(path, "rb", buffering=READ_BYTES if with_photos else io.DEFAULT_BUFFER_SIZE) as file:
        for key, group in groupby(_named_once(path, file, report), key=lambda member: member.key):
            group = list(group)  # reads on in the tar, whose end may be missing
            try:
                samples = _samples_of(group)
            except ValueError as error:
                report(f"{path}{os.sep}{printable(key)}", error)
                continue
            for members in samples:
                photo = next((member for member in members if member.is_photo), None)
                if photo is None:
                    texts_alone[members[0].stem] = key
                    continue
                if not any(member.is_text for member in members):
                    photos_alone[photo.stem] = key
                try:
                    yield _read_sample(file, photo, members, with_photos, unescape, case)
                except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
                    report(f"{path}{os.sep}{printable(key)}", printable(error))
    if torn := [stem for stem in texts_alone if stem in photos_alone]:
        report(
            path,
            f"{len(torn):,} samples are torn apart: their photos and captions do not lie side by side; the first: "
            f"{printable(torn[0])}. Write the tar again with its members sorted by name (tar --sort=name)",
        )
    for stem, key in texts_alone.items():
        if stem not in photos_alone:
            report(f"{path}{os.sep}{printable(key)}", "has no photo")


def _named_once(path, file, report):
    """Yields the members of an opened tar that may belong to a sample. Of two with the same name the first counts,
    because a path into the tar can mean only one; the others are reported."""
    names, repeated = set(), []
    for name, *place in tar_members.members(file):
        last = name.rpartition("/")[2]
        if METADATA_NAME.match(name) or is_litter(name) or "." not in last.removeprefix("."):
            continue
        member = _Member(name, tuple(place))
        if last.startswith("."):
            if member.is_photo or member.is_text:
                report(f"{path}{os.sep}{printable(name)}", "its name begins with a dot, which says that it is hidden")
        elif name in names:
            repeated.append(name)
        else:
            names.add(name)
            yield member
    if repeated:
        report(
            path,
            f"{len(repeated):,} members have the name of another one, and only the first of a name is read; the first: "
            f"{printable(repeated[0])}. Write the tar again with a name of its own for each photo",
        )


def _samples_of(group):
    """The members side by side that have one key -> the members of each sample among them, in a list.

    They are one sample, unless there are several photos: then names tell samples apart by their last dot. A photo
    without captions beside the sample with the key itself belongs to it, as the mask 1.mask.png beside 1.jpg. Raises
    ValueError for several photos when nothing says whose the captions are.
    """
    by_stem = {}
    for member in group:
        by_stem.setdefault(member.stem, []).append(member)
    with_photo = [stem for stem, members in by_stem.items() if any(member.is_photo for member in members)]
    if len(with_photo) < 2:
        return [group]
    whole = [stem for stem in with_photo if any(member.is_text for member in by_stem[stem])]
    if not whole and any(member.is_text for member in group):
        raise ValueError(
            f"has {len(with_photo):,} photos, and nothing says whose its captions are: name them like their photo, "
            f"{printable(with_photo[0])}.json"
        )
    return [by_stem[stem] for stem in (whole if group[0].key in whole else by_stem)]


def _read_sample(file, photo, members, with_photo, unescape, case):
    """The `_Member`s of a sample, one of them its photo -> ShardSample. Raises ValueError that says what is wrong."""
    offset, size = photo.place
    if size > tar_members.LARGEST:
        raise ValueError(f"its photo has {size:,} bytes")
    place_of = {}  # {kind: where its bytes are}; of two of a kind that with the photo's name, else the first
    for member in sorted(members, key=lambda member: member.stem != photo.stem):
        place_of.setdefault(member.kind, member.place)

    def read_text(kind):
        if place_of[kind][1] > LARGEST_TEXT:
            raise ValueError(f"its .{kind} has {place_of[kind][1]:,} bytes")
        return tar_members.read(file, *place_of[kind]).decode("utf-8-sig", errors="replace")

    captions, prompts = [], ""
    if "json" in place_of:
        record = json.loads(read_text("json"))
        if not isinstance(record, dict):
            raise ValueError("its .json is no object with captions")
        captions, prompts = (_first_value(record, keys) for keys in (CAPTION_KEYS, PROMPT_KEYS))
    if not captions and "txt" in place_of:
        captions = read_text("txt").replace("\r\n", "\n").split("\n")
    captions = captions if isinstance(captions, list) else [captions]
    prompts = prompts if isinstance(prompts, list) else [prompts] * len(captions)
    if len(prompts) != len(captions):
        raise ValueError(f"has {len(captions)} captions and {len(prompts)} prompts")
    pairs = [
        (_cleaned(caption, unescape, case), _cleaned(prompt, unescape, case))
        for caption, prompt in zip(captions, prompts, strict=True)
    ]
    usable = [pair for pair in pairs if is_usable(pair[0])]
    photo_bytes = tar_members.read(file, offset, size) if with_photo and usable else None
    return ShardSample(photo.name, photo_bytes, [caption for caption, _ in usable], [prompt for _, prompt in usable])


def _first_value(record, keys):
    return next((record[key] for key in keys if record.get(key)), "")


def _cleaned(text, unescape, case):
    if not isinstance(text, str | None):
        raise ValueError(f"the caption {repr(text)[:60]} is not a text")
    return clean_text(without_markup(text or "") if unescape else text or "", case)


def decode_photo(photo, **opening):
    """The bytes of a photo -> upright RGB image; `opening` as in `load_image`. Raises ValueError with the reason
    when they are not a readable image."""
    try:
        return load_image(io.BytesIO(photo), **opening)
    except ValueError as error:
        reason = error.__cause__
        if isinstance(reason, UnidentifiedImageError):  # it names the bytes by their place in memory
            reason = "of no known format"
        raise ValueError(f"not a readable image ({printable(reason)})") from error


def _append(problems, name, reason):
    problems.append((name, reason))


def read_rows(folder, splits, unescape=True, case="lower"):
    """Yields (shard and photo "val-000000.tar/000123.jpg", caption, split, prompt or None) for each caption of the
    given splits, and prints a warning for each shard with something broken in it. `unescape` and `case` as in
    `read_samples`. Raises ValueError when no shard is of these splits, or none has a photo with captions."""
    paths_of = shards_by_split(folder)
    if not paths_of.keys() & set(splits):
        there = ", ".join(f"{len(paths):,} of {split}" for split, paths in paths_of.items())
        raise ValueError(f"{folder}: no shard is of the split {' or '.join(splits)}; there are {there}")
    found = False
    for split, paths in paths_of.items():
        for path in paths if split in splits else ():
            problems = []
            try:
                report = partial(_append, problems)
                for sample in read_samples(path, report, unescape=unescape, case=case):
                    for caption, prompt in zip(sample.captions, sample.prompts, strict=True):
                        found = True
                        yield f"{path.name}/{sample.name}", caption, split, prompt or None
            except ValueError as error:
                problems.append((path, error))
            for problem in _shortened([f"{name}: {reason}; left out" for name, reason in problems]):
                print(f"warning: {problem}")
    if not found:
        raise ValueError(f"{folder}: no photo of its {' or '.join(splits)} shards has a usable caption beside it "
                         "(.json or .txt)")  # fmt: skip
