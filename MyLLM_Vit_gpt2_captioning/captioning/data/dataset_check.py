"""The check of a dataset before training: counts, caption lengths, and every problem with the rows that have it.

All photos are decoded in full, as training would, so that a truncated one is found here and not in the third hour of
a run; photos are compared by their pixels, so that a test photo is found in the training split under another name.
"""

import hashlib
import io
import os
import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, UnidentifiedImageError

from captioning.common.printable import in_markdown, printable
from captioning.common.progress import progress_bar
from captioning.common.stopping import stop_if_asked
from captioning.common.text import NOT_UTF8
from captioning.data import sources
from captioning.data.conventions import SPLITS, is_photo_file
from captioning.data.shards import reading
from captioning.images import tar_members
from captioning.images.preprocessing import load_image, open_image
from captioning.pages import plots

REPORT_FILE = "report.md"
SHEET_FILE = "contact_sheet.png"
LONG_CAPTION = 100  # words; a longer text is rarely a caption
SMALL_SIDE = 32  # pixels; on a photo with a shorter side nothing can be recognised
ROWS_SHOWN = 10
SHEET_PHOTOS = 24
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@dataclass
class CheckedPhoto:
    path: Path
    fault: str = ""  # why it cannot be decoded; "missing" when there is no such file
    size: tuple[int, int] = (0, 0)  # width, height of the upright image
    format: str = ""
    content: str = ""  # hash of the file
    pixels: str = ""  # hash of the upright RGB image


@dataclass
class Problem:
    kind: str
    is_error: bool
    cases: list[str] = field(default_factory=list)


def check_dataset(data_dir, report_dir, captions_file=None, image_dir=None, unescape=True):
    """Check the dataset that `sources.load` finds, print the report and write it with a contact sheet to `report_dir`.

    Returns whether it is free of errors: photos that are missing or cannot be decoded, photos that are in two splits,
    tar shards that differ from their manifest. All other problems are warnings. Raises FileNotFoundError or ValueError
    when there is no dataset to read.
    """
    df = sources.load(data_dir, captions_file, image_dir, unescape=unescape)
    source = Path(captions_file) if captions_file else sources.find_captions(data_dir, image_dir)
    photos = read_photos(dict.fromkeys(df["image"]))
    problems = find_problems(df, photos, source, image_dir)
    if source == Path(data_dir) and reading.has_shards(source):
        damage, without_captions = reading.find_damage(data_dir)
        kinds = [Problem("damaged shards, and samples in them", True, damage)]
        kinds += [Problem("shards with photos that have no usable caption beside them", False, without_captions)]
        problems = [problem for problem in kinds if problem.cases] + problems
    readable = [photo for photo in photos if not photo.fault]
    lines = [f"# Check of {data_dir}", "", f"Captions: `{source}`", ""]
    lines += _describe_splits(df) + _describe_captions(df) + _describe_photos(readable)
    print("\n".join(lines + _describe_problems(problems, printable)))
    lines += _describe_problems(problems, in_markdown)

    report_dir = Path(report_dir)
    report_dir.mkdir(parents=True, exist_ok=True)
    if readable:
        draw_contact_sheet(df, readable, report_dir / SHEET_FILE)
        lines += ["", f"![photos with one caption each]({SHEET_FILE})"]
    (report_dir / REPORT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nreport: {report_dir / REPORT_FILE}" + (f", {report_dir / SHEET_FILE}" if readable else ""))
    return not any(problem.is_error for problem in problems)


# --- photos -----------------------------------------------------------------------------------------------------------


def read_photos(paths):
    """Decode every photo in full, on all cores -> list of CheckedPhoto in the order of `paths`."""
    photos, bar = [], progress_bar(len(paths), "photos")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # pillow and hashlib let other threads run
        try:
            for photo in pool.map(read_photo, paths):
                photos.append(photo)
                bar.update(1)
                stop_if_asked()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    bar.close()
    return photos


def read_photo(path):
    """One photo -> CheckedPhoto, with `fault` set when it is missing or cannot be decoded."""
    try:
        content = tar_members.read_bytes(path)
        with open_image(io.BytesIO(content)) as opened:
            image = load_image(opened)
            pixels = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16)
            return CheckedPhoto(
                path, "", image.size, opened.format, hashlib.blake2b(content).hexdigest(), pixels.hexdigest()
            )
    except FileNotFoundError:
        return CheckedPhoto(path, "missing")
    except UnidentifiedImageError:
        return CheckedPhoto(path, "empty" if not content else "not an image of a known format")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return CheckedPhoto(path, str(error.__cause__ or error))  # `load_image` puts its advice around the cause


# --- problems ---------------------------------------------------------------------------------------------------------


def find_problems(df, photos, source, image_dir=None):
    """All problems of a dataset -> list of Problem, errors first, without kinds that do not occur."""
    names = [
        f"{source.name}, {df.index.name} {row}: {image.name}" for row, image in zip(df.index, df["image"], strict=True)
    ]
    first_row, splits = {}, defaultdict(list)
    for name, image, split in zip(names, df["image"], df["split"], strict=True):
        first_row.setdefault(image, name)
        if split not in splits[image]:
            splits[image].append(split)

    leaks, repeats = [], []
    by_pixels = defaultdict(list)
    for photo in photos:
        if not photo.fault:
            by_pixels[photo.pixels].append(photo)
    for same in by_pixels.values():
        uses = [f"{first_row[photo.path]} ({split})" for photo in same for split in splits[photo.path]]
        if len(uses) > 1:
            case = " = ".join(uses) + ("" if len({photo.content for photo in same}) == 1 else ", in pixels")
            (leaks if len({split for photo in same for split in splits[photo.path]}) > 1 else repeats).append(case)

    def of_photos(chosen, detail="{}"):
        return [f"{first_row[photo.path]}" + detail.format(photo) for photo in chosen]

    captions = df["caption"]
    words = captions.map(lambda caption: len(WORD.findall(caption)))
    problems = [
        Problem("missing images", True, of_photos([photo for photo in photos if photo.fault == "missing"], "")),
        Problem(
            "images that cannot be decoded",
            True,
            of_photos([photo for photo in photos if photo.fault not in ("", "missing")], " ({0.fault})"),
        ),
        Problem("photos that are in more than one split", True, leaks),
        Problem("photos that are in one split more than once", False, repeats),
        Problem(
            f"images with a side below {SMALL_SIDE} pixels",
            False,
            of_photos([p for p in photos if not p.fault and min(p.size) < SMALL_SIDE], " ({0.size[0]} x {0.size[1]})"),
        ),
        Problem("empty captions", False, [name for name, caption in zip(names, captions, strict=True) if not caption]),
        Problem(
            "captions that are not UTF-8",
            False,
            [name for name, caption in zip(names, captions, strict=True) if NOT_UTF8 in caption],
        ),
        Problem(
            f"captions of more than {LONG_CAPTION} words",
            False,
            [f"{name} ({count} words)" for name, count in zip(names, words, strict=True) if count > LONG_CAPTION],
        ),
        Problem("photos on disk that no row names", False, _unnamed_photos(df["image"], image_dir)),
    ]
    return [problem for problem in problems if problem.cases]


def _unnamed_photos(images, image_dir):
    """Photos in the folders of the named ones, and in `image_dir`, that no row names."""
    named = set(images)
    folders = {image.parent for image in named} | ({Path(image_dir)} if image_dir else set())
    return [
        str(path)
        for folder in sorted(folders)
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if is_photo_file(path) and path not in named
    ]


# --- the report -------------------------------------------------------------------------------------------------------


def _describe_splits(df):
    present = [split for split in SPLITS if (df["split"] == split).any()]
    parts = [df[df["split"] == split] for split in present] + [df]
    rows = [
        ["", *present, "all"],
        ["---", *["---:"] * len(parts)],
        ["images", *(f"{part['image'].nunique():,}" for part in parts)],
        ["captions", *(f"{len(part):,}" for part in parts)],
    ]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _describe_captions(df):
    per_image = df.groupby("image").size()
    found = [words for caption in df["caption"] if (words := WORD.findall(caption))]
    lines = [f"- captions an image: {per_image.min()} to {per_image.max()}, mean {per_image.mean():.2f}"]
    if not found:
        return [*lines, "- no caption has a word"]
    lengths = np.array([len(words) for words in found])
    bars = []
    for low in range(1, 37, 5):
        last = low == 36
        count = int((lengths >= low).sum() if last else ((lengths >= low) & (lengths < low + 5)).sum())
        if count:
            words = f"{low} or more" if last else f"{low} to {low + 4}"
            bars.append(f"{words:>10} {count:>10,}  {'#' * max(1, round(50 * count / len(lengths)))}")
    return [
        *lines,
        f"- words a caption: {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}, "
        f"95% have at most {np.percentile(lengths, 95):.0f}",
        f"- vocabulary: {len({word for words in found for word in words}):,} different words",
        "",
        "```",
        f"{'words':>10} {'captions':>10}",
        *bars,
        "```",
        "",
    ]


def _describe_photos(readable):
    if not readable:
        return ["- no photo can be decoded", ""]
    sizes = np.array([photo.size for photo in readable])  # (photos, 2)
    smallest, median, largest = (" x ".join(f"{v:.0f}" for v in f(sizes, axis=0)) for f in (np.min, np.median, np.max))
    formats = Counter(photo.format for photo in readable).most_common()
    return [
        f"- width x height of the photos: from {smallest} to {largest}, median {median}",
        f"- formats: {', '.join(f'{name} {count:,}' for name, count in formats)}",
        "",
    ]


def _describe_problems(problems, show):
    """`show`: for the names in them, `printable` or `in_markdown`."""
    lines = ["## Problems", ""]
    for problem in problems:
        lines += [f"**{'error' if problem.is_error else 'warning'}: {problem.kind}: {len(problem.cases):,}**", ""]
        lines += [f"- {show(case)}" for case in problem.cases[:ROWS_SHOWN]]
        if len(problem.cases) > ROWS_SHOWN:
            lines.append(f"- and {len(problem.cases) - ROWS_SHOWN:,} more")
        lines.append("")
    return lines[:-1] if problems else [*lines, "none"]


def draw_contact_sheet(df, readable, path, seed=0):
    """Random photos, always the same for `seed`, with one caption each -> PNG."""
    rng = random.Random(seed)
    chosen = rng.sample(readable, min(SHEET_PHOTOS, len(readable)))
    captions_of = df.groupby("image")["caption"].agg(list)
    captions = [rng.choice(captions_of[photo.path]) for photo in chosen]
    images = []
    for photo in chosen:
        image = load_image(photo.path)
        image.thumbnail((320, 320))
        images.append(image)
    plt.close(plots.plot_captions(images, captions, [""] * len(images), path, columns=6))
