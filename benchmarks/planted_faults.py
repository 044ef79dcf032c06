"""Does the run say why it fails? Faults are planted in small runs on Shapes, one at a time. What each run finds within
200 steps, an epoch, is a row of the table: what was found first and second, and whether that is the fault.

    python benchmarks/planted_faults.py                       all faults, and healthy runs with three seeds
    python benchmarks/planted_faults.py --flickr8k FOLDER --encoder_weights FILE
                          the same on 1,300 photos of Flickr8k, with the encoder and settings of recipe flickr8k_frozen
    python benchmarks/planted_faults.py --only learning       those whose name contains the text
    python benchmarks/planted_faults.py --cost                the share of a run's time that the diagnosis takes
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import captioners  # puts the script on the search path
from captioning.data import shapes
from captioning.model.loss import IGNORED_LABEL
from captioning.training.diagnosis import Diagnosis

script = captioners.script

SCENES, STEPS = 3200, 200
ENCODER = dict(img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=2, weight_init="jax")
SMALL = [
    "--recipe", "shapes", "--embed_dim", "64", "--num_heads", "2", "--depth", "2", "--encoder_options",
    json.dumps(ENCODER), "--lr", "2e-3", "--epochs", "4", "--score_images", "100", "--demo_images", "1", "--device",
    "cpu", "--num_workers", "0",
]  # fmt: skip
PHOTOS, PHOTO_LR = dict(train=1200, val=100), 6e-4
ON_PHOTOS = [
    "--recipe", "flickr8k_frozen", "--cache_views", "1", "--batch_size", "30", "--lr", str(PHOTO_LR), "--epochs", "4",
    "--ema_decay", "0", "--vocab_size", "1500", "--score_images", "100", "--demo_images", "1", "--device", "cpu",
    "--num_workers", "0",
]  # fmt: skip


# --- faults: each changes the options, the captions, the batches or the Trainer ---------------------------------------


def shuffled(df, every):
    """The captions of each `every`-th training photo go to the next such photo."""
    images = list(dict.fromkeys(df.loc[df["split"] == "train", "image"]))[::every]
    following = dict(zip(images, images[1:] + images[:1], strict=True))
    return df.assign(image=df["image"].map(lambda image: following.get(image, image)))


def same_caption(df):
    images = dict.fromkeys(df.loc[df["split"] == "train", "image"])
    chosen = set(list(images)[:: 10 // 3])
    return df.assign(caption=df["caption"].where(~df["image"].isin(chosen), "a picture"))


def cut_off(df):
    return df.assign(caption=df["caption"].map(lambda caption: " ".join(caption.split()[:2])))


def copied_photos(df, folder):
    """A copy of every validation photo, under another name, is a training photo."""
    validation = df[df["split"] == "val"].copy()
    copies = {image: folder / f"copy_{image.name}" for image in dict.fromkeys(validation["image"])}
    for image, copy in copies.items():
        shutil.copy(image, copy)
    validation["image"], validation["split"] = validation["image"].map(copies), "train"
    return pd.concat([df, validation], ignore_index=True)


def no_end(batch, tokenizer):
    images, ids, labels = batch
    return images, ids, labels.masked_fill(labels == tokenizer.eos_token_id, IGNORED_LABEL)


def no_begin(batch, tokenizer):
    images, ids, labels = batch
    return images, ids[:, 1:], labels[:, 1:]


def silent_cross_attention(trainer):
    for block in trainer.model.gpt.trf_blocks:
        for parameter in block.cross_attn.c_proj.parameters():
            parameter.data.zero_()
            parameter.requires_grad = False


def constant_encoder(trainer):
    encoder = trainer.model.encoder
    embed, levels = encoder.embed, encoder.levels
    if hasattr(encoder, "vit"):  # its blocks take up what comes out of `embed`
        encoder.embed = lambda images: embed(images)[:1].expand(len(images), -1, -1)
    else:
        encoder.levels = lambda images: [level[:1].expand(len(images), -1, -1) for level in levels(images)]


def overflow(trainer):
    """Every third step has an infinite loss, as float16 without a scaled loss may have."""
    real, count = trainer.objective.loss, iter(range(10**9))

    def loss(inputs):
        loss, value = real(inputs)
        return (loss * torch.inf, value) if next(count) % 3 == 2 else (loss, value)

    trainer.objective.loss = loss


UNFROZEN = ["--freeze_epochs_gpt", "0", "--freeze_epochs_all", "0", "--pretrained_lr_scale", "20"]
NEVER_CACHED = ["--cache_tokens", "false"]


def faults(photos):
    """{name: (what it changes, name of the finding)}; `photos`: on Flickr8k, not on Shapes."""
    lr, words = (PHOTO_LR, 50) if photos else (2e-3, 10)
    never_cached = NEVER_CACHED if photos else []
    trained = (
        [*UNFROZEN, "--trainable_stages", "-1", *never_cached]
        if photos
        else ["--encoder_weights", "pretrained", *UNFROZEN]
    )
    return {
        "learning rate x 100": (dict(options=["--lr", str(100 * lr)]), "the learning rate is too high"),
        "learning rate / 1000": (dict(options=["--lr", str(lr / 1000)]), "the learning rate is too low"),
        "[EOS] is never a target": (dict(batch=no_end), "the end of captions is not learned"),
        "[BOS] is missing in training": (dict(batch=no_begin), "captions do not begin with [BOS]"),
        "captions shuffled among photos": (dict(df=partial(shuffled, every=1)), "the photo makes no difference"),
        "half the captions shuffled": (dict(df=partial(shuffled, every=2)), "many captions belong to other photos"),
        "pixels in 0..255": (
            dict(options=["--preprocessing", json.dumps(dict(mean=[0.0] * 3, std=[1 / 255] * 3))]),
            f"the encoder gets {'other pixels than it was trained with' if photos else 'pixels of the wrong size'}",
        ),
        "cross-attention's output held at zero": (dict(trainer=silent_cross_attention), "cross-attention adds nothing"),
        "the encoder returns a constant": (
            dict(trainer=constant_encoder, options=never_cached),
            "the encoder sees no difference between photos",
        ),
        "the encoder trained with a rate that destroys it": (
            dict(options=trained),
            "the pretrained encoder is overwritten",
        ),
        "captions truncated to 3 tokens": (dict(options=["--seq_len", "3"]), "captions are cut off"),
        "the same caption for 30% of the photos": (dict(df=same_caption), "many photos have the same caption"),
        "validation photos also in training": (dict(files=copied_photos), "validation photos are in training too"),
        "label smoothing 0.9": (dict(options=["--label_smoothing", "0.9"]), "label smoothing is too strong"),
        "dropout 0.9": (dict(options=["--mlp_dropout", "0.9", "--residual_dropout", "0.9"]), "dropout is too strong"),
        "overflow in every third step": (dict(trainer=overflow), "steps are left out"),
        f"a word list of {words} words": (
            dict(options=["--tokenizer", "word", "--vocab_size", str(words)]),
            "most captions are full of <unk>",
        ),
    }


HEALTHY = {f"none, seed {seed}": (dict(options=["--seed", str(seed)]), None) for seed in range(3)}


def write_photos(flickr8k, folder):
    """The first photos of Flickr8k's splits (links) and their captions, to `folder`."""
    (folder / "images").mkdir(parents=True)
    lines = (flickr8k / "captions.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = set()
    for split, count in PHOTOS.items():
        names = (flickr8k / f"{split}.txt").read_text().split()[:count]
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        chosen.update(names)
    for name in chosen:
        (folder / "images" / name).symlink_to((flickr8k / "images" / name).absolute())
    kept = [line for line in lines[1:] if line.split(",", 1)[0] in chosen]
    (folder / "captions.txt").write_text("".join([lines[0], *kept]), encoding="utf-8")


def run(folder, settings, options=(), df=None, files=None, batch=None, trainer=None):
    """Train for STEPS steps with a fault, on the dataset in `folder`/data -> the Trainer's `Diagnosis`."""
    argv = [*settings, "--data_dir", str(folder / "data"), "--model_path", str(folder / "run"), *options]
    model_config, train_config, _ = script.read_configs(argv)
    torch.manual_seed(train_config.seed)
    rows = script.load_data(train_config, script.DATA_DIR)
    rows = df(rows) if df else files(rows, folder) if files else rows
    from_pretrained = script.VisionGPT2Model.from_pretrained
    if "pretrained" in options:  # there are no weights of this small encoder: its random ones stand for them
        script.VisionGPT2Model.from_pretrained = classmethod(lambda cls, config: cls(config))
    try:
        made = script.build_trainer(model_config, train_config, rows)
    finally:
        script.VisionGPT2Model.from_pretrained = from_pretrained
    if batch:
        collate = made.train_dl.collate_fn
        made.train_dl.collate_fn = lambda items: batch(collate(items), made.tokenizer)
    if trainer:
        trainer(made)
    train_step, left = made.train_step, iter(range(STEPS, 0, -1))

    def limited(batches):
        if next(left, 0) == 1:
            raise _Enough
        return train_step(batches)

    made.train_step = limited
    with contextlib.suppress(_Enough, FloatingPointError):
        made.run_training()
    if made.log.diagnosis.measured.get("epochs", 0) < 0.9:
        made.log.diagnosis.epoch(1, made.log.rows, [], [])
    return made.log.diagnosis


class _Enough(KeyboardInterrupt):
    """The run has had its steps."""


def print_cost(folder):
    """Train the Shapes recipe for two epochs and print which share of training and evaluation the diagnosis took."""
    spent = []

    def timed(method):
        def run_and_time(*args):
            start = time.perf_counter()
            method(*args)
            spent.append(time.perf_counter() - start)

        return run_and_time

    for name in ("begin", "step", "epoch"):
        setattr(Diagnosis, name, timed(getattr(Diagnosis, name)))
    argv = ["--recipe", "shapes", "--data_dir", str(folder / "data"), "--epochs", "2", "--device", "cpu"]
    model_config, train_config, _ = script.read_configs([*argv, "--model_path", str(folder / "run")])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = script.build_trainer(model_config, train_config, script.load_data(train_config, script.DATA_DIR))
        trainer.run_training()
    whole = sum(row["training"] + row["evaluation"] for row in trainer.log.timings)
    print(f"{sum(spent):.2f} s of {whole:.1f} s, {sum(spent) / whole:.2%}: {len(trainer.train_dl)} steps an epoch")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="also print all that was measured")
    parser.add_argument("--cost", action="store_true", help="measure what the diagnosis costs instead")
    parser.add_argument("--flickr8k", type=Path, metavar="FOLDER", help="Flickr8k, in the place of Shapes")
    parser.add_argument("--encoder_weights", metavar="FILE", help="of tf_efficientnet_lite0, for --flickr8k")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder, settings = Path(folder), SMALL
        if args.flickr8k:
            write_photos(args.flickr8k, folder / "data")
            weights = ["--encoder_weights", args.encoder_weights] if args.encoder_weights else []
            settings = [*ON_PHOTOS, *weights, "--cache_dir", str(folder / "cache")]
        else:
            shapes.write_dataset(folder / "data", SCENES)
        if args.cost:
            return print_cost(folder)
        print("| planted | found first | found second | named |\n| --- | --- | --- | --- |")
        right, planted = {}, faults(bool(args.flickr8k))
        for name, (fault, expected) in (HEALTHY | planted).items():
            if args.only in name:
                right[name] = row(folder, settings, name, fault, expected, args.verbose)
    named = [right[name] for name in planted if name in right]
    print(f"\n{sum(named)} of {len(named)} faults named among the first two findings")


def row(folder, settings, name, fault, expected, verbose):
    """Run with a fault and print its row -> whether the fault was named, or none where there was none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        diagnosis = run(folder, settings, **fault)
    found = [finding.name for finding in diagnosis.findings]
    right = expected in found[:2] if expected else not found
    print(f"| {name} | {' | '.join([*found, '-', '-'][:2])} | {'yes' if right else 'NO'} |", flush=True)
    if verbose or not right:
        print(diagnosis.as_table())
    return right


if __name__ == "__main__":
    main()
