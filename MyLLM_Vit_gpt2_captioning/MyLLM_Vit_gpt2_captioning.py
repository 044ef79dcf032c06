"""Train an image captioner: a timm ViT, stepped block by block with MyLLM GPT-2 blocks that carry cross-attention.

    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py                      everything by default
    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py --epochs 3 --lr 2e-4   with other constants
    python MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py --recipe shapes        with those of a recipe

Captions and photos are read from data/, in any format that sources.py knows; without them, a small captioner is trained
from scratch on the built-in Shapes dataset. Results go to captioner/.
"""

import gc
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from torch import nn

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO_ROOT))  # for MyLLM; this file's own folder is on the path already

from captioning.command_line.overrides import parse_overrides, what_to_give, with_defaults
from captioning.command_line.recipes import merge, write_recipe
from captioning.common.distributed import Team, only_first_speaks, without_sync
from captioning.common.files import WEIGHTS_FILE
from captioning.common.progress import progress_bar
from captioning.data import shapes, sources
from captioning.data.batching import (
    CaptionBatchSampler,
    build_loader,
    exact_captions_per_image,
    several,
    stack,
    to_device,
)
from captioning.data.built_in import data_paths, default_recipe, load_data
from captioning.data.shards import streaming
from captioning.data.token_cache import read_tokens_from_disk
from captioning.data.unreadable_photos import BadImages
from captioning.decoding.cached_decoder import BlockCache
from captioning.decoding.search import caption_images, generate_ids, trim
from captioning.images.augmentation import TrainingTransforms, ValidationTransforms
from captioning.images.preprocessing import normalize
from captioning.model import checkpoint, hugging_face
from captioning.model.encoders import build_encoder, meta_device_for, preprocessing_of, resolve_encoder, run_block
from captioning.model.loss import chunked_cross_entropy
from captioning.model.positions import SinusoidalPositions
from captioning.model.stages import keep_frozen_in_eval, pretrained_names, stage_of
from captioning.model.tokenizer import CaptionTokenizer, check_eos, encode_caption, encode_prompt, fit_config
from captioning.pages import plots
from captioning.sharing import upload
from captioning.training.run_log import RunLog, perplexity
from captioning.training.run_state import RunState, Stopped
from captioning.training.schedule import Optimization, be_deterministic, mixed_precision
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
WANDB_RUN_NAME = ""  # what such a run is called; "": the name of its folder and its id
HF_REPO_ID = os.environ.get("HF_REPO_ID", "")  # "user/repo" on the Hugging Face Hub, where a captioner is shared
RESUME_CHECKPOINT_PATH = ""  # "auto" goes on from OUTPUT_DIR/last, a path from there; "" starts afresh
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

tokenizer = CaptionTokenizer(HF_GPT2_REPO)  # GPT-2's; pad token = EOS; read on first use, so importing needs no network

model_config = SimpleNamespace(
    embed_dim=768,  # channels of the decoder
    num_heads=12,  # attention heads of the decoder, also in cross-attention
    depth=12,  # decoder blocks
    seq_len=1024,  # longest caption in tokens, [BOS] and [EOS] included
    vocab_size=50257,  # tokens the decoder knows; for a trained tokenizer the most it may learn
    emb_dropout=0.1,  # dropout on token + position embeddings
    attention_dropout=0.1,  # dropout on attention weights (self and cross)
    mlp_dropout=0.1,  # dropout behind the MLP
    residual_dropout=0.1,  # dropout behind attention's output projection
    label_smoothing=0.0,  # share of a training target that is spread over all tokens; validation's loss is without
    decoder_weights="pretrained",  # "pretrained" (HF_GPT2_REPO), a hub id, a local folder, or "scratch"
    positions="learned",  # "learned" as GPT-2's, or "sinusoidal" (from scratch only)
    activation="gelu",  # of the MLP: "gelu" as GPT-2's, or "relu" (from scratch only)
    post_norm=False,  # true: norms behind each residual sum as in the first Transformer (from scratch only)
    tokenizer="gpt2",  # "gpt2" (HF_GPT2_REPO), or "bpe" or "word", learnt from the training captions
    eos_token_id=50256,  # ends captions; set from the tokenizer
    unk_token_id=-1,  # stands for words that a word list lacks, never written; set from the tokenizer, -1: none
    encoder="vit_base_patch16_224",  # nearly any timm model, or a transformers ViT or CLIP (hub id or folder)
    encoder_weights="pretrained",  # "pretrained" (downloaded), a local weights file or folder, or "scratch"
    encoder_options={},  # more arguments of the timm model, as JSON: {"img_size": 48, "patch_size": 8}
    trainable_stages=-1,  # last blocks or stages of a pretrained encoder that ever train; -1: all, 0: none
    refiner={},  # encoder layers from scratch behind a CNN, as JSON: arguments of encoders.ConvolutionalRefiner
    feature_levels=1,  # last feature maps of a CNN that become tokens; with two or more a CNN can be stepped
    preprocessing={},  # mean, std, resample of photos, as JSON; what is not given comes with the encoder
    coupling="stepped",  # decoder block i attends to encoder depth i ("stepped") or to the last layer ("final")
    normalize_tokens=False,  # LayerNorm on image tokens that no final norm of the encoder has normalised
    start_from="",  # trained captioner to go on from, ours or Hugging Face's; it brings the model constants not given
)

train_config = SimpleNamespace(
    epochs=5,  # passes over the training captions
    freeze_epochs_gpt=1,  # epochs before the pretrained GPT-2 blocks train too
    freeze_epochs_all=2,  # epochs before everything trains
    lr=1e-4,  # peak learning rate of new layers; OneCycle starts at lr / 25
    pretrained_lr_scale=0.1,  # pretrained layers learn at lr times this
    warmup_share=0.1,  # share of all steps in which the learning rate rises
    weight_decay=0.01,  # AdamW; not on norms, biases and embeddings
    ema_decay=0.0,  # of a moving average of the weights, which is then what is validated and kept; 0: no average
    clip_norm=1.0,  # longest gradient; a longer one is scaled down
    batch_size=32,  # captions a batch; a multiple of captions_per_image
    accumulate=1,  # batches a step, for more captions a step than memory holds; the gradient is that of one large batch
    captions_per_image=1,  # captions that share one encoding of their image; with 5, Flickr encodes each photo once
    length_window=16,  # batches that are cut from one sort by caption length, so that little is padding; 1: unsorted
    shuffle_buffer=5000,  # of tar shards: groups of captions_per_image captions that are mixed; raw photos in memory
    cache_tokens=False,  # compute a frozen encoder's tokens once, keep them on disk and train from there
    cache_dir=DATA_DIR / "token_cache",  # where; runs share what depends on the same encoder and photos
    cache_views=1,  # versions of a training photo in the cache: itself, and augmented ones, the same for every seed
    crop_scale=0.8,  # smallest share of a photo's area that a training crop keeps
    max_bad_steps=20,  # consecutive steps with a non-finite loss or gradient after which training stops
    max_bad_images=100,  # photos that may turn out unreadable before training stops; their captions count nothing
    num_workers=0 if DEVICE == "cpu" else min(8, os.cpu_count()),  # processes that load images
    device=DEVICE,  # where to train; cuda:1 is a second GPU
    gradient_checkpointing=False,  # compute blocks again in the backward pass: slower, but takes little memory
    compile=False,  # torch.compile: minutes at first, then faster steps on a GPU
    precision="auto",  # "float32", "bf16", or "auto": on CUDA bf16, fp16 where the GPU lacks it, elsewhere float32
    seed=0,  # of weights, order and augmentation; the split stays the same, so that runs can be compared
    data_dir=DATA_DIR,  # folder with captions and photos
    image_dir=IMAGE_DIR,  # folder with the photos; found in data_dir when only that is given
    model_path=OUTPUT_DIR,  # folder for checkpoint, metrics and plots; an earlier run there is moved aside
    captions_file=CAPTIONS_FILE,  # annotation file of any format; found in data_dir when empty
    dataset="flickr30k",  # what --download puts into data_dir: flickr8k, flickr30k or coco2017
    score_every=1,  # epochs between scores of captions of the same validation photos; 0: never
    score_images=200,  # validation photos that are captioned for these scores
    best_by="perplexity",  # what decides which epoch is kept: "perplexity", or "CIDEr" of those captions
    keep_epoch_checkpoints=False,  # also keep the weights of every epoch, named by epoch and validation loss
    push_every_epoch=False,  # upload the best checkpoint to HF_REPO_ID in the background whenever there is a new one
    resume=RESUME_CHECKPOINT_PATH,  # stopped run to go on with: "auto" (the one in model_path), or a path
    save_minutes=10.0,  # between states to go on from, in model_path/last; one is saved after every epoch, too
    deterministic=False,  # only operations that give the same bits every time: on a GPU slower
    scst_epochs=0,  # epochs behind the others that raise the CIDEr of the model's captions, which then decides best_by
    scst_lr=5e-5,  # their peak learning rate
    scst_samples=5,  # captions drawn for a photo; a step draws batch_size captions
    scst_draws="sample",  # "sample" from the model, or take the ends of a "beam" search with as many beams
    scst_baseline="mean",  # what a draw is measured against: "mean" of the photo's other draws, or the "greedy" caption
    tracker="none",  # who else is told how the run goes: "tensorboard", "wandb" or "trackio"
    log_steps=50,  # steps that a point of the tracker's training curve, and of the report's, stands for
    demo_images=10,  # validation photos in demo.png
    shapes_scenes=6000,  # training scenes of the built-in datasets
)

IGNORED_LABEL = -100  # what cross_entropy skips
read_config = partial(hugging_face.read_config, read_decoder=gpt2_config, constants=model_config)


def complete_configs(model=None, train=None):
    """Copies of the given configs in which each attribute that they lack has the value it has above, or that it has in
    the captioner to start from, and a transformers model as encoder is put into timm's words."""
    model, defaults = model or SimpleNamespace(), model_config
    if getattr(model, "start_from", "") and not vars(defaults).keys() <= vars(model).keys():
        stored = SimpleNamespace(**read_config(model.start_from)[1])
        defaults = with_defaults(stored, model_config)
        model = SimpleNamespace(**vars(model))
        model.preprocessing = stored.preprocessing | getattr(model, "preprocessing", {})
    model = with_defaults(model, defaults)
    resolve_encoder(model)
    return model, with_defaults(train or SimpleNamespace(), train_config)


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
    with a row a caption.

    Columns: image (Path in `image_dir`), caption (lowercased, stripped, "" where missing), split (train/val/test, by
    image) and, for questions, prompt. Raises FileNotFoundError when there is no annotation file, ValueError when it
    cannot be understood.
    """
    return sources.load(data_dir, captions_file, image_dir)


def build_transforms(img_size=224, norm_mean=None, norm_std=None, crop_scale=0.8, resample="bicubic", normalized=True):
    """-> (train_tfms, valid_tfms); each is called `tfms(image=array)["image"]` -> float tensor (3, img_size, img_size).

    `norm_mean` and `norm_std` are one value a channel for pixels in 0..1; None means 0.5. `crop_scale`: see
    augmentation.py, which says how captions stay true. Without `normalized` the tensors are pixels, uint8.
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
        self.images = [str(path) for path in df["image"]]
        self.captions = list(df["caption"])
        self.prompts = list(df["prompt"]) if "prompt" in df else [""] * len(df)
        self.captions_of = {}  # all captions of an image decide how it may be augmented, questions too
        for image, *texts in zip(self.images, self.captions, self.prompts, strict=True):
            self.captions_of.setdefault(image, []).extend(filter(None, texts))
        self.tfms, self.tokenizer = tfms, _gpt2_tokenizer() if tokenizer is None else tokenizer
        self.captions_per_image, self.max_length, self.seed = captions_per_image, max_length, seed
        self.bad_images = BadImages(self.captions_of, max_bad_images)
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

    def look(self, path, row):
        """What the model is given of an image (grey if unreadable): (3, H, W), or from a token cache (N, C) a level."""
        seed = [self.seed, int(self.epoch), row]
        if self.token_caches:
            return self.token_caches[np.random.default_rng(seed).integers(len(self.token_caches))][path]
        pixels = self.bad_images.load(path, getattr(self.tfms, "least_side", None))  # (H, W, 3) uint8
        return self.tfms(image=pixels, captions=self.captions_of[path], seed=seed)["image"]

    def _items(self, rows):
        """Captions of one image -> their items; the image is loaded once."""
        image = self.look(self.images[rows[0]], rows[0])
        readable = self.images[rows[0]] not in self.bad_images
        return [(image, *self.tokens(self.captions[row], self.prompts[row], readable)) for row in rows]

    def tokens(self, caption, prompt="", readable=True):
        """-> (token_ids, labels); of an image that is not `readable` there is nothing to learn."""
        token_ids = encode_caption(self.tokenizer, caption, self.max_length, prompt)
        labels = _shift_labels(token_ids)
        if prompt:
            given = min(len(encode_prompt(self.tokenizer, prompt)), max(1, self.max_length - 2)) - 1
            labels[:given] = [IGNORED_LABEL] * given
        return token_ids, labels if readable else [IGNORED_LABEL] * len(labels)


def collate_fn(batch, tokenizer=None, captions_per_image=1):
    """Items of `Dataset` -> images (B, 3, H, W), input_ids (B*K, T), labels (B*K, T) with K = `captions_per_image`.

    From a token cache come the encoder's tokens instead of images: a list of (B, N, C).

    A label is -100 at and behind the last real token of its row, where there is nothing to predict. That is decided by
    length: the pad id is also EOS, and EOS is a target that the model has to learn.
    """
    images, token_ids, labels = zip(*batch, strict=True)
    if tokenizer is None:
        tokenizer = SimpleNamespace(pad_token_id=token_ids[0][-1])  # EOS: what ends a caption pads it, too
    input_ids = _pad_token_batch(tokenizer, token_ids)  # (B*K, T)
    lengths = torch.tensor([len(ids) for ids in token_ids])  # (B*K,)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in labels], batch_first=True)  # (B*K, T)
    labels[torch.arange(labels.size(1)) >= lengths[:, None] - 1] = IGNORED_LABEL
    return stack(images[::captions_per_image]), input_ids, labels


def build_tokenizer(model_config, captions):
    """The tokenizer of the captioner to start from, or the one that `model_config.tokenizer` names; "bpe" and "word"
    are learnt from `captions`."""
    if model_config.start_from:
        return CaptionTokenizer(read_config(model_config.start_from)[0])
    if model_config.tokenizer == "gpt2":
        return tokenizer
    return CaptionTokenizer.train(captions, model_config.vocab_size, model_config.tokenizer)


def build_dataloaders(df, tokenizer, model_config, train_config):
    """DataFrame of `_load_flickr_dataframe` -> (training DataLoader, validation DataLoader)."""
    model_config, config = complete_configs(model_config, train_config)
    photo = preprocessing_of(model_config)
    loaders = []
    transforms = build_transforms(
        photo["img_size"], photo["mean"], photo["std"], config.crop_scale, photo["resample"], normalized=False
    )
    for split, tfms in zip(("train", "val"), transforms, strict=True):
        rows, folder = df[df["split"] == split], split == "train" and streaming.streamed_folder(df)
        if rows.empty and not folder:
            raise ValueError(f"{config.data_dir}: no usable caption is in the {split} split")
        training, K = split == "train", config.captions_per_image
        if not training:
            K = exact_captions_per_image(rows["image"], K)  # validation counts every caption exactly once
        dataset = Dataset(rows, tfms, tokenizer, K, model_config.seq_len, config.seed, config.max_bad_images)
        collate = partial(collate_fn, tokenizer=tokenizer, captions_per_image=K)
        if folder:
            loaders.append(streaming.build_stream_loader(folder, dataset, collate, config))
            continue
        words = [caption.count(" ") for caption in dataset.captions]  # tells long captions from short ones
        sampler = CaptionBatchSampler(
            dataset.images, config.batch_size, K, training, config.seed, words, config.length_window
        )
        loaders.append(build_loader(dataset, sampler, collate, config))
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
        context = F.scaled_dot_product_attention(
            split_heads(queries, self.num_heads),
            keys,
            values,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # (B, heads, K*T, head_dim)
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
        x = hidden_states
        x = self.residual(x, self.ln_1, lambda x: self.self_attn(x, cache.self_attn if cache else None))
        x = self.residual(x, self.ln_cross, lambda x: self.cross_attn.attend(x, keys, values))
        return self.residual(x, self.ln_2, self.mlp)

    def residual(self, x, norm, layer):
        """x + layer(norm(x)), or with `post_norm` norm(x + layer(x)); x (B*K, T, embed_dim)."""
        return norm(x + layer(x)) if self.post_norm else x + layer(norm(x))


class VisionGPT2Model(nn.Module):
    """Image and caption in, loss or next-token scores out. `config` has the attributes of `model_config`; those it
    lacks have the values they have there. `from_pretrained` loads the weights that `config` names; the constructor by
    itself makes the frame for them, with random weights.
    """

    NEW_LAYERS = ("ln_cross", "cross_attn", "refiner")  # what GPT-2 and the pretrained encoders lack
    gradient_checkpointing = False
    loss = staticmethod(chunked_cross_entropy)

    def __init__(self, config, encoder_weights="scratch"):
        super().__init__()
        self.config, _ = complete_configs(model=config)
        config = self.config
        self.encoder = build_encoder(
            config.encoder, config.depth, config.coupling, config.encoder_options, encoder_weights, config.refiner,
            config.feature_levels,
        )  # fmt: skip
        config.coupling = self.encoder.coupling  # final where the encoder has nothing to step
        self.preprocessing = preprocessing_of(config)
        self.gpt = GPTModel(config, block_class=GPT2Block)
        if config.positions == "sinusoidal":
            std = 0.7 * initial_std(config.embed_dim)  # 0.7 is the paper's ratio of positions to tokens
            self.gpt.pos_emb = SinusoidalPositions(config.seq_len, config.embed_dim, std)
        if config.post_norm:
            self.gpt.final_norm = nn.Identity()  # the last block's norm is the last
        # From image tokens to what cross-attention reads: a norm if wanted, a projection where the widths differ. Each
        # level has statistics of its own and its own bridge; with final coupling all blocks share what comes out.
        self.bridges = nn.ModuleList(self._make_bridge(i, width) for i, width in enumerate(self.encoder.widths))

    def _make_bridge(self, level, width):
        config = self.config
        normalized = self.encoder.normalized and level == len(self.encoder.widths) - 1
        norm = LayerNorm(width) if config.normalize_tokens and not normalized else nn.Identity()
        return nn.Sequential(norm, nn.Linear(width, config.embed_dim) if width != config.embed_dim else nn.Identity())

    # The ViT's parts under the names that people look for.
    patch_embed = property(lambda self: self.encoder.vit.patch_embed)
    cls_token = property(lambda self: self.encoder.vit.cls_token)
    pos_embed = property(lambda self: self.encoder.vit.pos_embed)
    blocks = property(lambda self: self.encoder.vit.blocks)

    def _pos_embed(self, patch_tokens):
        """Patch tokens (B, N_patches, C) -> (B, N, C): class token (if any) in front, positions added."""
        return self.encoder.vit._pos_embed(patch_tokens)

    def _encode_images(self, images):
        """images (B, 3, H, W) -> tokens (B, N, C) that enter step 0; with final coupling, the encoder's output."""
        return self.encoder.embed(self._normalized(images))

    def _normalized(self, images):
        """Pixels (uint8) are normalised here, on the device: a quarter of the bytes had to be moved there."""
        photo = self.preprocessing
        return normalize(images, photo["mean"], photo["std"]) if images.dtype == torch.uint8 else images

    def levels(self, images):
        """images (B, 3, H, W), normalised, or uint8 pixels -> `encoder.levels`, a list of tokens (B, N, C)."""
        return self.encoder.levels(self._normalized(images))

    def encoder_states(self, images):
        """images as in `levels`, or what it makes of them -> for each decoder block the tokens (B, N, embed_dim) that
        it attends to."""
        levels = images if isinstance(images, (list, tuple)) else self.levels(images)
        levels = self.encoder.refine([level.to(self.gpt.tok_emb.weight.dtype) for level in levels])
        tokens = [bridge(level) for bridge, level in zip(self.bridges, levels, strict=True)]  # (B, N, embed_dim) each
        if self.config.coupling == "final":
            tokens = [torch.cat(tokens, dim=1)]  # (B, N of all levels, embed_dim)
        depth = self.config.depth
        return [tokens[i * len(tokens) // depth] for i in range(depth)]

    def _build_text_embeddings(self, input_ids, start=0):
        """input_ids (B, T) -> (B, T, embed_dim): token + position embeddings, positions from `start` on."""
        return self.gpt.embed(input_ids, start)

    def decode(self, input_ids, encoder_states, caches=None):
        """input_ids (B*K, T), encoder_states of `encoder_states` -> hidden states (B*K, T, embed_dim).

        With `caches` from `new_caches`, input_ids holds only the newest tokens.
        """
        caches = caches or [None] * self.config.depth
        x = self._build_text_embeddings(input_ids, start=caches[0].self_attn.length if caches[0] else 0)
        for block, tokens, cache in zip(self.gpt.trf_blocks, encoder_states, caches, strict=True):
            x = run_block(block, x, tokens, cache, recompute=self.gradient_checkpointing)
        return x

    def new_caches(self, max_length):
        """One empty `BlockCache` a block, for captions of up to `max_length` tokens."""
        return [BlockCache(KeyValueCache(max_length)) for _ in self.gpt.trf_blocks]

    def forward(self, image, input_ids, labels=None):
        """image (B, 3, H, W) or its `levels`, input_ids (B*K, T), labels (B*K, T) or None.

        With labels: the mean cross-entropy over labels that are not -100, a scalar in nats; in training mode with the
        config's label smoothing (Szegedy et al. 2016). Without: logits
        (B*K, 1, vocab_size) of the token that follows the last one.
        """
        B = len(image[0]) if isinstance(image, (list, tuple)) else len(image)
        if input_ids.size(0) % B:
            raise ValueError(f"{input_ids.size(0)} captions cannot be shared equally among {B} images")
        hidden = self.decode(input_ids, self.encoder_states(image))  # (B*K, T, embed_dim)
        if labels is None:
            return self.gpt.logits(hidden[:, -1:])
        real = labels != IGNORED_LABEL  # padding is left out before the head, by far the widest layer
        smoothing = self.config.label_smoothing if self.training else 0.0
        hidden = self.gpt.final_norm(hidden[real])  # (real tokens, embed_dim)
        return self.loss(hidden, self.gpt.tok_emb.weight, labels[real], smoothing)

    def checkpoint_gradients(self):
        """Compute blocks of ViT and decoder again in the backward pass instead of keeping what they made."""
        self.gradient_checkpointing = self.encoder.gradient_checkpointing = True

    # --- staged unfreezing --------------------------------------------------------------------------------------------

    def pretrained_parameters(self):
        """Names of the parameters whose weights `config` does not call "scratch"; nothing else is ever frozen."""
        return pretrained_names(self, self.NEW_LAYERS)

    def always_frozen(self):
        """Names of pretrained parameters that no stage trains: the encoder's in front of its `trainable_stages`."""
        if self.config.trainable_stages < 0:
            return set()
        before = {f"encoder.{name}" for name in self.encoder.parameters_before(self.config.trainable_stages)}
        return before & set(self.pretrained_parameters())

    def pretrained_layers_trainable(self, trainable=False):
        """Freeze all pretrained parameters, so that only new layers train, or thaw them but for `always_frozen`; print
        how many are frozen."""
        frozen = self.always_frozen()
        for name in self.pretrained_parameters():
            self.get_parameter(name).requires_grad = trainable and name not in frozen
        self._trainable_changed()

    def unfreeze_gpt_layers(self):
        """Let norms, self-attention and MLP of the blocks train; not embeddings, final norm (and so the head)."""
        self.gpt.trf_blocks.requires_grad_(True)
        self._trainable_changed()

    def _trainable_changed(self):
        self.train(self.training)
        print(f"frozen parameters: {sum(p.numel() for p in self.parameters() if not p.requires_grad):,}")

    def train(self, mode=True):
        """As in `nn.Module`, but what is frozen stays in eval mode: no dropout, and BatchNorm keeps its buffers."""
        super().train(mode)
        keep_frozen_in_eval(self)
        return self

    # --- weights ------------------------------------------------------------------------------------------------------

    def _load_hf_gpt2_weights(self, sd_hf):
        """Copy a Hugging Face GPT-2 state_dict into the decoder, strictly; cross-attention keeps its values.

        Raises ValueError when it does not fit, or when the decoder is built unlike GPT-2.
        """
        for key in ("positions", "activation", "post_norm"):
            if getattr(self.config, key) != getattr(model_config, key):
                raise ValueError(f"GPT-2 has no {key} {getattr(self.config, key)}: set --decoder_weights scratch")
        load_hf_gpt2_weights(self.gpt, sd_hf, new_layers=self.NEW_LAYERS)

    @classmethod
    def from_pretrained(cls, source):
        """A config -> a captioner with pretrained encoder and GPT-2, ready to be trained; a checkpoint folder or a hub
        id "user/repo" -> the trained captioner that is stored there, ours or a VisionEncoderDecoderModel of ViT and
        GPT-2.

        Raises FileNotFoundError or ValueError that says what is missing or does not fit.
        """
        if isinstance(source, (str, Path)):
            folder, stored = read_config(source)
            with meta_device_for(stored):
                model = cls(SimpleNamespace(**stored), encoder_weights="stored")
            model._load_captioner(folder)
            return model.eval()
        config, _ = complete_configs(model=source)
        if config.start_from:
            folder, _ = read_config(config.start_from)
            model = cls(config)
            model._load_captioner(folder)
            return model
        model = cls(config, encoder_weights=config.encoder_weights)
        if config.decoder_weights != "scratch":
            repo = HF_GPT2_REPO if config.decoder_weights == "pretrained" else config.decoder_weights
            hf_config, sd_hf = read_hf_gpt2(repo)
            hugging_face.check_sizes(hf_config, config, repo)
            model._load_hf_gpt2_weights(sd_hf)
        return model

    def _load_captioner(self, folder):
        """Load all weights of a captioner, strictly; on ValueError nothing has changed."""
        if hugging_face.is_vision_encoder_decoder(checkpoint.load_config(folder)):
            checkpoint.fill(self, hugging_face.read_captioner_weights(folder, self.state_dict(), hf_name))
        else:
            checkpoint.load_strictly(self, folder / WEIGHTS_FILE)

    def save_pretrained(self, folder, tokenizer=None):
        """Write a checkpoint that `from_pretrained(folder)` loads: weights, config.json and the `tokenizer`'s file."""
        config = checkpoint.describe(self, REPO_ROOT)
        checkpoint.save_checkpoint(folder, self.state_dict(), config, tokenizer, torch_file=False)

    def export_to_transformers(self, folder, tokenizer=None):
        """Write the captioner so that `transformers.VisionEncoderDecoderModel.from_pretrained(folder)` loads it.

        Raises ValueError for one that has no equal there: stepped coupling, an encoder other than a plain ViT.
        """
        hugging_face.write_captioner(folder, self, hf_name, tokenizer)

    def generate(self, image, sequence, max_tokens=50, temperature=1.0, deterministic=False, **options):
        """Caption one image (1, 3, H, W), continuing `sequence` (1, T), which starts with BOS.

        Returns the ids on the CPU, 1-D: the sequence, up to `max_tokens` new tokens, EOS last if it was reached; with
        `num_return_sequences` above 1 a list of them. Greedy when `deterministic`, else sampled at `temperature`;
        `options` are the other ones of `decoding.Options`, beam search among them.
        """
        if len(image) != 1 or len(sequence) != 1:
            raise ValueError(f"generate takes one image and one sequence, not {len(image)} and {len(sequence)}")
        ids = generate_ids(self, image, sequence, max_tokens, temperature, deterministic, **options)
        rows = [trim(row, sequence.size(1), self.config.eos_token_id) for row in ids.cpu()]
        return rows if len(rows) > 1 else rows[0]


def load_captioner(source):
    """A trained captioner (folder or hub id, ours or Hugging Face's) -> (model in eval mode, its tokenizer)."""
    folder, _ = read_config(source)
    model, tok = VisionGPT2Model.from_pretrained(folder), CaptionTokenizer(folder)
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


def _labels(batch):
    """How many labels of a batch of `collate_fn` count."""
    return int((batch[2] != IGNORED_LABEL).sum())


class Trainer:
    """Trains `VisionGPT2Model.from_pretrained(model_config)` on dls = (training DataLoader, validation DataLoader).

    What the configs lack has the value it has at the top of this file.
    """

    def __init__(self, model_config, train_config, dls):
        model_config, self.train_config = complete_configs(model_config, train_config)
        config = self.train_config
        if config.deterministic:
            be_deterministic()
        self.train_dl, self.valid_dl = dls
        self.tokenizer = getattr(self.train_dl.dataset, "tokenizer", tokenizer)
        fit_config(model_config, self.tokenizer)
        config.device = str(config.device)  # a torch.device could not be written into config.json
        self.team = Team(config.device)  # with torchrun there are more processes than this
        self.device = self.team.device
        self.model = VisionGPT2Model.from_pretrained(model_config).to(self.device)
        self.model_path = Path(config.model_path)

        if config.gradient_checkpointing:
            self.model.checkpoint_gradients()
        self.autocast, self.scaler = mixed_precision(self.device, config.precision)
        if config.cache_tokens:
            read_tokens_from_disk(self.model, dls, config)
        self.optimization = self._optimization(config.lr, config.epochs * len(self.train_dl))
        self.compiled = self.model
        if config.compile:
            self.model.loss = torch.compiler.disable(self.model.loss)  # the number of chunks changes with the batch
            self.compiled = torch.compile(self.model)  # with the same weights
        kind = config.tracker if self.team.first else "none"
        tracker = Tracker(kind, self.model_path, WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_NAME)
        self.log = RunLog(self.model_path, config, self.team, any(self.valid_dl.dataset.prompts), tracker)
        self.metrics = self.log.rows  # a dict an epoch, the rows of metrics.csv
        self.self_critical = SelfCritical(self.train_dl.dataset, config) if config.scst_epochs else None
        self.best = {"best_perplexity": math.inf, "best_epoch": None}
        self.trains = self.stage = None  # what is not frozen; what the epoch is called in metrics.csv
        self.uploads = upload.background_uploads(
            config.push_every_epoch and self.team.first, HF_REPO_ID, self.model_path
        )
        self.enter_stage(epoch=0)
        self.state = RunState(self, first_epoch=-1 if config.epochs == 0 else 0, root=REPO_ROOT)
        self.team.own_random_numbers(config.seed, self.state.position)
        if config.resume or self.team.restarted:
            self.state.resume(config.resume or "auto")

    def _optimization(self, lr, batches):
        steps = math.ceil(batches / self.train_config.accumulate)
        return Optimization(self.model, lr, steps, self.scaler, self.train_config)

    @property
    def averaged(self):
        """The model that is validated and kept: the moving average of the weights if there is one, else the model."""
        average = self.optimization.average
        return average.module if average else self.model

    def rebuild_schedule(self, epochs):
        """OneCycle over `epochs` epochs, continued at the current step: call it when the number of epochs changes."""
        self.train_config.epochs = epochs
        self.optimization.reschedule(math.ceil(epochs * len(self.train_dl) / self.train_config.accumulate))

    def enter_stage(self, epoch):
        """Make trainable what trains in this epoch, and say so when it changes."""
        config = self.train_config
        stage = stage_of(epoch, self.model, config)
        if stage != self.trains:
            print(f"epoch {epoch + 1}: training {stage}; ", end="")
            if stage == "everything" or self.trains != "new layers":
                self.model.pretrained_layers_trainable(trainable=stage == "everything")
            if stage == "GPT-2 blocks":
                self.model.unfreeze_gpt_layers()
            self.trains = stage
            self.shared = None  # the old one's hooks have to go before there are new ones
            self.shared = self.team.share(self.model)
        if config.scst_epochs and epoch >= config.epochs:
            stage = "self-critical"
            if self.stage != stage:
                print(f"epoch {epoch + 1}: {stage} training")
                if self.best["best_epoch"] is not None:
                    self.load_best_model()
                self.start_self_critical()
        self.stage = stage

    def start_self_critical(self):
        """An optimizer and a schedule of their own for rewards."""
        batches = self.train_config.scst_epochs * len(self.self_critical.loader)
        self.optimization = self._optimization(self.train_config.scst_lr, batches)

    def _loss(self, batch):
        """A batch of `collate_fn` -> its mean loss per label."""
        images, input_ids, labels = (to_device(part, self.device) for part in batch)
        with self.autocast():
            if self.model.training:
                return self.shared(self.compiled, images, input_ids, labels)
            return self.averaged(images, input_ids, labels)

    def _reward_loss(self, batch):
        """A batch of `SelfCritical` -> (loss, mean reward of its photos)."""
        images, places = batch
        self.model.eval()  # the draws are made without dropout: what is learnt from them is, too
        images = to_device(images, self.device)
        return self.shared(self.self_critical.loss, self.model, images, places, self.autocast)

    def _losses(self, batches, seen):
        """Batches that make one step -> yields a loss for each; their sum, averaged over the processes, is the mean
        over all labels, or photos.

        What epochs report, (loss or reward, number of labels or photos it is the mean of), is added to `seen`.
        """
        weights = [_labels(batch) if len(batch) == 3 else len(batch[1]) for batch in batches]
        [whole] = self.team.sum(sum(weights))
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
            if not whole:
                return  # none of the photos can be read
            with without_sync(self.shared, last=number == len(batches)):
                if len(batch) == 3:
                    loss = self._loss(batch)
                    value = loss.item()
                else:
                    loss, value = self._reward_loss(batch)
                seen.append((value, weight))
                yield loss * (weight / whole * self.team.size)

    def train_one_epoch(self, epoch):
        """One pass over the training captions (epoch counts from 0) -> mean loss per token; over the training photos
        with self-critical training -> mean reward of the captions that were drawn.

        A step whose loss or gradient is not finite changes nothing; after `max_bad_steps` of them in a row
        FloatingPointError is raised.
        """
        self.enter_stage(epoch)
        self.model.train()
        rewarded = self.stage == "self-critical"
        loader, name = (self.self_critical.loader, "reward") if rewarded else (self.train_dl, "loss")
        for part in (loader.dataset, loader.batch_sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        at = self.state.enter(epoch)
        loader.batch_sampler.first = at["batches"]
        K = getattr(loader.dataset, "captions_per_image", 1)
        epochs = self.train_config.epochs + self.train_config.scst_epochs
        bar = progress_bar(len(loader.dataset) // K, f"epoch {epoch + 1}/{epochs}")  # images, whatever K
        for batches in several(loader, self.train_config.accumulate):
            seen, total, count = [], 0.0, 0
            with self.state.step():
                if self.optimization.step(self._losses(batches, seen)):
                    total, count = self.team.sum(sum(value * n for value, n in seen), sum(n for _, n in seen))
                    at["total"], at["count"] = at["total"] + total, at["count"] + count
                    shown = {name: f"{at['total'] / at['count']:.3f}", "lr": f"{self.optimization.lr:.1e}"}
                    bar.set_postfix(shown, refresh=False)
                at["batches"] += len(batches)
                self.log.step(epoch + at["batches"] / len(loader), self.optimization.lr, name, total, count, batches)
            bar.update(sum(len(batch[-1]) for batch in batches) // K * self.team.size)
        bar.close()
        return at["total"] / at["count"] if at["count"] else math.nan

    @torch.inference_mode()
    def valid_one_epoch(self, epoch):
        """One pass over the validation captions -> perplexity: exp of the mean loss over all their tokens."""
        self.model.eval()
        total_loss, total_tokens = 0.0, 0
        K = getattr(self.valid_dl.dataset, "captions_per_image", 1)
        bar = progress_bar(len(self.valid_dl.dataset) // K, "validation")
        for batch in self.valid_dl:
            total_loss += self._loss(batch).item() * _labels(batch)
            total_tokens += _labels(batch)
            bar.update(len(batch[-1]) // K * self.team.size)
        bar.close()
        total_loss, total_tokens = self.team.sum(total_loss, total_tokens)
        return perplexity(total_loss / total_tokens)

    def run_training(self):
        """Train, keep the best epoch by `best_by` -> {"best_perplexity", "best_epoch"}: its perplexity and its number.

        Numbers count from 0; -1 is what self-critical training by itself starts from. Losses that stay non-finite end
        the run early, and what was best is kept. Raises Stopped on Ctrl-C, SIGTERM and SIGUSR1, its state saved.
        """
        self.log.begin(self)
        end = self.train_config.epochs + self.train_config.scst_epochs
        with self.state.signals():  # while the state is saved, too: torchrun asks all to stop when one has failed
            try:
                for epoch in range(self.state.position["epoch"], end):
                    self._run_epoch(epoch)
            except BaseException as reason:
                self.state.save()
                if not isinstance(reason, (FloatingPointError, KeyboardInterrupt)) or self.best["best_epoch"] is None:
                    raise
                if isinstance(reason, Stopped):
                    raise
                print(f"stopped early: {str(reason) or 'interrupted'}; the best epoch is kept")
        self.uploads.finish()
        if self.best["best_epoch"] is None:
            raise FloatingPointError("the validation perplexity was never finite: try a lower --lr")
        return dict(self.best)

    def _run_epoch(self, epoch):
        start = time.monotonic()
        trained = self.train_one_epoch(epoch) if epoch >= 0 else math.nan
        middle = time.monotonic()
        valid_perplexity, scores = self.valid_one_epoch(epoch), self.score_one_epoch(epoch)
        self.log.record(epoch, self.stage, self.optimization.lr, trained, valid_perplexity, scores)
        if self.log.is_best():
            best = {"best_perplexity": valid_perplexity, "best_epoch": epoch}
            if self.team.first:
                self.save_model(best)
            self.best = best  # only now: an interrupted save has kept the files of the epoch before
            self.uploads.push()
        if self.train_config.keep_epoch_checkpoints and self.team.first:
            weights = self.averaged.state_dict()
            checkpoint.save_epoch(self.model_path, weights, epoch + 1, self.metrics[-1]["valid_loss"])
        self.log.time(epoch, training=middle - start, evaluation=time.monotonic() - middle)
        self.clean()
        self.state.finish(epoch)
        self.log.write_report(self)
        self.team.wait()  # for what the first process writes

    def score_one_epoch(self, epoch):
        """Caption some validation photos -> {"CIDEr", "BLEU-4"} or {"exact_answers"}; see `RunLog.score`."""
        return self.log.score(epoch, self.averaged, self.tokenizer, self.valid_dl.dataset)

    def save_model(self, best=None):
        """Write the checkpoint: captioner.safetensors, captioner.pt, config.json, tokenizer.json.

        `best` says what is saved, {"best_perplexity", "best_epoch"}; without it the best so far.
        """
        best = best or self.best
        config = checkpoint.describe(self.model, REPO_ROOT, self.train_config, best)
        checkpoint.save_checkpoint(self.model_path, self.averaged.state_dict(), config, self.tokenizer)

    def load_best_model(self, path=None):
        """Load the best weights of this run, or those in `path` (a .safetensors or .pt file, or a folder)."""
        path = Path(path or self.model_path)
        path = path / WEIGHTS_FILE if path.is_dir() else path
        for model in {self.model, self.averaged}:
            checkpoint.load_strictly(model, path)

    def generate_caption(self, image, max_tokens=50, temperature=1.0, deterministic=False, **options):
        """A path or an opened image -> its caption; a list of them -> a list of captions.

        Greedy when `deterministic`, else sampled at `temperature`; `options` as in `caption_images`.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        captions = caption_images(
            self.averaged, self.tokenizer, images, max_tokens, temperature, deterministic, **options
        )
        return captions if isinstance(image, (list, tuple)) else captions[0]

    def clean(self):
        """Give back memory that an epoch left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# ======================================================================================================================
# Main
# ======================================================================================================================


def read_configs(argv):
    """Command line -> (model_config, train_config, download): the constants, on top of them those of the recipe, of the
    captioner to start from, and of the command line. Without a dataset the recipe is Shapes'."""
    sections = dict(model_config=model_config, train_config=train_config)
    given, recipe, download = parse_overrides(argv, __file__, **sections)
    recipe = recipe or default_recipe(given["train_config"], train_config.data_dir, DATA_DIR, download)
    from_recipe, model_cfg, train_cfg = merge(given, recipe, RECIPES_DIR, REPO_ROOT, **sections)
    chosen = from_recipe["train_config"] | given["train_config"]
    train_cfg |= data_paths(recipe, chosen, train_config, DATA_DIR)
    if model_cfg["start_from"]:  # the captioner brings the rest
        own = from_recipe["model_config"] if "start_from" in from_recipe["model_config"] else {}
        chosen = ({} if "start_from" in given["model_config"] else own) | given["model_config"]
        chosen["start_from"] = model_cfg["start_from"]
        model_cfg = vars(complete_configs(model=SimpleNamespace(**chosen))[0])
    return SimpleNamespace(**model_cfg), SimpleNamespace(**train_cfg), download


def build_trainer(model_cfg, train_cfg, df):
    """Tokenizer, loaders, model and Trainer for the captions in `df`.

    Raises FileNotFoundError that says what the run needed and how to give it locally, where weights cannot be had.
    """
    try:
        tok = build_tokenizer(model_cfg, streaming.training_texts(df))
        learnt = model_cfg.tokenizer in ("bpe", "word") and not model_cfg.start_from
        if learnt or len(tok) > model_cfg.vocab_size:
            model_cfg.vocab_size = len(tok)  # a larger one, padded for speed, may stay with GPT-2's tokenizer
        return Trainer(model_cfg, train_cfg, build_dataloaders(df, tok, model_cfg, train_cfg))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\n\n{what_to_give(model_cfg, HF_GPT2_REPO)}") from error


def main(argv=None):
    """Train, plot, demonstrate -> {"best_perplexity", "best_epoch"}, for Shapes also {"scores"}."""
    only_first_speaks()
    model_cfg, train_cfg, download = read_configs(sys.argv[1:] if argv is None else argv)
    torch.manual_seed(train_cfg.seed)
    df = load_data(train_cfg, DATA_DIR, download)
    trainer = build_trainer(model_cfg, train_cfg, df)
    if trainer.team.first:
        if not trainer.state.resumed and (earlier := checkpoint.set_aside(train_cfg.model_path)):
            print(f"an earlier run was moved to {earlier}")
        write_recipe(train_cfg.model_path, model_config=trainer.model.config, train_config=trainer.train_config)
    result = trainer.run_training()

    trainer.load_best_model()
    trainer.team.leave()
    if not trainer.team.first:
        return result
    trainer.log.finish(trainer)
    caption = partial(caption_images, trainer.model, trainer.tokenizer)
    plots.draw_demo(caption, df[df["split"] == "val"], train_cfg.demo_images, train_cfg.model_path / "demo.png")
    if (train_cfg.data_dir / shapes.SPLIT_FILE).is_file():
        result["scores"] = (shapes.score_answers if "prompt" in df else shapes.score)(caption, train_cfg.data_dir)
    print(
        f"best {trainer.log.best_by}: epoch {result['best_epoch'] + 1}, perplexity {result['best_perplexity']:.3f}; "
        f"checkpoint and plots are in {train_cfg.model_path}"
    )
    upload.offer_upload(HF_REPO_ID, train_cfg.model_path, train_cfg.push_every_epoch)
    plots.show_windows()
    return result


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except Stopped as reason:
        print(f"{reason}; the same command with --resume auto goes on from here")
    except KeyboardInterrupt:
        sys.exit("interrupted")
