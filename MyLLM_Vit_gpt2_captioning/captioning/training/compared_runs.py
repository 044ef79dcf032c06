"""Runs beside each other, from the files that each has written: what differed, what came of it, the same photos."""

import json
import math
import os
import re
import tomllib
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from captioning.common.files import CURVES, RECIPE_FILE, RUN_FILES
from captioning.common.printable import from_markdown, in_html, printable
from captioning.data.photo_names import PhotoIndex
from captioning.pages import html_pages, plots
from captioning.scoring.intervals import mean_interval
from captioning.training.run_log import best_row

PAGE = "compared_runs.html"
# Constants that change nothing that is learned or scored: runs that differ only in these have one setting.
WITHOUT_EFFECT = {"model_path", "resume", "tracker", "log_steps", "save_minutes", "demo_images", "num_workers"}
WITHOUT_EFFECT |= {"keep_epoch_checkpoints", "push_every_epoch", "cache_dir"}
SCORES = {  # columns of metrics.csv -> what the tables call them
    "valid_perplexity": "perplexity",
    "CIDEr": "CIDEr",
    "BLEU-4": "BLEU-4",
    "METEOR": "METEOR",
    "exact_answers": "right answers",
}
AXES = {"epoch": "epochs", "captions": "captions seen in training", "hours": "hours"}
LONGEST_LABEL = 48  # characters; a setting with a longer one is called like its first run

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20em, 100%), 1fr)); gap: 0.8em; }
.curves img { border-radius: 0; }
.wide { overflow-x: auto; } .wide td, .wide th { border-bottom: 1px solid #e6e9ec; white-space: nowrap; }
.keys span { margin-right: 1.6em; white-space: nowrap; } .keys i { display: inline-block; width: 1.6em; height: 0.25em;
  vertical-align: middle; margin-right: 0.5em; } .note { color: #59636e; font-size: 13px; }
.photos { grid-template-columns: repeat(auto-fill, minmax(min(22em, 100%), 1fr)); }
figure > img { max-width: 18em; } figcaption td:first-child { overflow-wrap: anywhere; min-width: 8em; }
"""


@dataclass
class Run:
    """What a run has left in its folder."""

    folder: Path
    constants: dict  # of recipe.toml
    rows: list  # a dict an epoch: metrics.csv without empty cells, with "captions" and "hours" since the run's start
    samples: dict  # {(name of a photo, true captions): {epoch: caption}}, of samples.md
    name: str = ""
    setting: str = ""  # the same for all seeds of one setting

    @property
    def best(self):
        """The row of its best epoch, by what it was told to choose by."""
        by = "CIDEr" if self.constants.get("scst_epochs") else self.constants.get("best_by", "perplexity")
        return best_row(self.rows, by) or self.rows[-1]

    @property
    def epochs(self):
        """How many epochs it was to train."""
        return self.constants.get("epochs", 0) + self.constants.get("scst_epochs", 0)

    @property
    def is_finished(self):
        return self.rows[-1]["epoch"] >= self.epochs

    def caption(self, photo):
        """(epoch, caption) of a photo in the best epoch; where that was not scored, in the last before it that was."""
        captions, best = self.samples[photo], self.best["epoch"]
        epoch = max((epoch for epoch in captions if epoch <= best), default=min(captions))
        return epoch, captions[epoch]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_runs(folders):
    """The runs in `folders` and in the folders `earlier` below them -> ([Run, ...], [a line for each one left out]).

    Single files and the parts of a run are passed over, because the * of a shell brings them too.
    """
    found, left_out = [], []
    for folder in dict.fromkeys(map(Path, folders)):
        if not folder.exists():
            left_out.append(f"{folder}: there is no such folder")
        elif folder.is_dir() and folder.name not in RUN_FILES:
            inside = [folder] if _is_run(folder) else []
            inside += sorted(path for path in (folder / "earlier").glob("*") if path.is_dir())
            if not inside:  # a folder of runs, such as captioner/ or earlier/
                below = sorted(path for path in folder.glob("*") if _is_run(path))
                inside = [path for run in below for path in (run, *sorted((run / "earlier").glob("*/")))]
            if not inside:
                left_out.append(f"{folder}: not the folder of a run ({RECIPE_FILE} and metrics.csv are missing)")
            found += inside
    runs = []
    for folder in {path.resolve(): path for path in found}.values():
        try:
            runs.append(read_run(folder))
        except (OSError, ValueError) as error:
            left_out.append(str(error).splitlines()[0])
    return runs, [printable(line) for line in left_out]


def _is_run(folder):
    return any((folder / name).is_file() for name in (RECIPE_FILE, "metrics.csv"))


def read_run(folder):
    """The `Run` in a folder. Raises OSError or ValueError that names the file which is missing or damaged; timings.csv
    and samples.md may be missing."""
    for name in (RECIPE_FILE, "metrics.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: is missing")
    try:
        constants = tomllib.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        if not all(isinstance(constants.get(name, 0), int) for name in ("epochs", "scst_epochs", "seed")):
            raise ValueError("epochs and seed have to be integers")
    except ValueError as error:
        raise ValueError(f"{folder / RECIPE_FILE}: damaged ({error})") from error
    rows = _read_table(folder / "metrics.csv", ["epoch", "valid_loss", "valid_perplexity"])
    if not rows:
        raise ValueError(f"{folder / 'metrics.csv'}: no epoch is finished yet")
    if (folder / "timings.csv").is_file():
        _add_times(rows, _read_table(folder / "timings.csv", ["epoch", "training", "evaluation"]))
    samples = _read_samples(folder / "samples.md") if (folder / "samples.md").is_file() else {}
    return Run(folder, constants, rows, samples)


def _read_table(path, needed):
    """A table that a run writes -> one dict a row, without empty cells. The columns `needed` hold numbers in all."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
        missing = [name for name in needed if name not in table]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        numbers = [name for name in table if name != "stage"]
        table[numbers] = table[numbers].apply(pd.to_numeric)
        rows = [{key: row[key] for key in row if pd.notna(row[key])} for row in table.to_dict("records")]
        if any("epoch" not in row or row["epoch"] != int(row["epoch"]) for row in rows):
            raise ValueError("an epoch is not an integer")
        if any(row["epoch"] <= before["epoch"] for before, row in pairwise(rows)):
            raise ValueError("the epochs are not in their order")
    except (ValueError, TypeError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
    return [row | {"epoch": int(row["epoch"])} for row in rows]


def _add_times(rows, timings):
    """Add to the `rows` of metrics.csv the captions trained on and the hours from the start until the end of the epoch;
    not to those behind an epoch for which they are not known."""
    timing = {row["epoch"]: row for row in timings}
    for key, parts, unit in (("captions", ["captions"], 1), ("hours", ["training", "evaluation"], 3600)):
        each = [sum(timing.get(row["epoch"], {}).get(part, math.nan) for part in parts) / unit for row in rows]
        for row, total in zip(rows, accumulate(each), strict=True):
            if math.isfinite(total):
                row[key] = total


def _read_samples(path):
    """samples.md -> {(name, true captions): {epoch: caption}}; a photo without a caption is left out."""
    try:
        _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    samples = {}
    for section in sections:
        name, *lines = section.splitlines() or [""]
        true = tuple(from_markdown(line.removeprefix("- true: ")) for line in lines if line.startswith("- true: "))
        cells = filter(None, (re.fullmatch(r"\| (\d+) \| (.*) \|", line) for line in lines))
        if captions := {int(cell[1]): from_markdown(cell[2]) for cell in cells}:
            samples[from_markdown(name), true] = captions
    if not samples:
        raise ValueError(f"{path}: damaged (there is no caption in it)")
    return samples


# --- comparing --------------------------------------------------------------------------------------------------------


def differing(runs):
    """The constants that differ and may matter, without the seed -> {name: [value of each run as text, "-": none]}."""
    names = dict.fromkeys(name for run in runs for name in run.constants)
    values = {
        name: [_shown(run.constants[name]) if name in run.constants else "-" for run in runs]
        for name in names
        if name not in WITHOUT_EFFECT | {"seed"}
    }
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}


def _shown(value):
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def name_runs(runs):
    """Name every run by its folder, without the part that all have in common, and every setting by what differs
    -> the runs, those of one setting beside each other."""
    folders = [run.folder.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders])
    differences, labels = differing(runs), {}
    for i, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        run.name = printable(folder.relative_to(common))
        key = tuple(values[i] for values in differences.values())
        label = ", ".join(f"{name} {values[i]}" for name, values in differences.items()) or "all runs"
        run.setting = labels.setdefault(key, printable(label) if len(label) <= LONGEST_LABEL else f"like {run.name}")
    order = list(dict.fromkeys(labels.values()))
    return sorted(runs, key=lambda run: (order.index(run.setting), run.constants.get("seed", 0)))


def by_setting(runs):
    """-> {setting: its runs}."""
    groups = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    return groups


def runs_table(runs):
    """Rows of text, the header first: a run a row, with the scores of its best epoch."""
    scores = [key for key in SCORES if any(key in run.best for run in runs)]
    rows = [("run", "setting", "seed", "epochs", "best epoch", *(SCORES[key] for key in scores), "captions", "hours")]
    for run in runs:
        epochs = str(run.rows[-1]["epoch"]) + ("" if run.is_finished else f" of {run.epochs}")
        last, seed = run.rows[-1], str(run.constants.get("seed", "-"))
        seen = f"{last['captions']:,.0f}" if "captions" in last else "-"
        hours = f"{last['hours']:.3f}" if "hours" in last else "-"
        values = (f"{run.best[key]:.3f}" if key in run.best else "-" for key in scores)
        rows.append((run.name, run.setting, seed, epochs, str(run.best["epoch"]), *values, seen, hours))
    return rows


def constants_table(runs):
    """Rows of text, the header first: a constant that differs a row, a setting a column."""
    settings = list(by_setting(runs))
    first = [next(i for i, run in enumerate(runs) if run.setting == setting) for setting in settings]
    rows = [(name, *(printable(values[i]) for i in first)) for name, values in differing(runs).items()]
    return [("constant", *settings), *rows] if rows else []


def seeds_table(runs):
    """Rows of text, the header first: a setting a row, with mean and 95% interval of the best epochs over its seeds.

    A run counts when it is finished, and a seed once: the same run a second time would say nothing new. Empty when no
    setting has two seeds.
    """
    groups = {}
    for setting, of_setting in by_setting(runs).items():
        groups[setting] = list({run.constants.get("seed"): run for run in of_setting if run.is_finished}.values())
    if max(map(len, groups.values())) < 2:
        return []
    scores = [key for key in SCORES if any(key in run.best for run in runs)]
    rows = [("setting", "seeds", *(f"{SCORES[key]}, 95% interval" for key in scores))]
    for setting, seeds in groups.items():
        cells = []
        for key in scores:
            values = [run.best[key] for run in seeds if math.isfinite(run.best.get(key, math.nan))]
            if len(values) < 2:
                cells.append(f"{values[0]:.3f}" if values else "-")
            else:
                mean, low, high = mean_interval(values)
                cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        rows.append((setting, str(len(seeds)), *cells))
    return rows


def same_photos(runs):
    """Photos of samples.md as `html_pages.side_by_side` takes them: those that all runs have captioned, or, where there
    are none, those of at least one."""
    with_samples = [run for run in runs if run.samples]
    photos = dict.fromkeys(photo for run in with_samples for photo in run.samples)
    common = [photo for photo in photos if all(photo in run.samples for run in with_samples)]
    indices, shown = {}, []
    for name, true in common or photos:
        having = [run for run in with_samples if (name, true) in run.samples]
        rows = [("photo", name, "")]
        for run in having:
            epoch, caption = run.caption((name, true))
            rows.append((run.name, caption, f"epoch {epoch}"))
        paths = (_find_photo(name, run.constants, indices) for run in having)
        shown.append((next(filter(None, paths), Path(name)), rows, true))
    return shown


def _find_photo(name, constants, indices):
    """The file of a photo in the folders of a run's recipe, or None. `indices`: those that were read before. The name
    may have a question behind it."""
    folder = constants.get("image_dir") or constants.get("data_dir")
    if not isinstance(folder, str) or not folder:
        return None
    index = indices.setdefault(folder, PhotoIndex(folder))
    words = name.split(" ")
    names = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((found[0] for text in names if len(found := index.find(text)) == 1), None)


# --- the page ---------------------------------------------------------------------------------------------------------


def write_comparison(runs, path):
    """Write the page of `runs` to `path` -> the tables of it as one text. Raises OSError when it cannot be written."""
    runs = name_runs(runs)
    tables = {
        "Runs": runs_table(runs),
        "Constants that differ": constants_table(runs),
        "Mean over seeds": seeds_table(runs),
    }
    notes = {
        "Runs": "Scores are those of the best epoch, by what the run chose it by.",
        "Mean over seeds": "Of finished runs, with the interval of Student's t: it holds for other seeds of the same "
        "setting on the same photos.",
    }
    parts = [f"<h1>{len(runs)} {'run' if len(runs) == 1 else 'runs'} compared</h1>"]
    for title, rows in tables.items():
        if rows:
            parts.append(f"<h2>{title}</h2><div class=wide>{html_pages.table(rows)}</div>")
            parts += [f"<p class=note>{notes[title]}</p>"] if title in notes else []
    parts.append(f"<h2>Curves</h2>{_curves(runs)}")
    if photos := same_photos(runs):
        parts += ["<h2>The same photos</h2>", html_pages.side_by_side(photos)]
    html_pages.write_page(path, "Runs compared", parts, STYLE)
    return "\n\n".join(html_pages.text_table(rows) for rows in tables.values() if rows)


def _curves(runs):
    """Every quantity against every axis, a colour a setting; the training's own values are dotted."""
    settings = list(by_setting(runs))
    colours = dict(zip(settings, plots.colours(len(settings)), strict=True))
    keys = "".join(f'<span><i style="background: {colours[name]}"></i>{in_html(name)}</span>' for name in settings)
    pictures = []
    for quantity in CURVES:
        for axis, label in AXES.items():
            lines = []
            for run in runs:
                for key, dotted in ((f"train_{quantity}", True), (f"valid_{quantity}", False), (quantity, False)):
                    points = [(row[axis], row[key]) for row in run.rows if axis in row and key in row]
                    lines += [(points, colours[run.setting], dotted)] if points else []
            if lines:
                svg = plots.overlaid_as_svg(lines, label, quantity)
                pictures.append(
                    f'<img src="{html_pages.data_url("image/svg+xml", svg.encode())}" alt="{quantity} by {label}">'
                )
    note = "A line a run, a colour a setting. Solid: validation; dotted: training."
    return f"<p class=keys>{keys}</p><div class=curves>{''.join(pictures)}</div><p class=note>{note}</p>"
