"""captions.csv: the captions of a folder of photos, written batch by batch, so that an interrupted command can resume.

Each image is a line; the columns are image, caption, caption_2 and so on, model, and for a calibrated captioner
confidence, confidence_2 and so on in front of it.
"""

import csv
import io
from pathlib import Path

from captioning.common.files import write_atomically

FILE = "captions.csv"
REMEDY = "name another file with --out, or move this one away"


class CaptionTable:
    """The table at `path`, with `count` captions an image by the captioner with the name `model`.

    Images whose lines it has already count as done (`name in table`); a line that an interruption cut off does not.
    Raises ValueError, and changes nothing, when the file is not such a table or holds captions of another captioner.
    """

    def __init__(self, path, count, model, with_confidence=False):
        self.path, self.model = Path(path), str(model)
        kinds = ["caption", "confidence"] if with_confidence else ["caption"]
        columns = [f"{kind}_{n}" if n > 1 else kind for kind in kinds for n in range(1, count + 1)]
        columns = ["image", *columns, "model"]
        self.old_text = self.path.read_bytes().decode("utf-8", "surrogateescape") if self.path.is_file() else ""
        complete = self.old_text[: self.old_text.rfind("\n") + 1]  # without a last line that was cut off
        try:
            header, *rows = list(csv.reader(io.StringIO(complete, newline=""))) or [columns]
        except csv.Error as error:
            raise ValueError(f"{self.path}: not a table of captions ({error}); {REMEDY}") from error
        others = {row[-1] for row in rows if row} - {self.model}
        if header != columns:
            raise ValueError(f"{self.path}: its columns are {', '.join(header)}, not {', '.join(columns)}; {REMEDY}")
        if others:
            raise ValueError(f"{self.path}: it has captions by {min(others)}, not by {self.model}; {REMEDY}")
        self.done = {row[0] for row in rows if row}
        self.text = complete or _as_csv([columns])

    def start(self):
        """Write the header of a new table, or remove a line that was cut off. Raises OSError that names the file."""

        def write(draft):
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(self.text.encode("utf-8", "surrogateescape"))

        if self.text != self.old_text:
            write_atomically(self.path, write)

    def __contains__(self, name):
        return name in self.done

    def add(self, rows):
        """Append [(image, [captions]), ...] to the file; with confidence [(image, [captions], [confidences]), ...].
        Raises OSError that names the file."""
        lines = []
        for image, captions, *sure in rows:
            columns = [" ".join(caption.split()) for caption in captions]
            lines.append([image, *columns, *(f"{value:.4f}" for value in (sure[0] if sure else [])), self.model])
        text = _as_csv(lines)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise OSError(
                f"{self.path}: could not be written ({error.strerror}); what was written before is complete, and the "
                "same command resumes when there is room"
            ) from error
        self.done.update(image for image, *_ in rows)

    def write_list_to_check(self, min_confidence):
        """Write a second table with the images of this one whose first caption has less confidence than that, the least
        sure first -> (its path, how many)."""
        header, *rows = csv.reader(io.StringIO(self.path.read_bytes().decode("utf-8", "surrogateescape"), newline=""))
        place = header.index("confidence")
        low = sorted((row for row in rows if float(row[place]) < min_confidence), key=lambda row: float(row[place]))
        path, text = self.path.with_stem(f"{self.path.stem}_to_check"), _as_csv([header, *low])
        write_atomically(path, lambda draft: draft.write_bytes(text.encode("utf-8", "surrogateescape")))
        return path, len(low)


def _as_csv(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
