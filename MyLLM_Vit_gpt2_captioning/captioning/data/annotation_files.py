"""Readers of annotation files: path -> DataFrame with the columns image (name as in the file), caption and, where the
file has them, split and prompt. The index says where a row stands: line, annotation id, ... as `index.name` says.

All raise ValueError that names the file, and the row where there is one.
"""

import codecs
import io
import json
import re

from captioning.data.conventions import COLUMN_NAMES, as_utf8

# --- tables -----------------------------------------------------------------------------------------------------------


def read_table(path):
    """A table with a header line: Flickr30k's (separated by "|", where a quotation mark is just a character), CSV, or
    TSV."""
    import pandas as pd

    text = read_text(path)
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
    df = df.rename(columns=our_column_names(list(df.columns), path))
    # Lines count from 1, and the first holds the column names. Where quotes span lines, only rows can be counted.
    row_is_line = len(df) + 1 == len(text.rstrip("\n").split("\n"))
    df.index = pd.RangeIndex(2, len(df) + 2, name="line") if row_is_line else pd.RangeIndex(1, len(df) + 1, name="row")
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
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: expected 'photo.jpg#0', a tab and the caption, not {line[:60]!r}")
        rows.append((number, re.sub(r"#\w+$", "", name), caption))
    return to_frame(rows, "line")


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path):
    """COCO, Karpathy, a mapping from image to captions, or a list of records."""
    content = _parse_json(read_text(path), path)
    try:
        if isinstance(content, list):
            return _read_records(enumerate(content), path, "record")
        if "annotations" in content and "images" in content:
            return _read_coco(content, path)
        if "images" in content:
            return _read_karpathy(content, path)
        return _read_mapping(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not in a format that is known ({error!r})") from error


def read_json_lines(path):
    """A record {"image": ..., "caption": ...} a line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    records = ((number, _parse_json(line, f"{path}, line {number}")) for number, line in lines if line.strip())
    return _read_records(records, path, "line")


def _parse_json(text, place):
    """`place`: file, or file and line, that the ValueError names when the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise ValueError(f"{place}: not valid JSON ({error}); mend the file or take another copy of it") from error


def _read_coco(content, path):
    """COCO's captions_*.json, parsed. The split, and the folder of the photos, come from the file's name."""
    match = re.fullmatch(r"captions_((train|val|test)\w*)", path.stem)
    folder, split = (f"{match[1]}/", match[2]) if match else ("", None)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            raise ValueError(f"{path}, annotation {annotation['id']}: no image has the id {annotation['image_id']}")
        name = names[annotation["image_id"]]
        rows.append((annotation["id"], name if "/" in name else folder + name, annotation.get("caption"), split))
    return to_frame(rows, "annotation", ("image", "caption", "split"))


def _read_karpathy(content, path):
    """dataset_*.json, parsed: captions and Karpathy's split in one file."""
    rows = []
    for number, image in enumerate(content["images"]):
        if "sentences" not in image:
            raise ValueError(f"{path}, entry {number}: no sentences; this file only splits another file's images")
        name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
        rows += [(number, name, sentence["raw"], image.get("split")) for sentence in image["sentences"]]
    return to_frame(rows, "entry", ("image", "caption", "split"))


def _read_mapping(content):
    """{"1.jpg": ["caption", ...], ...}, parsed; a single caption may stand without a list."""
    rows = []
    for number, (name, captions) in enumerate(content.items()):
        rows += [(number, name, caption) for caption in ([captions] if isinstance(captions, str) else captions)]
    return to_frame(rows, "entry")


def _read_records(numbered, path, row_name):
    """Pairs (number, {"image": ..., "caption": ...}); a list of captions makes a row for each."""
    rows = []
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {row_name} {number}: expected an object with image and caption")
        ours = our_column_names(list(record), f"{path}, {row_name} {number}")
        values = {ours[name]: value for name, value in record.items() if name in ours}
        captions = values["caption"] if isinstance(values["caption"], list) else [values["caption"]]
        rows += [(number, values["image"], text, record.get("split"), values.get("prompt")) for text in captions]
    return without_empty_columns(to_frame(rows, row_name, ("image", "caption", "split", "prompt")))


# --- shared by readers of files and folders ---------------------------------------------------------------------------


def read_text(path, may_be_empty=False):
    """The text of a file, UTF-8 or what Windows calls Unicode (UTF-16 with its mark), lines ended by LF;
    bytes that are neither become NOT_UTF8, so that their rows can be counted and named."""
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").replace("\r\n", "\n")
    if not (may_be_empty or text.strip()):
        raise ValueError(f"{path}: the file is empty")
    # Alone, as Macs once ended lines, "\r" ends them too; beside "\n" it is a character of a caption.
    return text if "\n" in text else text.replace("\r", "\n")


def our_column_names(columns, place):
    """{column name in the file: image, caption or prompt}. Raises ValueError that names the `place` when image or
    caption is missing."""
    ours = {}
    for our_name, other_names in COLUMN_NAMES.items():
        for name in (our_name, *other_names):
            if name in columns and our_name not in ours.values():
                ours[name] = our_name
    missing = {"image", "caption"} - set(ours.values())
    if missing:
        raise ValueError(f"{place}: no column {' and '.join(sorted(missing))}; it has {', '.join(map(str, columns))}")
    return ours


def to_frame(rows, row_name, columns=("image", "caption")):
    """Rows (number, *values) -> DataFrame with the numbers as index."""
    import pandas as pd

    numbers = [row[0] for row in rows]
    values = [[as_utf8(value) if isinstance(value, str) else value for value in row[1:]] for row in rows]
    return pd.DataFrame(values, columns=list(columns), index=pd.Index(numbers, name=row_name))


def without_empty_columns(df):
    """The frame without split and prompt where no row has one."""
    return df.drop(columns=[name for name in ("split", "prompt") if df[name].isna().all()])
