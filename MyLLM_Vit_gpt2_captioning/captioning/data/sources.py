"""Annotation files of every common format -> one DataFrame: `image` (Path), `caption`, `split` (train/val/test) and,
for questions about images, `prompt`.

    Flickr30k      results.csv                    image_name| comment_number| comment
    Flickr8k       captions.txt                   image,caption
                   Flickr8k.token.txt             1.jpg#0 <tab> caption
    COCO           annotations/captions_*.json    train2017 is train, val2017 is val
    Karpathy       dataset_*.json                 with sentences in it; without, it only splits another file's images
    mapping        captions.json                  {"1.jpg": ["caption", ...]}
    records        *.jsonl, *.json, *.csv, *.tsv  columns image and caption, optionally prompt and split
    side by side   folders of photos              1.jpg beside 1.txt, a caption a line
    imagefolder    train/metadata.csv, ...        the photos beside it
    datasets       a Hugging Face folder          written by `save_to_disk`
    tar shards     train-000000.tar, ...          1.jpg beside 1.json or 1.txt in them; see shards/reading.py

A file of another name is taken where it is the only one that holds captions, or the only one of its split. Photos are
found under names of other systems, see photo_names.py; what a file says, and what was made of it, is printed.

Captions are lowercased (unless another `case` is asked for) and stripped, and unescaped where they were written for a
web page; a missing one is "". Splits are made by image, never by caption: two captions of one photo in different splits
would let validation see a training photo.

pandas is imported in the functions that make frames, so that captioning a photo does not wait for it.
"""

from pathlib import Path

from captioning.common.printable import printable
from captioning.common.text import clean_text, without_markup
from captioning.data import photo_names
from captioning.data.annotation_folders import (
    COCO_FILES,
    EXTRACTED_IMAGES,
    files_of_splits,
    has_text_beside_photos,
    is_record_of_sidecars,
    is_saved_dataset,
    read_file,
    read_folder,
    try_files,
)
from captioning.data.conventions import ALL, CAPTION_FAULTS, KARPATHY_FILES, KNOWN_FILES, SPLIT_NAMES, SPLITS
from captioning.data.exclusions import without_excluded
from captioning.data.shards import reading
from captioning.data.splits import assign_splits
from captioning.images import tar_members

# Folders in which the captions of public data sets lie when an archive was unpacked as it is.
INNER_FOLDERS = ("flickr30k_images", "Flickr8k_text")
FILES_SHOWN = 10

# --- a dataset --------------------------------------------------------------------------------------------------------


def load(data_dir, captions_file=None, image_dir=None, shard_splits=SPLITS, unescape=True, say=print, case="lower"):
    """Read a dataset -> DataFrame with the columns image, caption, split and, where the file has one, prompt.

    `captions_file`: the annotation file or folder, found in `data_dir` when not given; `image_dir`: the folder of
    photos, likewise; `shard_splits`: the splits that are read of tar shards; `unescape`: whether captions that were
    written for a web page are unescaped; `case`: of captions and prompts, one of `text.CASES`; `say` prints what was
    understood. The index says where a row stands: line,
    annotation id, ... as `index.name` says. Rows that training cannot use are still there: see `drop_unusable`; but
    rows with nothing in them are not. Raises FileNotFoundError when there is no annotation file, ValueError that names
    file and row when it cannot be understood, names an image outside the image folder, or one that may be two photos.
    """
    data_dir = Path(data_dir)
    source = Path(captions_file) if captions_file else find_captions(data_dir, image_dir)
    if source is None or not source.exists():
        raise FileNotFoundError(_nothing_found(source, data_dir, image_dir))
    if source.is_dir() and is_saved_dataset(source):
        roots = [source / EXTRACTED_IMAGES]
    else:
        roots = photo_names.image_roots(data_dir, source, image_dir)
    photos = photo_names.PhotoFinder(roots)
    df = read_captions(source, shard_splits, unescape, say, photos.is_photo, case)
    file_splits = df.pop("split") if "split" in df else None
    names = df["image"]
    df["image"] = photos.find_all(names, source, say)
    names = names.groupby(df["image"].to_numpy()).transform("first")  # one photo under two names is one photo
    in_shards = tar_members.tar_of(df["image"].iloc[0]) is not None  # only the shards' names tell the splits
    if in_shards:
        df["split"] = file_splits
    else:
        beside = source if source.is_dir() else source.parent  # where the lists of the splits may lie, too
        df["split"] = assign_splits(names, data_dir, given=file_splits, photos=df["image"], other_dir=beside)
    columns = ["image", "caption", "split", "prompt"]
    return df[[column for column in columns if column in df]]


def find_captions(data_dir, image_dir=None):
    """The annotation file (or folder) in `data_dir`, or None; `image_dir` as in `load`."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return None
    for path in (data_dir / name for name in KNOWN_FILES):
        if path.is_file():
            return data_dir if is_record_of_sidecars(path) else path
    for folder in (data_dir / "annotations", data_dir):
        if any(folder.glob(COCO_FILES)):
            return folder
    if is_saved_dataset(data_dir):
        return data_dir
    for path in sorted(data_dir.glob(KARPATHY_FILES)):
        if '"sentences"' in path.read_text(encoding="utf-8", errors="replace"):
            return path
    for folder in (data_dir, *(data_dir / name for name in photo_names.IMAGE_FOLDERS)):
        if folder.is_dir() and has_text_beside_photos(folder):
            return folder
    if reading.has_shards(data_dir):
        return data_dir
    for path in (data_dir / folder / name for folder in INNER_FOLDERS for name in KNOWN_FILES):
        if path.is_file():
            return path
    is_photo = photo_names.PhotoFinder(photo_names.image_roots(data_dir, data_dir, image_dir)).is_photo
    for folder in (data_dir, data_dir / "annotations"):
        if folder.is_dir() and files_of_splits(folder, is_photo):
            return folder
    readable = [path for path, reason in _tried_files(data_dir, is_photo).items() if reason is None]
    return readable[0] if len(readable) == 1 else None


def _tried_files(data_dir, is_photo):
    return try_files(data_dir, is_photo) | try_files(data_dir / "annotations", is_photo)


def _nothing_found(source, data_dir, image_dir):
    """The message for a dataset without captions: what was looked for, which files are there, and why none will do."""
    message = (
        f"{source or data_dir}: no captions there: looked for {', '.join(KNOWN_FILES)}, {COCO_FILES}, "
        f"{KARPATHY_FILES}, photos with .txt files beside them, a folder written by Hugging Face datasets, or "
        "tar shards (train-000000.tar)"
    )
    if source or not data_dir.is_dir():
        return message
    is_photo = photo_names.PhotoFinder(photo_names.image_roots(data_dir, data_dir, image_dir)).is_photo
    tried = _tried_files(data_dir, is_photo)
    if sum(reason is None for reason in tried.values()) > 1:
        message += ". More than one other file holds captions: choose with --captions_file FILE"
    for path, reason in [*tried.items()][:FILES_SHOWN]:
        message += f"\n    {printable(path.relative_to(data_dir))}: {printable(reason or 'holds captions')}"
    return message + (f"\n    and {len(tried) - FILES_SHOWN:,} more" if len(tried) > FILES_SHOWN else "")


def read_captions(path, shard_splits=SPLITS, unescape=True, say=print, is_photo=lambda name: False, case="lower"):
    """Read any of the formats above -> DataFrame with the columns image (name as in the file), caption, and split and
    prompt where the file has them. The other arguments as in `load` and `read_table`. Raises ValueError that names the
    file, and the row where one is wrong."""
    path = Path(path)
    if path.is_dir():
        df = read_folder(path, shard_splits, say, is_photo, unescape, case)
    else:
        df = read_file(path, say, is_photo)
    df = _without_empty_rows(df, path, say)
    if df.empty:
        raise ValueError(f"{path}: holds no captions")
    if unescape and not (path.is_dir() and reading.has_shards(path)):  # their samples are unescaped when they are read
        df = _unescaped(df, path, say)
    return _cleaned(df, path, case)


def _without_empty_rows(df, path, say):
    """The rows that have an image or a caption."""
    empty = df[["image", "caption"]].map(lambda text: text is None or text != text or not str(text).strip()).all(axis=1)
    if empty.any():
        say(
            f"warning: {path}: left out {empty.sum():,} of {len(df):,} rows; the first, {df.index.name} "
            f"{df.index[empty.argmax()]}, has nothing in it"
        )
    return df[~empty]


def _unescaped(df, path, say):
    """Captions and prompts as the web page shows them that they were written for."""
    df = df.copy()
    for column in {"caption", "prompt"} & set(df.columns):
        plain = df[column].astype(object).map(lambda text: without_markup(text) if isinstance(text, str) else text)
        rows = (plain != df[column]) & plain.notna()
        if rows.any():
            first = rows.to_numpy().argmax()
            say(
                f"{path}: {rows.sum():,} of {len(df):,} {column}s were written for a web page, and are unescaped, "
                f"without tags and invisible characters (--unescape_captions false keeps all); the first, "
                f"{df.index.name} {df.index[first]}: {printable(clean_text(df[column].iloc[first]))[:60]}"
            )
        df[column] = plain
    return df


def _cleaned(df, path, case):
    """Names of images stripped, captions and prompts cleaned, splits under their usual names."""
    blank = df["image"].isna() | (df["image"].astype(str).str.strip() == "")
    if blank.any():
        raise ValueError(f"{path}, {df.index.name} {df.index[blank.argmax()]}: no image name")
    df["image"] = df["image"].astype(str).str.strip()
    for column in {"caption", "prompt"} & set(df.columns):
        not_text = df[column].map(lambda value: isinstance(value, (dict, list)))
        if not_text.any():
            row = not_text.to_numpy().argmax()
            shown = repr(df[column].iloc[row])[:60]
            raise ValueError(f"{path}, {df.index.name} {df.index[row]}: the {column} is {shown}, not a text")
        df[column] = df[column].astype(object).fillna("").map(lambda value: clean_text(str(value), case))
    if "split" in df:
        if df["split"].isna().all():
            return df.drop(columns="split")
        df["split"] = df["split"].astype(str).str.strip().str.lower().replace(SPLIT_NAMES)
        unknown = ~df["split"].isin(SPLITS)
        if unknown.any():
            row = df.index[unknown.argmax()]
            raise ValueError(
                f"{path}, {df.index.name} {row}: unknown split {repr(df['split'][unknown].iloc[0])[:60]}; "
                f"expected {', '.join(SPLITS)}"
            )
    return df


def load_split(data_dir, split, captions_file=None, image_dir=None, **cleaning):
    """`load` with the usable rows of one split, or of ALL: for tools that do not train, to which the other splits do
    not matter. `cleaning`: `unescape` and `case` of `load`. Raises ValueError when the split is empty."""
    splits = SPLITS if split == ALL else [split]
    df = load(data_dir, captions_file, image_dir, splits, **cleaning)
    df = drop_unusable(df, captions_file or find_captions(data_dir, image_dir))
    rows = df[df["split"].isin(splits)]
    if rows.empty:
        counts = ", ".join(f"{split} {n:,}" for split, n in df.groupby("split")["image"].nunique().items())
        raise ValueError(
            f"{data_dir}: the split {split} is empty; images of the other splits: {counts}; --split {ALL} takes all"
        )
    return rows


# --- rows that training can use ---------------------------------------------------------------------------------------


def load_usable(data_dir, captions_file, image_dir, dataset, unescape=True, exclude="", case="lower"):
    """`load` without the rows that training cannot use, or that the list `exclude` names; prints how many photos each
    split has. Of tar shards only the validation split is read, since training streams the others: see
    `streaming.streamed_folder`.

    Raises FileNotFoundError with the command that fetches the public `dataset` where there is none, ValueError when
    there is nothing to train or to validate on.
    """
    captions_file = captions_file or find_captions(data_dir, image_dir)
    try:
        df = load(data_dir, captions_file, image_dir, shard_splits=["val"], unescape=unescape, case=case)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nTo fetch {dataset}, add --download, or run\n"
            f"    python MyLLM_Vit_gpt2_captioning/prepare_data.py {dataset} --to {data_dir}"
        ) from error
    if tar_members.tar_of(df["image"].iloc[0]) is None:
        _check_trainable(df, data_dir)
    df = drop_unusable(df, captions_file)
    if exclude:
        df = without_excluded(df, exclude, data_dir)
    print(", ".join(f"{split}: {n:,} photos" for split, n in df.groupby("split")["image"].nunique().items()))
    return df


def _check_trainable(df, data_dir):
    """Raise ValueError when there is no image to train on, or none to validate on."""
    for split in ("train", "val"):
        if not (df["split"] == split).any():
            few = df["image"].nunique()
            reason = f"; {few} image(s) cannot be split into train, val and test" if few < 3 else ""
            raise ValueError(f"{data_dir}: none of the images with captions is in the split {split}{reason}")


def drop_unusable(df, source):
    """Drop rows whose caption has one of the CAPTION_FAULTS or whose photo is missing; print how many, and the first of
    each kind with its row in `source` -> DataFrame with a fresh index.

    Raises FileNotFoundError when no photo is there at all, ValueError when no caption is usable.
    """
    exists = {image: photo_names.is_image_file(Path(image)) for image in df["image"].unique()}
    missing = ~df["image"].map(exists).astype(bool)
    if missing.all():
        folder, tried = df["image"].iloc[0].parent, " and ".join(printable(image) for image in list(exists)[:2])
        there = sorted(printable(path.name) for path in folder.iterdir()) if folder.is_dir() else []
        more = [f"{len(there) - 3:,} more"] if len(there) > 3 else []
        holds = ", ".join(there[:3] + more) or ("nothing" if folder.is_dir() else "nothing, for it does not exist")
        raise FileNotFoundError(
            f"{folder}: none of the photos named in {source} is here; tried {tried}; the folder holds {holds}"
        )
    faults = {fault: df["caption"].map(has_fault) for fault, has_fault in CAPTION_FAULTS.items()}
    faults["names a photo that is not there"] = missing
    usable = ~missing
    for fault, rows in faults.items():
        if rows.any():
            first = rows.to_numpy().argmax()
            print(
                f"warning: {source}: left out {rows.sum():,} of {len(df):,} rows; the first, "
                f"{df.index.name or 'row'} {df.index[first]}, {fault}: {printable(df['image'].iloc[first])[:200]}"
            )
        usable &= ~rows
    if not usable.any():
        raise ValueError(f"{source}: no row has both a caption and a photo")
    return df[usable].reset_index(drop=True)
