"""The list of pairs of photo and caption that a run leaves out (`exclude`): a CSV file with the columns image and
caption, as prepare_data.py --check writes it. The dataset itself is never changed."""

import csv
import io
from pathlib import Path

from captioning.common.files import write_atomically
from captioning.images import tar_members

COLUMNS = ("image", "caption")


def name_of(image, data_dir):
    """The name of a photo in the list: its path relative to the dataset's folder, or its file name if it lies
    elsewhere."""
    image, data_dir = Path(image).absolute(), Path(data_dir).absolute()
    return image.relative_to(data_dir).as_posix() if image.is_relative_to(data_dir) else image.name


def write_list(path, rows, data_dir, columns=()):
    """Write rows (image, caption, *values of the further `columns`) as such a list."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *columns])
    writer.writerows([name_of(image, data_dir), *others] for image, *others in rows)
    write_atomically(path, lambda draft: draft.write_text(text.getvalue(), encoding="utf-8"))


def read_list(path):
    """-> set of (name of the photo, caption). Raises FileNotFoundError, or ValueError that names file and line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; exclude is a list that prepare_data.py --check writes")
    pairs = set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                if any(row.get(column) is None for column in COLUMNS):
                    raise ValueError(f"line {rows.line_num}: no image and caption; the first line is {COLUMNS}")
                pairs.add((row["image"], row["caption"]))
    except (ValueError, csv.Error) as error:  # of which one says that the text is not UTF-8
        raise ValueError(f"{path}: not a list of pairs to exclude ({error})") from error
    return pairs


def without_excluded(df, path, data_dir):
    """The rows of a dataset's DataFrame that the list at `path` does not name; prints how many are left out.

    Raises what `read_list` raises, and ValueError when the list names no row, for tar shards, or when nothing is left.
    """
    pairs = read_list(path)
    if tar_members.tar_of(df["image"].iloc[0]) is not None:
        raise ValueError(
            f"exclude is {str(path)!r}, but {data_dir} holds tar shards, which are read as a stream: leave the pairs "
            "out of the dataset that the shards are written from"
        )
    named = [
        (name_of(image, data_dir), caption) in pairs for image, caption in zip(df["image"], df["caption"], strict=True)
    ]
    if not any(named):
        raise ValueError(f"{path}: none of its {len(pairs):,} pairs is in {data_dir}; it was written for other data")
    print(f"left out {sum(named):,} of {len(df):,} captions, which {path} names")
    kept = df[[not excluded for excluded in named]].reset_index(drop=True)
    if kept.empty:
        raise ValueError(f"{path}: it names every caption of {data_dir}")
    return kept
