"""Photo store: a dataset with its photos reduced once, so that no epoch decodes pixels that training throws away.

A store is a dataset folder like any other:
    images/          the photos, upright RGB whose shorter side has at most 256 pixels, as JPEG or uncompressed BMP
    captions.jsonl   one line per caption: image, caption, split and, where there are questions, prompt
    manifest.json    how the photos were made
    index.jsonl      a line a finished photo: name, size and time of the last change of the original
A photo gets its name only when it is whole, then its line in the index, and the captions are written last: whatever
ends the work, an unfinished store is not a dataset yet, and the next run goes on. A photo that changed is made anew.
"""

import io
import json
import os
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image

from captioning.common.files import read_json, write_atomically
from captioning.common.locks import LOCK_FILE, after_other_writers
from captioning.common.text import with_markup
from captioning.data import resumable_work, sources
from captioning.data.unreadable_photos import print_left_out
from captioning.images import tar_members
from captioning.images.preprocessing import load_image, open_image

STORE_FORMAT = 1  # of these files
SIDE = 256  # pixels of the shorter side: what a crop for 224 pixels needs
# Of the JPEGs, with colours at half resolution (4:2:0). On 80 COCO photos the model's 224 x 224 pixels then differ from
# those of the original by 1.8 of 255 levels (39 dB), about as bicubic from bilinear resampling (1.3, 40 dB). Colours in
# full would give 1.3 (42 dB) for 20% more time to decode, quality 95 1.4 (41 dB) for 25%.
QUALITY = 90
# In the place of the quality: BMP, 6 times as large and ready in two thirds of the time; 0.6 levels (47 dB).
UNCOMPRESSED = "uncompressed"
MANIFEST_FILE, INDEX_FILE, CAPTIONS_FILE, IMAGE_FOLDER = "manifest.json", "index.jsonl", "captions.jsonl", "images"
PREFETCH = 16  # photos that each worker is given in advance


def write_store(
    data_dir, store, side=SIDE, captions_file=None, image_dir=None, num_workers=0, quality=QUALITY, unescape=True
):
    """Write the dataset that `sources.load` finds to the folder `store`, with reduced photos.

    `sources.load(store)` gives the same rows. Photos that cannot be read are counted, named and left out; their rows
    stay, and training leaves them out as it does the rows of a missing photo. Returns the number of these photos. With
    `num_workers` processes; 0 works in this one. `quality`: of the JPEGs, or UNCOMPRESSED; `unescape` as in `load`.
    Raises what `sources.load` raises, ValueError when the store has another side or quality or no photo can be read,
    and FileExistsError when its folder holds something else.
    """
    store = Path(store)
    if side < 1:
        raise ValueError(f"side {side}: a photo needs at least one pixel")
    if store.exists() and any(store.iterdir()) and not (store / MANIFEST_FILE).is_file():
        raise FileExistsError(f"{store} holds something other than a photo store: give another folder with --to")
    df = sources.load(data_dir, captions_file, image_dir, unescape=unescape, case="keep")
    for column in {"caption", "prompt"} & set(df.columns) if unescape else ():
        df[column] = df[column].map(with_markup)  # the store is read as any dataset is
    names = store_names(df["image"].unique(), quality)
    (store / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    with after_other_writers(store / LOCK_FILE):  # a second run waits, and then has nothing to do
        _write_or_compare_manifest(store, dict(format=STORE_FORMAT, side=side, quality=quality))
        faults, made = _make_missing(store, names, side, quality, num_workers)
        if len(faults) == len(names):
            raise ValueError(f"{data_dir}: none of its {len(names):,} photos can be read; the first: {faults[0]}")
        rows = df.assign(image=[names[image] for image in df["image"]]).to_dict("records")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(store / CAPTIONS_FILE, lambda path: path.write_text(lines, encoding="utf-8"))
    print(f"{store}: {len(names) - len(faults):,} photos, {made:,} of them made now; {len(df):,} captions")
    print_left_out(faults)
    return len(faults)


def store_names(images, quality=QUALITY):
    """Paths of photos -> {path: name in the store's image folder}: relative to the folder that holds them all, with
    ".jpg" (or ".bmp") added where the name has another ending, so that 1.png and 1.jpg stay two photos."""
    endings = (".bmp",) if quality == UNCOMPRESSED else (".jpg", ".jpeg")
    paths = {image: Path(os.path.abspath(image)) for image in images}
    root = os.path.commonpath([path.parent for path in paths.values()])
    names = {}
    for image, path in paths.items():
        name = path.relative_to(root).as_posix()
        names[image] = name if path.suffix.lower() in endings else name + endings[0]
    owners = {}
    for image, name in names.items():
        if owners.setdefault(name, image) is not image:
            raise ValueError(f"{owners[name]} and {image} would both be {name} in the store: rename one of them")
    return names


def shrink(path, side, quality=QUALITY):
    """A photo -> bytes of an upright RGB JPEG (or BMP, where `quality` is UNCOMPRESSED) whose shorter side has at most
    `side` pixels; never enlarged.

    A JPEG file that is one already is not compressed a second time. Raises what `load_image` raises.
    """
    image = load_image(path, least_side=2 * side)
    with open_image(tar_members.opened(path)) as opened:
        fits = min(opened.size) <= side and opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
        # A progressive JPEG takes twice the time to decode.
        baseline = opened.format == "JPEG" and opened.mode == "RGB" and not opened.info.get("progressive")
        if fits and baseline and quality != UNCOMPRESSED:
            return tar_members.read_bytes(path)
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if quality == UNCOMPRESSED:
        image.save(buffer, "BMP")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _write_or_compare_manifest(store, manifest):
    """Write the manifest of a new store. Raises ValueError when an existing store was made in another way."""
    path = store / MANIFEST_FILE
    if not path.is_file():
        write_atomically(path, lambda draft: draft.write_text(json.dumps(manifest, indent=2) + "\n"))
        return
    existing = read_json(path)
    differing = [
        f"{key} {repr(existing.get(key))[:60]} instead of {value}"
        for key, value in manifest.items()
        if existing.get(key) != value
    ]
    if differing:
        raise ValueError(f"{path}: the photos there have {', '.join(differing)}: give another folder with --to")


def _make_missing(store, names, side, quality, num_workers):
    """Make the photos that are missing or changed -> ([why a photo cannot be read, ...], how many were made)."""
    for draft in (store / IMAGE_FOLDER).rglob(".*.part"):
        draft.unlink()  # of a run that was killed
    identities = {image: _identity(image) for image in names}
    entries = resumable_work.read_index(store / INDEX_FILE)
    entries = [entry for entry in entries if isinstance(entry, list) and entry and isinstance(entry[0], str)]
    finished = {name: identity for name, *identity in entries}
    jobs = [
        (image, store / IMAGE_FOLDER / name)
        for image, name in names.items()
        if finished.get(name) != identities[image] or not (store / IMAGE_FOLDER / name).is_file()
    ]
    make, faults = partial(_make_photo, side=side, quality=quality), []
    with resumable_work.open_index(store / INDEX_FILE, [[name, *same] for name, same in finished.items()]) as index:
        for (image, _), fault in resumable_work.run_jobs(make, jobs, num_workers, "photos", prefetch=PREFETCH):
            if fault:
                faults.append(fault)
            else:
                resumable_work.add_entries(index, [names[image], *identities[image]])
    return faults, len(jobs) - len(faults)


def _identity(image):
    """`file_identity` of the original; empty when it is not there."""
    try:
        return tar_members.file_identity(image)
    except OSError:
        return []


def _make_photo(job, side, quality):
    """(path, path in the store): make the photo -> "", or why the original cannot be read."""
    path, target = job
    try:
        content = shrink(path, side, quality)
    except (OSError, ValueError) as error:
        target.unlink(missing_ok=True)  # made when the original could still be read
        return str(error)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda draft: draft.write_bytes(content))
    return ""
