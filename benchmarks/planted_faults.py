"""Does the run say why it fails? Faults are planted in small runs on Shapes, one at a time. What each run finds within
200 steps, an epoch, is a row of the table: what was found first and second, and whether that is the fault.

    python benchmarks/planted_faults.py                       all faults, and healthy runs with three seeds
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
    embed = trainer.model.encoder.embed
    trainer.model.encoder.embed = lambda images: embed(images)[:1].expand(len(images), -1, -1)


def overflow(trainer):
    """Every third step has an infinite loss, as float16 without a scaled loss may have."""
    real, count = trainer.objective.loss, iter(range(10**9))

    def loss(inputs):
        loss, value = real(inputs)
        return (loss * torch.inf, value) if next(count) % 3 == 2 else (loss, value)

    trainer.objective.loss = loss


PRETRAINED = ["--encoder_weights", "pretrained", "--freeze_epochs_gpt", "0", "--freeze_epochs_all", "0"]
FAULTS = {  # name: (what it changes, name of the finding)
    "learning rate x 100": (dict(options=["--lr", "0.2"]), "the learning rate is too high"),
    "learning rate / 1000": (dict(options=["--lr", "2e-6"]), "the learning rate is too low"),
    "[EOS] is never a target": (dict(batch=no_end), "the end of captions is not learned"),
    "[BOS] is missing in training": (dict(batch=no_begin), "captions do not begin with [BOS]"),
    "captions shuffled among photos": (dict(df=partial(shuffled, every=1)), "the photo makes no difference"),
    "half the captions shuffled": (dict(df=partial(shuffled, every=2)), "many captions belong to other photos"),
    "pixels in 0..255": (
        dict(options=["--preprocessing", json.dumps(dict(mean=[0.0] * 3, std=[1 / 255] * 3))]),
        "the encoder gets pixels of the wrong size",
    ),
    "cross-attention's output held at zero": (dict(trainer=silent_cross_attention), "cross-attention adds nothing"),
    "the encoder returns a constant": (dict(trainer=constant_encoder), "the encoder sees no difference between photos"),
    "the encoder trained with a rate that destroys it": (
        dict(options=[*PRETRAINED, "--pretrained_lr_scale", "20"]),
        "the pretrained encoder is overwritten",
    ),
    "captions truncated to 3 tokens": (dict(options=["--seq_len", "3"]), "captions are cut off"),
    "the same caption for 30% of the photos": (dict(df=same_caption), "many photos have the same caption"),
    "validation photos also in training": (dict(files=copied_photos), "validation photos are in training too"),
    "label smoothing 0.9": (dict(options=["--label_smoothing", "0.9"]), "label smoothing is too strong"),
    "dropout 0.9": (dict(options=["--mlp_dropout", "0.9", "--residual_dropout", "0.9"]), "dropout is too strong"),
    "overflow in every third step": (dict(trainer=overflow), "steps are left out"),
    "a word list of 10 words": (
        dict(options=["--tokenizer", "word", "--vocab_size", "10"]),
        "most captions are full of <unk>",
    ),
}
HEALTHY = {f"none, seed {seed}": (dict(options=["--seed", str(seed)]), None) for seed in range(3)}


def run(folder, options=(), df=None, files=None, batch=None, trainer=None):
    """Train for STEPS steps with a fault -> the Trainer's `Diagnosis`."""
    argv = [*SMALL, "--data_dir", str(folder / "shapes"), "--model_path", str(folder / "run"), *options]
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
    argv = ["--recipe", "shapes", "--data_dir", str(folder / "shapes"), "--epochs", "2", "--device", "cpu"]
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
    args = parser.parse_args(argv)
    if args.cost:
        with tempfile.TemporaryDirectory() as folder:
            shapes.write_dataset(Path(folder) / "shapes", SCENES)
            print_cost(Path(folder))
        return
    print("| planted | found first | found second | named |\n| --- | --- | --- | --- |")
    right = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_dataset(Path(folder) / "shapes", SCENES)
        for name, (fault, expected) in (HEALTHY | FAULTS).items():
            if args.only in name:
                right[name] = row(Path(folder), name, fault, expected, args.verbose)
    planted = [right[name] for name in FAULTS if name in right]
    print(f"\n{sum(planted)} of {len(planted)} faults named among the first two findings")


def row(folder, name, fault, expected, verbose):
    """Run with a fault and print its row -> whether the fault was named, or none where there was none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        diagnosis = run(folder, **fault)
    found = [finding.name for finding in diagnosis.findings]
    right = expected in found[:2] if expected else not found
    print(f"| {name} | {' | '.join([*found, '-', '-'][:2])} | {'yes' if right else 'NO'} |", flush=True)
    if verbose or not right:
        print(diagnosis.as_table())
    return right


if __name__ == "__main__":
    main()
