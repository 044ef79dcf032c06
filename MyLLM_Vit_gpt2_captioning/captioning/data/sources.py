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
    tar shards     train-000000.tar, ...          1.jpg beside 1.json or 1.txt in them; see shards.py

Captions are lowercased and stripped; a missing one is "". Splits are made by image, never by caption: two captions of
one photo in different splits would let validation see a training photo.

pandas is imported in the functions that make frames, so that captioning a photo does not wait for it.
"""

import codecs
import io
import json
import re
from pathlib import Path

from captioning.data.conventions import (
    COLUMN_NAMES,
    DATASETS_FILES,
    IMAGE_SUFFIXES,
    KARPATHY_FILES,
    LONGEST_CAPTION,
    NOT_UTF8,
    SPLIT_NAMES,
    SPLITS,
)
from captioning.data.splits import assign_splits
from captioning.images import tar_members

RESULTS_FILE = "results.csv"
CAPTIONS_FILE = "captions.txt"
FLICKR_TOKENS = ("Flickr8k.token.txt", "results_20130124.token")
# Annotation files that are recognised in a data folder, the first that is there.
KNOWN_FILES = (RESULTS_FILE, CAPTIONS_FILE, *FLICKR_TOKENS, "captions.json", "captions.jsonl", "captions.csv",
               "metadata.jsonl", "metadata.csv")  # fmt: skip
COCO_FILES = "captions_*.json"
IMAGE_FOLDERS = ("flickr30k_images", "images", "Images", "Flicker8k_Dataset")  # looked for in this order
# --- the one entrance -------------------------------------------------------------------------------------------------


def load(data_dir, captions_file=None, image_dir=None, shard_splits=SPLITS):
    """Read a dataset -> DataFrame with the columns image, caption, split and, where the file has one, prompt.

    `captions_file`: the annotation file or folder, found in `data_dir` when not given; `image_dir`: the folder of
    photos, likewise; `shard_splits`: what of tar shards is read. The index tells the row: line, annotation id, ... as
    `index.name` says. Rows that cannot be used are still there: see `drop_unusable`. Raises FileNotFoundError when
    there is no annotation file, ValueError that names file and row when it cannot be understood or names an image
    outside the image folder.
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
    if source.is_dir() and _is_saved_dataset(source):
        roots = [source / EXTRACTED_IMAGES]
    else:
        roots = [Path(image_dir)] if image_dir else _image_roots(data_dir, source)
    given = df.pop("split") if "split" in df else None
    names = df["image"]
    df["image"] = _find_images(names, roots, source, df.index.name)
    names = names.groupby(df["image"].to_numpy()).transform("first")  # one photo under two names is one photo
    in_shards = tar_members.tar_of(df["image"].iloc[0]) is not None  # their names are all there is to know of splits
    df["split"] = given if in_shards else assign_splits(names, data_dir, given=given)
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
    if _is_saved_dataset(data_dir):
        return data_dir
    for path in sorted(data_dir.glob(KARPATHY_FILES)):
        if '"sentences"' in path.read_text(encoding="utf-8", errors="replace"):
            return path
    for folder in (data_dir, *(data_dir / name for name in IMAGE_FOLDERS)):
        if folder.is_dir() and any(path.with_suffix(".txt").is_file() for path in _photos(folder)):
            return folder
    return data_dir if _has_shards(data_dir) else None


def _has_shards(folder):
    from captioning.data.shards import reading  # here: it reads captions with what is in this file

    return reading.are_in(folder)


def find_image_dir(data_dir):
    """The folder of photos in `data_dir`; Flickr30k's name for it when there is none."""
    folders = [Path(data_dir) / name for name in IMAGE_FOLDERS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _image_roots(data_dir, source):
    """Where an image's name may start, in the order in which it is looked for."""
    if source.is_dir() and source.name != "annotations":
        return [source, data_dir]
    found = find_image_dir(data_dir)
    return [found, data_dir] if found.is_dir() else [data_dir, found]


def _find_images(names, roots, source, row_name):
    """Image names as in the file -> Paths; a name that leads out of the folder is refused, with its row."""
    found = {}
    for row, name in zip(names.index, names, strict=True):
        if name in found:
            continue
        candidates = [root / name for root in roots]  # an absolute name stays what it is
        within = zip(candidates, roots, strict=True) if "\0" not in name else ()  # NUL: no path can be made of it
        suspicious = Path(name).is_absolute() or ".." in Path(name).parts
        if suspicious and not any(path.resolve().is_relative_to(root.resolve()) for path, root in within):
            raise ValueError(
                f"{source}, {row_name} {row}: the image {name!r} lies outside of {roots[0]}; move it there"
            )
        # COCO's names come with their folder (train2017/1.jpg), which is left out when the image folder is that folder.
        candidates += [root / Path(name).name for root in roots if "/" in name and not Path(name).is_absolute()]
        found[name] = next((path for path in candidates if _is_file(path)), candidates[0])
    return names.map(found)


def _is_file(path):
    """Whether it is one, or in a tar; also for a name that is too long to be one, where Path raises OSError."""
    try:
        return path.is_file() or tar_members.exists(path)
    except OSError:
        return False


# --- readers: path -> DataFrame with image (name), caption, maybe split and prompt ------------------------------------


def read_captions(path, shard_splits=SPLITS):
    """Read any of the formats above -> DataFrame with the columns image (name as in the file), caption, and split and
    prompt where the file has them. Raises ValueError that names the file, and the row where one is wrong."""
    path = Path(path)
    if path.is_dir():
        df = _read_folder(path, shard_splits)
    elif path.suffix == ".json":
        df = _read_json(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        df = _read_json_lines(path)
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
    """Names and captions stripped, captions lowercased, splits under their usual names."""
    blank = df["image"].isna() | (df["image"].astype(str).str.strip() == "")
    if blank.any():
        raise ValueError(f"{path}, {df.index.name} {df.index[blank.argmax()]}: no image name")
    df["image"] = df["image"].astype(str).str.strip()
    for column in {"caption", "prompt"} & set(df.columns):
        strange = df[column].map(lambda value: isinstance(value, (dict, list)))
        if strange.any():
            row = strange.to_numpy().argmax()
            raise ValueError(
                f"{path}, {df.index.name} {df.index[row]}: the {column} is {df[column].iloc[row]!r}, not a text"
            )
        df[column] = df[column].astype(object).fillna("").astype(str).str.split().str.join(" ").str.lower()
    if "split" in df:
        if df["split"].isna().all():
            return df.drop(columns="split")
        df["split"] = df["split"].astype(str).str.strip().str.lower().replace(SPLIT_NAMES)
        strange = ~df["split"].isin(SPLITS)
        if strange.any():
            row = df.index[strange.argmax()]
            raise ValueError(
                f"{path}, {df.index.name} {row}: unknown split {df['split'][strange].iloc[0]!r}; "
                f"expected {', '.join(SPLITS)}"
            )
    return df


def _text(path):
    """The text of a file, UTF-8 or what Windows calls Unicode (UTF-16 with its mark), its lines ended by "\n" alone;
    bytes that are neither become NOT_UTF8, so that their rows can be counted and named."""
    text = _decoded(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _decoded(path):
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").replace("\r\n", "\n")
    # Alone, as Macs once ended lines, "\r" ends them too; beside "\n" it is a character of a caption.
    return text if "\n" in text else text.replace("\r", "\n")


def _named(columns, path, expected=("image", "caption")):
    """Column names of the file -> ours. Raises ValueError when one of `expected` is there under none of its names."""
    renamed = {}
    for ours, others in COLUMN_NAMES.items():
        for name in (ours, *others):
            if name in columns and ours not in renamed.values():
                renamed[name] = ours
    missing = set(expected) - set(renamed.values())
    if missing:
        raise ValueError(f"{path}: no column {' and '.join(sorted(missing))}; it has {', '.join(map(str, columns))}")
    return renamed


def read_table(path):
    """A table with a header line: Flickr30k's (separated by "|", where a quotation mark is just a character), CSV, or
    TSV."""
    import pandas as pd

    text = _text(path)
    header = text.split("\n", 1)[0]
    if "|" in header:
        options = dict(sep="|", skipinitialspace=True, quoting=3)
    elif "\t" in header:
        options = dict(sep="\t", quoting=3)
    else:
        options = dict(sep=",", skipinitialspace=True)
    try:
        options |= dict(dtype=str, keep_default_na=False, na_values=[""], lineterminator="\n")
        df = pd.read_csv(io.StringIO(text), **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(
            f"{path}: {str(error).strip()}; quote captions that hold the separator, and close the quotes"
        ) from error
    if not isinstance(df.index, pd.RangeIndex):  # pandas then takes the first column for row names
        raise ValueError(f"{path}, line 2: more fields than the header has; quote captions that hold the separator")
    df.columns = [str(column).strip() for column in df.columns]
    df = df.rename(columns=_named(list(df.columns), path))
    # Lines count from 1, and the first holds the column names. Where quotes span lines, only rows can be counted.
    plain = len(df) + 1 == len(text.rstrip("\n").split("\n"))
    df.index = pd.RangeIndex(2, len(df) + 2, name="line") if plain else pd.RangeIndex(1, len(df) + 1, name="row")
    if "comment_number" in df.columns:
        df["caption"] = _repair_missing_delimiter(df["comment_number"], df["caption"])
    return df


def _repair_missing_delimiter(numbers, captions):
    """Flickr30k's row of 2199200615.jpg reads `4   A dog runs across the grass .`: its last "|" is missing, so the
    caption is found behind the number. Rows that already have a caption stay as they are."""
    repaired = numbers.str.extract(re.compile(r"^\s*\d+\s+(\S.*)$"), expand=False)
    return captions.where(captions.notna(), repaired)


def read_flickr_tokens(path):
    """`1000.jpg#0 <tab> caption` a line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: expected 'photo.jpg#0', a tab and the caption, not {line[:60]!r}")
        rows.append((number, re.sub(r"#\w+$", "", name), caption))
    return _frame(rows, "line")


def _frame(rows, row_name, columns=("image", "caption")):
    """Rows (number, *values) -> DataFrame whose index is the number."""
    import pandas as pd

    numbers = [row[0] for row in rows]
    values = [[_utf8(value) for value in row[1:]] for row in rows]
    return pd.DataFrame(values, columns=list(columns), index=pd.Index(numbers, name=row_name))


def _utf8(value):
    """A text as it is, but for halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold: NOT_UTF8."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value


def _parse_json(text, place):
    """Raises ValueError that names the `place` of what is not JSON, or JSON that no program would have written."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets in each other
        raise ValueError(f"{place}: not valid JSON ({error}); mend the file or take another copy of it") from error


def _read_json(path):
    """COCO, Karpathy, a mapping from image to captions, or a list of records."""
    content = _parse_json(_text(path), path)
    try:
        if isinstance(content, list):
            return _records(enumerate(content), path, "record")
        if "annotations" in content and "images" in content:
            return read_coco(content, path)
        if "images" in content:
            return read_karpathy(content, path)
        return read_mapping(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not in a format that is known ({error!r})") from error


def read_coco(content, path):
    """COCO's captions_*.json, read already. The split, and the folder of the photos, come from the file's name."""
    match = re.fullmatch(r"captions_((train|val|test)\w*)", path.stem)
    folder, split = (f"{match[1]}/", match[2]) if match else ("", None)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            raise ValueError(f"{path}, annotation {annotation['id']}: no image has the id {annotation['image_id']}")
        name = names[annotation["image_id"]]
        rows.append((annotation["id"], name if "/" in name else folder + name, annotation.get("caption"), split))
    return _frame(rows, "annotation", ("image", "caption", "split"))


def read_karpathy(content, path):
    """dataset_*.json, read already: captions and Karpathy's split in one file."""
    rows = []
    for number, image in enumerate(content["images"]):
        if "sentences" not in image:
            raise ValueError(f"{path}, entry {number}: no sentences; this file only splits another file's images")
        name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
        rows += [(number, name, sentence["raw"], image.get("split")) for sentence in image["sentences"]]
    return _frame(rows, "entry", ("image", "caption", "split"))


def read_mapping(content):
    """{"1.jpg": ["caption", ...], ...}, read already; a single caption may stand without a list."""
    rows = []
    for number, (name, captions) in enumerate(content.items()):
        rows += [(number, name, caption) for caption in ([captions] if isinstance(captions, str) else captions)]
    return _frame(rows, "entry")


def _read_json_lines(path):
    def records():
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                yield number, _parse_json(line, f"{path}, line {number}")

    return _records(records(), path, "line")


def _records(numbered, path, row_name):
    """Pairs (number, {"image": ..., "caption": ...}); a list of captions makes a row for each."""
    rows, renamed = [], None
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {row_name} {number}: expected an object with image and caption")
        try:
            renamed = _named(list(record), path)
        except ValueError as error:
            raise ValueError(f"{path}, {row_name} {number}:{str(error).removeprefix(f'{path}:')}") from None
        values = {ours: record[name] for name, ours in renamed.items()}
        captions = values["caption"] if isinstance(values["caption"], list) else [values["caption"]]
        rows += [(number, values["image"], text, record.get("split"), values.get("prompt")) for text in captions]
    df = _frame(rows, row_name, ("image", "caption", "split", "prompt"))
    return df.drop(columns=[name for name in ("split", "prompt") if df[name].isna().all()])


def _photos(folder):
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_folder(folder, shard_splits):
    """COCO's annotations, a dataset saved by `datasets`, photos with a .txt beside each, or tar shards."""
    if any(folder.glob(COCO_FILES)):
        import pandas as pd

        return pd.concat([_read_json(path) for path in sorted(folder.glob(COCO_FILES))])
    if _is_saved_dataset(folder):
        return read_saved_dataset(folder)
    rows, number = [], 0
    for photo in _photos(folder):
        text = photo.with_suffix(".txt")
        if text.is_file():
            for line in _decoded(text).rstrip("\n").split("\n"):
                number += 1
                rows.append((number, photo.name, line))
    if not rows and _has_shards(folder):
        return _read_shards(folder, shard_splits)
    if not rows:
        raise ValueError(f"{folder}: no photo with a .txt file of the same name is in this folder")
    return _frame(rows, "caption")


EXTRACTED_IMAGES = "extracted_images"


def _is_saved_dataset(folder):
    return any((folder / name).is_file() for name in DATASETS_FILES)


def read_saved_dataset(folder):
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
        renamed = {ours: name for name, ours in _named(part.column_names, folder).items()}
        if isinstance(part.features[renamed["image"]], datasets.Image):
            part = part.cast_column(renamed["image"], datasets.Image(decode=False))  # the bytes as they are
        for number, record in enumerate(part):
            image, captions = record[renamed["image"]], record[renamed["caption"]]
            if isinstance(image, dict):
                image = _extract(image, folder / EXTRACTED_IMAGES, f"{split or 'image'}_{number:08d}")
            prompt = record[renamed["prompt"]] if "prompt" in renamed else None
            for caption in captions if isinstance(captions, list) else [captions]:
                rows.append((number, image, caption, record.get("split", split), prompt))
    df = _frame(rows, "row", ("image", "caption", "split", "prompt"))
    return df.drop(columns=[name for name in ("split", "prompt") if df[name].isna().all()])


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


def _read_shards(folder, splits):
    from captioning.data.shards import reading

    df = _frame([(n, *row) for n, row in enumerate(reading.read_rows(folder, splits), 1)], "caption",
                ("image", "caption", "split", "prompt"))  # fmt: skip
    return df.drop(columns="prompt") if df["prompt"].isna().all() else df


# --- splits -----------------------------------------------------------------------------------------------------------


# --- rows that cannot be used -----------------------------------------------------------------------------------------


def load_usable(data_dir, captions_file, image_dir, dataset):
    """`load`, without the rows that training cannot use; prints how many photos each split has. Of tar shards the
    validation split: training streams the others, see `shards.streamed_folder`.

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
    print(", ".join(f"{split}: {n:,} photos" for split, n in df.groupby("split")["image"].nunique().items()))
    return df


def drop_unusable(df, source):
    """Drop rows without a caption, with a caption that is not UTF-8 or too long, or whose photo is missing; say how
    many, and name the first of each kind with its row in `source` -> DataFrame with a fresh index.

    Raises FileNotFoundError when no photo is there at all, ValueError when no caption is usable.
    """
    import pandas as pd

    exists = {image: _is_file(Path(image)) for image in df["image"].unique()}
    problems = {
        "has no caption": df["caption"] == "",
        "has a caption that is not UTF-8": df["caption"].str.contains(NOT_UTF8, regex=False),
        f"has a caption of more than {LONGEST_CAPTION:,} characters": df["caption"].str.len() > LONGEST_CAPTION,
        "names a photo that is not there": ~df["image"].map(exists).astype(bool),
    }
    if problems["names a photo that is not there"].all():
        raise FileNotFoundError(f"{df['image'].iloc[0].parent}: none of the photos named in {source} is here")
    usable = pd.Series(True, index=range(len(df)))
    for what, rows in problems.items():
        if rows.any():
            first = rows.to_numpy().argmax()
            print(
                f"warning: {source}: left out {rows.sum():,} of {len(df):,} rows; the first, "
                f"{df.index.name or 'row'} {df.index[first]}, {what}: {str(df['image'].iloc[first])[:200]}"
            )
            usable &= ~rows.to_numpy()
    if not usable.any():
        raise ValueError(f"{source}: no row has both a caption and a photo")
    return df[usable.to_numpy()].reset_index(drop=True)
