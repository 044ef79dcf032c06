"""captions.csv: the captions of a folder of photos, written batch by batch, so that an interrupted command can resume.

Each image is a line; the columns are image, caption, caption_2 and so on, for a calibrated captioner confidence,
confidence_2 and so on, then model, and made_with, which says what wrote the line. Cells are captions and names as they
are: what begins with =, +, - or @ is not changed, and a program that opens tables must not take it for a formula.
"""

import csv
import hashlib
import io
from pathlib import Path

from captioning.common.files import write_atomically
from captioning.data.conventions import RECORD_COLUMNS

FILE = "captions.csv"
REMEDY = "name another file with --out, or move this one away"
DIGITS = 12  # of the hash of the weights


def made_with(weights_files, options):
    """What wrote a line: a hash of the weights' files (in bytes), and the `options` (dict) that decide the words."""
    digest = hashlib.sha256()
    for path in weights_files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return ", ".join([f"weights {digest.hexdigest()[:DIGITS]}", *(f"{key} {value}" for key, value in options.items())])


class CaptionTable:
    """The table at `path`, with `count` captions an image by the captioner with the name `model`, which are `made_with`
    this (see the function).

    Images whose lines it has already count as done (`name in table`), with `redo` only those that were made with the
    same; a line that an interruption cut off does not. Lines of an earlier version, without a column made_with, are by
    the captioner they name. Raises ValueError, and changes nothing, when the file is not such a table.
    """

    def __init__(self, path, count, model, made_with, with_confidence=False, redo=False):
        self.path, self.count, self.own = Path(path), count, [str(model), made_with]
        kinds = ["caption", "confidence"] if with_confidence else ["caption"]
        columns = [f"{kind}_{n}" if n > 1 else kind for kind in kinds for n in range(1, count + 1)]
        self.columns = ["image", *columns, *RECORD_COLUMNS]
        self.old_text = self.path.read_bytes().decode("utf-8", "surrogateescape") if self.path.is_file() else ""
        complete = self.old_text[: self.old_text.rfind("\n") + 1]  # without a last line that was cut off
        try:
            header, *rows = list(csv.reader(io.StringIO(complete, newline=""))) or [self.columns]
        except csv.Error as error:
            raise ValueError(f"{self.path}: not a table of captions ({error}); {REMEDY}") from error
        if header not in (self.columns, self.columns[:-1]):
            raise ValueError(
                f"{self.path}: its columns are {', '.join(header)}, not {', '.join(self.columns)}; {REMEDY}"
            )
        # {image: its lines, the newest last}: what --redo writes anew is only left out of the file in the end
        self.rows = {}
        for row in filter(None, rows):
            self.rows.setdefault(row[0], []).append(row + [""] * (len(self.columns) - len(row)))
        self.others = {image for image, lines in self.rows.items() if not self._is_own(lines[-1])}
        self.done = set(self.rows) - (self.others if redo else set())

    def _is_own(self, row):
        model, made_with = row[-2:]
        return made_with == self.own[1] if made_with else model == self.own[0]

    def __contains__(self, name):
        return name in self.done

    def captions(self, name):
        """The captions in the lines of an image: a list for each line, the newest last."""
        return [row[1 : 1 + self.count] for row in self.rows.get(name, ())]

    def start(self):
        """Write the header of a new table, or remove a line that was cut off. Raises OSError that names the file."""
        self._rewrite([row for lines in self.rows.values() for row in lines])

    def finish(self):
        """Leave only the newest line of each image. Raises OSError that names the file."""
        if any(len(lines) > 1 for lines in self.rows.values()):
            self._rewrite([lines[-1] for lines in self.rows.values()])

    def _rewrite(self, rows):
        text = _as_csv([self.columns, *rows])

        def write(draft):
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(text.encode("utf-8", "surrogateescape"))

        if text != self.old_text:
            write_atomically(self.path, write)

    def add(self, rows):
        """Append [(image, [captions]), ...] to the file; with confidence [(image, [captions], [confidences]), ...].
        Raises OSError that names the file."""
        lines = []
        for image, captions, *sure in rows:
            columns = [" ".join(caption.split()) for caption in captions]
            lines.append([image, *columns, *(f"{value:.4f}" for value in (sure[0] if sure else [])), *self.own])
        text = _as_csv(lines)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise OSError(
                f"{self.path}: could not be written ({error.strerror}); what was written before is complete, and the "
                "same command resumes when there is room"
            ) from error
        for line in lines:
            self.rows.setdefault(line[0], []).append(line)
            self.done.add(line[0])
            self.others.discard(line[0])

    def write_list_to_check(self, min_confidence):
        """Write a second table with the images of this one whose first caption has less confidence than that, the least
        sure first -> (its path, how many)."""
        place = self.columns.index("confidence")
        rows = [lines[-1] for lines in self.rows.values()]
        low = sorted((row for row in rows if float(row[place]) < min_confidence), key=lambda row: float(row[place]))
        path, text = self.path.with_stem(f"{self.path.stem}_to_check"), _as_csv([self.columns, *low])
        write_atomically(path, lambda draft: draft.write_bytes(text.encode("utf-8", "surrogateescape")))
        return path, len(low)


def _as_csv(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
