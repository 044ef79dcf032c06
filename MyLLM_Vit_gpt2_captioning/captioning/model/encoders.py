"""Image encoders behind one contract: `levels(images)` is a list of (B, N, C), N image tokens of C channels each.

A ViT is `embed(images)`, then `step(i, tokens)` for each decoder block i. In "stepped" coupling `embed` only makes the
patch tokens and step i runs the ViT's i-th share of blocks, so that decoder block i attends to that depth: as many
levels as decoder blocks. In "final" coupling `embed` runs the whole encoder, its own final norm included, `step` hands
the tokens on unchanged, and there is one level. A CNN makes its last feature map, or several: see `GridEncoder`.

timm is imported in the functions that use it. That takes seconds (torchvision and torch's compiler come with it), and a
trained captioner with a plain ViT does not need it: see plain_vit.py.
"""

import math
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from captioning.model import hugging_face, plain_vit

COUPLINGS = ("stepped", "final")


def input_config(name, options=None):
    """What preprocessing has to make of a photo for the timm model `name` -> (img_size, mean, std).

    img_size in pixels of a square; mean and std one value a channel, for pixel values in 0..1. They come from the data
    config that timm keeps beside the model's weights. Raises ValueError for an unknown name.
    """
    import timm
    from timm.data import resolve_data_config

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


def resolve_encoder(config):
    """Put a captioner's `config` into timm's words, in place.

    A transformers vision model (ViT or CLIP, folder or hub id) as `encoder` becomes the timm architecture that is its
    equal: its sizes go to `encoder_options`, its weights to `encoder_weights`, mean and std to `preprocessing`. A timm
    name stays. Raises FileNotFoundError, or ValueError that names an architecture that is neither ViT nor CLIP.
    """
    source = str(config.encoder).removeprefix("timm/")  # timm's models on the hub are called by their names
    config.encoder = source
    if not (Path(source).is_dir() or "/" in source):
        return
    import timm

    if timm.is_model(source.split(".")[0]):
        return
    config.encoder, options, preprocessing, _ = hugging_face.read_tower(source)
    config.encoder_options = options | config.encoder_options
    config.preprocessing = preprocessing | config.preprocessing
    if config.encoder_weights == "pretrained":
        config.encoder_weights = source


def preprocessing_of(config):
    """The arguments of `preprocessing.preprocess` for a captioner's `config`: what the encoder was trained with, and
    on top of it what `config.preprocessing` says. Raises ValueError for a key that is not one of them."""
    plain = plain_vit.options_of(config.encoder, config.encoder_options)
    if plain and {"mean", "std"} <= config.preprocessing.keys():  # as in a trained captioner: no need to ask timm
        img_size, mean, std = plain["img_size"], None, None
    else:
        img_size, mean, std = input_config(config.encoder, config.encoder_options)
    own = dict(img_size=img_size, mean=mean, std=std, resample="bicubic")
    unknown = config.preprocessing.keys() - own.keys()
    if unknown:
        raise ValueError(f"preprocessing has no {', '.join(sorted(unknown))}; it has mean, std and resample")
    chosen = own | config.preprocessing
    if chosen["img_size"] != img_size:
        raise ValueError(f"preprocessing: img_size is the encoder's, {img_size}; change it in encoder_options")
    if chosen["resample"] not in ("bicubic", "bilinear"):
        raise ValueError(f"preprocessing: resample {chosen['resample']!r} is neither bicubic nor bilinear")
    for key in ("mean", "std"):
        value = chosen[key]
        if not (
            isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
        ):
            raise ValueError(f"preprocessing: {key} {value!r} is not one number for each of three channels")
    return chosen


def run_block(block, *inputs, recompute=False, **options):
    """block(*inputs, **options); `recompute`: its activations are not kept but computed again in the backward pass, with
    the same dropout (Chen et al. 2016)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, **options)
    return block(*inputs, **options)


class Encoder(nn.Module):
    """The contract, with the `step` of final coupling. `widths` are the channels C of a token on each level, as
    the decoder gets it: behind `refine`."""

    coupling = "final"
    gradient_checkpointing = False  # of a ViT's blocks
    normalized = False  # True when the last level leaves through the encoder's own final norm
    width = property(lambda self: self.widths[-1])

    def levels(self, images):
        """images (B, 3, H, W) -> list of tokens (B, N, C) as the timm model makes them, in front of `refine`."""
        return [self.embed(images)]

    def refine(self, levels):
        """What is trained from scratch on top of pretrained features: list of (B, N, C) -> list of (B, N, C)."""
        return levels

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, N, C)."""
        raise NotImplementedError

    def step(self, i, tokens):
        """tokens (B, N, C) -> the tokens (B, N, C) that decoder block i attends to."""
        return tokens

    def stages(self):
        """The parts of the timm model that run one after the other: blocks of a ViT, stages of a CNN."""
        raise NotImplementedError

    def parameters_before(self, last):
        """Names of the parameters in front of the `last` stages; with 0 all but the refiner's.

        Raises ValueError when there are fewer stages.
        """
        stages = self.stages()
        if last > len(stages):
            raise ValueError(f"trainable_stages {last}: the encoder has {len(stages)} stages")
        names = [name for name, _ in self.named_parameters() if not name.startswith("refiner.")]
        if last == 0:
            return names
        first = next(stages[-last].parameters())
        start = next(i for i, name in enumerate(names) if self.get_parameter(name) is first)
        return names[:start]  # timm registers the parts in the order in which they run


class ViTEncoder(Encoder):
    """A timm VisionTransformer or Eva, or the one of plain_vit.py: class and register tokens, then the patches, as timm
    orders them."""

    def __init__(self, vit, steps, coupling):
        super().__init__()
        self.vit, self.coupling = vit, coupling
        self.widths = (vit.num_features,) * (steps if coupling == "stepped" else 1)
        self.normalized = coupling == "final"
        # Step i runs blocks[bounds[i]:bounds[i + 1]]. With as many blocks as steps that is one block a step.
        self.bounds = [round(i * len(vit.blocks) / steps) for i in range(steps + 1)]
        if isinstance(vit.norm, nn.Identity):  # towers that pool keep their norm behind the pooling: here it is due
            vit.norm = vit.fc_norm  # for each token
        if coupling == "stepped":
            vit.norm = nn.Identity()  # made for the last depth only: here every depth gets a norm of its own
        vit.fc_norm, vit.attn_pool = nn.Identity(), None  # no pooling, so no weights for it
        self.rotary = None

    def embed(self, images):
        tokens = self.vit.patch_embed(images)  # (B, N_patches, C)
        tokens = self.vit._pos_embed(tokens)  # (B, N, C): class token in front, position added
        if isinstance(tokens, tuple):  # an Eva turns queries and keys in each block by the patch's position
            tokens, self.rotary = tokens  # the same for all images, so keeping it makes no image depend on another
        else:
            tokens = self.vit.patch_drop(tokens)
        tokens = self.vit.norm_pre(tokens)  # CLIP has one, elsewhere identity
        if self.coupling == "stepped":
            return tokens
        return self.vit.norm(self._run(tokens, 0, len(self.vit.blocks)))

    def levels(self, images):
        levels, tokens = [], self.embed(images)
        for i in range(len(self.widths)):
            tokens = self.step(i, tokens)  # (B, N, C), one share of the ViT deeper
            levels.append(tokens)
        return levels

    def step(self, i, tokens):
        return self._run(tokens, *self.bounds[i : i + 2]) if self.coupling == "stepped" else tokens

    def stages(self):
        return list(self.vit.blocks)

    def _run(self, tokens, start, end):
        """tokens (B, N, C) through the blocks start..end-1."""
        for i in range(start, end):
            options = {}
            if self.rotary is not None:
                options["rope"] = self.rotary[i] if self.vit.rope_mixed else self.rotary
            tokens = run_block(self.vit.blocks[i], tokens, recompute=self.gradient_checkpointing, **options)
        if end == len(self.vit.blocks):
            self.rotary = None  # done with these images
        return tokens


def _has_weights(module):
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


class GridEncoder(Encoder):
    """Any other timm model: each cell of its last feature map is a token, row by row.

    With `feature_levels` above 1 the maps of earlier stages become tokens too, on the grid of the last one: a cell that
    covers 2 x 2 of an earlier map has their channels side by side. With coupling "final" the decoder reads all levels
    at once, with "stepped" its blocks read from the first level to the last.
    """

    def __init__(self, model, img_size, refiner=None, feature_levels=1, coupling="final"):
        """`refiner`: arguments of `ConvolutionalRefiner`, {} or None for none."""
        super().__init__()
        # Channels last in memory: EfficientNet's convolutions are then 1.8 times as fast on a CPU; GPUs like it too.
        if feature_levels < 1:
            raise ValueError(f"feature_levels must be at least 1, not {feature_levels}")
        self.cnn, width = model.to(memory_format=torch.channels_last), model.num_features
        self.feature_levels = feature_levels
        self.coupling = coupling if feature_levels > 1 else "final"
        features = self._probe(img_size)
        shape = tuple(getattr(features, "shape", ()))
        if feature_levels > 1 and len(shape) != 4:
            raise ValueError(f"feature_levels {feature_levels}: {type(model).__name__} makes no feature map")
        # What a model makes of an image: a map with channels first (CNNs) or last (Swin), or already tokens (mixers).
        if len(shape) == 4 and shape[1] == width:
            self.channels_first = True
        elif (len(shape) == 4 or (len(shape) == 3 and shape[1] > 1)) and shape[-1] == width:
            self.channels_first = False
        else:
            raise ValueError(f"{type(model).__name__} makes no feature map or tokens of {width} channels")
        # ConvNeXt and its like keep their final norm in the head, BEiT behind the pooling.
        places = (getattr(getattr(model, "head", None), "norm", None), getattr(model, "fc_norm", None))
        norms = [norm for norm in places if _has_weights(norm) and next(norm.parameters()).shape == (width,)]
        self.normalized = bool(norms)
        self.norm = norms[0] if norms else nn.Identity()
        for part in ("head", "fc_norm"):  # pooling and classifier, unless a model calls something else so
            kept = getattr(model, part, None)
            if kept is not None:
                setattr(model, part, nn.Identity())
                if not torch.equal(features, self._probe(img_size)):
                    setattr(model, part, kept)
        self.refiner = None  # what is trained from scratch behind a pretrained encoder
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
        """What the model makes of an image without content; None when it has no `forward_features`."""
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
        images = images.contiguous(memory_format=torch.channels_last)  # still (B, 3, H, W)
        if self.feature_levels == 1:
            return [self._as_tokens(self.norm(self.cnn.forward_features(images)))]
        last, earlier = self._feature_maps(images)
        levels = []
        for features in earlier:  # (B, C, h, w), at least as fine as the last map
            ratio = math.ceil(features.size(-1) / self.grid(last))
            features = F.adaptive_avg_pool2d(features, ratio * self.grid(last))  # as it is where the sizes divide
            levels.append(F.pixel_unshuffle(features, ratio).flatten(2).transpose(1, 2))  # (B, N, C * ratio ** 2)
        return [*levels, self._as_tokens(self.norm(last))]

    def grid(self, features):
        """Cells a side of the last map."""
        return features.size(-1 if self.channels_first else 1)

    def _feature_maps(self, images):
        """-> the last map as `forward_features` makes it, and those of the stages in front of it (B, C, h, w).

        Raises ValueError when the model has fewer stages or cannot show them.
        """
        wanted = self.feature_levels
        stages = len(getattr(self.cnn, "feature_info", [])) if hasattr(self.cnn, "forward_intermediates") else 1
        if stages < wanted:
            raise ValueError(f"feature_levels {wanted}: {type(self.cnn).__name__} shows {stages} feature maps")
        indices = list(range(stages - wanted, stages - 1))
        return self.cnn.forward_intermediates(images, indices=indices, output_fmt="NCHW")

    def refine(self, levels):
        return levels if self.refiner is None else [self.refiner(levels[0])]

    def _as_tokens(self, features):
        if self.channels_first:
            return features.flatten(2).transpose(1, 2)  # (B, h*w, C)
        return features.flatten(1, -2)  # (B, N, C)


class ConvolutionalRefiner(nn.Module):
    """From a CNN's feature map to tokens that know of each other: 1x1 convolution, batch norm, ReLU, pooling to a fixed
    grid, learned positions, then post-norm encoder layers (Vaswani et al. 2017) with a convolutional feed-forward."""

    def __init__(self, channels, width=512, grid=7, layers=2, heads=8, kernel=3, dropout=0.1):
        """`channels` of the map come in, `width` go out; `grid` cells a side; `kernel` of the feed-forward's first
        convolution, which runs over the row of tokens (odd, so that the row keeps its length)."""
        super().__init__()
        if width % heads or kernel % 2 == 0:
            raise ValueError(f"refiner: width {width} must be a multiple of heads {heads}, and kernel {kernel} odd")
        self.width = width
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.positions = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
        self.layers = nn.ModuleList(RefinerLayer(width, heads, kernel, dropout) for _ in range(layers))

    def forward(self, tokens):
        """tokens (B, h*h, channels), the cells of a square map row by row -> tokens (B, grid * grid, width)."""
        features = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.size(1)), -1))  # (B, channels, h, h)
        tokens = self.pool(self.reduce(features)).flatten(2).transpose(1, 2) + self.positions  # (B, N, width)
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
    """Leaves tensors as they are where `torch.nn.init` would draw numbers. On the meta device it would draw none, but
    for `normal_` torch imports its compiler there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def meta_device_for(stored):
    """The context in which to build the frame of a trained captioner, with the model_config `stored` (a dict).

    Around a plain ViT it is the meta device, on which tensors have a shape and no numbers: to draw random ones, only to
    read others over them, would take seconds. timm's other models look at numbers when they are built.
    """
    if plain_vit.options_of(str(stored.get("encoder")), stored.get("encoder_options")):
        with torch.device("meta"), _SkipInit():
            yield
    else:
        yield


def build_encoder(name, steps, coupling="stepped", options=None, weights="scratch", refiner=None, feature_levels=1):
    """Make the timm model `name` and put it behind the contract.

    `options` are keyword arguments of the timm model, such as {"img_size": 48, "depth": 3}. `weights` is "pretrained"
    (timm downloads them), "scratch" (random), "stored" (those of a trained captioner, which are loaded afterwards: a
    plain ViT is then made without timm), the path of a local weights file, or a transformers ViT or CLIP (folder or
    hub id). `options` may also hold "norm_eps", the epsilon of a ViT's norms. A model without blocks to step gets
    coupling "final" whatever `coupling` says, and a line is printed about it. `refiner`: arguments of
    `ConvolutionalRefiner`, for a CNN that is to have one. `feature_levels`: last feature maps of a CNN that become
    tokens; with two or more a CNN can be stepped.
    Raises ValueError for an unknown name, coupling or architecture, and FileNotFoundError that says what to do when
    the weights are not to be had.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
    plain = plain_vit.options_of(name, options) if weights == "stored" else None
    if plain and not refiner and feature_levels == 1:
        return ViTEncoder(plain_vit.VisionTransformer(**plain), steps, coupling)
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    img_size, _, _ = input_config(name, options)
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", **_timm_options(name, options))
    except (RuntimeError, TypeError) as error:  # no published weights, an unknown option
        raise ValueError(f"timm cannot make {name}: {error}") from error
    except OSError as error:  # what huggingface_hub and urllib raise without a network
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}); "
            "give a local file with --encoder_weights FILE (.safetensors or .pth, timm's key names)"
        ) from error
    if weights not in ("pretrained", "scratch", "stored"):
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
        raise ValueError(f"feature_levels {feature_levels}: {steps} decoder blocks cannot step through so many")
    if coupling != encoder.coupling:
        print(f"{name} cannot be stepped: every decoder block attends to its last layer (coupling final)")
    return encoder


def _timm_options(name, options):
    """What timm is asked for: our options, without the classifier."""
    import timm

    options = dict(options or {}, num_classes=0)
    entrypoint = timm.models.model_entrypoint(name.split(".")[0])
    family = vars(sys.modules[entrypoint.__module__])
    if "norm_eps" in options:  # transformers' ViT has 1e-12; timm takes a layer, which JSON cannot hold
        options["norm_layer"] = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
    if "Eva" in family:
        options["dynamic_img_size"] = False  # all photos have one size here
    if "img_size" in options and "VisionTransformer" not in family and "Eva" not in family:
        try:  # a CNN takes any size and has no such option, a Swin has it
            timm.create_model(name, **options)
        except TypeError:
            options.pop("img_size", None)
    return options


def _load_local_weights(model, source, name, options):
    """Load a weights file with timm's key names, or a transformers ViT or CLIP (folder or hub id), strictly: only the
    classifier, which the captioner does not have, may be left over.

    Raises FileNotFoundError, or ValueError that lists what does not fit.
    """
    import timm

    path = Path(source)
    if not path.is_file() and path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        tower, tower_options, _, read = hugging_face.read_tower(source)
        if name != tower or not tower_options.items() <= options.items():
            raise ValueError(f"encoder_weights {source} is a transformers model: give it as --encoder {source}")
        model.load_state_dict(read(model.state_dict()))
        return
    if not path.is_file():
        raise FileNotFoundError(f"encoder_weights {path}: no such file")
    try:
        stored = timm.models.load_state_dict(str(path))
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if adapt:  # timm's own: older key names, positions for another image size
            stored = adapt(stored, model)
        classifier = model.pretrained_cfg.get("classifier") or ()
        classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        left_out = tuple(f"{part}." for part in (*classifier, "pre_logits"))
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in stored.items() if k in own or not k.startswith(left_out)})
    except Exception as error:  # whatever a foreign or damaged file makes of reading, adapting or loading
        raise ValueError(f"encoder_weights {path} does not fit {type(model).__name__}: {error}") from error


@torch.no_grad()
def _start_positions_from_sincos(vit):
    """Let the learned positions of a random ViT start from the fixed 2-D sine-cosine table (Chen et al. 2021, MoCo v3;
    Beyer et al. 2022). timm starts them at std 0.02, far below the patches: where things are is then learnt late."""
    from timm.layers import build_sincos2d_pos_embed

    if vit.pos_embed is not None and vit.embed_dim % 4 == 0:
        table = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)  # (N_patches, C)
        vit.pos_embed[0, -len(table) :] = table  # behind the positions of class and register tokens, if any
