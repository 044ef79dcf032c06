"""Reader of tables: CSV, TSV, Flickr30k's results.csv, with or without a line of column names."""

import csv
import io
import re
from contextlib import suppress

from captioning.common.printable import printable
from captioning.common.text import clean_text
from captioning.data.annotation_files import our_column_names, read_text
from captioning.data.conventions import match_columns

SEPARATORS = "|\t,;"  # in the order in which they are tried
QUOTING = ",;"  # with these, quotation marks surround a field that holds the separator


def read_table(path, say=print, is_photo=lambda name: False):
    """A table -> DataFrame as in annotation_files.py, whose index says in which line a row stands, where it can.

    The separator is that of the first line: "|", tab, comma or semicolon. Behind "|" and tab a quotation mark is just a
    character. Where the caption is the last column, all that is behind the last separator of the first line belongs to
    it. A table without column names is recognised by its first field, which `is_photo`. `say` prints what was
    understood.
    """
    lines = read_text(path, say).rstrip("\n").split("\n")
    first = next(line for line in lines if line.strip())
    separator, columns, has_names = _recognise(first, path, is_photo)
    if not has_names:
        lines = [separator.join(columns), *lines]
    df = _read_with_pandas(lines, separator)
    if df is None:
        df = _read_line_by_line(lines, separator, columns, path, say)
    if not has_names:
        if df.index.name == "line":
            df.index -= 1
        if not is_photo(_split(first, separator)[0]):
            df["image"] = df["image"].map(_without_number, na_action="ignore")
    df.columns = [str(column).strip() for column in df.columns]
    ours = our_column_names(list(df.columns), path)
    df = df.rename(columns=ours)
    if "comment_number" in df.columns:
        df["caption"] = _repair_missing_delimiter(df["comment_number"], df["caption"])
    named = [f"{our_name} is {name!r}" for name, our_name in ours.items() if name != our_name]
    understood = named if has_names else ["no line of column names", f"taken for {', '.join(columns)}"]
    say(f"{path}: {', '.join([f'a table separated by {separator!r}', *understood])}")
    return df


def _recognise(line, path, is_photo):
    """The first line -> (separator, names of the columns, whether the line holds these names).

    Raises ValueError that names the columns which are missing.
    """
    fields_by = {separator: _split(line, separator) for separator in SEPARATORS}
    for separator, columns in fields_by.items():
        if {"image", "caption"} <= set(match_columns(columns).values()):
            return separator, columns, True
    for separator, fields in fields_by.items():
        if len(fields) > 1 and (is_photo(fields[0]) or is_photo(_without_number(fields[0]))):
            numbered = len(fields) > 2 and fields[1].isdigit()  # as in Flickr30k's table
            return separator, ["image", "comment_number", "caption"] if numbered else ["image", "caption"], False
    separator = max(SEPARATORS, key=lambda separator: len(fields_by[separator]))
    return separator, our_column_names(fields_by[separator], path), True  # raises, since nothing has fitted


def _without_number(name):
    """1.jpg#0 -> 1.jpg: Flickr's tokens, and tables made of them, number the captions of a photo so."""
    return re.sub(r"#\w+$", "", name)


def _split(line, separator):
    """A line -> its fields, stripped, without the quotation marks around them."""
    if separator in QUOTING:
        with suppress(csv.Error):  # a field of more than 131,072 characters, or the end of a line of old Macs in it
            return [f.strip() for f in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    return [field.strip() for field in line.split(separator)]


def _read_with_pandas(lines, separator):
    """-> DataFrame, or None where a line has more fields than the first one, or a quotation mark is never closed."""
    import pandas as pd

    options = dict(sep=separator, dtype=str, keep_default_na=False, na_values=[""], lineterminator="\n")
    options |= dict(quoting=csv.QUOTE_MINIMAL if separator in QUOTING else csv.QUOTE_NONE)
    try:
        df = pd.read_csv(io.StringIO("\n".join([*lines, ""])), skipinitialspace=separator != "\t", **options)
    except pd.errors.ParserError:
        return None
    if not isinstance(df.index, pd.RangeIndex):  # pandas then takes the first column for row names
        return None
    # Lines count from 1, and the first holds the column names. Where quotes span lines, only rows can be counted.
    row_is_line = len(df) + 1 == len(lines)
    df.index = pd.RangeIndex(2, len(df) + 2, name="line") if row_is_line else pd.RangeIndex(1, len(df) + 1, name="row")
    return df


# --- tables in which captions hold the separator ----------------------------------------------------------------------


def _read_line_by_line(lines, separator, columns, path, say):
    """As `_read_with_pandas`, for tables in which a line has more fields than the first: its last field is all the rest
    of it. Raises ValueError that names the line when the last field is not the caption."""
    import pandas as pd

    count, caption_is_last = len(columns), match_columns(columns).get(columns[-1]) == "caption"
    records = (_quoted_records if separator in QUOTING else _unquoted_records)(lines, separator, count, path)
    rows, numbers, too_long = [], [], []
    for i, fields, has_more in records:
        if not lines[i].strip() and separator not in lines[i]:
            continue
        if not lines[i].strip(f"{separator} \t\r"):
            fields, has_more = [], False  # nothing but separators
        if has_more and not caption_is_last:
            raise ValueError(
                f"{path}, line {i + 1}: more fields than the header has; quote captions that hold the separator"
            )
        fields = fields if separator == "\t" else [field.lstrip(" ") for field in fields]
        rows.append([field or None for field in fields] + [None] * (count - len(fields)))
        numbers.append(i + 1)
        if has_more:
            too_long.append(len(rows) - 1)
    if too_long:
        first = too_long[0]
        say(
            f"{path}: {len(too_long):,} of {len(rows) - 1:,} rows have more separators {separator!r} than the header; "
            f"what is behind the last of them belongs to the caption; the first, line {numbers[first]}: "
            f"{printable(clean_text(rows[first][-1])[:60])}"
        )
    return pd.DataFrame(rows[1:], columns=columns, index=pd.Index(numbers[1:], name="line"), dtype=object)


def _unquoted_records(lines, separator, count, path):
    """As `_quoted_records`, where a quotation mark is just a character."""
    return ((i, line.split(separator, count - 1), line.count(separator) >= count) for i, line in enumerate(lines))


def _quoted_records(lines, separator, count, path):
    """Yields (index of its first line, fields, whether it has more than `count`) for each record of a CSV. A record
    that has more, or is no proper CSV, is one line, and the next record begins behind it."""
    lines = [line.replace("\r", " ") for line in lines]  # which csv would take for the end of a line
    start = 0
    while start < len(lines):
        rest = (f"{lines[i]}\n" for i in range(start, len(lines)))
        reader, first = csv.reader(rest, delimiter=separator, skipinitialspace=True, strict=True), start
        try:
            for fields in reader:
                if len(fields) > count:
                    break
                yield first, fields, False
                first = start + reader.line_num
            else:
                return
        except csv.Error as error:
            if "end of data" in str(error):
                raise ValueError(f"{path}, line {first + 1}: a quotation mark that nothing closes; close it") from error
        fields = _fields_of_line(lines[first], separator, count)
        yield first, fields, separator in fields[-1]
        start = first + 1


def _fields_of_line(line, separator, count):
    """The first count - 1 fields, without the quotes around them, and the rest of the line as it is."""
    quoted, may_open, found = False, True, 0  # a mark opens at the start of a field, or is the second of two inside
    for i, character in enumerate(line):
        if character == '"' and (quoted or may_open):
            quoted, may_open = not quoted, quoted
        elif character == separator and not quoted:
            may_open, found = True, found + 1
            if found == count - 1:
                fields = _split(line[:i], separator)
                return [*fields, line[i + 1 :]] if len(fields) == found else line.split(separator, found)
        elif character != " ":
            may_open = False
    return line.split(separator, count - 1)


def _repair_missing_delimiter(numbers, captions):
    """Flickr30k's row of 2199200615.jpg reads `4   A dog runs across the grass .`: its last "|" is missing, so the
    caption is found behind the number. Rows that already have a caption stay as they are."""
    repaired = numbers.str.extract(re.compile(r"^\s*\d+\s+(\S.*)$"), expand=False)
    return captions.where(captions.notna(), repaired)
