"""Annotation files -> one DataFrame with the columns `image` (Path), `caption` (str) and `split` (train/val/test).

Captions are lowercased and stripped; a missing one is "". Splits are made by image, never by caption: two captions of
one photo in different splits would let validation see a training photo.
"""

import json
import re
from pathlib import Path

import pandas as pd

RESULTS_FILE = "results.csv"  # Flickr30k: image_name| comment_number| comment
CAPTIONS_FILE = "captions.txt"  # Flickr8k: image,caption
IMAGE_FOLDERS = ("flickr30k_images", "images", "Images")  # looked for in this order in the data folder
SPLITS = ("train", "val", "test")
SPLIT_LISTS = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt"),
    "val": ("val.txt", "Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt"),
}


def find_captions_file(data_dir):
    """The annotation file in `data_dir`, or None."""
    candidates = [Path(data_dir) / name for name in (RESULTS_FILE, CAPTIONS_FILE)]
    return next((path for path in candidates if path.is_file()), None)


def find_image_dir(data_dir):
    """The folder of photos in `data_dir`; Flickr30k's name for it when there is none."""
    folders = [Path(data_dir) / name for name in IMAGE_FOLDERS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_captions(path):
    """Read `results.csv` or `captions.txt` -> DataFrame with the columns image (file name) and caption (str).

    Raises ValueError that names the file when its columns are not the expected ones or it holds no row.
    """
    path = Path(path)
    flickr30k = path.name == RESULTS_FILE
    # In Flickr30k's file a quotation mark is just a character of the caption; in a CSV it protects commas.
    options = dict(sep="|", skipinitialspace=True, quoting=3) if flickr30k else dict(sep=",", skipinitialspace=True)
    try:
        df = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False, na_values=[""], **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {str(error).strip()}") from error
    df.columns = [str(column).strip() for column in df.columns]
    df = df.rename(columns={"image_name": "image", "comment": "caption"})
    missing = {"image", "caption"} - set(df.columns)
    if missing:
        expected = "image_name| comment_number| comment" if flickr30k else "image,caption"
        raise ValueError(f"{path}: the first line must be '{expected}', not '{', '.join(df.columns)}'")
    if df.empty:
        raise ValueError(f"{path}: holds no captions")
    if "comment_number" in df.columns:
        df["caption"] = _repair_missing_delimiter(df["comment_number"], df["caption"])
    df["caption"] = df["caption"].fillna("").str.strip().str.lower()
    if df["image"].isna().any():
        # +2: lines count from 1, and the first holds the column names.
        raise ValueError(f"{path}, line {df['image'].isna().idxmax() + 2}: no image name")
    df["image"] = df["image"].str.strip()
    return df[["image", "caption"]]


def _repair_missing_delimiter(numbers, captions):
    """Flickr30k's row of 2199200615.jpg reads `4   A dog runs across the grass .`: its last "|" is missing, so the
    caption is found behind the number. Rows that already have a caption stay as they are."""
    repaired = numbers.str.extract(re.compile(r"^\s*\d+\s+(\S.*)$"), expand=False)
    return captions.where(captions.notna(), repaired)


def split_by_lists(data_dir):
    """Published splits in `data_dir` -> {file name: split}; empty when there are none.

    Reads a Karpathy file (`dataset_*.json`; his `restval` counts as train) or lists of file names (`train.txt`, ...).
    """
    data_dir = Path(data_dir)
    for path in sorted(data_dir.glob("dataset*.json")):
        try:
            images = json.loads(path.read_text(encoding="utf-8"))["images"]
            split_of = {image["filename"]: image["split"].replace("restval", "train") for image in images}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a Karpathy split file ({error!r})") from error
        strange = set(split_of.values()) - set(SPLITS)
        if strange:
            raise ValueError(f"{path}: unknown split {sorted(strange)[0]!r}; expected {', '.join(SPLITS)} or restval")
        return split_of
    split_of = {}
    for split, names in SPLIT_LISTS.items():
        for path in (data_dir / name for name in names):
            if path.is_file():
                for name in path.read_text(encoding="utf-8-sig").split():
                    if split_of.setdefault(name, split) != split:
                        raise ValueError(f"{path}: {name} is also in the {split_of[name]} list")
    return split_of


def assign_splits(images, data_dir, seed=0):
    """File names (one a caption) -> their splits, in the same order.

    Published splits are used where they are given; an image in none of their lists is test, so that nothing held out
    by its publisher is ever trained on. Otherwise about 5% of the images each become val and test, chosen by `seed`.
    Raises ValueError when fewer than three images are to be split, or a published split leaves train or val empty.
    """
    split_of = split_by_lists(data_dir)
    if split_of:
        splits = images.map(split_of).fillna("test")
        for split in ("train", "val"):
            if not (splits == split).any():
                raise ValueError(f"{data_dir}: the published split puts none of the images with captions into {split}")
        return splits
    from sklearn.model_selection import GroupShuffleSplit  # here, so that captioning a photo does not wait for it

    if images.nunique() < 3:
        raise ValueError(f"{data_dir}: {images.nunique()} image(s) cannot be split into train, val and test")
    splits = pd.Series("train", index=images.index)
    for split, share in (("test", 0.05), ("val", 0.05 / 0.95)):
        rest = images[splits == "train"]
        _, chosen = next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(rest, groups=rest))
        splits[rest.index[chosen]] = split
    return splits


def drop_unusable(df, captions_file):
    """Drop rows without a caption or whose photo is missing; say how many and name the first of each kind.

    Raises FileNotFoundError when no photo is there at all.
    """
    empty = df["caption"] == ""
    exists = {image: Path(image).is_file() for image in df["image"].unique()}
    missing = ~df["image"].map(exists)
    if missing.all():
        raise FileNotFoundError(f"{df['image'].iloc[0].parent}: none of the photos named in {captions_file} is here")
    for rows, what in ((empty, "has no caption"), (missing, "names a photo that is not there")):
        if rows.any():
            first = rows.idxmax()
            print(
                f"warning: {captions_file}: left out {rows.sum():,} of {len(df):,} rows; the first, on line "
                f"{first + 2}, {what}: {df['image'][first]}"
            )
    return df[~empty & ~missing].reset_index(drop=True)
