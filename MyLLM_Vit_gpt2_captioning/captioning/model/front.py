"""The front of an encoder: what lies before its last `trainable_stages`, which alone ever train.

The front is frozen, so what it makes of a photo never changes. `Encoder.front` computes that, `data.token_cache` keeps
it on disk, and `Encoder.levels_behind` goes on from there: training the last stages of an encoder then costs these
stages, not the whole encoder.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

# What a timm model raises that cannot be entered in its middle.
UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


class FrontOutput(NamedTuple):
    """What the front makes of a photo, or, with a dimension B in front of all, of a batch."""

    entering: torch.Tensor  # what enters the first stage that trains: tokens (N, C), or a feature map (C, h, w)
    levels: list  # tokens (N, C) of the encoder's first levels, as far as they do not follow from `entering`


def front_of(model):
    """A `VisionGPT2Model` -> (how many last stages follow its front, how many of its first levels a `FrontOutput`
    needs); (0, 0) where all stages stay frozen or may train, and for an encoder that cannot be entered there."""
    last = model.config.trainable_stages
    if last < 1 or model.config.encoder_weights == "scratch":
        return 0, 0
    follows = _levels_that_follow(model, last)
    if not follows or not follows[-1]:
        return 0, 0
    kept = model.encoder.levels_in_front(last)
    return last, follows.index(True) if kept is None else kept


@torch.inference_mode()
def _levels_that_follow(model, last):
    """For each level whether `levels_behind` makes it of what enters the `last` stages alone; [] where that fails.

    Found by trying it on noise, since timm's models differ in what they do between their parts.
    """
    side, parameter, was_training = model.preprocessing["img_size"], next(model.parameters()), model.training
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(parameter)
    model.eval()
    try:
        front = model.encoder.front(noise, last)
        behind = model.encoder.levels_behind(FrontOutput(front.entering, []), last)
    except UNFIT:
        return []
    finally:
        model.train(was_training)
    return [_close(one, other) for one, other in zip(behind, front.levels, strict=True)]


def _close(one, other):
    """Whether tokens (B, N, C) are equal but for rounding, that of a GPU with other algorithms included. Most channels
    have to agree on their own scale: one channel may be so large that nothing beside it counts."""
    if one.shape != other.shape:
        return False
    difference, scale = (tokens.square().mean((0, 1)).sqrt() for tokens in (one - other, other))  # (C,)
    return bool((difference <= 5e-3 * scale).float().mean() > 0.5)


def without_front(module, stage):
    """A copy of a module in which what is registered before its part `stage`, at any depth, returns its input; `stage`
    and all behind it are shared with `module`. timm registers parts in the order in which they run."""
    [path] = (name for name, part in module.named_modules() if part is stage)
    return _shortened(module, path.split("."))


def _shortened(module, path):
    shared = copy.copy(module)
    shared._modules = dict(module._modules)
    for name, part in module._modules.items():
        if name == path[0]:
            shared._modules[name] = _shortened(part, path[1:]) if path[1:] else part
            return shared
        shared._modules[name] = nn.Identity()
