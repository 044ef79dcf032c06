"""Train an image captioner: a timm ViT, stepped block by block with MyLLM GPT-2 blocks that carry cross-attention.

    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py                      everything by default
    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py --epochs 3 --lr 2e-4   with other constants
    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py --recipe shapes        with those of a recipe

Captions and photos are read from data/, in any format that captioning/data/sources.py reads; without them, a small
captioner is trained from scratch on the built-in Shapes dataset. Results go to captioner/.
"""

import gc
import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO_ROOT))  # for MyLLM; this file's own folder is on the path already

from captioning.command_line import checks, overrides, recipes
from captioning.common.config import Config, complete
from captioning.common.distributed import ProcessGroup, gradient_sync, silence_other_ranks
from captioning.common.precision import choose_algorithms, mixed_precision
from captioning.common.progress import progress_bar
from captioning.common.stopping import Stopped, listening, stop_if_asked
from captioning.data import batching, shapes, sources
from captioning.data.built_in import cleaning_of, data_paths, default_recipe, load_data
from captioning.data.shards import streaming
from captioning.data.token_cache import read_tokens_from_disk
from captioning.data.unreadable_photos import UnreadablePhotos
from captioning.decoding.cached_decoder import BlockCache
from captioning.decoding.search import caption_images, generate_ids, trim
from captioning.images.augmentation import CaptionsOfPicture, TrainingTransforms, ValidationTransforms, opening_of
from captioning.images.preprocessing import normalize_pixels
from captioning.model import checkpoint, hugging_face, loading
from captioning.model.encoders import build_encoder, meta_device_for, preprocessing_of, run_block
from captioning.model.front import FrontOutput
from captioning.model.loss import IGNORED_LABEL, chunked_cross_entropy, label_places
from captioning.model.positions import SinusoidalPositions
from captioning.model.stages import keep_frozen_in_eval, pretrained_names, stage_of, train_only, trainable_names
from captioning.model.tokenizer import CaptionTokenizer, check_eos, encode_caption, encode_prompt
from captioning.pages import plots
from captioning.scoring.calibration import calibrate_run
from captioning.sharing import upload
from captioning.training import run_folder, schedule, sweep
from captioning.training.cross_entropy import CrossEntropy, check_batches
from captioning.training.out_of_memory import explained
from captioning.training.run_log import RunLog, perplexity
from captioning.training.run_state import RunState, dataset_digest
from captioning.training.self_critical import SelfCritical
from captioning.training.trackers import Tracker
from MyLLM.ch3 import KeyValueCache, merge_heads, split_heads
from MyLLM.ch4 import GPTModel, LayerNorm, TransformerBlock, initial_std
from MyLLM.MyLLM_nominal import gpt2_config, hf_name, load_hf_gpt2_weights, read_hf_gpt2

# ======================================================================================================================
# Constants: edit them here, or give --key value on the command line (--help lists them)
# ======================================================================================================================

HF_GPT2_REPO = os.environ.get("HF_GPT2_REPO", "openai-community/gpt2")  # GPT-2 weights, tokenizer: hub id or folder
DATA_DIR = REPO_ROOT / "data"
IMAGE_DIR = DATA_DIR / "flickr30k_images"
CAPTIONS_FILE = ""  # found in DATA_DIR when empty
OUTPUT_DIR = REPO_ROOT / "captioner"
RECIPES_DIR = REPO_ROOT / "recipes"
WANDB_PROJECT = "image-captioning"  # of runs with --tracker wandb or trackio
WANDB_ENTITY = ""  # user or team that the project belongs to; "": yours
WANDB_RUN_NAME = ""  # name of such a run; "": the name of its folder and its id
HF_REPO_ID = os.environ.get("HF_REPO_ID", "")  # "user/repo" on the Hugging Face Hub, where a captioner is shared
RESUME_CHECKPOINT_PATH = ""  # "auto" resumes the run in OUTPUT_DIR, a path the run there; "" starts afresh
torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every shape, and captions differ in length
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

tokenizer = CaptionTokenizer(HF_GPT2_REPO)  # GPT-2's; pad token = EOS; read on first use, so importing needs no network


@dataclass
class ModelConfig(Config):
    embed_dim: int = 768  # channels of the decoder
    num_heads: int = 12  # attention heads of the decoder, also in cross-attention
    depth: int = 12  # decoder blocks
    seq_len: int = 1024  # longest caption in tokens, [BOS] and [EOS] included
    vocab_size: int = 50257  # tokens the decoder knows; for a trained tokenizer the most it may learn
    emb_dropout: float = 0.1  # dropout on token + position embeddings
    attention_dropout: float = 0.1  # dropout on attention weights (self and cross)
    mlp_dropout: float = 0.1  # dropout behind the MLP
    residual_dropout: float = 0.1  # dropout behind attention's output projection
    label_smoothing: float = 0.0  # share of a training target that is spread over all tokens; none in validation
    decoder_weights: str = "pretrained"  # "pretrained" (HF_GPT2_REPO), a hub id, a local folder, or "scratch"
    positions: str = "learned"  # "learned" as GPT-2's, or "sinusoidal" (from scratch only)
    activation: str = "gelu"  # of the MLP: "gelu" as GPT-2's, or "relu" (from scratch only)
    post_norm: bool = False  # norms behind each residual sum as in the first Transformer (from scratch only)
    caption_case: str = "lower"  # of captions and prompts: "lower", "lower_turkish" (with its two letters I), "keep"
    tokenizer: str = "gpt2"  # "gpt2" (HF_GPT2_REPO), or "bpe", "word" or "character", trained on the captions
    eos_token_id: int = 50256  # ends captions; set from the tokenizer
    unk_token_id: int = -1  # token for unknown words, never generated; set from the tokenizer, -1: none
    encoder: str = "vit_base_patch16_224"  # nearly any timm model, or a transformers ViT or CLIP (hub id or folder)
    encoder_weights: str = "pretrained"  # "pretrained" (downloaded), a local weights file or folder, or "scratch"
    encoder_options: dict = field(default_factory=dict)  # arguments of the timm model, as JSON: {"img_size": 48}
    trainable_stages: int = -1  # last blocks or stages of a pretrained encoder that ever train; -1: all, 0: none
    refiner: dict = field(default_factory=dict)  # arguments of encoders.ConvolutionalRefiner, as JSON; {}: no refiner
    feature_levels: int = 1  # last feature maps of a CNN that become tokens; with two or more a CNN can be stepped
    preprocessing: dict = field(default_factory=dict)  # mean, std, resample as JSON, where not those of the encoder
    coupling: str = "stepped"  # decoder block i attends to encoder depth i ("stepped") or to the last layer ("final")
    normalize_tokens: bool = False  # LayerNorm on image tokens that the encoder's final norm has not normalised
    start_from: str = ""  # trained captioner, ours or Hugging Face's; it brings its weights and its model constants


@dataclass
class TrainConfig(Config):
    epochs: int = 5  # passes over the training captions
    freeze_epochs_gpt: int = 1  # epochs before the pretrained GPT-2 blocks train too
    freeze_epochs_all: int = 2  # epochs before everything trains
    lr: float = 1e-4  # peak learning rate of new layers; OneCycle starts at lr / 25
    pretrained_lr_scale: float = 0.1  # pretrained layers learn at lr times this
    warmup_share: float = 0.1  # share of all steps in which the learning rate rises
    weight_decay: float = 0.01  # AdamW; not on norms, biases and embeddings
    ema_decay: float = 0.0  # of a moving average of the weights, which is then validated and kept; 0: no average
    clip_norm: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    batch_size: int = 32  # captions a batch; a multiple of captions_per_image
    accumulate: int = 1  # batches a step (gradient accumulation); the gradient is that of one large batch
    captions_per_image: int = 1  # captions that share one encoding of their image; 5 suits Flickr and COCO
    length_window: int = 16  # batches sorted by caption length together, so that little is padding; 1: unsorted
    shuffle_buffer: int = 5000  # of tar shards: groups of captions_per_image captions that are mixed, in memory
    cache_tokens: bool = False  # compute what the frozen part of an encoder makes once, and train from that on disk
    cache_dir: Path = DATA_DIR / "token_cache"  # where; runs with the same encoder and photos share it
    cache_views: int = 1  # versions of a training photo in the cache: the photo itself, and augmented ones
    crop_scale: float = 0.8  # smallest share of a photo's area that a training crop keeps
    max_bad_steps: int = 20  # consecutive steps with a non-finite loss or gradient after which training stops
    max_bad_images: int = 100  # photos that may turn out unreadable before training stops; they add no loss
    num_workers: int = 0 if DEVICE == "cpu" else min(8, os.cpu_count())  # processes that load images
    device: str = DEVICE  # where to train: cpu, cuda, cuda:1 for a second GPU, or mps
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: slower, with far less memory
    compile: bool = False  # torch.compile: minutes at first, then faster steps on a GPU
    precision: str = "auto"  # "float32", "bf16", or "auto": bf16 on CUDA (fp16 on older GPUs), elsewhere float32
    seed: int = 0  # of weights, order and augmentation; the split stays the same, so that runs can be compared
    data_dir: Path = DATA_DIR  # folder with captions and photos
    image_dir: Path = IMAGE_DIR  # folder with the photos; found in data_dir when only that is given
    model_path: Path = OUTPUT_DIR  # folder for checkpoint, metrics and plots; an earlier run there is moved aside
    captions_file: str = CAPTIONS_FILE  # annotation file of any format; found in data_dir when empty
    unescape_captions: bool = True  # captions: &amp; becomes &, tags like <b> and invisible characters are left out
    exclude: str = ""  # list of pairs of photo and caption to leave out, as prepare_data.py --check writes it
    dataset: str = "flickr30k"  # what --download puts into data_dir: flickr8k, flickr30k or coco2017
    score_every: int = 1  # epochs between scores of captions of the same validation photos; 0: never
    score_images: int = 200  # validation photos that are captioned for these scores
    score_tokens: str = "words"  # that scores count; "characters" for languages without spaces between words
    best_by: str = "perplexity"  # decides which epoch is kept: "perplexity", or "CIDEr" of those captions
    keep_epoch_checkpoints: bool = False  # also keep the weights of every epoch, named by epoch and validation loss
    push_every_epoch: bool = False  # upload each new best checkpoint to HF_REPO_ID in the background
    resume: str = RESUME_CHECKPOINT_PATH  # run to resume: "auto" (the one in model_path), or a path; empty: none
    save_minutes: float = 10.0  # between states to resume from, in model_path/last; another follows every epoch
    deterministic: bool = False  # only operations that give the same bits every time: on a GPU slower
    scst_epochs: int = 0  # further epochs of self-critical training, which raise CIDEr and choose the best epoch by it
    scst_lr: float = 5e-5  # their peak learning rate
    scst_samples: int = 5  # captions drawn for a photo; a step draws batch_size captions
    scst_bleu: float = 0.0  # weight of a caption's BLEU-4 in its reward, beside CIDEr; it works against short captions
    scst_draws: str = "sample"  # "sample" from the model, or the finished captions of a "beam" search
    scst_baseline: str = "mean"  # reward a draw is compared with: "mean" of the other draws, or the "greedy" caption
    tracker: str = "none"  # "tensorboard", "wandb" or "trackio" also get the metrics of the run
    log_steps: int = 50  # steps that one point of the training curves averages
    demo_images: int = 10  # validation photos in demo.png
    shapes_scenes: int = 6000  # training scenes of the built-in datasets


model_config, train_config = ModelConfig(), TrainConfig()  # the values of a run that is given no others
stored_config = partial(loading.stored_config, defaults=model_config, read_decoder=gpt2_config)


def complete_configs(model=None, train=None):
    """Objects with some of the constants above -> (ModelConfig, TrainConfig) with all, checked; None stays None.

    Constants that `model` lacks are those of the captioner to start from, where it names one, else those above.
    Raises ValueError that names the constant, its value and what is allowed, or for an unknown one the nearest name.
    """
    if train is not None:
        train = complete(train, train_config)
        checks.check_train_config(train)
    if model is not None:
        model = loading.complete_model_config(model, model_config, gpt2_config)
        checks.check_model_config(model)
        model = loading.with_timm_encoder(model, HF_GPT2_REPO)
    return model, train


# ======================================================================================================================
# Tokens and labels
# ======================================================================================================================


def _shift_labels(token_ids):
    """[a, b, c] -> [b, c, c]: the label of a token is the next one; the last is a copy, masked in `collate_fn`."""
    return list(token_ids[1:]) + list(token_ids[-1:])


def _pad_token_batch(tokenizer, token_id_batch):
    """Lists of ids -> LongTensor (B, T_max), padded on the right with the tokenizer's pad id."""
    rows = [torch.tensor(token_ids, dtype=torch.long) for token_ids in token_id_batch]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def _gpt2_tokenizer():
    return tokenizer  # the module's, for functions whose own argument has this name


# ======================================================================================================================
# Data
# ======================================================================================================================


def _load_flickr_dataframe(data_dir, image_dir, captions_file=None):
    """Read `data_dir`/results.csv (Flickr30k), or any other dataset that `sources.load` recognises there -> DataFrame
    with a row a caption: image (Path in `image_dir`), caption (lowercased, stripped, "" where missing), split
    (train/val/test, by image) and, for questions, prompt. Raises FileNotFoundError or ValueError for a bad file."""
    return sources.load(data_dir, captions_file, image_dir, **cleaning_of(model_config, train_config))


def build_transforms(img_size=224, norm_mean=None, norm_std=None, crop_scale=0.8, resample="bicubic", normalized=True):
    """-> (train_tfms, valid_tfms); each is called `tfms(image=array)["image"]` -> float tensor (3, img_size, img_size).

    `norm_mean` and `norm_std` are one value a channel for pixels in 0..1; None means 0.5. Without `normalized` the
    tensors are pixels, uint8. captioning/images/augmentation.py says how captions stay true, with `crop_scale`.
    """
    mean, std = norm_mean or (0.5,) * 3, norm_std or (0.5,) * 3
    return (
        TrainingTransforms(img_size, mean, std, crop_scale, resample, normalized),
        ValidationTransforms(img_size, mean, std, resample, normalized),
    )


class Dataset(torch.utils.data.Dataset):
    """One caption with its image: (image_tensor (3, H, W), token_ids, labels), the latter two lists of equal length.

    Where `df` has a column `prompt`, the ids begin with it, and its labels are -100: it is context, never loss.

    With `captions_per_image` = K, `__getitems__` expects groups of K captions of one image, as `CaptionBatchSampler`
    makes them, and decodes and augments the image once for all K. The tokenizer is GPT-2's unless one is given.
    """

    def __init__(self, df, tfms, tokenizer=None, captions_per_image=1, max_length=1024, seed=0, max_bad_images=100):
        self.tfms, self.tokenizer = tfms, _gpt2_tokenizer() if tokenizer is None else tokenizer
        self.images = [str(path) for path in df["image"]]
        self.captions = list(df["caption"])
        self.prompts = list(df["prompt"]) if "prompt" in df else [""] * len(df)
        self.captions_of = {}  # all captions of an image decide how it may be augmented, questions too
        for image, *texts in zip(self.images, self.captions, self.prompts, strict=True):
            self.captions_of.setdefault(image, CaptionsOfPicture()).extend(filter(None, texts))
        self.captions_per_image, self.max_length, self.seed = captions_per_image, max_length, seed
        self.repeats_count = True  # whether a caption that repeats, to fill the group of its image, adds loss again
        self.unreadable_photos = UnreadablePhotos(self.captions_of, max_bad_images)
        self.token_caches = []  # a `TokenCache` for each view, where the encoder's tokens are not computed anew
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # shared: workers live longer than an epoch

    def set_epoch(self, epoch):
        """Choose the epoch's augmentations: they depend on (seed, epoch, row) only, not on the number of workers."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, row):
        return self._items([row])[0]

    def __getitems__(self, rows):
        """The rows of a batch -> list of items, in the same order."""
        K = self.captions_per_image
        return [item for start in range(0, len(rows), K) for item in self._items(rows[start : start + K])]

    def load_input(self, path, row):
        """The model's input for an image (grey if unreadable): (3, H, W), or what the token cache holds of it."""
        seed = [self.seed, int(self.epoch), row]
        if self.token_caches:
            return self.token_caches[np.random.default_rng(seed).integers(len(self.token_caches))][path]
        pixels = self.unreadable_photos.load(path, **opening_of(self.tfms))  # (H, W, 3) uint8
        return self.tfms(image=pixels, captions=self.captions_of[path], seed=seed)["image"]

    def _items(self, rows):
        """Captions of one image -> their items; the image is loaded once."""
        image = self.load_input(self.images[rows[0]], rows[0])
        readable = self.images[rows[0]] not in self.unreadable_photos
        pairs = [(row, readable and (self.repeats_count or row not in rows[:n])) for n, row in enumerate(rows)]
        return [(image, *self.tokens(self.captions[row], self.prompts[row], counts)) for row, counts in pairs]

    def tokens(self, caption, prompt="", counts=True):
        """-> (token_ids, labels); labels of a caption that does not count, as of an unreadable image, are all -100."""
        token_ids = encode_caption(self.tokenizer, caption, self.max_length, prompt)
        labels = _shift_labels(token_ids)
        if prompt:
            prompt_length = min(len(encode_prompt(self.tokenizer, prompt)), max(1, self.max_length - 2)) - 1
            labels[:prompt_length] = [IGNORED_LABEL] * prompt_length
        return token_ids, labels if counts else [IGNORED_LABEL] * len(labels)


def collate_fn(batch, tokenizer=None, captions_per_image=1):
    """Items of `Dataset` -> images (B, 3, H, W), input_ids (B*K, T), labels (B*K, T) with K = `captions_per_image`.

    With a token cache the images are the encoder's tokens, a list of (B, N, C), or a `FrontOutput`.

    A label is -100 at and behind the last real token of its row, where there is nothing to predict. That is decided by
    length: the pad id is also EOS, and EOS is a target that the model has to learn.
    """
    images, token_ids, labels = zip(*batch, strict=True)
    if tokenizer is None:
        tokenizer = SimpleNamespace(pad_token_id=token_ids[0][-1])  # EOS, which ends a caption, also pads it
    input_ids = _pad_token_batch(tokenizer, token_ids)  # (B*K, T)
    lengths = torch.tensor([len(ids) for ids in token_ids])  # (B*K,)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in labels], batch_first=True)  # (B*K, T)
    labels[torch.arange(labels.size(1)) >= lengths[:, None] - 1] = IGNORED_LABEL
    return batching.stack(images[::captions_per_image]), input_ids, labels


def build_tokenizer(model_config, captions):
    """The tokenizer of the captioner to start from, or the one that `model_config.tokenizer` names; the others
    are trained on `captions`."""
    if model_config.start_from:
        return loading.stored_tokenizer(stored_config(model_config.start_from)[0])
    if model_config.tokenizer == "gpt2":
        return tokenizer
    return CaptionTokenizer.train(captions, model_config.vocab_size, model_config.tokenizer)


def build_dataloaders(df, tokenizer, model_config, train_config):
    """DataFrame of `_load_flickr_dataframe` -> (training DataLoader, validation DataLoader)."""
    model_config, config = complete_configs(model_config, train_config)
    photo = preprocessing_of(model_config)
    loaders, size_and_norm = [], (photo["img_size"], photo["mean"], photo["std"])
    transforms = build_transforms(*size_and_norm, config.crop_scale, photo["resample"], normalized=False)
    for split, tfms in zip(("train", "val"), transforms, strict=True):
        tfms.grey16 = photo.get("grey16", "full")  # how photos with 16 bits of grey are opened
        rows, folder = df[df["split"] == split], split == "train" and streaming.streamed_folder(df)
        if rows.empty and not folder:
            raise ValueError(f"{config.data_dir}: no usable caption is in the {split} split")
        training, K = split == "train", config.captions_per_image
        dataset = Dataset(rows, tfms, tokenizer, K, model_config.seq_len, config.seed, config.max_bad_images)
        dataset.repeats_count = training  # validation counts every caption exactly once
        collate = partial(collate_fn, tokenizer=tokenizer, captions_per_image=K)
        if folder:
            loaders.append(streaming.build_stream_loader(folder, dataset, collate, config, model_config.caption_case))
        else:
            loaders.append(batching.build_caption_loader(dataset, collate, config, training))
    return tuple(loaders)


# ======================================================================================================================
# Model
# ======================================================================================================================


class GPT2CrossAttention(nn.Module):
    """Text asks, the image answers: queries from text tokens, keys and values from image tokens, no mask."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.q, self.k, self.v, self.c_proj = (nn.Linear(config.embed_dim, config.embed_dim) for _ in range(4))
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        for layer in (self.q, self.k, self.v, self.c_proj):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def project(self, k, v):
        """Image tokens (B, N, embed_dim), twice -> keys and values (B, heads, N, head_dim)."""
        return split_heads(self.k(k), self.num_heads), split_heads(self.v(v), self.num_heads)

    def attend(self, q, keys, values):
        """q (B*K, T, embed_dim), keys and values of `project` -> (B*K, T, embed_dim).

        The K captions of an image ask side by side, as one row of K*T queries. Without a causal mask the queries do
        not see each other, so this is the same as repeating the image K times, at no cost.
        """
        queries = self.q(q).view(keys.size(0), -1, q.size(-1))  # (B, K*T, embed_dim)
        queries = split_heads(queries, self.num_heads)  # (B, heads, K*T, head_dim)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)  # (B, heads, K*T, head_dim)
        return self.residual_dropout(self.c_proj(merge_heads(context).view(q.shape)))

    def forward(self, q, k, v):
        """q (B*K, T, embed_dim), k and v (B, N, embed_dim) -> (B*K, T, embed_dim)."""
        return self.attend(q, *self.project(k, v))


class GPT2Block(TransformerBlock):
    """GPT-2's block with cross-attention between self-attention and the MLP.

    x + self_attn(ln_1(x)); x + cross_attn(ln_cross(x), image); x + mlp(ln_2(x)). `ln_2` stays where GPT-2 was trained
    with it, in front of the MLP: cross-attention brings a norm of its own. With `config.post_norm` each norm stands
    behind its sum instead, norm(x + layer(x)), as in the first Transformer (Vaswani et al. 2017).
    """

    def __init__(self, config):
        super().__init__(config)
        self.ln_cross = LayerNorm(config.embed_dim)
        self.cross_attn = GPT2CrossAttention(config)
        self.post_norm = getattr(config, "post_norm", False)
        if getattr(config, "activation", "gelu") == "relu":
            self.mlp.activation = nn.ReLU()

    def forward(self, hidden_states, encoder_states, cache=None):
        """hidden_states (B*K, T, embed_dim), encoder_states (B, N, embed_dim) -> (B*K, T, embed_dim).

        With a `BlockCache`, hidden_states holds the newest tokens only, and encoder_states is projected once.
        """
        if cache is None:
            keys, values = self.cross_attn.project(encoder_states, encoder_states)
        else:
            if cache.cross_attn is None:
                cache.cross_attn = self.cross_attn.project(encoder_states, encoder_states)
            keys, values = cache.cross_attn
        x = self.residual(hidden_states, self.ln_1, self.self_attn, cache.self_attn if cache else None)
        x = self.residual(x, self.ln_cross, self.cross_attn.attend, keys, values)
        return self.residual(x, self.ln_2, self.mlp)

    def residual(self, x, norm, layer, *args):
        """x + layer(norm(x)), or with `post_norm` norm(x + layer(x)); x (B*K, T, embed_dim), `args` go to `layer`."""
        return norm(x + layer(x, *args)) if self.post_norm else x + layer(norm(x), *args)


class VisionGPT2Model(nn.Module):
    """Image and caption in, loss or next-token logits out. `config` has all or some attributes of `model_config`, which
    supplies the others. `from_pretrained` loads the weights that `config` names, the constructor makes random ones."""

    NEW_LAYERS = ("ln_cross", "cross_attn", "refiner")  # what GPT-2 and the pretrained encoders lack
    gradient_checkpointing = False
    loss = staticmethod(chunked_cross_entropy)

    def __init__(self, config, encoder_weights="scratch"):
        super().__init__()
        config, _ = complete_configs(model=config)
        timm_model = config.encoder, config.depth, config.coupling, config.encoder_options
        self.encoder = build_encoder(*timm_model, encoder_weights, config.refiner, config.feature_levels)
        config = replace(config, coupling=self.encoder.coupling)  # "final" where the encoder has no blocks to step
        self.config = config
        self.preprocessing = preprocessing_of(config)
        self.gpt = GPTModel(config, block_class=GPT2Block)
        if config.positions == "sinusoidal":
            std = 0.7 * initial_std(config.embed_dim)  # 0.7 is the paper's ratio of positions to tokens
            self.gpt.pos_emb = SinusoidalPositions(config.seq_len, config.embed_dim, std)
        if config.post_norm:
            self.gpt.final_norm = nn.Identity()  # the last block ends with a norm
        # A bridge turns the encoder's tokens into those of cross-attention: a norm if wanted, a projection where the
        # widths differ. Each level has a bridge of its own, because its statistics differ from those of the others.
        self.bridges = nn.ModuleList(self._make_bridge(i, width) for i, width in enumerate(self.encoder.widths))

    def _make_bridge(self, level, width):
        config = self.config
        normalized = self.encoder.normalized and level == len(self.encoder.widths) - 1
        norm = LayerNorm(width) if config.normalize_tokens and not normalized else nn.Identity()
        return nn.Sequential(norm, nn.Linear(width, config.embed_dim) if width != config.embed_dim else nn.Identity())

    def __getattr__(self, name):
        if name in ("patch_embed", "cls_token", "pos_embed", "blocks"):  # a ViT's parts, where people look for them
            return getattr(self.encoder.vit, name)
        return super().__getattr__(name)

    def _pos_embed(self, patch_tokens):
        """Patch tokens (B, N_patches, C) -> (B, N, C): class token (if any) in front, positions added."""
        return self.encoder.vit._pos_embed(patch_tokens)

    def _encode_images(self, images):
        """images (B, 3, H, W) -> tokens (B, N, C) that enter step 0; with final coupling the encoder's output."""
        return self.encoder.embed(normalize_pixels(images, self.preprocessing))

    def levels(self, images):
        """images (B, 3, H, W), normalised or uint8, or their `FrontOutput` -> `encoder.levels`, a list of (B, N, C)."""
        if isinstance(images, FrontOutput):
            return self.encoder.levels_behind(images, self.config.trainable_stages)
        return self.encoder.levels(normalize_pixels(images, self.preprocessing))

    def encoder_states(self, images):
        """images as in `levels`, or the result of `levels` -> list of the tokens (B, N, embed_dim) that each decoder
        block attends to."""
        levels = images if type(images) in (list, tuple) else self.levels(images)  # a `FrontOutput` is a tuple, too
        levels = self.encoder.refine([level.to(self.gpt.tok_emb.weight.dtype) for level in levels])
        tokens = [bridge(level) for bridge, level in zip(self.bridges, levels, strict=True)]  # (B, N, embed_dim) each
        if self.config.coupling == "final":
            tokens = [torch.cat(tokens, dim=1)]  # (B, N of all levels, embed_dim)
        return [tokens[i * len(tokens) // self.config.depth] for i in range(self.config.depth)]

    def _build_text_embeddings(self, input_ids, start=0):
        """input_ids (B, T) -> (B, T, embed_dim): token + position embeddings, positions from `start` on."""
        return self.gpt.embed(input_ids, start)

    def decode(self, input_ids, encoder_states, caches=None):
        """input_ids (B*K, T), result of `encoder_states` -> hidden states (B*K, T, embed_dim).

        With `caches` from `new_caches` (KV cache), input_ids holds only the newest tokens.
        """
        caches = caches or [None] * self.config.depth
        x = self._build_text_embeddings(input_ids, start=caches[0].self_attn.length if caches[0] else 0)
        for block, tokens, cache in zip(self.gpt.trf_blocks, encoder_states, caches, strict=True):
            x = run_block(block, x, tokens, cache, recompute=self.gradient_checkpointing)
        return x

    def new_caches(self, max_length):
        """One empty `BlockCache` a block, for captions of up to `max_length` tokens."""
        return [BlockCache(KeyValueCache(max_length)) for _ in self.gpt.trf_blocks]

    def forward(self, image, input_ids, labels=None, places=None):
        """image (B, 3, H, W), its `levels` or `FrontOutput`, input_ids (B*K, T), labels (B*K, T) or None.

        With labels: the mean cross-entropy over labels that are not -100, a scalar in nats, in training mode with label
        smoothing (Szegedy et al. 2016). Without: logits (B*K, 1, vocab_size) of the token that follows the last one.
        `places`: `label_places(labels)`, for callers who find them before the labels are on a GPU, which has to wait.
        """
        B = len(image[0]) if isinstance(image, (list, tuple)) else len(image)
        if input_ids.size(0) % B:
            raise ValueError(f"{input_ids.size(0)} captions cannot be shared equally among {B} images")
        hidden = self.decode(input_ids, self.encoder_states(image))  # (B*K, T, embed_dim)
        if labels is None:
            return self.gpt.logits(hidden[:, -1:])
        places = label_places(labels) if places is None else places  # (real tokens,)
        smoothing = self.config.label_smoothing if self.training else 0.0
        # Padding is dropped before the head, by far the widest layer.
        hidden = self.gpt.final_norm(hidden.flatten(0, 1).index_select(0, places))  # (real tokens, embed_dim)
        return self.loss(hidden, self.gpt.tok_emb.weight, labels.flatten().index_select(0, places), smoothing)

    def checkpoint_gradients(self):
        """Recompute the blocks of ViT and decoder in the backward pass instead of storing their activations."""
        self.gradient_checkpointing = self.encoder.gradient_checkpointing = True

    # --- staged unfreezing --------------------------------------------------------------------------------------------

    def pretrained_parameters(self):
        """Names of the parameters whose weights `config` does not call "scratch"; nothing else is ever frozen."""
        return pretrained_names(self, self.NEW_LAYERS)

    def pretrained_layers_trainable(self, trainable=False):
        """Freeze all pretrained parameters, so that only new layers train, or unfreeze them, except those in front of
        `trainable_stages`; print how many parameters are frozen."""
        train_only(self, trainable_names("everything" if trainable else "new layers", self))

    def unfreeze_gpt_layers(self):
        """Also train norms, self-attention and MLP of the GPT-2 blocks, but not embeddings, final norm and head; print
        how many parameters are frozen."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        train_only(self, trained | trainable_names("GPT-2 blocks", self))

    def train(self, mode=True):
        """As in `nn.Module`, but frozen modules stay in eval mode: no dropout, and BatchNorm keeps its buffers."""
        super().train(mode)
        keep_frozen_in_eval(self)
        return self

    # --- weights ------------------------------------------------------------------------------------------------------

    def _load_hf_gpt2_weights(self, sd_hf):
        """Copy a Hugging Face GPT-2 state_dict into the decoder, strictly; cross-attention keeps its values.

        Raises ValueError when it does not fit, or when the decoder is built unlike GPT-2.
        """
        hugging_face.check_built_like_gpt2(self.config, model_config)
        load_hf_gpt2_weights(self.gpt, sd_hf, new_layers=self.NEW_LAYERS)

    @classmethod
    def from_pretrained(cls, source):
        """A config -> a captioner with pretrained encoder and GPT-2, ready to be trained; a checkpoint folder or a hub
        id "user/repo" -> the trained captioner there, ours or a VisionEncoderDecoderModel of ViT and GPT-2, in eval
        mode. Raises FileNotFoundError or ValueError that says what is missing or does not fit."""
        if isinstance(source, (str, Path)):
            folder, config = stored_config(source)
            with meta_device_for(vars(config), folder):
                model = cls(config, encoder_weights="stored")
            loading.load_captioner_weights(model, folder, hf_name)
            return model.eval()
        config, _ = complete_configs(model=source)
        if config.start_from:
            folder, _ = stored_config(config.start_from)
            model = cls(config)
            loading.load_captioner_weights(model, folder, hf_name)
            return model
        model = cls(config, encoder_weights=config.encoder_weights)
        if config.decoder_weights != "scratch":
            repo = HF_GPT2_REPO if config.decoder_weights == "pretrained" else config.decoder_weights
            hf_config, sd_hf = read_hf_gpt2(repo)
            hugging_face.check_sizes(hf_config, config, repo)
            model._load_hf_gpt2_weights(sd_hf)
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Write a checkpoint that `from_pretrained(folder)` loads: weights, config.json and the `tokenizer`'s file."""
        config = checkpoint.describe(self, REPO_ROOT)
        checkpoint.save_checkpoint(folder, self.state_dict(), config, tokenizer, torch_file=False)

    def export_to_transformers(self, folder, tokenizer=None):
        """Write the captioner so that `transformers.VisionEncoderDecoderModel.from_pretrained(folder)` loads it. Raises
        ValueError for one that has no equal there: stepped coupling, an encoder other than a plain ViT."""
        hugging_face.write_captioner(folder, self, hf_name, tokenizer)

    def generate(self, image, sequence, max_tokens=50, temperature=1.0, deterministic=False, **options):
        """Caption one image (1, 3, H, W), continuing `sequence` (1, T), which starts with BOS.

        Returns the ids on the CPU, 1-D: the sequence and up to `max_tokens` new tokens, of which EOS is the last; with
        `num_return_sequences` above 1 a list of them. Greedy when `deterministic`, else sampled at `temperature`;
        `options` are those of `decoding.search.Options`, among them beam search.
        """
        if len(image) != 1 or len(sequence) != 1:
            raise ValueError(f"generate takes one image and one sequence, not {len(image)} and {len(sequence)}")
        ids = generate_ids(self, image, sequence, max_tokens, temperature, deterministic, **options)
        rows = [trim(row, sequence.size(1), self.config.eos_token_id) for row in ids.cpu()]
        return rows if len(rows) > 1 else rows[0]


def load_captioner(source):
    """A trained captioner (folder or hub id, ours or Hugging Face's) -> (model in eval mode, its tokenizer)."""
    folder, _ = stored_config(source)
    model, tok = VisionGPT2Model.from_pretrained(folder), loading.stored_tokenizer(folder)
    check_eos(tok, model.config)
    return model, tok


def caption_image(
    image_path, model_source, device=None, max_length=32, temperature=1.0, do_sample=True, top_k=50, top_p=0.95
):
    """One photo -> its caption (str), of at most `max_length` tokens, by the captioner in `model_source` (folder or hub
    id): drawn from the `top_k` likeliest tokens that have the probability `top_p` together, or greedy."""
    model, tok = load_captioner(model_source)
    draws = dict(temperature=temperature, top_k=top_k, top_p=top_p) if do_sample else {}
    options = dict(max_tokens=max_length, deterministic=not do_sample, **draws)
    return caption_images(model.to(device or DEVICE), tok, [image_path], **options)[0]


# ======================================================================================================================
# Training
# ======================================================================================================================


class Trainer:
    """Trains `VisionGPT2Model.from_pretrained(model_config)` on dls = (training DataLoader, validation DataLoader).

    The configs may be any objects with some of the constants; the others have the values at the top of this file.
    """

    def __init__(self, model_config, train_config, dls):
        model_config, config = complete_configs(model_config, train_config)
        self.train_config, self.model_path = config, config.model_path
        self.train_dl, self.valid_dl = dls
        self.tokenizer = getattr(self.train_dl.dataset, "tokenizer", tokenizer)
        self.processes = ProcessGroup(config.device)  # under torchrun there are more than this one
        self.device = self.processes.device
        model_config = loading.with_tokenizer(model_config, self.tokenizer)
        self.model = VisionGPT2Model.from_pretrained(model_config).to(self.device)
        choose_algorithms(config.deterministic, convolutional=hasattr(self.model.encoder, "cnn"))
        if config.gradient_checkpointing:
            self.model.checkpoint_gradients()
        self.autocast, self.scaler = mixed_precision(self.device, config.precision)
        if config.cache_tokens:
            read_tokens_from_disk(self.model, dls, config)
        check_batches(self.model, self.train_dl)
        self.start_schedule(config.lr, config.epochs * len(self.train_dl))
        if config.compile:
            self.model.loss = torch.compiler.disable(self.model.loss)  # the number of chunks changes with the batch
        compiled = torch.compile(self.model) if config.compile else self.model  # with the same weights
        self.objective, self.self_critical = CrossEntropy(compiled, self.train_dl), None
        if config.scst_epochs:
            self.self_critical = SelfCritical(self.model, self.train_dl.dataset, config)
        tracker = config.tracker if self.processes.is_main else "none"
        tracker = Tracker(tracker, self.model_path, WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_NAME)
        self.log = RunLog(self.model_path, config, self.processes, any(self.valid_dl.dataset.prompts), tracker)
        self.metrics = self.log.rows  # one dict per epoch, the rows of metrics.csv
        self.best = {"best_perplexity": math.inf, "best_epoch": None}
        push = config.push_every_epoch and self.processes.is_main
        self.uploads = upload.background_uploads(push, HF_REPO_ID, self.model_path)
        self.stage = self.ddp = None
        self.enter_stage(epoch=0)
        self.state = RunState(self.model_path, self.processes, config, first_epoch=-1 if config.epochs == 0 else 0)
        if config.resume or self.processes.restarted:
            loaders = [*dls, self.self_critical.loader] if self.self_critical else dls
            if state := self.state.resume(config.resume or "auto", self.identity(), loaders):
                with self.state.damage_named():
                    self.load_state_dict(state)

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, batches):
        """One optimizer step on `batches`, whose gradient is that of one large batch.

        -> (sum, count) over all ranks: the summed loss or reward, and the number of labels or photos; (0.0, 0) for a
        step that changes nothing, because no photo could be read or the gradient is not finite. Raises
        FloatingPointError after `max_bad_steps` non-finite gradients in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        counts, values = [self.objective.count(batch) for batch in batches], []
        [total_count] = self.processes.all_reduce_sum(sum(counts))
        if total_count == 0:
            return 0.0, 0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
            batch = self.objective.to_device(batch, self.device)
            with gradient_sync(self.ddp, enabled=number == len(batches)):
                with self.autocast():
                    loss, value = self.ddp(self.objective.loss, batch)
                weight = count / total_count * self.processes.world_size  # DDP takes the mean over processes
                # An infinite loss may have a finite gradient; NaN survives the all-reduce.
                loss = loss * torch.where(loss.detach().isfinite(), weight, math.nan)
                self.scaler.scale(loss).backward()
            values.append(value)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train_config.clip_norm)
        *values, self.norm = torch.stack([*values, norm]).tolist()  # the one place where the step waits for the device
        finite = math.isfinite(self.norm)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.train_config.max_bad_steps:
            raise FloatingPointError(f"{self.bad_steps} steps in a row were not finite: try a lower --lr")
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers the scale of fp16 where gradients were not finite
        if not finite:
            return 0.0, 0
        if self.scheduler.last_epoch < self.scheduler.total_steps:  # in more epochs than planned the rate stays low
            self.scheduler.step()
        if self.average:
            self.average.update(self.model, step=self.scheduler.last_epoch)
        return self.processes.all_reduce_sum(float(np.dot(values, counts)), sum(counts))

    def start_schedule(self, lr, batches):
        """A new optimizer with peak learning rate `lr`, OneCycle over `batches` batches, and a new moving average."""
        config = self.train_config
        self.peak_lr, self.bad_steps, self.norm = lr, 0, 0.0  # consecutive bad steps; norm of the last gradient
        self.optimizer = schedule.build_optimizer(self.model, lr, config)
        self.scheduler = schedule.one_cycle(self.optimizer, math.ceil(batches / config.accumulate), config.warmup_share)
        self.average = schedule.moving_average(self.model, config.ema_decay) if config.ema_decay else None

    def rebuild_schedule(self, epochs):
        """OneCycle over `epochs` epochs, continued at the current step: call it when the number of epochs changes."""
        self.train_config = replace(self.train_config, epochs=epochs)
        steps = math.ceil(epochs * len(self.train_dl) / self.train_config.accumulate)
        done = self.scheduler.last_epoch
        self.scheduler = schedule.one_cycle(self.optimizer, steps, self.train_config.warmup_share, done)

    @property
    def lr(self):
        """The current learning rate of new layers."""
        return max(self.scheduler.get_last_lr())

    @property
    def eval_model(self):
        """The model that is validated and kept: the moving average of the weights (EMA) where there is one."""
        return self.average.module if self.average else self.model

    # --- one epoch ----------------------------------------------------------------------------------------------------

    def enter_stage(self, epoch):
        """Train the parameters and use the objective that this epoch is for, and print when they change."""
        config, stage = self.train_config, stage_of(epoch, self.model, self.train_config)
        if stage != self.stage:
            print(f"epoch {epoch + 1}: training {stage}; ", end="")
            train_only(self.model, trainable_names(stage, self.model))
            self.stage = stage
            self.ddp = None  # the old one's hooks have to go before there are new ones
            self.ddp = self.processes.wrap(self.model)
        if config.scst_epochs and epoch >= config.epochs and self.objective is not self.self_critical:
            print(f"epoch {epoch + 1}: self-critical training")
            if self.best["best_epoch"] is not None:
                self.load_best_model()
            self.start_self_critical()

    def start_self_critical(self):
        """Train on rewards from now on, with an optimizer and a schedule of their own."""
        self.objective = self.self_critical
        self.start_schedule(self.train_config.scst_lr, self.train_config.scst_epochs * len(self.objective.loader))

    def train_one_epoch(self, epoch):
        """One pass over the training captions (epoch counts from 0) -> mean loss per label; in self-critical training
        over the training photos -> mean reward. A resumed run goes on where it was in the epoch."""
        self.enter_stage(epoch)
        objective, config = self.objective, self.train_config
        self.model.train(objective.dropout)
        for part in (objective.loader.dataset, objective.loader.batch_sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        position = self.state.enter(epoch)
        objective.loader.batch_sampler.skip_batches = position["batches"]
        bar = progress_bar(objective.images, f"epoch {epoch + 1}/{config.epochs + config.scst_epochs}")
        for batches in batching.grouped(objective.loader, config.accumulate):
            captions = sum(objective.captions_in(batch) for batch in batches)
            with self.state.step():
                total, count = self.train_step(batches)
                position["total"], position["count"] = position["total"] + total, position["count"] + count
                position["batches"] += len(batches)
                place = epoch + position["batches"] / len(objective.loader)
                self.log.step(place, self.lr, objective.name, total, count, captions, batches[0], self.norm)
            if count:
                mean = f"{position['total'] / position['count']:.3f}"
                bar.set_postfix({objective.name: mean, "lr": f"{self.lr:.1e}"}, refresh=False)
            bar.update(captions // objective.captions_per_image * self.processes.world_size)
            self.state.stop_or_save(self.state_dict)
        bar.close()
        return position["total"] / position["count"] if position["count"] else math.nan

    @torch.inference_mode()
    def valid_one_epoch(self, epoch):
        """One pass over the validation captions -> perplexity: exp of the mean loss over all their labels."""
        self.model.eval()
        validation, losses, counts = CrossEntropy(self.eval_model, self.valid_dl), [], []
        bar = progress_bar(validation.images, "validation")
        for batch in self.valid_dl:
            counts.append(validation.count(batch))
            with self.autocast():
                losses.append(validation.loss(validation.to_device(batch, self.device))[1])
            bar.update(validation.captions_in(batch) // validation.captions_per_image * self.processes.world_size)
            stop_if_asked()
        bar.close()
        total_loss = float(np.dot(torch.stack(losses).tolist(), counts))  # read only now: no batch waits for another
        total_loss, total_count = self.processes.all_reduce_sum(total_loss, sum(counts))
        return perplexity(total_loss / total_count)

    def score_one_epoch(self, epoch):
        """Caption some validation photos -> {"CIDEr", "BLEU-4", "METEOR"} or {"exact_answers"}; see `RunLog.score`."""
        return self.log.score(epoch, self.eval_model, self.tokenizer, self.valid_dl.dataset)

    # --- the whole run ------------------------------------------------------------------------------------------------

    def run_training(self):
        """Train, keep the best epoch by `best_by` -> {"best_perplexity", "best_epoch"}: its perplexity and its number.

        Epochs count from 0; -1 is the model that self-critical training by itself starts from. Losses that stay
        non-finite end the run early, and the best epoch is kept. Raises Stopped on Ctrl-C, SIGTERM and SIGUSR1, with
        the state of the run saved.
        """
        epochs = range(self.state.position["epoch"], self.train_config.epochs + self.train_config.scst_epochs)
        try:
            with self.state.run(self.state_dict, self.best["best_epoch"] is not None), explained(self.train_config):
                datasets = [loader.dataset for loader in (self.train_dl, self.valid_dl)]
                self.log.config = self.train_config  # `rebuild_schedule` may have replaced it
                told = *datasets, self.identity()["config"], self.autocast, self.state.resumed
                self.log.begin(self.model, self.tokenizer, *told)
                for epoch in epochs:
                    self._run_epoch(epoch)
        except (FloatingPointError, KeyboardInterrupt) as reason:
            if isinstance(reason, Stopped) or self.best["best_epoch"] is None:
                raise
            print(f"stopped early: {str(reason) or 'interrupted'}; the best epoch is kept")
        self.uploads.finish()
        if self.best["best_epoch"] is None:
            raise FloatingPointError("the validation perplexity was never finite: try a lower --lr")
        return dict(self.best)

    def _run_epoch(self, epoch):
        start = time.monotonic()
        reported = self.train_one_epoch(epoch) if epoch >= 0 else math.nan
        trained = time.monotonic()
        valid_perplexity, scores = self.valid_one_epoch(epoch), self.score_one_epoch(epoch)
        self.log.record(epoch, self.objective.stage or self.stage, self.lr, reported, valid_perplexity, scores)
        if self.log.is_best():
            best = {"best_perplexity": valid_perplexity, "best_epoch": epoch}
            if self.processes.is_main:
                self.save_model(best)
            self.best = best  # only now: an interrupted save has kept the files of the epoch before
            self.uploads.push()
        if self.train_config.keep_epoch_checkpoints and self.processes.is_main:
            checkpoint.save_epoch(self.model_path, self.eval_model, epoch + 1, self.metrics[-1]["valid_loss"])
        self.log.time(epoch, training=trained - start, evaluation=time.monotonic() - trained)
        self.clean()
        self.state.finish_epoch(epoch, self.state_dict)
        self.log.write_report(self.eval_model)
        self.processes.barrier()  # until rank 0 has written its files

    # --- resume -------------------------------------------------------------------------------------------------------

    def identity(self):
        """Constants and captions of the run, as `check_same_run` compares them before a run is resumed; paths are
        relative to the repository."""
        configs = {"model": self.model.config, "train": self.train_config}
        configs = {name: checkpoint.portable(config, REPO_ROOT) for name, config in configs.items()}
        return {"config": configs, "dataset": [dataset_digest(dl.dataset) for dl in (self.train_dl, self.valid_dl)]}

    def state_dict(self):
        """Everything that the rest of the run depends on, beside position and random numbers, which `RunState` adds."""
        parts = self.optimizer, self.scheduler, self.scaler, self.average, self.peak_lr
        return {
            "stage": self.objective.stage or self.stage,
            "model": self.model.state_dict(),
            "optimization": schedule.optimization_state(*parts),
            "best": self.best,
            **self.log.state_dict(),
            **self.identity(),
        }

    def load_state_dict(self, state):
        """Go on from `state_dict`. Where the peak learning rate or the number of steps has changed since, the schedule
        is a new one, at the step that the old one had come to."""
        self.best, saved, position = state["best"], state["optimization"], self.state.position
        self.log.load_state_dict(state)
        if state["stage"] == "self-critical":
            self.start_self_critical()
        else:
            self.rebuild_schedule(self.train_config.epochs)  # the number of steps follows the number of processes
        if position["batches"]:
            self.enter_stage(position["epoch"])
        self.model.load_state_dict(state["model"])
        parts = self.optimizer, self.scheduler, self.scaler, self.average, self.peak_lr
        self.scheduler = schedule.load_optimization_state(saved, *parts, self.train_config.warmup_share)

    # --- the trained model --------------------------------------------------------------------------------------------

    def save_model(self, best=None):
        """Write the checkpoint: captioner.safetensors, captioner.pt, config.json, tokenizer.json. `best`,
        {"best_perplexity", "best_epoch"}, describes the weights that are saved; by default the best so far."""
        config = checkpoint.describe(self.model, REPO_ROOT, self.train_config, best or self.best)
        checkpoint.save_checkpoint(self.model_path, self.eval_model.state_dict(), config, self.tokenizer)

    def load_best_model(self, path=None):
        """Load the best weights of this run, or those in `path` (a .safetensors or .pt file, or a folder)."""
        for model in {self.model, self.eval_model}:
            checkpoint.load_strictly(model, path or self.model_path)

    def generate_caption(self, image, max_tokens=50, temperature=1.0, deterministic=False, **options):
        """A path or an opened image -> its caption; a list of them -> a list of captions.

        Greedy when `deterministic`, else sampled at `temperature`; `options` as in `caption_images`.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        options |= dict(max_tokens=max_tokens, temperature=temperature, deterministic=deterministic)
        captions = caption_images(self.eval_model, self.tokenizer, images, **options)
        return captions if isinstance(image, (list, tuple)) else captions[0]

    def clean(self):
        """Free memory that an epoch left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# ======================================================================================================================
# Main
# ======================================================================================================================


def read_configs(argv):
    """Command line -> (ModelConfig, TrainConfig, download), checked before anything is loaded or written: the constants
    at the top, on top of them those of the recipe, of the captioner to start from, and of the command line."""
    sections = dict(model_config=model_config, train_config=train_config)
    given, recipe, download = overrides.parse_overrides(argv, __file__, **sections)
    recipe, notice = default_recipe(recipe, given["train_config"], train_config.data_dir, DATA_DIR, download)
    chosen = recipes.recipe_constants(recipe, given, RECIPES_DIR, REPO_ROOT, **sections)
    train = chosen["train_config"] | data_paths(recipe, chosen["train_config"], train_config, DATA_DIR)
    model, train = complete_configs(SimpleNamespace(**chosen["model_config"]), SimpleNamespace(**train))
    preprocessing_of(model)  # knows the encoder: a mistyped name is an error before data is rendered or downloaded
    print(notice, end="\n" if notice else "")  # not in front of an error
    return model, train, download


def build_trainer(model_cfg, train_cfg, df):
    """Tokenizer, loaders, model and Trainer for the captions in `df`. Where files cannot be downloaded, raises
    FileNotFoundError that says which the run needs, and how to give local copies."""
    try:
        tok = build_tokenizer(model_cfg, streaming.training_texts(df, **cleaning_of(model_cfg, train_cfg)))
        trained = model_cfg.tokenizer != "gpt2" and not model_cfg.start_from
        if trained or len(tok) > model_cfg.vocab_size:  # a vocab_size above GPT-2's stays: padded for speed
            model_cfg = replace(model_cfg, vocab_size=len(tok))
        return Trainer(model_cfg, train_cfg, build_dataloaders(df, tok, model_cfg, train_cfg))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\n\n{loading.offline_help(model_cfg, HF_GPT2_REPO)}") from error


def main(argv=None):
    """Train, plot, demonstrate -> {"best_perplexity", "best_epoch"}, for Shapes also {"scores"}."""
    silence_other_ranks()
    model_cfg, train_cfg, download = read_configs(sys.argv[1:] if argv is None else argv)
    with run_folder.writing(train_cfg.model_path):
        with listening("the same command starts again"):
            torch.manual_seed(train_cfg.seed)
            df = load_data(train_cfg, DATA_DIR, download, model_cfg)
            trainer = build_trainer(model_cfg, train_cfg, df)
            if trainer.processes.is_main:
                run_folder.set_aside(train_cfg.model_path, trainer.state.resumed)
                recipes.write_recipe(train_cfg.model_path, trainer.model.config, trainer.train_config)
            result = trainer.run_training()
        trainer.load_best_model()
        trainer.processes.destroy()
        if not trainer.processes.is_main:
            return result
        trainer.log.finish(trainer.model)
        caption = partial(caption_images, trainer.model, trainer.tokenizer)
        plots.draw_demo(caption, df[df["split"] == "val"], train_cfg.demo_images, train_cfg.model_path / "demo.png")
        calibrate_run(trainer.model, trainer.tokenizer, trainer.train_dl.dataset, trainer.valid_dl.dataset, train_cfg)
        result |= shapes.scores_of(caption, train_cfg.data_dir, questions="prompt" in df)
        trainer.log.print_best(result)
    upload.offer_upload(HF_REPO_ID, train_cfg.model_path, train_cfg.push_every_epoch)
    plots.show_windows()
    return result


if __name__ == "__main__":
    try:
        sweep.run(sys.argv[1:], __file__, read_configs) or main()
    except (OSError, ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except Stopped as reason:
        print(reason)
    except KeyboardInterrupt:
        sys.exit("interrupted")
