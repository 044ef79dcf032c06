"""Readers of folders that hold captions themselves: COCO's annotations, a dataset saved by `datasets`, photos with a
.txt beside each, tar shards. They return the same frames as annotation_files.py."""

import os
from pathlib import Path

from captioning.common.files import is_litter
from captioning.data.annotation_files import (
    decode,
    our_column_names,
    read_coco_ids,
    read_flickr_tokens,
    read_json,
    read_json_lines,
    to_frame,
    without_empty_columns,
)
from captioning.data.conventions import (
    DATASETS_FILES,
    FLICKR_TOKENS,
    KNOWN_FILES,
    RECORD_COLUMNS,
    SPLIT_NAMES,
    SPLITS,
    is_photo_file,
    split_in_name,
)
from captioning.data.shards import reading
from captioning.data.tables import read_table

COCO_FILES = "captions_*.json"
EXTRACTED_IMAGES = "extracted_images"  # folder for photos that lie inside a saved dataset
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token")
LARGEST_UNKNOWN = 2**30  # bytes of a file with a name of its own that is tried; a larger one has to be given
NAMES_TRIED = 100  # of the photos in it, one of which has to be there


def read_file(path, say=print, is_photo=lambda name: False):
    """A file in any of the formats, by its name. `say` and `is_photo` as in `read_table`."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        return read_json(path, say)
    if suffix in (".jsonl", ".ndjson"):
        return read_json_lines(path, say)
    if path.name in FLICKR_TOKENS or suffix == ".token":
        return read_flickr_tokens(path, say)
    if suffix in (".csv", ".tsv", ".txt"):
        return read_table(path, say, is_photo)
    raise ValueError(f"{path}: unknown format; expected .csv, .tsv, .json, .jsonl, Flickr's .token or a folder")


def read_image_ids(source):
    """The ids of the images in COCO's annotation files, one or those of a folder -> {name of an image: its id}; empty
    for other formats."""
    source = Path(source)
    files = sorted(source.glob(COCO_FILES)) if source.is_dir() else [source] if source.suffix == ".json" else []
    return {name: number for path in files for name, number in read_coco_ids(path).items()}


def read_folder(folder, shard_splits, say=print, is_photo=lambda name: False, unescape=True, case="lower"):
    """Read the captions in a folder; of tar shards those of `shard_splits`, with `unescape` and `case` as in
    `read_samples`. `say` and `is_photo` as in `read_table`.

    Raises ValueError when the folder holds no captions, or a file in it cannot be read.
    """
    import pandas as pd

    if any(folder.glob(COCO_FILES)):
        return pd.concat([read_json(path, say) for path in sorted(folder.glob(COCO_FILES))])
    if is_saved_dataset(folder):
        return _read_saved_dataset(folder)
    if has_text_beside_photos(folder):
        return _read_side_by_side(folder, say)
    if reading.has_shards(folder):
        return _read_shards(folder, shard_splits, unescape, case)
    if files := files_of_splits(folder, is_photo):
        return pd.concat([_read_file_of_split(folder, *item, say, is_photo) for item in files.items()])
    if has_text_beside_photos(folder, in_subfolders=True):
        return _read_side_by_side(folder, say)
    raise ValueError(f"{folder}: no photo with a .txt file of the same name is in this folder")


# --- files with other names than those that are looked for ------------------------------------------------------------


def try_files(folder, is_photo):
    """{path: why it is no annotation file, or None for one that is} for the files in a folder that could be some. The
    content decides: it is captions, and one of the photos named first is there."""
    reasons = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix.lower() not in FILE_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stat().st_size > LARGEST_UNKNOWN:
            reasons[path] = "larger than 1 GiB, so it is not tried"
            continue
        try:
            names = read_file(path, lambda line: None, is_photo)["image"].dropna().astype(str).unique()
            there = any(is_photo(name.strip()) for name in names[:NAMES_TRIED])
            reasons[path] = None if there else "captions, but no photo that it names is here" if len(names) else "empty"
        except ValueError as error:
            reasons[path] = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}, ")
    return reasons


def files_of_splits(folder, is_photo):
    """{split: its annotation file} where every split has one: in a folder of its own with its photos, as an imagefolder
    of Hugging Face has train/metadata.csv, or with the split in its name, as LAVIS has coco_karpathy_train.json. Empty
    where it is not so."""
    files = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = next((inner / name for name in KNOWN_FILES if (inner / name).is_file()), None)
        if found and (split := SPLIT_NAMES.get(inner.name.lower(), inner.name.lower())) in SPLITS:
            files.setdefault(split, found)
    if not files:
        readable = [path for path, reason in try_files(folder, is_photo).items() if reason is None]
        files = {split_in_name(path.stem): path for path in readable}
        if len(files) < max(2, len(readable)) or None in files:
            return {}
    return {split: files[split] for split in SPLITS if split in files}


def _read_file_of_split(folder, split, path, say, is_photo):
    """The captions of one split; where its file lies beside its photos, their names begin with their folder's."""
    inner = "" if path.parent == folder else f"{path.parent.name}/"
    df = read_file(path, say, lambda name: is_photo(inner + name))
    df["image"] = [inner + name if isinstance(name, str) else name for name in df["image"]]
    return df.assign(split=split).rename_axis("row")


# --- other folders ----------------------------------------------------------------------------------------------------


def is_saved_dataset(folder):
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in DATASETS_FILES)


def is_record_of_sidecars(path):
    """Whether a table is the captions.csv of caption_image.py and at least half of its photos have their captions in
    .txt files, too: people correct those, and not the table."""
    with open(path, encoding="utf-8", errors="replace") as file:
        is_record = file.readline().rstrip("\n").endswith(",".join(("", *RECORD_COLUMNS)))
        return is_record and 2 * sum(1 for _ in _photos_with_text(path.parent, True)) >= sum(1 for _ in file) > 0


def has_text_beside_photos(folder, in_subfolders=False):
    """Whether a photo in the folder, or in those below it, has a .txt file of the same name."""
    return any(_photos_with_text(folder, in_subfolders))


def _photos_with_text(folder, in_subfolders):
    """Yields the photos in a folder that have a .txt file of the same name, sorted; those of hidden folders are other
    programs' thumbnails."""
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if in_subfolders and not name.startswith(".") and not is_litter(name))
        names = set(files)
        photos = (path for name in sorted(files) if is_photo_file(path := Path(place, name)))
        yield from (photo for photo in photos if photo.with_suffix(".txt").name in names)


def _read_side_by_side(folder, say):
    """1.jpg beside 1.txt, a caption a line; also in the folders below it."""
    rows, windows = [], []
    for photo in _photos_with_text(folder, in_subfolders=True):
        path = photo.with_suffix(".txt")
        text, is_windows = decode(path.read_bytes())
        windows += [path.name] * is_windows
        lines, name = text.rstrip("\n").split("\n"), photo.relative_to(folder).as_posix()
        rows += [(number, name, line) for number, line in enumerate(lines, len(rows) + 1)]
    if windows:
        say(f"{folder}: {len(windows):,} files are not UTF-8; read as Windows-1252; the first: {windows[0]}")
    return to_frame(rows, "caption")


def _read_shards(folder, splits, unescape, case):
    rows = [(number, *row) for number, row in enumerate(reading.read_rows(folder, splits, unescape, case), 1)]
    df = to_frame(rows, "caption", ("image", "caption", "split", "prompt"))
    return df.drop(columns="prompt") if df["prompt"].isna().all() else df


def _read_saved_dataset(folder):
    """A folder written by `datasets.save_to_disk`, with the columns image and caption (or their other names).

    Photos that lie inside the dataset's own files are written to `folder`/extracted_images, as they are, once.
    Raises ValueError when the `datasets` library is not installed.
    """
    try:
        import datasets  # heavy, and only needed for this format
    except ImportError as error:
        raise ValueError(f"{folder}: reading it needs the datasets library: pip install datasets") from error
    stored = datasets.load_from_disk(str(folder))
    parts = stored if isinstance(stored, datasets.DatasetDict) else {None: stored}
    rows = []
    for split, part in parts.items():
        column = {ours: name for name, ours in our_column_names(part.column_names, folder).items()}
        if isinstance(part.features[column["image"]], datasets.Image):
            part = part.cast_column(column["image"], datasets.Image(decode=False))  # the bytes as they are
        for number, record in enumerate(part):
            image, captions = record[column["image"]], record[column["caption"]]
            if isinstance(image, dict):
                image = _extract(image, folder / EXTRACTED_IMAGES, f"{split or 'image'}_{number:08d}")
            prompt = record[column["prompt"]] if "prompt" in column else None
            for caption in captions if isinstance(captions, list) else [captions]:
                rows.append((number, image, caption, record.get("split", split), prompt))
    return without_empty_columns(to_frame(rows, "row", ("image", "caption", "split", "prompt")))


def _extract(image, folder, name):
    """Write the bytes of a `datasets` image to a file, unless that was done before -> its name."""
    if image["bytes"] is None:
        return image["path"]
    suffix = Path(image["path"] or "").suffix or ".jpg"
    path = folder / (name + suffix)
    if not path.is_file() or path.stat().st_size != len(image["bytes"]):
        folder.mkdir(exist_ok=True)
        path.write_bytes(image["bytes"])
    return path.name
