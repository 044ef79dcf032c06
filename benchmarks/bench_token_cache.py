"""How much faster is an epoch that reads a frozen encoder's tokens from disk than one that computes them?

    python benchmarks/bench_token_cache.py                                   photos of the built-in Shapes
    python benchmarks/bench_token_cache.py --data data/flickr8k --photos 160   those of another dataset

The decoder is that of recipes/flickr8k_frozen.toml. Epochs with and without cache are timed in turns in one process;
the table shows medians and ranges. Encoders have random weights, which does not change their time.
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


def make_trainer(encoder, captions_per_image, cached, df, folder):
    """A Trainer of the recipe with another, frozen encoder."""
    weights = folder / f"{encoder}.safetensors"
    if not weights.exists():
        save_file(timm.create_model(encoder).state_dict(), weights)
    constants = dict(
        encoder=encoder,
        encoder_weights=weights,
        coupling="final",
        captions_per_image=captions_per_image,
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
            for trainer in trainers:
                timed_epoch(trainer, 0)
            times = [[timed_epoch(trainer, epoch) for trainer in trainers] for epoch in range(1, args.repeats + 1)]
            computed, cached = (
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                for seconds in zip(*times, strict=True)
            )
            ratio = statistics.median(without / with_cache for without, with_cache in times)
            print(f"| {encoder} | {captions_per_image} | {computed} | {cached} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
