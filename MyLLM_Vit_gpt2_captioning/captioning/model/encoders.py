"""Image encoders behind one interface: `levels(images)` is a list of (B, N, C), N image tokens of C channels each.

A ViT is run as `embed(images)`, then `step(i, tokens)` for each decoder block i. In "stepped" coupling `embed` only
computes the patch tokens and step i runs the ViT's i-th share of blocks, so that decoder block i attends to that depth:
there are as many levels as decoder blocks. In "final" coupling `embed` runs the whole encoder, its final norm included,
`step` returns the tokens unchanged, and there is one level. A CNN gives its last feature map, or its last few: see
`GridEncoder`.

timm is imported in the functions that use it. The import takes seconds, because torchvision and torch's compiler come
with it, and a trained captioner with a plain ViT does not need it: see plain_vit.py.
"""

import difflib
import math
import re
import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from captioning.common.printable import printable
from captioning.model import hugging_face, plain_vit
from captioning.model.checkpoint import OTHER_COPY, read_shapes, weights_file
from captioning.model.front import FrontOutput, without_front

COUPLINGS = ("stepped", "final")
# What `encoder_options` may hold. They come from the config.json of strangers, too, and timm has arguments that read
# files (checkpoint_path) or ask the Hub (pretrained_cfg).
COUNTS = (
    "patch_size", "embed_dim", "embed_dims", "dims", "width", "widths", "channels", "depth", "depths", "layers",
    "num_blocks", "num_heads", "window_size", "kernel_sizes", "output_stride", "stem_width", "stem_size",
    "base_width", "cardinality", "strides", "groups",
)  # fmt: skip
NUMBERS = (
    "mlp_ratio", "mlp_ratios", "init_values", "ls_init_value", "norm_eps", "drop_rate", "drop_path_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "window_ratio", "reg_tokens",
    "num_reg_tokens",
)  # fmt: skip
SWITCHES = (
    "qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "fc_norm", "final_norm", "dynamic_img_size",
    "dynamic_img_pad", "zero_init_last", "conv_mlp", "avg_down", "use_abs_pos_emb", "use_rel_pos_bias",
    "use_rot_pos_emb", "use_post_norm", "swiglu_mlp", "scale_mlp",
)  # fmt: skip
WORDS = (
    "global_pool", "weight_init", "stem_type", "pos_embed", "norm_layer", "act_layer",
)  # fmt: skip
LARGEST_OPTION = 100_000  # of a number in them
LARGEST_SIDE = 2_048  # of img_size: what a photo becomes takes memory by its square
REFINER = ("width", "grid", "layers", "heads", "kernel", "dropout")  # arguments of ConvolutionalRefiner
# What the libraries raise for sizes that do not fit each other.
UNFIT = (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, AttributeError, LookupError, MemoryError)


def timm_data_config(name, options=None):
    """The input that the timm model `name` expects -> (img_size, mean, std), from timm's data config for its weights.

    img_size is the side of a square in pixels; mean and std have one value a channel, for pixel values in 0..1.
    Raises ValueError for an unknown model name or tag, with the nearest known ones.
    """
    import timm
    from timm.data import resolve_data_config

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {name!r}{_suggestions(architecture, timm.list_models())}")
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(f"timm has no weights {tag!r} of {architecture}{_suggestions(name, tags)}") from error
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    img_size = (options or {}).get("img_size", data_config["input_size"][-1])
    return img_size, tuple(data_config["mean"]), tuple(data_config["std"])


def _suggestions(name, known):
    """The end of an error message: up to five of the `known` names that `name` may stand for, the nearest first.

    First choice are similar names of the same family (vit_base_patch16_225, resnet5), then names with the same parts
    in another order (clip_vit_base), then similar names of any family (resnt50).
    """
    name = re.sub(r"[-/ ]", "_", name.lower())
    family, parts = re.split(r"[\d_.]", name)[0], [part for part in re.split(r"[_.]", name) if part]
    similar = partial(difflib.get_close_matches, name, n=5)
    near = similar([other for other in known if other.startswith(family)], cutoff=0.4)
    near = near or [other for other in known if parts and all(part in other for part in parts)][:5] or similar(known)
    return f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists all names"


def resolve_encoder(config):
    """The constants of a model_config that replace a transformers vision model as encoder by its timm equivalent
    -> dict.

    A ViT or CLIP of transformers (folder or hub id) becomes the timm architecture that computes the same: its sizes go
    to `encoder_options`, its weights to `encoder_weights`, its mean and std to `preprocessing`. A timm name stays.
    Raises FileNotFoundError, or ValueError that names an architecture that is neither ViT nor CLIP.
    """
    source = config.encoder.removeprefix("timm/")  # on the hub, timm's models lie in timm/<name>
    if not (Path(source).is_dir() or "/" in source):
        return {"encoder": source}
    import timm

    if timm.is_model(source.split(".")[0]):
        return {"encoder": source}
    name, options, preprocessing, _ = hugging_face.read_vision_tower(source)
    try:
        check_options(options)
        check_photos(**preprocessing)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return {
        "encoder": name,
        "encoder_options": options | config.encoder_options,
        "encoder_weights": source if config.encoder_weights == "pretrained" else config.encoder_weights,
        "preprocessing": preprocessing | config.preprocessing,
    }


def preprocessing_of(config):
    """The arguments of `preprocessing.preprocess` for a captioner's `config`: those that the encoder was trained with,
    overridden by `config.preprocessing`.

    Raises ValueError for an unknown key, and for a value that is out of range.
    """
    plain = plain_vit.options_of(config.encoder, config.encoder_options)
    if plain and {"mean", "std"} <= config.preprocessing.keys():  # a trained captioner's: timm is not needed
        img_size, mean, std = plain["img_size"], None, None
    else:
        img_size, mean, std = timm_data_config(config.encoder, config.encoder_options)
    defaults = dict(img_size=img_size, mean=mean, std=std, resample="bicubic")
    unknown = config.preprocessing.keys() - defaults.keys() - {"grey16"}
    if unknown:
        raise ValueError(f"preprocessing has no {', '.join(sorted(unknown))}; it has mean, std, resample and grey16")
    chosen = defaults | config.preprocessing
    if chosen["img_size"] != img_size:
        raise ValueError(f"preprocessing: img_size is the encoder's, {img_size}; change it in encoder_options")
    check_photos(**chosen)
    return chosen


def check_photos(resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1), grey16="full", **others):
    """Raise ValueError for values of `preprocessing` that are out of range."""
    if resample not in ("bicubic", "bilinear"):
        raise ValueError(f"preprocessing: resample {repr(resample)[:60]} is neither bicubic nor bilinear")
    if grey16 not in ("full", "range"):
        raise ValueError(f"preprocessing: grey16 {repr(grey16)[:60]} is neither full nor range")
    for key, value in (("mean", mean), ("std", std)):
        is_triple = isinstance(value, (list, tuple)) and len(value) == 3
        if not (is_triple and all(isinstance(v, (int, float)) and abs(v) < LARGEST_OPTION for v in value)):
            raise ValueError(
                f"preprocessing: {key} {repr(value)[:60]} is not one finite number for each of three channels"
            )
    if min(std) <= 0:
        raise ValueError(f"preprocessing: std {std!r} is not above 0")


def check_options(options):
    """Raise ValueError for `encoder_options` (a dict) that no timm model is given here: names outside of the
    lists above, and values of other types."""
    for name, value in options.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if name in SWITCHES:
            fits, kind = isinstance(value, bool), "true or false"
        elif name in WORDS:
            fits, kind = isinstance(value, str) and re.fullmatch(r"\w{0,40}", value), "a word"
        elif name == "img_size":
            fits = type(value) is int and 1 <= value <= LARGEST_SIDE
            kind = f"one number from 1 to {LARGEST_SIDE:,}: the side in pixels of the square that a photo becomes"
        elif name in COUNTS:
            fits = 0 < len(numbers) <= 100 and all(type(n) is int and 1 <= n <= LARGEST_OPTION for n in numbers)
            kind = f"a whole number from 1 to {LARGEST_OPTION:,}, or a list of them"
        elif name in NUMBERS:
            may_be_list = name.startswith("mlp_ratio")
            fits = 0 < len(numbers) <= 100 and all(
                type(n) in (int, float) and 0 <= n <= LARGEST_OPTION for n in numbers
            )
            fits = fits and (may_be_list or numbers[0] is value)
            kind = f"a number from 0 to {LARGEST_OPTION:,}" + (", or a list of them" if may_be_list else "")
        else:
            near = difflib.get_close_matches(name, ["img_size", *COUNTS, *NUMBERS, *SWITCHES, *WORDS], n=1)
            raise ValueError(f"encoder_options has no {name[:60]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if not fits:
            raise ValueError(f"encoder_options: {name} is {repr(value)[:60]}, but must be {kind}")
    width, heads = options.get("embed_dim"), options.get("num_heads")
    if type(width) is int and type(heads) is int and width % heads:
        raise ValueError(f"encoder_options: embed_dim is {width}, but must be a multiple of num_heads {heads}")


def check_refiner(options):
    """Raise ValueError for arguments (a dict) that `ConvolutionalRefiner` does not have, or of other types."""
    for name, value in options.items():
        if name not in REFINER:
            raise ValueError(f"refiner has no {name[:60]!r}; it has {', '.join(REFINER)}")
        if name == "dropout":
            fits, kind = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"
        else:
            fits, kind = type(value) is int and 1 <= value <= LARGEST_OPTION, "a whole number above 0"
        if not fits:
            raise ValueError(f"refiner: {name} is {repr(value)[:60]}, but must be {kind}")


def run_block(block, *inputs, recompute=False, **options):
    """block(*inputs, **options), with gradient checkpointing if `recompute`: the activations are not kept but computed
    again in the backward pass, with the same dropout (Chen et al. 2016)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, **options)
    return block(*inputs, **options)


class Encoder(nn.Module):
    """The interface of all encoders, with the `step` of final coupling.

    `widths` are the channels C of each level's tokens as the decoder gets them, after `refine`.
    """

    coupling = "final"
    gradient_checkpointing = False  # recompute a ViT's blocks in the backward pass
    normalized = False  # True when the last level has passed the encoder's own final norm

    @property
    def width(self):
        """Channels of the last level's tokens."""
        return self.widths[-1]

    def levels(self, images):
        """images (B, 3, H, W) -> list of tokens (B, N, C) as the timm model computes them, before `refine`."""
        return [self.embed(images)]

    def refine(self, levels):
        """The layers trained from scratch on top of the pretrained features: list of (B, N, C) -> list of (B, N, C)."""
        return levels

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, N, C)."""
        raise NotImplementedError

    def step(self, i, tokens):
        """tokens (B, N, C) -> the tokens (B, N, C) that decoder block i attends to."""
        return tokens

    def stages(self):
        """The parts of the timm model that run one after the other: the blocks of a ViT, the stages of a CNN."""
        raise NotImplementedError

    def front(self, images, last, kept=None):
        """images (B, 3, H, W) -> what enters the `last` stages, and the first `kept` levels (by default all), as a
        `FrontOutput`."""
        entering = []
        hook = self.stages()[-last].register_forward_pre_hook(lambda stage, inputs: entering.append(inputs[0]))
        try:
            levels = self.levels(images)
        finally:
            hook.remove()
        return FrontOutput(entering[0], levels[:kept])

    def levels_behind(self, front, last):
        """`FrontOutput` in front of the `last` stages -> the result of `levels`: list of tokens (B, N, C)."""
        levels = self._levels_from(front.entering.to(next(self.parameters()).dtype), last)
        return [*front.levels, *levels[len(front.levels) :]]

    def levels_in_front(self, last):
        """How many of the first levels do not follow from what enters the `last` stages; None where only trying it
        shows that."""
        return None

    def _levels_from(self, entering, last):
        """What enters the `last` stages, in the weights' dtype -> the levels behind; those in front may be wrong."""
        raise NotImplementedError

    def weights_before(self, last):
        """Names of the weights (parameters and buffers, as in the state_dict) in front of the `last` stages; with 0 all
        names except the refiner's.

        Raises ValueError when the encoder has fewer stages.
        """
        stages = self.stages()
        if last > len(stages):
            raise ValueError(f"trainable_stages {last}: the encoder has {len(stages)} stages")
        names = [name for name in self.state_dict() if not name.startswith("refiner.")]
        if last == 0:
            return names
        [path] = (name for name, part in self.named_modules() if part is stages[-last])
        start = next(i for i, name in enumerate(names) if name.startswith(f"{path}."))
        return names[:start]  # timm registers the parts in the order in which they run


class ViTEncoder(Encoder):
    """A timm VisionTransformer or Eva, or the ViT of plain_vit.py. Its tokens are in timm's order: class and register
    tokens first, then the patches."""

    def __init__(self, vit, steps, coupling):
        super().__init__()
        self.vit, self.coupling = vit, coupling
        self.widths = (vit.num_features,) * (steps if coupling == "stepped" else 1)
        self.normalized = coupling == "final"
        # Step i runs blocks[bounds[i]:bounds[i + 1]]: one block if there are as many blocks as steps.
        self.bounds = [round(i * len(vit.blocks) / steps) for i in range(steps + 1)]
        if isinstance(vit.norm, nn.Identity):  # a ViT with average pooling has its norm after the pooling (fc_norm)
            vit.norm = vit.fc_norm  # here it is applied to each token
        if coupling == "stepped":
            vit.norm = nn.Identity()  # trained for the last depth only; the bridges normalise each depth if wanted
        vit.fc_norm, vit.attn_pool = nn.Identity(), None  # nothing is pooled
        self.rotary = None

    def embed(self, images):
        return self._patches(images) if self.coupling == "stepped" else self.levels(images)[0]

    def levels(self, images):
        return self._levels(self._patches(images), 0)

    def _patches(self, images):
        """images (B, 3, H, W) -> the tokens (B, N, C) that enter the first block."""
        tokens = self.vit.patch_embed(images)  # (B, N_patches, C)
        tokens = self.vit._pos_embed(tokens)  # (B, N, C): class token in front, positions added
        if isinstance(tokens, tuple):  # an Eva rotates queries and keys in each block by the patch's position (RoPE)
            tokens, self.rotary = tokens  # the rotations are the same for all images
        else:
            tokens = self.vit.patch_drop(tokens)
        return self.vit.norm_pre(tokens)  # CLIP's norm before the first block; identity elsewhere

    def _levels(self, tokens, first):
        """Tokens (B, N, C) that enter the block `first` -> the levels, list of (B, N, C)."""
        if self.coupling == "final":
            return [self.vit.norm(self._run(tokens, first, len(self.vit.blocks)))]
        levels = []
        for start, end in pairwise(self.bounds):
            tokens = self._run(tokens, max(start, first), end)
            levels.append(tokens)
        return levels

    def levels_in_front(self, last):
        first = len(self.vit.blocks) - last
        return sum(end < first for end in self.bounds[1:]) if self.coupling == "stepped" else 0

    def _levels_from(self, entering, last):
        if getattr(self.vit, "rope", None) is not None:  # the rotations of any photo will do
            side = self.vit.patch_embed.img_size
            self._patches(entering.new_zeros(1, 3, *side))
        return self._levels(entering, len(self.vit.blocks) - last)

    def step(self, i, tokens):
        return self._run(tokens, *self.bounds[i : i + 2]) if self.coupling == "stepped" else tokens

    def stages(self):
        return list(self.vit.blocks)

    def _run(self, tokens, start, end):
        """tokens (B, N, C) -> (B, N, C) after the blocks start..end-1."""
        for i in range(start, end):
            options = {}
            if self.rotary is not None:
                options["rope"] = self.rotary[i] if self.vit.rope_mixed else self.rotary
            tokens = run_block(self.vit.blocks[i], tokens, recompute=self.gradient_checkpointing, **options)
        if end == len(self.vit.blocks):
            self.rotary = None
        return tokens


def _has_weights(module):
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


class GridEncoder(Encoder):
    """Any other timm model: each cell of its last feature map is a token, row by row.

    With `feature_levels` above 1 the maps of earlier stages become tokens too, on the grid of the last map: a cell that
    covers 2 x 2 cells of an earlier map holds their channels side by side. With coupling "final" every decoder block
    attends to all levels at once; with "stepped" the first blocks attend to the first level, the last to the last.
    """

    def __init__(self, model, img_size, refiner=None, feature_levels=1, coupling="final"):
        """`refiner`: arguments of `ConvolutionalRefiner`, {} or None for none."""
        super().__init__()
        if feature_levels < 1:
            raise ValueError(f"feature_levels must be at least 1, not {feature_levels}")
        # With channels last in memory EfficientNet's convolutions are 1.8 times as fast on a CPU; GPUs gain as well.
        self.cnn, width = model.to(memory_format=torch.channels_last), model.num_features
        self.feature_levels = feature_levels
        self.coupling = coupling if feature_levels > 1 else "final"
        features = self._probe(img_size)
        shape = tuple(getattr(features, "shape", ()))
        if feature_levels > 1 and len(shape) != 4:
            raise ValueError(f"feature_levels {feature_levels}: {type(model).__name__} makes no feature map")
        # The output is a map with channels first (CNNs) or last (Swin), or tokens already (mixers).
        if len(shape) == 4 and shape[1] == width:
            self.channels_first = True
        elif (len(shape) == 4 or (len(shape) == 3 and shape[1] > 1)) and shape[-1] == width:
            self.channels_first = False
        else:
            raise ValueError(f"{type(model).__name__} makes no feature map or tokens of {width} channels")
        # ConvNeXt and similar models have their final norm in the head, BEiT after the pooling.
        candidates = (getattr(getattr(model, "head", None), "norm", None), getattr(model, "fc_norm", None))
        norms = [norm for norm in candidates if _has_weights(norm) and next(norm.parameters()).shape == (width,)]
        self.normalized = bool(norms)
        self.norm = norms[0] if norms else nn.Identity()
        for part in ("head", "fc_norm"):  # pooling and classifier; kept where a model uses the name for something else
            module = getattr(model, part, None)
            if module is not None:
                setattr(model, part, nn.Identity())
                if not torch.equal(features, self._probe(img_size)):
                    setattr(model, part, module)
        self.refiner = None
        if refiner:
            if not self.channels_first:
                raise ValueError(f"a refiner needs the feature map of a CNN; {type(model).__name__} makes none")
            if feature_levels > 1:
                raise ValueError("a refiner takes one feature map: set --feature_levels 1")
            self.refiner = ConvolutionalRefiner(width, **refiner)
            width, self.normalized = self.refiner.width, True
        self.widths = (width,)
        if feature_levels > 1:
            with torch.no_grad():
                self.eval()
                self.widths = tuple(level.size(-1) for level in self.levels(torch.zeros(1, 3, img_size, img_size)))
                self.train()

    @torch.no_grad()
    def _probe(self, img_size):
        """The model's features of an image of zeros, in eval mode; None when it has no `forward_features`."""
        self.eval()
        images = torch.zeros(1, 3, img_size, img_size)
        features = self.cnn.forward_features(images) if hasattr(self.cnn, "forward_features") else None
        self.train()
        return features

    def stages(self):
        for name in ("stages", "blocks", "layers", "features"):  # ConvNeXt, EfficientNet, Swin, VGG and DenseNet
            if isinstance(getattr(self.cnn, name, None), (nn.Sequential, nn.ModuleList)):
                return [part for part in getattr(self.cnn, name) if _has_weights(part)]
        return [part for name, part in self.cnn.named_children() if name.startswith(("layer", "stage", "s"))]  # ResNet

    def embed(self, images):
        return self.levels(images)[-1]

    def levels(self, images):
        return self._levels(self.cnn, images)

    def _levels_from(self, entering, last):
        return self._levels(without_front(self.cnn, self.stages()[-last]), entering)

    def _levels(self, cnn, images):
        """`cnn`: the timm model, or what is left of it behind a front, with its input in place of the images."""
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # still (B, 3, H, W)
        if self.feature_levels == 1:
            return [self._as_tokens(self.norm(cnn.forward_features(images)))]
        last, earlier = self._feature_maps(cnn, images)
        levels = []
        grid = last.size(-1 if self.channels_first else 1)  # cells a side of the last map
        for features in earlier:  # (B, C, h, w), h and w at least `grid`
            ratio = math.ceil(features.size(-1) / grid)
            features = pool_to_grid(features, ratio * grid)  # changes nothing where `grid` divides h
            levels.append(F.pixel_unshuffle(features, ratio).flatten(2).transpose(1, 2))  # (B, N, C * ratio ** 2)
        return [*levels, self._as_tokens(self.norm(last))]

    def _feature_maps(self, cnn, images):
        """-> (the last map as `forward_features` returns it, list of the maps (B, C, h, w) of the stages before it).

        Raises ValueError when the model has fewer stages or no `forward_intermediates`.
        """
        stages = len(getattr(cnn, "feature_info", [])) if hasattr(cnn, "forward_intermediates") else 1
        if stages < self.feature_levels:
            raise ValueError(f"feature_levels {self.feature_levels}: {type(cnn).__name__} gives {stages} feature maps")
        indices = list(range(stages - self.feature_levels, stages - 1))
        return cnn.forward_intermediates(images, indices=indices, output_fmt="NCHW")

    def refine(self, levels):
        return levels if self.refiner is None else [self.refiner(levels[0])]

    def _as_tokens(self, features):
        if self.channels_first:
            return features.flatten(2).transpose(1, 2)  # (B, h*w, C)
        return features.flatten(1, -2)  # (B, N, C)


def pool_to_grid(features, cells):
    """features (B, C, h, w) -> (B, C, cells, cells), the values of `F.adaptive_avg_pool2d`, whose backward pass is a
    different sum every time on a GPU."""
    h, w = features.shape[-2:]
    if h % cells == 0 and w % cells == 0:
        return F.avg_pool2d(features, (h // cells, w // cells))
    return _cell_means(_cell_means(features.float(), cells, 2), cells, 3).to(features.dtype)


def _cell_means(features, cells, dim):
    """A dimension of n positions -> `cells` means over the positions from i * n / cells, rounded down, to
    (i + 1) * n / cells, rounded up."""
    n = features.size(dim)
    bounds = [(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)]
    return torch.stack([features.narrow(dim, start, end - start).mean(dim) for start, end in bounds], dim)


class ConvolutionalRefiner(nn.Module):
    """A small transformer encoder on a CNN's feature map, trained from scratch: 1x1 convolution, batch norm, ReLU,
    pooling to a fixed grid, learned positions, then post-norm encoder layers (Vaswani et al. 2017) with a convolutional
    feed-forward."""

    def __init__(self, channels, width=512, grid=7, layers=2, heads=8, kernel=3, dropout=0.1):
        """`channels` of the feature map, `width` of the tokens, `grid` cells a side after pooling. `kernel` is that of
        the feed-forward's first convolution, which runs over the sequence of tokens (odd, to keep its length)."""
        super().__init__()
        if width % heads or kernel % 2 == 0:
            raise ValueError(f"refiner: width {width} must be a multiple of heads {heads}, and kernel {kernel} odd")
        self.width = width
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.grid = grid
        self.positions = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
        self.layers = nn.ModuleList(RefinerLayer(width, heads, kernel, dropout) for _ in range(layers))

    def forward(self, tokens):
        """tokens (B, h*h, channels), the cells of a square map row by row -> (B, grid * grid, width)."""
        features = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.size(1)), -1))  # (B, channels, h, h)
        features = pool_to_grid(self.reduce(features), self.grid)  # (B, width, grid, grid)
        tokens = features.flatten(2).transpose(1, 2) + self.positions  # (B, N, width)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class RefinerLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + feed-forward(x)); the feed-forward is two 1-d convolutions."""

    def __init__(self, width, heads, kernel, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.expand = nn.Conv1d(width, 4 * width, kernel, padding=kernel // 2)
        self.contract = nn.Conv1d(4 * width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        """(B, N, width) -> (B, N, width)."""
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.norm_1(tokens + self.dropout(attended))
        hidden = self.contract(self.expand(tokens.transpose(1, 2)).relu()).transpose(1, 2)  # (B, N, width)
        return self.norm_2(tokens + self.dropout(hidden))


class _SkipInit(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` do nothing. On the meta device they have no effect anyway, but `normal_`
    would import torch's compiler there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def meta_device_for(model_config, folder):
    """Context manager in which to build a model whose trained weights are loaded afterwards; `model_config` is a dict,
    from the config.json in `folder`. Raises ValueError that names it where no model can be built.

    With a plain ViT as encoder, parameters are made on the meta device, without memory and without random numbers:
    drawing those, only to overwrite them, would take seconds. With other encoders it does nothing, because timm
    computes with the values of some tensors while it builds them.
    """
    files = [path for path in hugging_face.weights_files(folder) or [weights_file(folder)] if path.is_file()]
    try:
        with no_larger_than(files):
            if plain_vit.options_of(str(model_config.get("encoder")), model_config.get("encoder_options")):
                with torch.device("meta"), _SkipInit():
                    yield
            else:
                yield
    except UNFIT as error:
        raise ValueError(
            f"{folder}/config.json: no captioner can be built with it: {_reason(error)}; {OTHER_COPY}"
        ) from error


@contextmanager
def no_larger_than(files):
    """Context in which to build a model whose weights are in these `files`: ValueError as soon as it has many more
    numbers than they. Sizes in a stranger's config.json may be absurd, and timm's options are too many to compare each.

    Twice as many are allowed, because timm also builds heads and poolings that are then taken off.
    """
    stored = sum(math.prod(shape) for path in files for shape in read_shapes(path).values())
    limit, numbers = 10**6 + 2 * stored, 0

    def count(module, name, parameter):
        nonlocal numbers
        numbers += parameter.numel() if parameter is not None else 0
        if numbers > limit:
            raise ValueError(f"it needs far more than the {stored:,} numbers that are in the weights")

    hook = register_module_parameter_registration_hook(count) if files else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _reason(error):
    """What went wrong, in one line that is not too long."""
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return printable(next(iter(reason.splitlines()), ""))[:300]


def build_encoder(name, steps, coupling="stepped", options=None, weights="scratch", refiner=None, feature_levels=1):
    """Build the timm model `name` -> `Encoder`.

    `steps`: decoder blocks that attend to it. `options`: keyword arguments of the timm model, such as {"img_size": 48,
    "depth": 3}, and "norm_eps", the epsilon of a ViT's norms. `weights`: "pretrained" (timm downloads them), "scratch"
    (random), "stored" (those of a trained captioner, loaded afterwards; a plain ViT is then built without timm), the
    path of a local weights file, or a transformers ViT or CLIP (folder or hub id). `refiner`: arguments of a
    `ConvolutionalRefiner` for a CNN. `feature_levels`: how many of a CNN's last feature maps become tokens; with two or
    more a CNN can be stepped. A model that cannot be stepped gets coupling "final" whatever `coupling` says, and a line
    is printed about it.
    Raises ValueError for an unknown name, coupling or architecture, and FileNotFoundError that says what to do when
    the weights cannot be found or downloaded.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
    check_options(options or {})
    check_refiner(refiner or {})
    plain = plain_vit.options_of(name, options) if weights == "stored" else None
    if plain and not refiner and feature_levels == 1:
        return ViTEncoder(plain_vit.VisionTransformer(**plain), steps, coupling)
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    img_size, _, _ = timm_data_config(name, options)
    is_local = weights not in ("pretrained", "scratch", "stored")
    files = hugging_face.weights_files(Path(weights)) if is_local and Path(weights).is_dir() else []
    try:
        with no_larger_than([path for path in files if path.is_file()]):
            model = timm.create_model(name, pretrained=weights == "pretrained", **_timm_options(name, options))
    except UNFIT as error:  # no published weights, an option that this model does not have or that does not fit
        place = f"{weights}: " if files else ""
        raise ValueError(f"{place}timm cannot make {name} with {options or 'no options'}: {_reason(error)}") from error
    except OSError as error:  # huggingface_hub and urllib raise it without a network
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}); "
            "give a local file with --encoder_weights FILE (.safetensors or .pth, timm's key names)"
        ) from error
    if is_local:
        _load_local_weights(model, weights, name, options or {})
    if isinstance(model, (VisionTransformer, Eva)):
        if refiner:
            raise ValueError(f"a refiner needs the feature map of a CNN; {name} makes none")
        if feature_levels > 1:
            raise ValueError(f"feature_levels {feature_levels}: they are a CNN's; {name} has blocks to step")
        if weights == "scratch":
            _start_positions_from_sincos(model)
        return ViTEncoder(model, steps, coupling)
    encoder = GridEncoder(model, img_size, refiner, feature_levels, coupling)
    if encoder.coupling == "stepped" and feature_levels > steps:
        raise ValueError(
            f"feature_levels {feature_levels}: more than the {steps} decoder blocks that step through them"
        )
    if coupling != encoder.coupling:
        print(f"{name} cannot be stepped: every decoder block attends to its last layer (coupling final)")
    return encoder


def _timm_options(name, options):
    """The keyword arguments of `timm.create_model` for `options`, without the classifier."""
    import timm

    options = dict(options or {}, num_classes=0)
    entrypoint = timm.models.model_entrypoint(name.split(".")[0])
    classes = vars(sys.modules[entrypoint.__module__])  # those of the model's family are defined in its module
    if "norm_eps" in options:  # transformers' ViT has 1e-12; timm's option is a layer, which JSON cannot hold
        options["norm_layer"] = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
    if "Eva" in classes:
        options["dynamic_img_size"] = False  # all photos have the same size
    if "img_size" in options and "VisionTransformer" not in classes and "Eva" not in classes:
        try:  # a Swin has this option; a CNN has not, because it takes any size
            timm.create_model(name, **options)
        except TypeError:
            options.pop("img_size", None)
    return options


def _load_local_weights(model, source, name, options):
    """Load a weights file with timm's key names, or a transformers ViT or CLIP (folder or hub id), strictly: only the
    weights of the classifier, which the captioner does not have, are ignored.

    Raises FileNotFoundError, or ValueError that lists the missing, unknown and wrongly shaped keys.
    """
    import timm

    path = Path(source)
    if not path.is_file() and path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        tower, tower_options, _, read_state_dict = hugging_face.read_vision_tower(source)
        if name != tower or not tower_options.items() <= options.items():
            raise ValueError(f"encoder_weights {source} is a transformers model: give it as --encoder {source}")
        model.load_state_dict(read_state_dict(model.state_dict()))
        return
    if not path.is_file():
        raise FileNotFoundError(f"encoder_weights {path}: no such file")
    try:
        stored = timm.models.load_state_dict(str(path))
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert:  # timm's own: older key names, positions for another image size
            stored = convert(stored, model)
        classifier = model.pretrained_cfg.get("classifier") or ()
        classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        ignored = tuple(f"{part}." for part in (*classifier, "pre_logits"))
        keys = model.state_dict().keys()
        model.load_state_dict({k: v for k, v in stored.items() if k in keys or not k.startswith(ignored)})
    except Exception as error:  # a damaged file may raise anything while it is read, converted or loaded
        raise ValueError(f"encoder_weights {path} does not fit {type(model).__name__}: {error}") from error


@torch.no_grad()
def _start_positions_from_sincos(vit):
    """Initialise the learned positions of a ViT trained from scratch with the 2-D sine-cosine table (Chen et al. 2021,
    MoCo v3; Beyer et al. 2022). timm initialises them with std 0.02, far below the patch embeddings, so that where
    things are is learnt late."""
    from timm.layers import build_sincos2d_pos_embed

    if vit.pos_embed is not None and vit.embed_dim % 4 == 0:
        table = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)  # (N_patches, C)
        vit.pos_embed[0, -len(table) :] = table  # after the positions of class and register tokens, if any
