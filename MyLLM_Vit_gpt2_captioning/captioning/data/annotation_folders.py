"""Readers of folders that hold captions themselves: COCO's annotations, a dataset saved by `datasets`, photos with a
.txt beside each, tar shards. They return the same frames as annotation_files.py."""

from pathlib import Path

from captioning.data.annotation_files import our_column_names, read_json, read_text, to_frame, without_empty_columns
from captioning.data.conventions import DATASETS_FILES, IMAGE_SUFFIXES
from captioning.data.shards import reading

COCO_FILES = "captions_*.json"
EXTRACTED_IMAGES = "extracted_images"  # folder for photos that lie inside a saved dataset


def read_folder(folder, shard_splits):
    """Read the captions in a folder; of tar shards those of `shard_splits`.

    Raises ValueError when the folder holds no captions, or a file in it cannot be read.
    """
    if any(folder.glob(COCO_FILES)):
        import pandas as pd

        return pd.concat([read_json(path) for path in sorted(folder.glob(COCO_FILES))])
    if is_saved_dataset(folder):
        return _read_saved_dataset(folder)
    if has_text_beside_photos(folder):
        return _read_side_by_side(folder)
    if reading.has_shards(folder):
        return _read_shards(folder, shard_splits)
    raise ValueError(f"{folder}: no photo with a .txt file of the same name is in this folder")


def is_saved_dataset(folder):
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in DATASETS_FILES)


def has_text_beside_photos(folder):
    """Whether a photo in the folder has a .txt file of the same name."""
    return any(path.with_suffix(".txt").is_file() for path in _photos(folder))


def _photos(folder):
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_side_by_side(folder):
    """1.jpg beside 1.txt, a caption a line."""
    rows = []
    for photo in _photos(folder):
        if photo.with_suffix(".txt").is_file():
            lines = read_text(photo.with_suffix(".txt"), may_be_empty=True).rstrip("\n").split("\n")
            rows += [(number, photo.name, line) for number, line in enumerate(lines, len(rows) + 1)]
    return to_frame(rows, "caption")


def _read_shards(folder, splits):
    rows = [(number, *row) for number, row in enumerate(reading.read_rows(folder, splits), 1)]
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
