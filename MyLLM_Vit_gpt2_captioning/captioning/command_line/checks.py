"""What the constants of a run may be: every range, every choice and every rule between two of them, in one place.

The checks run before anything is loaded or written. Each error is one line with the constant, its value and what is
allowed. Classes and functions that a user may call directly guard their own arguments, too.
"""

import math

import torch

from captioning.common.text import CASES
from captioning.model import encoders


class Range:
    """`low` <= value <= `high`, but for the values in `exclude`. NaN is in no range."""

    def __init__(self, low, high=math.inf, exclude=()):
        self.low, self.high, self.exclude = low, high, exclude

    def __contains__(self, value):
        return self.low <= value <= self.high and value not in self.exclude

    def __str__(self):
        low = f"above {self.low}" if self.low in self.exclude else f"at least {self.low}"
        if self.high == math.inf:
            return f"finite and {low}" if math.inf in self.exclude else low
        return f"{low} and {'below' if self.high in self.exclude else 'at most'} {self.high}"


class NotEmpty:
    """A text that says something."""

    def __contains__(self, value):
        return value != ""

    def __str__(self):
        return "a name or a path"


class Given:
    """Anything but None, which only the constants that are looked for may be."""

    def __contains__(self, value):
        return value is not None

    def __str__(self):
        return "a path"


class Choice(tuple):
    """One of these values."""

    def __str__(self):
        return f"one of {', '.join(map(repr, self))}"


AT_LEAST_1, AT_LEAST_0 = Range(1), Range(0)
POSITIVE = Range(0, exclude=(0, math.inf))
NOT_NEGATIVE = Range(0, exclude=(math.inf,))
SHARE = Range(0, 1, exclude=(1,))  # of dropout, smoothing, averaging: with 1 nothing would be left

MODEL = {
    "embed_dim": AT_LEAST_1,
    "num_heads": AT_LEAST_1,
    "depth": AT_LEAST_1,
    "seq_len": Range(3),  # [BOS], one token, [EOS]
    "vocab_size": Range(2),
    "emb_dropout": SHARE,
    "attention_dropout": SHARE,
    "mlp_dropout": SHARE,
    "residual_dropout": SHARE,
    "label_smoothing": SHARE,
    "decoder_weights": NotEmpty(),
    "positions": Choice(("learned", "sinusoidal")),
    "activation": Choice(("gelu", "relu")),
    "caption_case": Choice(CASES),
    "tokenizer": Choice(("gpt2", "bpe", "word", "character")),
    "eos_token_id": AT_LEAST_0,
    "unk_token_id": Range(-1),
    "encoder": NotEmpty(),
    "encoder_weights": NotEmpty(),
    "trainable_stages": Range(-1),
    "feature_levels": AT_LEAST_1,
    "coupling": Choice(("stepped", "final")),
}

TRAIN = {
    "epochs": AT_LEAST_0,
    "freeze_epochs_gpt": AT_LEAST_0,
    "freeze_epochs_all": AT_LEAST_0,
    "lr": POSITIVE,
    "pretrained_lr_scale": NOT_NEGATIVE,
    "warmup_share": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "ema_decay": SHARE,
    "clip_norm": Range(0, exclude=(0,)),  # infinity clips nothing
    "batch_size": AT_LEAST_1,
    "accumulate": AT_LEAST_1,
    "captions_per_image": AT_LEAST_1,
    "length_window": AT_LEAST_1,
    "shuffle_buffer": AT_LEAST_1,
    "cache_views": AT_LEAST_1,
    "crop_scale": Range(0, 1, exclude=(0,)),
    "max_bad_steps": AT_LEAST_1,
    "max_bad_images": AT_LEAST_0,
    "num_workers": AT_LEAST_0,
    "precision": Choice(("auto", "float32", "bf16")),
    "seed": Range(0, 2**64 - 1),
    "cache_dir": Given(),
    "data_dir": Given(),
    "model_path": Given(),
    "dataset": Choice(("flickr8k", "flickr30k", "coco2017")),
    "score_every": AT_LEAST_0,
    "score_images": AT_LEAST_0,
    "score_tokens": Choice(("words", "characters")),
    "best_by": Choice(("perplexity", "CIDEr")),
    "save_minutes": AT_LEAST_0,
    "scst_epochs": AT_LEAST_0,
    "scst_lr": POSITIVE,
    "scst_samples": AT_LEAST_1,
    "scst_bleu": AT_LEAST_0,
    "scst_draws": Choice(("sample", "beam")),
    "scst_baseline": Choice(("mean", "greedy")),
    "tracker": Choice(("none", "tensorboard", "wandb", "trackio")),
    "log_steps": AT_LEAST_1,
    "demo_images": AT_LEAST_0,
    "shapes_scenes": AT_LEAST_1,
}


def check(config, table):
    """Raise ValueError for the first constant of `config` that its entry in `table` does not allow."""
    for name, allowed in table.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, but must be {allowed}")


def check_model_config(config):
    """Raise ValueError where a complete model_config has a value that is not allowed."""
    check(config, MODEL)
    encoders.check_options(config.encoder_options)
    if config.embed_dim % config.num_heads:
        raise ValueError(
            f"embed_dim is {config.embed_dim}, but must be a multiple of num_heads {config.num_heads}: each head gets "
            "an equal part of the channels"
        )


def check_train_config(config):
    """Raise ValueError where a complete train_config has a value that is not allowed."""
    check(config, TRAIN)
    check_device(config.device)
    K = config.captions_per_image
    if config.batch_size % K:
        raise ValueError(
            f"batch_size is {config.batch_size}; it counts captions and must be a multiple of captions_per_image {K}, "
            f"for example {max(1, config.batch_size // K) * K}"
        )
    if config.epochs + config.scst_epochs < 1:
        raise ValueError("epochs is 0 and scst_epochs is 0: there is nothing to train")
    if (
        config.scst_epochs
        and config.scst_samples < 2
        and (config.scst_baseline == "mean" or config.scst_draws == "beam")
    ):
        raise ValueError(
            f"scst_samples is {config.scst_samples}, but must be at least 2: a beam, and the mean of a photo's other "
            "draws, need more than one"
        )
    if config.scst_epochs or config.best_by == "CIDEr":
        wanted = "scst_epochs" if config.scst_epochs else "best_by CIDEr"
        if config.score_every != 1:
            raise ValueError(f"score_every is {config.score_every}, but must be 1: {wanted} needs CIDEr every epoch")
        if config.score_images < 1:
            raise ValueError(f"score_images is {config.score_images}, but must be at least 1: {wanted} needs CIDEr")


def check_device(device):
    """Raise ValueError unless `device` (str) names a device of torch that this machine has."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}, but must be cpu, cuda, cuda:N or mps") from None
    if kind.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (kind.index or 0) >= count:
            there = f"{count} CUDA GPU{'s are' if count != 1 else ' is'} here" if count else "no CUDA GPU is here"
            raise ValueError(f"device is {device!r}, but {there}; give --device cpu{', or cuda:0' if count else ''}")
    elif kind.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"device is {device!r}, but this machine has no Metal GPU; give --device cpu")
    elif kind.type != "cpu":
        raise ValueError(f"device is {device!r}, but must be cpu, cuda, cuda:N or mps")
