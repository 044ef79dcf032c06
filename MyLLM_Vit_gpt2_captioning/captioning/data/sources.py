"""Annotation files of every common format -> one DataFrame: `image` (Path), `caption`, `split` (train/val/test) and,
for questions about images, `prompt`.

    Flickr30k      results.csv                    image_name| comment_number| comment
    Flickr8k       captions.txt                   image,caption
                   Flickr8k.token.txt             1.jpg#0 <tab> caption
    COCO           annotations/captions_*.json    train2017 is train, val2017 is val
    Karpathy       dataset_*.json                 with sentences in it; without, it only splits another file's images
    mapping        captions.json                  {"1.jpg": ["caption", ...]}
    records        *.jsonl, *.json, *.csv, *.tsv  columns image and caption, optionally prompt and split
    side by side   a folder of photos             1.jpg beside 1.txt, a caption a line
    datasets       a Hugging Face folder          written by `save_to_disk`
    tar shards     train-000000.tar, ...          1.jpg beside 1.json or 1.txt in them; see shards/reading.py

Captions are lowercased and stripped; a missing one is "". Splits are made by image, never by caption: two captions of
one photo in different splits would let validation see a training photo.

pandas is imported in the functions that make frames, so that captioning a photo does not wait for it.
"""

from pathlib import Path

from captioning.data.annotation_files import read_flickr_tokens, read_json, read_json_lines, read_table
from captioning.data.annotation_folders import (
    COCO_FILES,
    EXTRACTED_IMAGES,
    has_text_beside_photos,
    is_saved_dataset,
    read_folder,
)
from captioning.data.conventions import CAPTION_FAULTS, KARPATHY_FILES, SPLIT_NAMES, SPLITS, clean_text
from captioning.data.exclusions import without_excluded
from captioning.data.shards import reading
from captioning.data.splits import assign_splits
from captioning.images import tar_members

RESULTS_FILE = "results.csv"
CAPTIONS_FILE = "captions.txt"
FLICKR_TOKENS = ("Flickr8k.token.txt", "results_20130124.token")
KNOWN_FILES = (  # looked for in this order
    RESULTS_FILE,
    CAPTIONS_FILE,
    *FLICKR_TOKENS,
    "captions.json",
    "captions.jsonl",
    "captions.csv",
    "metadata.jsonl",
    "metadata.csv",
)
IMAGE_FOLDERS = ("flickr30k_images", "images", "Images", "Flicker8k_Dataset")  # looked for in this order

# --- a dataset --------------------------------------------------------------------------------------------------------


def load(data_dir, captions_file=None, image_dir=None, shard_splits=SPLITS):
    """Read a dataset -> DataFrame with the columns image, caption, split and, where the file has one, prompt.

    `captions_file`: the annotation file or folder, found in `data_dir` when not given; `image_dir`: the folder of
    photos, likewise; `shard_splits`: the splits that are read of tar shards. The index says where a row stands: line,
    annotation id, ... as `index.name` says. Rows that training cannot use are still there: see `drop_unusable`. Raises
    FileNotFoundError when there is no annotation file, ValueError that names file and row when it cannot be understood
    or names an image outside the image folder.
    """
    data_dir = Path(data_dir)
    source = Path(captions_file) if captions_file else find_captions(data_dir)
    if source is None or not source.exists():
        raise FileNotFoundError(
            f"{source or data_dir}: no captions there: looked for {', '.join(KNOWN_FILES)}, {COCO_FILES}, "
            f"{KARPATHY_FILES}, photos with .txt files beside them, a folder written by Hugging Face datasets, or "
            "tar shards (train-000000.tar)"
        )
    df = read_captions(source, shard_splits)
    if source.is_dir() and is_saved_dataset(source):
        roots = [source / EXTRACTED_IMAGES]
    else:
        roots = [Path(image_dir)] if image_dir else _image_roots(data_dir, source)
    file_splits = df.pop("split") if "split" in df else None
    names = df["image"]
    df["image"] = _find_images(names, roots, source, df.index.name)
    names = names.groupby(df["image"].to_numpy()).transform("first")  # one photo under two names is one photo
    in_shards = tar_members.tar_of(df["image"].iloc[0]) is not None  # only the shards' names tell the splits
    df["split"] = file_splits if in_shards else assign_splits(names, data_dir, given=file_splits)
    columns = ["image", "caption", "split", "prompt"]
    return df[[column for column in columns if column in df]]


def find_captions(data_dir):
    """The annotation file (or folder) in `data_dir`, or None."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return None
    for path in (data_dir / name for name in KNOWN_FILES):
        if path.is_file():
            return path
    for folder in (data_dir / "annotations", data_dir):
        if any(folder.glob(COCO_FILES)):
            return folder
    if is_saved_dataset(data_dir):
        return data_dir
    for path in sorted(data_dir.glob(KARPATHY_FILES)):
        if '"sentences"' in path.read_text(encoding="utf-8", errors="replace"):
            return path
    for folder in (data_dir, *(data_dir / name for name in IMAGE_FOLDERS)):
        if folder.is_dir() and has_text_beside_photos(folder):
            return folder
    return data_dir if reading.has_shards(data_dir) else None


def read_captions(path, shard_splits=SPLITS):
    """Read any of the formats above -> DataFrame with the columns image (name as in the file), caption, and split and
    prompt where the file has them. Raises ValueError that names the file, and the row where one is wrong."""
    path = Path(path)
    if path.is_dir():
        df = read_folder(path, shard_splits)
    elif path.suffix == ".json":
        df = read_json(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        df = read_json_lines(path)
    elif path.name in FLICKR_TOKENS or path.suffix == ".token":
        df = read_flickr_tokens(path)
    elif path.suffix in (".csv", ".tsv", ".txt"):
        df = read_table(path)
    else:
        raise ValueError(f"{path}: unknown format; expected .csv, .tsv, .json, .jsonl, Flickr's .token or a folder")
    if df.empty:
        raise ValueError(f"{path}: holds no captions")
    return _cleaned(df, path)


def _cleaned(df, path):
    """Names of images stripped, captions and prompts cleaned, splits under their usual names."""
    blank = df["image"].isna() | (df["image"].astype(str).str.strip() == "")
    if blank.any():
        raise ValueError(f"{path}, {df.index.name} {df.index[blank.argmax()]}: no image name")
    df["image"] = df["image"].astype(str).str.strip()
    for column in {"caption", "prompt"} & set(df.columns):
        not_text = df[column].map(lambda value: isinstance(value, (dict, list)))
        if not_text.any():
            row = not_text.to_numpy().argmax()
            raise ValueError(
                f"{path}, {df.index.name} {df.index[row]}: the {column} is {df[column].iloc[row]!r}, not a text"
            )
        df[column] = df[column].astype(object).fillna("").map(lambda value: clean_text(str(value)))
    if "split" in df:
        if df["split"].isna().all():
            return df.drop(columns="split")
        df["split"] = df["split"].astype(str).str.strip().str.lower().replace(SPLIT_NAMES)
        unknown = ~df["split"].isin(SPLITS)
        if unknown.any():
            row = df.index[unknown.argmax()]
            raise ValueError(
                f"{path}, {df.index.name} {row}: unknown split {df['split'][unknown].iloc[0]!r}; "
                f"expected {', '.join(SPLITS)}"
            )
    return df


# --- where the photos are ---------------------------------------------------------------------------------------------


def _image_roots(data_dir, source):
    """Folders that image names may be relative to, in the order in which they are tried."""
    if source.is_dir() and source.name != "annotations":
        return [source, data_dir]
    folders = [data_dir / name for name in IMAGE_FOLDERS]
    found = next((folder for folder in folders if folder.is_dir()), None)
    return [found, data_dir] if found else [data_dir, folders[0]]


def _find_images(names, roots, source, row_name):
    """Image names as in the file -> Paths. Raises ValueError with the row for a name that leads out of the folder."""
    found = {}
    for row, name in zip(names.index, names, strict=True):
        if name in found:
            continue
        candidates = [root / name for root in roots]  # an absolute name stays what it is
        inside = zip(candidates, roots, strict=True) if "\0" not in name else ()  # a path cannot hold NUL
        suspicious = Path(name).is_absolute() or ".." in Path(name).parts
        if suspicious and not any(path.resolve().is_relative_to(root.resolve()) for path, root in inside):
            raise ValueError(
                f"{source}, {row_name} {row}: the image {name!r} lies outside of {roots[0]}; move it there"
            )
        # COCO's names come with their folder (train2017/1.jpg), which is left out when the image folder is that folder.
        candidates += [root / Path(name).name for root in roots if "/" in name and not Path(name).is_absolute()]
        found[name] = next((path for path in candidates if _is_image_file(path)), candidates[0])
    return names.map(found)


def _is_image_file(path):
    """Whether there is such a file, or member of a tar; False for a name too long for a file, where Path raises."""
    try:
        return path.is_file() or tar_members.exists(path)
    except OSError:
        return False


# --- rows that training can use ---------------------------------------------------------------------------------------


def load_usable(data_dir, captions_file, image_dir, dataset, exclude=""):
    """`load` without the rows that training cannot use, or that the list `exclude` names; prints how many photos each
    split has. Of tar shards only the validation split is read, since training streams the others: see
    `streaming.streamed_folder`.

    Raises FileNotFoundError with the command that fetches the public `dataset` where there is none.
    """
    captions_file = captions_file or find_captions(data_dir)
    try:
        df = drop_unusable(load(data_dir, captions_file, image_dir, shard_splits=["val"]), captions_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nTo fetch {dataset}, add --download, or run\n"
            f"    python MyLLM_Vit_gpt2_captioning/prepare_data.py {dataset} --to {data_dir}"
        ) from error
    if exclude:
        df = without_excluded(df, exclude, data_dir)
    print(", ".join(f"{split}: {n:,} photos" for split, n in df.groupby("split")["image"].nunique().items()))
    return df


def drop_unusable(df, source):
    """Drop rows whose caption has one of the CAPTION_FAULTS or whose photo is missing; print how many, and the first of
    each kind with its row in `source` -> DataFrame with a fresh index.

    Raises FileNotFoundError when no photo is there at all, ValueError when no caption is usable.
    """
    exists = {image: _is_image_file(Path(image)) for image in df["image"].unique()}
    missing = ~df["image"].map(exists).astype(bool)
    if missing.all():
        raise FileNotFoundError(f"{df['image'].iloc[0].parent}: none of the photos named in {source} is here")
    faults = {fault: df["caption"].map(has_fault) for fault, has_fault in CAPTION_FAULTS.items()}
    faults["names a photo that is not there"] = missing
    usable = ~missing
    for fault, rows in faults.items():
        if rows.any():
            first = rows.to_numpy().argmax()
            print(
                f"warning: {source}: left out {rows.sum():,} of {len(df):,} rows; the first, "
                f"{df.index.name or 'row'} {df.index[first]}, {fault}: {str(df['image'].iloc[first])[:200]}"
            )
        usable &= ~rows
    if not usable.any():
        raise ValueError(f"{source}: no row has both a caption and a photo")
    return df[usable].reset_index(drop=True)
