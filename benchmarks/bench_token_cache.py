"""How much faster is an epoch that reads from disk what the frozen part of an encoder makes than one that computes it?

    python benchmarks/bench_token_cache.py                                   photos of the built-in Shapes
    python benchmarks/bench_token_cache.py --data data/flickr8k --photos 160   those of another dataset

The decoder is that of recipes/flickr8k_frozen.toml. The first table has frozen encoders, the second those whose last
stages train. Epochs of all kinds are timed in turns in one process; the tables show medians and ranges. Encoders have
random weights, which does not change their time.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"))

import timm
import torch
from safetensors.torch import save_file

import MyLLM_Vit_gpt2_captioning as script

CASES = [  # encoder, captions that share one encoding of their photo
    ("tf_efficientnet_lite0", 5),
    ("tf_efficientnet_lite0", 1),
    ("resnet50", 5),
    ("vit_base_patch16_224", 5),
]
TUNED = [  # encoder, how many of its last stages (blocks of a ViT) train
    ("tf_efficientnet_lite0", 2),
    ("resnet50", 1),
    ("vit_base_patch16_224", 2),
]


def make_trainer(encoder, captions_per_image, cached, df, folder, stages=0):
    """A Trainer of the recipe with another encoder, whose last `stages` train from the first epoch on."""
    weights = folder / f"{encoder}.safetensors"
    if not weights.exists():
        save_file(timm.create_model(encoder).state_dict(), weights)
    constants = dict(
        encoder=encoder,
        encoder_weights=weights,
        coupling="final",
        captions_per_image=captions_per_image,
        trainable_stages=stages,
        freeze_epochs_gpt=0,
        freeze_epochs_all=0,
        cache_tokens=cached,
        cache_views=1,
        cache_dir=folder,
        model_path=folder / "run",
        batch_size=80,
        score_images=0,
        best_by="perplexity",
        feature_levels=1 if "vit" in encoder else 2,
    )
    argv = ["--recipe", "flickr8k_frozen", *(f"--{key}={value}" for key, value in constants.items())]
    model_cfg, train_cfg, _ = script.read_configs(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        return script.build_trainer(model_cfg, train_cfg, df)


def timed_epoch(trainer, epoch):
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        trainer.train_one_epoch(epoch)
    return time.perf_counter() - start


def in_turns(trainers, repeats):
    """Time an epoch of each trainer in turns -> a list of `repeats` rows of seconds, a column for each trainer."""
    for trainer in trainers:
        timed_epoch(trainer, 0)
    return [[timed_epoch(trainer, epoch) for trainer in trainers] for epoch in range(1, repeats + 1)]


def as_cells(times):
    """Median and range of each column of `in_turns`."""
    return [
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        for seconds in zip(*times, strict=True)
    ]


def ratio(times, column, other):
    return statistics.median(row[column] / row[other] for row in times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=script.DATA_DIR / "shapes", metavar="FOLDER")
    parser.add_argument("--photos", type=int, default=80, help="photos of an epoch (default: 80)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each kind (default: 5)")
    args = parser.parse_args()
    if args.data == script.DATA_DIR / "shapes":
        script.shapes.write_dataset(args.data, script.train_config.shapes_scenes)
    df = script.sources.load(args.data)
    train, val = (df[df["split"] == split]["image"].unique()[: args.photos] for split in ("train", "val"))
    df = df[df["image"].isin([*train, *val])]
    print(f"{args.photos} photos an epoch, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| encoder | captions that share an encoding | computed, s | from cache, s | faster |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for encoder, captions_per_image in CASES:
            trainers = [make_trainer(encoder, captions_per_image, cached, df, Path(folder)) for cached in (False, True)]
            times = in_turns(trainers, args.repeats)
            cells = encoder, captions_per_image, *as_cells(times), f"{ratio(times, 0, 1):.1f}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        print("\n| encoder | stages that train | computed, s | from cache in front of them, s | faster | ", end="")
        print("frozen, from cache, s | times a frozen epoch |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for encoder, stages in TUNED:
            kinds = (False, stages), (True, stages), (True, 0)
            trainers = [make_trainer(encoder, 5, cached, df, Path(folder), last) for cached, last in kinds]
            times = in_turns(trainers, args.repeats)
            computed, front, frozen = as_cells(times)
            cells = encoder, stages, computed, front, f"{ratio(times, 0, 1):.1f}", frozen, f"{ratio(times, 1, 2):.1f}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
