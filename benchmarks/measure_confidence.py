"""What confidence and the check of pairs are worth, most of it on Shapes, where the truth about captions is known.

    python benchmarks/measure_confidence.py unseen       attributes that training never showed: is the captioner unsure?
    python benchmarks/measure_confidence.py damaged      5% of the training captions swapped, found, and left out
    python benchmarks/measure_confidence.py shifted      confidence without familiarity and with shifted copies
    python benchmarks/measure_confidence.py strange --captioner captioner --photos data/flickr8k/images
                                                         how unlike those of training it takes images of other kinds for

All but the last train the recipe `shapes` for some epochs, `damaged` three times for each seed.
"""

import argparse
import contextlib
import csv
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageOps

import captioners  # puts the script on the search path
import evaluate_captions
import prepare_data
from captioning.data import shapes
from captioning.decoding.confidence import Confidence, caption_with_confidence
from captioning.decoding.familiarity import is_strange, trust
from captioning.scoring.intervals import mean_interval

script = captioners.script

SCENES = 6000
UNSEEN = {"purple", "cross"}  # a colour and a shape
SWAPPED, DROPPED = 0.05, 0.06  # shares of the training captions


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def train(data, run, epochs, *options):
    """-> the share of unseen scenes that the trained captioner describes without an error."""
    argv = ["--recipe", "shapes", "--data_dir", data, "--model_path", run, "--epochs", epochs, *options]
    return quietly(script.main, [*map(str, argv), "--demo_images", "1"])["scores"]["unseen scenes"]


def rewrite_captions(source, target, change):
    """A copy of the dataset; `change`: [[scene's file name, comment number, caption], ...] -> the rows to write."""
    shutil.copytree(source, target)
    head, *lines = (source / "results.csv").read_text().splitlines()
    rows = change([line.split("| ") for line in lines])
    (target / "results.csv").write_text("\n".join([head, *map("| ".join, rows)]) + "\n")
    return target


# --- attributes that training never showed ----------------------------------------------------------------------------


def measure_unseen(folder, args):
    data = folder / "shapes"
    split = json.loads((data / shapes.SPLIT_FILE).read_text())
    new = {image["filename"] for image in split["images"] if any(UNSEEN & set(thing) for thing in image["scene"])}
    trained_on = {image["filename"] for image in split["images"] if image["split"] != "test"} - new
    known_only = rewrite_captions(data, folder / "known", lambda rows: [row for row in rows if row[0] not in new])
    run = folder / "run"
    train(known_only, run, args.epochs)
    model, tokenizer = script.load_captioner(run)
    known, scenes = Confidence.load(run), shapes.true_scenes(data)
    print(f"trained on {len(trained_on):,} scenes without {' and '.join(sorted(UNSEEN))}, {args.epochs} epochs")
    columns = "alone | with familiarity"  # "alone": by log-probabilities
    print(f"| test scenes | number | right | unlike | confidence, {columns} | above 0.9, {columns} | wrong word |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, wanted in (("known attributes", False), ("with an unseen one", True)):
        of_split = [i["filename"] for i in split["images"] if i["split"] == "test" and (i["filename"] in new) == wanted]
        images = [data / shapes.IMAGE_FOLDER / image for image in of_split]
        found = [one for [one] in caption_with_confidence(model, tokenizer, images, known)]
        right = [shapes.parse_caption(text) == scenes[image] for (text, _), image in zip(found, of_split, strict=True)]
        sure = np.array([judged.caption for _, judged in found])
        wrong_words = []
        for (text, judged), image in zip(found, of_split, strict=True):
            right_words = shapes.right_words(text.split(), scenes[image])
            if len(right_words) == len(judged.words):
                wrong_words += [c for c, is_right in zip(judged.words, right_words, strict=True) if not is_right]
        strange = np.mean([is_strange(judged.familiarity) for _, judged in found])
        shares = [1.0 if judged.familiarity is None else judged.familiarity for _, judged in found]
        alone = sure / trust(shares)  # by log-probabilities
        cells = f"{np.mean(right):.1%} | {strange:.1%} | {alone.mean():.2f} | {sure.mean():.2f}"
        cells += f" | {(alone > 0.9).mean():.1%} | {(sure > 0.9).mean():.1%}"
        cells += f" | {np.mean(wrong_words):.2f}"
        print(f"| {name} | {len(images):,} | {cells} |", flush=True)


# --- captions that belong to other scenes -----------------------------------------------------------------------------


def swap(seed, train_names):
    """-> a `change` of `rewrite_captions` that swaps SWAPPED of the training captions among scenes."""

    def change(rows):
        rng = random.Random(seed)
        places = [i for i, row in enumerate(rows) if row[0] in train_names]
        chosen = rng.sample(places, round(SWAPPED * len(places)))
        captions = [rows[i][2] for i in chosen]
        for place, caption in zip(chosen, captions[1:] + captions[:1], strict=True):
            rows[place][2] = caption
        return rows

    return change


def measure_damaged(folder, args):
    data = folder / "shapes"
    images = json.loads((data / shapes.SPLIT_FILE).read_text())["images"]
    scenes = {i["filename"]: tuple(map(tuple, i["scene"])) for i in images if i["split"] == "train"}
    print("| seed | sound | damaged | swapped captions found | with --exclude |\n| --- | --- | --- | --- | --- |")
    rates = []
    for seed in range(args.seeds):
        damaged = rewrite_captions(data, folder / f"damaged{seed}", swap(seed, scenes))
        runs = {name: folder / f"{name}{seed}" for name in ("sound_run", "damaged_run", "mended_run")}
        options = ["--seed", str(seed)]
        row = [train(data, runs["sound_run"], args.epochs, *options)]
        row.append(train(damaged, runs["damaged_run"], args.epochs, *options))
        report = folder / f"check{seed}"
        check = [
            "--check",
            damaged,
            "--with",
            runs["damaged_run"],
            "--drop_worst",
            f"{DROPPED:.0%}",
            "--report",
            report,
        ]
        with contextlib.suppress(SystemExit):  # scenes of one combination look alike, which the check finds, too
            quietly(prepare_data.main, list(map(str, check)))
        with open(report / "exclude.csv", newline="", encoding="utf-8") as file:
            listed = list(csv.DictReader(file))
        hits = sum(shapes.parse_caption(pair["caption"]) != scenes[Path(pair["image"]).name] for pair in listed)
        wrong = [line.split("| ") for line in (damaged / "results.csv").read_text().splitlines()[1:]]
        wrong = sum(name in scenes and shapes.parse_caption(text) != scenes[name] for name, _, text in wrong)
        row.append(train(damaged, runs["mended_run"], args.epochs, *options, "--exclude", report / "exclude.csv"))
        rates.append(row)
        print(f"| {seed} | {row[0]:.1%} | {row[1]:.1%} | {hits} of {wrong} | {row[2]:.1%} |", flush=True)
    for name, column in (("damage", 1), ("what is left of it with --exclude", 2)):
        mean, low, high = mean_interval([100 * (row[0] - row[column]) for row in rates])
        print(f"{name}: {mean:.1f} points, 95% interval over seeds {low:.1f} to {high:.1f}")


# --- shifted copies of the photo --------------------------------------------------------------------------------------


def measure_shifted(folder, args):
    data, run = folder / "shapes", folder / "run"
    train(data, run, args.epochs)
    model, tokenizer = script.load_captioner(run)
    images = sorted((data / shapes.IMAGE_FOLDER).iterdir())[-256:]
    known, times = {}, {}
    base = [str(run), "--data", str(data)]
    for name, options in (("photo alone", []), ("without familiarity", []), ("with shifted copies", ["--shifted"])):
        quietly(evaluate_captions.main, [*base, "--split", "val", "--calibrate", *options])
        known[name], times[name] = Confidence.load(run), []
        if name == "without familiarity":
            known[name].familiarity = None
            known[name].save(run)
        scores = quietly(evaluate_captions.main, [*base, "--split", "test"])
        print(f"\n{name}")
        for measure, value in scores.items():
            if "wrong" in measure or measure.startswith("calibration error"):
                print(f"    {measure:40s} {value:.3f}")
    for _ in range(7):  # interleaved: the machine's mood counts for both
        for name, one in known.items():
            start = time.perf_counter()
            caption_with_confidence(model, tokenizer, images, one)
            times[name].append((time.perf_counter() - start) / len(images))
    for name, of_one in times.items():
        print(f"{name}: {1000 * median(of_one):.2f} ms a caption")


# --- images of other kinds --------------------------------------------------------------------------------------------


def measure_strange(folder, args):
    rng, changed = np.random.default_rng(0), {}
    photos = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if args.names:
        names = set(args.names.read_text().split())
        photos = [path for path in photos if path.name in names]
    changes = {
        "upside down": lambda photo: photo.rotate(180),
        "negatives": ImageOps.invert,
        "without colours": lambda photo: photo.convert("L").convert("RGB"),
        "noise": lambda photo: Image.fromarray(rng.integers(0, 256, (*photo.size[::-1], 3), dtype=np.uint8)),
    }
    for name, change in changes.items():
        (folder / name).mkdir()
        changed[name] = [folder / name / f"{path.stem}.png" for path in photos[:100]]
        for path, target in zip(photos, changed[name], strict=False):
            change(Image.open(path).convert("RGB")).save(target)
    changed["scenes of Shapes"] = sorted((folder / "shapes" / shapes.IMAGE_FOLDER).iterdir())[:100]
    model, tokenizer = script.load_captioner(args.captioner)
    if (known := Confidence.load(args.captioner)) is None or known.familiarity is None:
        sys.exit(f"error: {args.captioner} does not know what is familiar: evaluate_captions.py --calibrate")
    print(
        "| images | number | unlike training | mean confidence | without familiarity |\n| --- | --- | --- | --- | --- |"
    )
    for name, images in {"photos as they are": photos, **changed}.items():
        judged = [one for [(_, one)] in caption_with_confidence(model, tokenizer, images, known)]
        share, sure = np.array([one.familiarity for one in judged]), np.array([one.caption for one in judged])
        strange = np.mean([is_strange(one.familiarity) for one in judged])
        print(f"| {name} | {len(images)} | {strange:.1%} | {sure.mean():.3f} | {(sure / trust(share)).mean():.3f} |")


MEASUREMENTS = {
    "strange": measure_strange,
    "unseen": measure_unseen,
    "damaged": measure_damaged,
    "shifted": measure_shifted,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="(default: 5: about 80% right)")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help=f"(default: {SCENES:,})")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="damaged: training runs of each kind (default: 3)"
    )
    parser.add_argument("--captioner", type=Path, metavar="FOLDER", help="strange: a calibrated captioner")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="strange: photos like those of its training")
    parser.add_argument("--names", type=Path, metavar="FILE", help="strange: only the photos whose names it lists")
    args = parser.parse_args(argv)
    if args.what == "strange" and not (args.captioner and args.photos):
        parser.error("strange needs --captioner and --photos")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", args.scenes)
        MEASUREMENTS[args.what](folder, args)


if __name__ == "__main__":
    sys.exit(main())
