"""Readers of annotation files: path -> DataFrame with the columns image (name as in the file), caption and, where the
file has them, split and prompt. The index says where a row stands: line, annotation id, ... as `index.name` says.

All raise ValueError that names the file, and the row where there is one, and call `say` with a line on what they had to
make out. Tables are read in tables.py.
"""

import codecs
import json
import re

from captioning.common.printable import printable
from captioning.common.text import NOT_UTF8, as_utf8
from captioning.data.conventions import match_columns

COCO_NAME = re.compile(r"captions_((train|val|test)\w*)")  # the folder of the photos, and the split
# A character of UTF-8 that is not ASCII.
UTF8_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


def read_flickr_tokens(path, say=print):
    """`1000.jpg#0 <tab> caption` a line."""
    rows = []
    for number, line in enumerate(read_text(path, say).split("\n"), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: expected 'photo.jpg#0', a tab and the caption, not {line[:60]!r}")
        rows.append((number, re.sub(r"#\w+$", "", name), caption))
    return to_frame(rows, "line")


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path, say=print):
    """COCO, Karpathy, a mapping from image to captions, or a list of records."""
    content = _parse_json(read_text(path, say), path)
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


def read_json_lines(path, say=print):
    """A record {"image": ..., "caption": ...} a line."""
    lines = enumerate(read_text(path, say).split("\n"), 1)
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
    match = COCO_NAME.fullmatch(path.stem)
    folder, split = (f"{match[1]}/", match[2]) if match else ("", None)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            raise ValueError(f"{path}, annotation {annotation['id']}: no image has the id {annotation['image_id']}")
        name = names[annotation["image_id"]]
        rows.append((annotation["id"], name if "/" in name else folder + name, annotation.get("caption"), split))
    return to_frame(rows, "annotation", ("image", "caption", "split"))


def read_coco_ids(path):
    """COCO's captions_*.json -> {name of an image, with its folder: its id}; empty for other JSON."""
    content = _parse_json(read_text(path, lambda text: None), path)
    if not isinstance(content, dict) or not {"annotations", "images"} <= content.keys():
        return {}
    match = COCO_NAME.fullmatch(path.stem)
    folder = f"{match[1]}/" if match else ""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return {name if "/" in name else folder + name: number for number, name in names.items()}


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


def read_text(path, say=print, may_be_empty=False):
    """The text of a file, decoded as by `decode`. Raises ValueError when there is none, unless it `may_be_empty`."""
    text, is_windows = decode(path.read_bytes())
    if not (may_be_empty or text.strip()):
        raise ValueError(f"{path}: the file is empty")
    if is_windows:
        say(f"{path}: not UTF-8; read as Windows-1252, which all of it is")
    return text


def decode(content):
    """Bytes -> (text with lines ended by LF, whether it was Windows-1252).

    UTF-8, or what Windows calls Unicode (UTF-16 with its mark); where nothing in it is UTF-8 and all is Windows-1252,
    that. Other bytes become NOT_UTF8, so that their rows can be counted and named.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    is_windows = NOT_UTF8 in text and not is_utf16 and _is_windows_1252(content)
    if is_windows:
        text = content.decode("cp1252")
    text = text.replace("\r\n", "\n")
    # Alone, as Macs once ended lines, "\r" ends them too; beside "\n" it is a character of a caption.
    return text if "\n" in text else text.replace("\r", "\n"), is_windows


def _is_windows_1252(content):
    """Whether bytes that are not all UTF-8 can be decoded as Windows-1252, and no characters of UTF-8 are among them,
    of which that would make two or three. Latin-1 is a part of it, without controls."""
    if UTF8_CHARACTER.search(content):
        return False
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


def our_column_names(columns, place):
    """{column name in the file: image, caption or prompt}. Raises ValueError that names the `place` when image or
    caption is missing."""
    ours = match_columns(columns)
    missing = {"image", "caption"} - set(ours.values())
    if missing:
        raise ValueError(
            f"{place}: no column {' and '.join(sorted(missing))}; it has {printable(', '.join(map(str, columns)))}"
        )
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
