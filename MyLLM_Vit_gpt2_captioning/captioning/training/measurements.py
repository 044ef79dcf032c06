"""What tells one way to fail from another, as numbers: of the captions before a run begins, of its batches, of its
weights, of what the model does with a few photos, and of the captions it writes.

Each function returns a dict of numbers, which `diagnosis.find` reads. None of them draws a random number or changes the
model, so a run is the same with them and without.
"""

import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from captioning.common.printable import printable
from captioning.decoding.attention_maps import eager_attend
from captioning.images.preprocessing import normalize_pixels
from captioning.model.encoders import timm_data_config
from captioning.model.front import FrontOutput
from captioning.model.loss import IGNORED_LABEL
from captioning.model.summary import part_of
from captioning.model.tokenizer import encode_caption

CAPTIONS = 2000  # that are looked at before a run
PHOTOS = 32  # of the probe, with one caption each
VALUES = 256  # of each matrix, whose movement stands for that of all


def of_captions(dataset):
    """A training `Dataset` of the script -> lengths, unknown words, captions that many photos share."""
    if not dataset.captions_of:  # tar shards are read as they come
        return {}
    rows = range(0, len(dataset.captions), max(1, len(dataset.captions) // CAPTIONS))
    unknown, tokenizer, lengths, unknown_count = dataset.tokenizer.unk_token_id, dataset.tokenizer, [], 0
    for row in rows:
        ids = encode_caption(tokenizer, dataset.captions[row], 10**6, dataset.prompts[row])
        lengths.append(len(ids))
        unknown_count += ids.count(unknown)
    found = {
        "tokens of a caption": sorted(lengths)[len(lengths) // 2],
        "captions cut off": sum(length > dataset.max_length for length in lengths) / len(lengths),
        "unknown words": unknown_count / max(1, sum(lengths) - 2 * len(lengths)),
    }
    if not any(dataset.prompts):  # questions have few answers
        photos_of = Counter(caption for texts in dataset.captions_of.values() for caption in set(texts))
        caption, photos = photos_of.most_common(1)[0]
        found |= {
            "photos with the commonest caption": photos / len(dataset.captions_of),
            "commonest caption": printable(caption),
            "photos": len(dataset.captions_of),
        }
    return found


def of_photos(training, validation):
    """Paths of photos of both splits -> the share of the validation photos whose file is also a training photo's, byte
    for byte. Only files of equal size are read."""
    sizes = {}
    for path in training:
        if os.path.isfile(path):  # photos inside tars are not looked at
            sizes.setdefault(os.path.getsize(path), []).append(path)
    candidates = [path for path in validation if os.path.isfile(path) and os.path.getsize(path) in sizes]
    if not candidates:
        return {"validation photos also in training": 0.0}
    rivals = {digest(path) for size in {os.path.getsize(path) for path in candidates} for path in sizes[size]}
    return {"validation photos also in training": sum(digest(path) in rivals for path in candidates) / len(validation)}


def digest(path):
    """A file -> hash of its content."""
    return hashlib.blake2b(Path(path).read_bytes()).digest()


def of_batch(batch, model, tokenizer):
    """A batch of `collate_fn`, on any device -> what is in its tokens, labels and pixels."""
    images, ids, labels = batch[:3]
    has_labels = (labels != IGNORED_LABEL).any(1)
    ids, labels = ids[has_labels], labels[has_labels]
    found = {}
    if len(ids):
        found = {
            "captions that begin with BOS": (ids[:, 0] == tokenizer.bos_token_id).float().mean().item(),
            "captions whose end is a target": (labels == tokenizer.eos_token_id).any(1).float().mean().item(),
        }
    if torch.is_tensor(images):  # not with a token cache
        pixels = normalize_pixels(images, model.preprocessing)
        found |= {"mean of the model's input": pixels.mean().item(), "its standard deviation": pixels.std().item()}
    return found


def of_preprocessing(config):
    """A model_config -> whether mean and std are those that its pretrained encoder was trained with."""
    if config.encoder_weights == "scratch" or not {"mean", "std"} & config.preprocessing.keys():
        return {}
    _, *expected = timm_data_config(config.encoder, config.encoder_options)
    given = [config.preprocessing.get(key, values) for key, values in zip(("mean", "std"), expected, strict=True)]
    difference = np.abs(np.subtract(given, expected)).max()  # of (2, 3) values
    return {"mean and std, difference from the encoder's own": float(difference)}


@torch.no_grad()
def weights_of(model):
    """-> {part: a few values of each of its matrices (n,)}, on the CPU."""
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # norms and biases may begin at 0, from which all movement is large
            flat = parameter.detach().flatten()
            values.setdefault(part_of(name), []).append(flat[:: max(1, len(flat) // VALUES)].float())
    return {part: torch.cat(parts).cpu() for part, parts in values.items()}


def movement(start, model):
    """-> {part: (size of its weights, root mean square; how far they have moved since `start`, a result of
    `weights_of`, as a share of that size)}"""
    moved = {}
    for part, values in weights_of(model).items():
        size, distance = (v.square().mean().sqrt().item() for v in (values, values - start[part]))
        moved[part] = size, distance / max(size, 1e-12)
    return moved


def of_gradients(model):
    """-> {part: norm of its gradient}, of the parts that have one."""
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares.setdefault(part_of(name), []).append(parameter.grad.detach().float().square().sum())
    if not squares:
        return {}
    sums = torch.stack([torch.stack(parts).sum() for parts in squares.values()]).sqrt().tolist()
    return dict(zip(squares, sums, strict=True))


@torch.no_grad()
def of_model(model, batch):
    """What the model does with the first photos of a batch of `collate_fn`, on the model's device, in eval mode.

    The captions' loss is compared with that of the same captions beside the next photo of the batch: what the photo is
    worth. Also measured: how much image tokens differ between photos, what cross-attention adds to the text, and how
    evenly it looks at the tokens.
    """
    images, ids, labels = batch[:3]
    B = len(images[0]) if isinstance(images, (list, tuple)) else len(images)
    K, few = len(ids) // B, min(B, PHOTOS)
    if few < 2:
        return {}
    ids, labels = ids[: few * K : K], labels[: few * K : K]  # (few, T): one caption of each photo
    was_training = model.training
    model.eval()
    try:
        states = model.encoder_states(_first(images, few))  # depth x (few, N, embed_dim)
        own, first, cross = _losses(model, ids, labels, states)
        kept = {id(tokens): tokens.roll(1, 0) for tokens in states}  # blocks may share the same tensor
        other, _, _ = _losses(model, ids, labels, [kept[id(tokens)] for tokens in states])
    finally:
        model.train(was_training)
    labels_of = (labels != IGNORED_LABEL).sum(1)
    real, gap = labels_of > 0, other - own  # (few,), nats a caption
    decisive = real & (gap.abs() > 1)
    numbers = {
        "loss with the own photo": own.sum() / labels_of.sum(),
        "loss with another photo": other.sum() / labels_of.sum(),
        "worth of the photo": gap.sum() / labels_of.sum(),
        "loss of the first word": first[real].mean(),
        "captions that another photo suits clearly better": (decisive & (gap < 0)).sum() / real.sum(),
        "captions that their own photo suits clearly better": (decisive & (gap > 0)).sum() / real.sum(),
        "image tokens' variance between photos": torch.stack([_between_photos(tokens) for tokens in states]).max(),
        **cross,
    }
    return dict(zip(numbers, torch.stack([value.float() for value in numbers.values()]).tolist(), strict=True))


def _first(images, few):
    """The first photos of a batch of pixels, of the encoder's levels, or of a `FrontOutput`."""
    if isinstance(images, FrontOutput):
        return FrontOutput(images.entering[:few], _first(images.levels, few))
    return [level[:few] for level in images] if isinstance(images, list) else images[:few]


def _between_photos(tokens):
    """tokens (B, N, C) -> the share of their variance that is between photos at the same place."""
    tokens = tokens.float()
    return tokens.var(0).mean() / tokens.flatten(0, 1).var(0).mean().clamp_min(1e-12)


def _losses(model, ids, labels, states):
    """ids and labels (B, T), states of the encoder -> (loss of each caption (B,), summed over its labels; loss of each
    caption's first label (B,); numbers about cross-attention)."""
    x, added, entropies = model._build_text_embeddings(ids), [], []
    for block, tokens in zip(model.gpt.trf_blocks, states, strict=True):

        def cross_attend(q, block=block, tokens=tokens):
            output, weights = eager_attend(block.cross_attn, q, tokens)  # weights (B, heads, T, N)
            added.append(output.float().norm(dim=-1).mean())
            weights = weights.float()
            entropies.append(-(weights * weights.clamp_min(1e-12).log()).sum(-1).mean() / math.log(weights.size(-1)))
            return output

        x = block.residual(x, block.ln_1, block.self_attn)
        stream = x.float().norm(dim=-1).mean()
        x = block.residual(x, block.ln_cross, cross_attend)
        added[-1] = added[-1] / stream
        x = block.residual(x, block.ln_2, block.mlp)
    real = labels != IGNORED_LABEL  # (B, T)
    log_probs = model.gpt.logits(x[real]).float().log_softmax(-1)  # (labels, vocab_size); an unknown word is a label
    losses = torch.zeros(labels.shape, device=x.device)
    losses[real] = -log_probs.gather(1, labels[real][:, None])[:, 0]
    first = losses.gather(1, real.long().argmax(1, keepdim=True))[:, 0]
    cross = {
        "cross-attention's share of the text": torch.stack(added).max(),
        "evenness of cross-attention": torch.stack(entropies).mean(),
    }
    return losses.sum(1), first, cross


def of_written(captions, true_captions):
    """Captions that were written for photos, and lists of the true ones -> how they differ and repeat themselves."""
    if not captions:
        return {}
    words = [caption.split() for caption in captions]
    lengths = sorted(len(text.split()) for texts in true_captions for text in texts)
    usual = lengths[len(lengths) // 2]
    return {
        "captions written": len(captions),
        "different ones among them": len(set(captions)) / len(captions),
        "captions that repeat three words": sum(map(_repeats, words)) / len(words),
        "captions over three times the usual length": sum(len(text) > 3 * usual for text in words) / len(words),
        "empty captions": sum(not text for text in words) / len(words),
    }


def _repeats(words):
    """Whether the same three words come three times."""
    return max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0) >= 3
