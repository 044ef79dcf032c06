"""Image encoders behind one contract: `embed(images)`, then `step(i, tokens)` for each decoder block i.

Both return (B, N, C): N image tokens of C channels. In "stepped" coupling `embed` only makes the patch tokens and
step i runs the ViT's i-th share of blocks, so that decoder block i attends to that depth. In "final" coupling `embed`
runs the whole encoder, its own final norm included, and `step` hands the tokens on unchanged.
"""

import sys
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

COUPLINGS = ("stepped", "final")


def input_config(name, options=None):
    """What preprocessing has to make of a photo for the timm model `name` -> (img_size, mean, std).

    img_size in pixels of a square; mean and std one value a channel, for pixel values in 0..1. They come from the data
    config that timm keeps beside the model's weights. Raises ValueError for an unknown name.
    """
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    except RuntimeError as error:  # an unknown tag behind the dot
        raise ValueError(f"timm cannot make {name}: {error}") from error
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    img_size = (options or {}).get("img_size", data_config["input_size"][-1])
    return img_size, tuple(data_config["mean"]), tuple(data_config["std"])


class Encoder(nn.Module):
    """The contract, with the `step` of final coupling. `width` is C, the channels of a token."""

    normalized = False  # True when tokens leave `embed` through the encoder's own final norm

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, N, C)."""
        raise NotImplementedError

    def step(self, i, tokens):
        """tokens (B, N, C) -> the tokens (B, N, C) that decoder block i attends to."""
        return tokens


class ViTEncoder(Encoder):
    """A timm VisionTransformer: class and register tokens, then the patches, as timm orders them."""

    def __init__(self, vit, steps, coupling):
        super().__init__()
        self.vit, self.width = vit, vit.num_features
        self.stepped = coupling == "stepped"
        self.normalized = not self.stepped
        # Step i runs blocks[bounds[i]:bounds[i + 1]]. With as many blocks as steps that is one block a step.
        self.bounds = [round(i * len(vit.blocks) / steps) for i in range(steps + 1)]
        if self.stepped:
            vit.norm = nn.Identity()  # made for the last depth only: here every depth gets a norm of its own

    def embed(self, images):
        tokens = self.vit.patch_embed(images)  # (B, N_patches, C)
        tokens = self.vit._pos_embed(tokens)  # (B, N, C): class token in front, position added
        tokens = self.vit.norm_pre(self.vit.patch_drop(tokens))  # norm_pre: CLIP has one, elsewhere identity
        return tokens if self.stepped else self.vit.norm(self.vit.blocks(tokens))

    def step(self, i, tokens):
        if self.stepped:
            for block in self.vit.blocks[self.bounds[i] : self.bounds[i + 1]]:
                tokens = block(tokens)
        return tokens


class GridEncoder(Encoder):
    """A timm CNN: each cell of its last feature map is a token, row by row."""

    def __init__(self, cnn):
        super().__init__()
        self.cnn, self.width = cnn, cnn.num_features

    def embed(self, images):
        features = self.cnn.forward_features(images)  # (B, C, h, w)
        return features.flatten(2).transpose(1, 2)  # (B, h*w, C)


def build_encoder(name, steps, coupling="stepped", options=None, weights="scratch"):
    """Make the timm model `name` and put it behind the contract.

    `options` are keyword arguments of the timm model, such as {"img_size": 48, "depth": 3}. `weights` is "pretrained"
    (timm downloads them), "scratch" (random) or the path of a local weights file.
    Raises ValueError for an unknown name, coupling or architecture, and FileNotFoundError that says what to do when
    the weights are not to be had.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
    img_size, _, _ = input_config(name, options)
    options = dict(options or {}, num_classes=0, global_pool="")  # all tokens, no pooling and no classifier
    entrypoint = timm.models.model_entrypoint(name.split(".")[0])
    if not hasattr(sys.modules[entrypoint.__module__], "VisionTransformer"):
        options.pop("img_size", None)  # a CNN takes any size
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", **options)
    except (RuntimeError, TypeError) as error:  # no published weights, an unknown option
        raise ValueError(f"timm cannot make {name}: {error}") from error
    except OSError as error:  # what huggingface_hub and urllib raise without a network
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}); "
            "give a local file with --encoder_weights FILE (.safetensors or .pth, timm's key names)"
        ) from error
    if weights not in ("pretrained", "scratch"):
        _load_local_weights(model, Path(weights))
    if isinstance(model, VisionTransformer):
        if weights == "scratch":
            _start_positions_from_sincos(model)
        return ViTEncoder(model, steps, coupling)
    if not _makes_feature_map(model, img_size):
        raise ValueError(f"{name} ({type(model).__name__}) is neither a timm VisionTransformer nor a CNN")
    if coupling == "stepped":
        raise ValueError(f"{name} is a CNN and has no blocks to step: use --coupling final")
    return GridEncoder(model)


def _load_local_weights(model, path):
    """Load a weights file with timm's key names, strictly: only the classifier and pooling, which the captioner does
    not have, may be left over. Raises FileNotFoundError, or ValueError that lists what does not fit."""
    if not path.is_file():
        raise FileNotFoundError(f"encoder_weights {path}: no such file")
    try:
        stored = timm.models.load_state_dict(str(path))
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if adapt:  # timm's own: older key names, positions for another image size
            stored = adapt(stored, model)
        classifier = model.pretrained_cfg.get("classifier") or ()
        classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        left_out = tuple(f"{part}." for part in (*classifier, "fc_norm", "attn_pool", "pre_logits"))
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in stored.items() if k in own or not k.startswith(left_out)})
    except Exception as error:  # whatever a foreign or damaged file makes of reading, adapting or loading
        raise ValueError(f"encoder_weights {path} does not fit {type(model).__name__}: {error}") from error


@torch.no_grad()
def _start_positions_from_sincos(vit):
    """Let the learned positions of a random ViT start from the fixed 2-D sine-cosine table (Chen et al. 2021, MoCo v3;
    Beyer et al. 2022). timm starts them at std 0.02, far below the patches: where things are is then learnt late."""
    if vit.pos_embed is not None and vit.embed_dim % 4 == 0:
        table = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)  # (N_patches, C)
        vit.pos_embed[0, -len(table) :] = table  # behind the positions of class and register tokens, if any


def _makes_feature_map(model, img_size):
    """True when the model turns an image into a map (B, num_features, h, w), as CNNs do."""
    if not hasattr(model, "forward_features"):
        return False
    with torch.no_grad():
        features = model.eval().forward_features(torch.zeros(1, 3, img_size, img_size))
    model.train()
    return features.ndim == 4 and features.size(1) == model.num_features
