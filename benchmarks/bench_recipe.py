"""How long would the COCO recipe take here? Its training runs for a minute on JPEGs, and the rest is computed.

    python benchmarks/bench_recipe.py                          5 captions a photo, 640 captions a step
    python benchmarks/bench_recipe.py --batch_size 1280 --num_workers 16

Everything that a run does in a step is done, by the script's own `Trainer`: photos are read from files of 500 x 375
pixels, decoded, augmented and moved, in the recipe's precision. The photos and their captions are synthetic, the
weights random: the same work, without a download. The files lie in the disk cache. Validation, scores and checkpoints,
once an epoch, come on top. More options are constants of the script.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import captioners  # finds the script
from bench_data import QUALITY, SIZES, draw_photo
from timing import machine

script = captioners.script

RECIPE, PHOTOS = "vit_gpt2_coco", 118_287  # of COCO's train2017
WORDS = [
    "a", "man", "woman", "dog", "cat", "train", "on", "in", "with", "the", "red", "of", "street", "sitting", "by",
]  # fmt: skip
WARMUP = 10  # steps


class Measured(Exception):
    """Enough steps were timed."""


def write_dataset(folder, photos, different=100):
    """Write so many photos, a few of them different, and a captions.jsonl with 5 captions of 10 words for each."""
    rng = random.Random(0)
    for number in range(min(photos, different)):
        draw_photo(number, *SIZES[0]).save(folder / f"{number}.jpg", quality=QUALITY)
    for number in range(different, photos):
        os.link(folder / f"{number % different}.jpg", folder / f"{number}.jpg")
    with (folder / "captions.jsonl").open("w") as lines:
        for number in range(photos):
            for _ in range(5):
                row = dict(image=f"{number}.jpg", caption=" ".join(rng.choices(WORDS, k=10)), split="train")
                lines.write(json.dumps(row) + "\n")


def make_trainer(folder, argv):
    """The recipe's Trainer, with random weights, for the dataset in `folder`; `argv`: constants to change."""
    argv = ["--recipe", RECIPE, "--encoder_weights", "scratch", "--decoder_weights", "scratch", *argv]
    model_config, train_config, _ = script.read_configs(argv)
    train_config.model_path = folder / "run"
    df = script.sources.load_usable(folder, None, None, "flickr30k")
    model_config.tokenizer = "word"  # a few words of a head that is as wide as ever
    tokenizer = script.build_tokenizer(model_config, df["caption"])
    return script.Trainer(
        model_config, train_config, script.build_dataloaders(df, tokenizer, model_config, train_config)
    )


def seconds_of_steps(trainer, least):
    """Train until so many seconds are measured -> seconds of each step, from the end of the one before to its own."""
    times, step = [], trainer.train_step

    def timed(batches):
        reported = step(batches)  # it asks for the loss, and so waits for a GPU
        times.append(time.perf_counter())
        if len(times) > WARMUP + 1 and times[-1] - times[WARMUP] >= least:
            raise Measured
        return reported

    trainer.train_step = timed
    epoch = 0
    try:
        while True:
            trainer.train_one_epoch(epoch)
            epoch += 1
    except Measured:
        return [after - before for before, after in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="to measure (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=20_000, help="of the dataset (default: %(default)s)")
    args, constants = parser.parse_known_args(argv)
    constants = ["--device", args.device, "--captions_per_image", "5", "--batch_size", "640", *constants]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), args.photos)
        trainer = make_trainer(Path(folder), constants)
        config = trainer.train_config
        photos = config.batch_size // config.captions_per_image * config.accumulate
        seconds = seconds_of_steps(trainer, args.seconds)
    rate = photos * len(seconds) / sum(seconds)
    print(f"{machine()}\n\n    python benchmarks/bench_recipe.py {' '.join(constants)}\n")
    print("| steps | photos a step | photos/s | captions/s | ms of a step, median | the recipe, minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    minutes = PHOTOS * config.epochs / rate / 60
    print(
        f"| {len(seconds)} | {photos} | {rate:,.1f} | {rate * config.captions_per_image:,.1f} | "
        f"{1000 * statistics.median(seconds):,.0f} | {minutes:,.0f} for {config.epochs} epochs of {PHOTOS:,} photos |"
    )


if __name__ == "__main__":
    main()
