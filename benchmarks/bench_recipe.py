"""How long would the COCO recipe take on this machine? It is trained for a minute, and the rest is extrapolated.

    python benchmarks/bench_recipe.py                          as the recipe is
    python benchmarks/bench_recipe.py --batch_size 1280 --num_workers 16

The steps are those of a run, by the script's own `Trainer`: photos are read from JPEGs of 500 x 375 pixels, decoded,
augmented and moved to the device, in the recipe's precision. Photos and captions are synthetic and the weights random,
which is the same work without a download; captions are about as long as COCO's. The files are in the disk cache. What
comes once an epoch (the start of the workers, validation, scores, checkpoints) is not included. All further options are
constants of the script.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import captioners  # puts the script on the search path
from bench_data import QUALITY, SIZES, draw_photo
from timing import check_device, machine

script = captioners.script

RECIPE, PHOTOS = "vit_gpt2_coco", 118_287  # photos of COCO's train2017
WORDS = ("a", "man", "woman", "dog", "cat", "train", "on", "in", "with", "the", "red", "of", "street", "sitting", "by")
WARMUP = 10  # steps


class Measured(Exception):
    """Enough steps were timed."""


def write_dataset(folder, photos, distinct=100):
    """Write `photos` photos, `distinct` of them different, and captions.jsonl with 5 captions of 7 to 20 words, 10.4 in
    the mean, for each."""
    rng = random.Random(0)
    for number in range(min(photos, distinct)):
        draw_photo(number, *SIZES[0]).save(folder / f"{number}.jpg", quality=QUALITY)
    for number in range(distinct, photos):
        os.link(folder / f"{number % distinct}.jpg", folder / f"{number}.jpg")
    with (folder / "captions.jsonl").open("w") as lines:
        for number in range(photos):
            for _ in range(5):
                words = rng.choices(WORDS, k=min(20, 7 + int(rng.expovariate(1 / 4))))
                row = dict(image=f"{number}.jpg", caption=" ".join(words), split="train")
                lines.write(json.dumps(row) + "\n")


def make_loaders(folder, argv):
    """-> (configs of the recipe with random weights, its loaders) for the dataset in `folder`; `argv`: options that
    change constants."""
    argv = ["--recipe", RECIPE, "--encoder_weights", "scratch", "--decoder_weights", "scratch", *argv]
    argv += ["--save_minutes", "1000"]  # states to resume from are not timed
    model_config, train_config, _ = script.read_configs(argv)
    train_config.model_path = folder / "run"
    df = script.sources.load_usable(folder, None, None, "flickr30k")
    model_config.tokenizer = "word"  # the head keeps the recipe's vocab_size
    tokenizer = script.build_tokenizer(model_config, df["caption"])
    loaders = script.build_dataloaders(df, tokenizer, model_config, train_config)
    return (model_config, train_config), loaders


def make_trainer(folder, argv):
    """The Trainer of the recipe, as `make_loaders`."""
    configs, loaders = make_loaders(folder, argv)
    return script.Trainer(*configs, loaders)


def seconds_of_steps(trainer, min_seconds):
    """Train for `min_seconds` after a warm-up -> seconds of each step, from the end of the previous one to its own; the
    first step of an epoch is left out. Raises ValueError where an epoch has no other."""
    seconds, previous, step = [], None, trainer.train_step
    if len(trainer.train_dl) < 2:
        raise ValueError("an epoch has a single step: give more --photos")

    def timed(batches):
        nonlocal previous
        reported = step(batches)  # waits for the GPU: at the latest for the step before
        now = time.perf_counter()
        if previous is not None:
            seconds.append(now - previous)
        previous = now
        if len(seconds) > WARMUP and sum(seconds[WARMUP:]) >= min_seconds:
            raise Measured
        return reported

    trainer.train_step = timed
    try:
        for epoch in itertools.count():
            previous = None
            trainer.train_one_epoch(epoch)
    except Measured:
        return seconds[WARMUP:]


def measure(device, seconds, photos, constants, distinct=100):
    """Train the recipe, with `constants` changed by options, for some seconds on a dataset of `photos` photos, and
    print a table."""
    constants = ["--device", device, *constants]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), photos, distinct)
        trainer = make_trainer(Path(folder), constants)
        config = trainer.train_config
        per_step = config.batch_size // config.captions_per_image * config.accumulate
        seconds = seconds_of_steps(trainer, seconds)
    rate = per_step * len(seconds) / sum(seconds)
    print(f"    python benchmarks/bench_recipe.py {' '.join(constants)}\n")
    print("| steps | photos a step | photos/s | captions/s | ms of a step, median | the recipe, minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    minutes = PHOTOS * config.epochs / rate / 60
    print(
        f"| {len(seconds)} | {per_step} | {rate:,.1f} | {rate * config.captions_per_image:,.1f} | "
        f"{1000 * statistics.median(seconds):,.0f} | {minutes:,.0f} for {config.epochs} epochs of {PHOTOS:,} photos |"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="length of the measurement (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=20_000, help="photos of the dataset (default: %(default)s)")
    args, constants = parser.parse_known_args(argv)
    check_device(args.device)
    print(f"{machine()}\n")
    measure(args.device, args.seconds, args.photos, constants)


if __name__ == "__main__":
    main()
