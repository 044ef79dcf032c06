"""Convert Hugging Face checkpoints: VisionEncoderDecoder captioners (ViT + GPT-2) in both directions, ViT and CLIP
vision towers to timm.

Tensors are only renamed, split, joined and transposed, so that a round trip is exact to the bit. The names are those
that transformers writes to disk; the names of its modules differ between versions.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, processors

from captioning.common.files import CONFIG_FILE, TOKENIZER_FILE, read_json, write_atomically
from captioning.common.form import check
from captioning.common.printable import printable
from captioning.model.checkpoint import check_finite, find_folder, load_config, load_weights, some_of, unwrapped
from captioning.model.tokenizer import END_OF_TEXT, UNKNOWN

MODEL_TYPE = "vision-encoder-decoder"  # in the config.json of a VisionEncoderDecoderModel
WEIGHTS_FILE, TORCH_FILE = "model.safetensors", "pytorch_model.bin"
PREPROCESSOR_FILE = "preprocessor_config.json"
SMALL_FILES = ("*.json", "merges.txt")  # configs, tokenizer, indices of sharded weights
MAX_TOKENS = 50  # of captions in transformers, where nothing else is said, as in the project
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which preprocessor_config.json holds
VIT_FORM = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), int)
VIT_FORM |= dict(patch_size=(int, [int]), image_size=(int, [int], tuple), layer_norm_eps=float)
PREPROCESSOR_DEFAULTS = dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
PREPROCESSOR_DEFAULTS |= dict.fromkeys(("image_mean", "image_std", "resample"))
PREPROCESSOR_FORM = dict(do_rescale=bool, rescale_factor=float, do_normalize=bool, resample=(int, None))
PREPROCESSOR_FORM |= dict.fromkeys(("image_mean", "image_std"), (float, [float], None))


# --- names of the same tensors in both libraries ----------------------------------------------------------------------


class Pair(NamedTuple):
    """Names of tensors with the same values: `ours` concatenated along dim 0 equal `theirs` concatenated."""

    ours: tuple
    theirs: tuple
    conv1d: bool = False  # theirs is a Conv1D, stored (in, out); ours is (out, in)


# Names in timm's VisionTransformer: names in transformers' ViTModel, then in its CLIPVisionModel.
VIT_TENSORS = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
VIT_LAYERS = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
VIT_BLOCK = "encoder.layer."
VIT_BLOCK_LAYERS = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
CLIP_TENSORS = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight"}
CLIP_LAYERS = {"patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
CLIP_BLOCK = "encoder.layers."
CLIP_BLOCK_LAYERS = {
    "norm1": ("layer_norm1",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
# Prefixes of what the checkpoint of a vision tower may hold besides it: pooler, classifier, CLIP's text half, and the
# position ids that old versions of transformers saved.
NOT_OF_THE_TOWER = (
    "pooler.",
    "classifier.",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "embeddings.position_ids",
    "embeddings.mask_token",
)

CROSS_ATTENTION = {
    "ln_cross.scale": "ln_cross_attn.weight",
    "ln_cross.shift": "ln_cross_attn.bias",
    "cross_attn.q.weight": "crossattention.q_attn.weight",
    "cross_attn.q.bias": "crossattention.q_attn.bias",
    "cross_attn.c_proj.weight": "crossattention.c_proj.weight",
    "cross_attn.c_proj.bias": "crossattention.c_proj.bias",
}


def _tower_pairs(depth, tensors, layers, block, block_layers):
    pairs = [Pair((ours,), (theirs,)) for ours, theirs in tensors.items()]
    layers = {ours: (theirs,) for ours, theirs in layers.items()}
    for i in range(depth):
        layers |= {
            f"blocks.{i}.{ours}": tuple(f"{block}{i}.{name}" for name in theirs)
            for ours, theirs in block_layers.items()
        }
    for ours, theirs in layers.items():
        for part in ("weight", "bias"):
            pairs.append(Pair((f"{ours}.{part}",), tuple(f"{name}.{part}" for name in theirs)))
    return pairs


def vit_pairs(depth):
    """List of `Pair` for a timm VisionTransformer of `depth` blocks (ours) and transformers' ViTModel (theirs)."""
    return _tower_pairs(depth, VIT_TENSORS, VIT_LAYERS, VIT_BLOCK, VIT_BLOCK_LAYERS)


def clip_pairs(depth):
    """List of `Pair` for a timm VisionTransformer of `depth` blocks with norm_pre and transformers' CLIPVisionModel."""
    return _tower_pairs(depth, CLIP_TENSORS, CLIP_LAYERS, CLIP_BLOCK, CLIP_BLOCK_LAYERS)


def captioner_pairs(state_dict, gpt2_name):
    """List of `Pair` for a captioner with a ViT in final coupling and a VisionEncoderDecoderModel of ViT and GPT-2.

    `state_dict` is the captioner's. `gpt2_name` maps our name of a GPT-2 parameter to Hugging Face's, and the name of a
    parameter that GPT-2 does not have to None.
    """
    blocks = [int(name.split(".")[3]) for name in state_dict if name.startswith("encoder.vit.blocks.")]
    depth = 1 + max(blocks, default=-1)
    pairs = [
        Pair(tuple(f"encoder.vit.{name}" for name in ours), tuple(f"encoder.{name}" for name in theirs))
        for ours, theirs, _ in vit_pairs(depth)
    ]
    pairs += [Pair((f"bridges.0.1.{part}",), (f"enc_to_dec_proj.{part}",)) for part in ("weight", "bias")]
    for name in state_dict:
        if not name.startswith("gpt."):
            continue
        name = name.removeprefix("gpt.")
        theirs = gpt2_name(name)
        if theirs is None:
            _, i, layer = name.split(".", 2)
            if layer.startswith("cross_attn.k."):  # keys and values are one layer in transformers
                key_and_value = tuple(f"gpt.trf_blocks.{i}.{layer.replace('.k.', f'.{x}.')}" for x in "kv")
                joint = f"decoder.transformer.h.{i}.crossattention.c_attn.{layer.rpartition('.')[2]}"
                pairs.append(Pair(key_and_value, (joint,), conv1d=layer.endswith("weight")))
            if layer not in CROSS_ATTENTION:
                continue
            theirs = f"h.{i}.{CROSS_ATTENTION[layer]}"
        conv1d = theirs.startswith("h.") and state_dict[f"gpt.{name}"].ndim == 2
        pairs.append(Pair((f"gpt.{name}",), (f"decoder.transformer.{theirs}",), conv1d))
    return pairs


def convert_from_hf(theirs, pairs, reference, source):
    """transformers' state_dict `theirs` -> our state_dict, strictly.

    Keys, shapes and dtypes are those of `reference`, a state_dict of the model to load. Raises ValueError that names
    `source` and keys that are missing, unknown or wrongly shaped.
    """
    theirs, ours, problems = dict(theirs), {}, []
    for pair in pairs:
        if pair.ours[0] not in reference:
            continue  # the model lacks this layer (no bias, equal widths): if the checkpoint has it, its key is unknown
        missing = [name for name in pair.theirs if name not in theirs]
        if missing:
            problems += [f"{name}: missing" for name in missing]
            continue
        tensors = [theirs.pop(name) for name in pair.theirs]
        if pair.conv1d:
            tensors = [tensor.T for tensor in tensors]
        rows = sum(reference[name].shape[0] for name in pair.ours)
        expected = (rows // len(tensors), *reference[pair.ours[0]].shape[1:])
        for name, tensor in zip(pair.theirs, tensors, strict=True):
            if tensor.is_floating_point() != reference[pair.ours[0]].is_floating_point():
                problems.append(f"{name}: {tensor.dtype} where {reference[pair.ours[0]].dtype} is needed")
                break
            if _squeezed(tensor.shape) != _squeezed(expected):
                shape, needed = (tuple(s)[:: -1 if pair.conv1d else 1] for s in (tensor.shape, expected))
                problems.append(f"{name}: shape {shape} where {needed} is needed")
                break
        else:
            for name, part in zip(pair.ours, _resplit(tensors, len(pair.ours)), strict=True):
                ours[name] = part.reshape(reference[name].shape).to(reference[name].dtype).contiguous()
    problems += [f"{printable(name):.200}: unknown key" for name in theirs]
    if not problems:
        problems = [f"{name}: nothing there for this layer" for name in reference.keys() - ours.keys()]
    if problems:
        raise ValueError(f"{source} does not fit the model:\n  {some_of(sorted(problems))}")
    return ours


def _squeezed(shape):
    """A shape without its ones: a class token is (C,) in one library and (1, 1, C) in the other."""
    return [size for size in shape if size != 1]


def _resplit(tensors, parts):
    """Tensors -> as many tensors as `parts` says, with the same rows (dim 0) in the same order."""
    joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return joined.chunk(parts) if parts > 1 else [joined]


def convert_to_hf(ours, pairs):
    """Our state_dict -> transformers'. Raises ValueError that lists the keys without a counterpart there."""
    remaining, theirs = dict(ours), {}
    for pair in pairs:
        if pair.ours[0] not in remaining:
            continue
        tensors = [remaining.pop(name) for name in pair.ours]
        for name, part in zip(pair.theirs, _resplit(tensors, len(pair.theirs)), strict=True):
            theirs[name] = (part.T if pair.conv1d else part).contiguous()
    if remaining:
        raise ValueError(
            "a VisionEncoderDecoderModel of ViT and GPT-2 has no place for these layers:\n  "
            + "\n  ".join(sorted(remaining))
        )
    return theirs


# --- reading ----------------------------------------------------------------------------------------------------------


def fetch(source):
    """A folder or a hub id -> Path of the folder; of a hub id, config, tokenizer and weights are downloaded."""
    if Path(source).is_dir():
        return Path(source)
    folder = find_folder(source, (*SMALL_FILES, WEIGHTS_FILE, "model-*.safetensors"))
    files = weights_files(folder)
    if not files or not all(file.is_file() for file in files):
        folder = find_folder(source, (*SMALL_FILES, TORCH_FILE, "pytorch_model-*.bin"))  # an older upload
    return folder


def weights_files(folder):
    """The files that hold the weights: one, or those that the index of a sharded checkpoint names."""
    for name in (WEIGHTS_FILE, TORCH_FILE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in _shards_of(index)]
    return []


def _shards_of(index):
    """The names of the files that the `index` of a sharded checkpoint lists. Raises ValueError for one that is none,
    and for names that lead out of its folder."""
    names = read_json(index).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else {None}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"{index}: not the index of a checkpoint (its weight_map holds {repr(name)[:60]})")
    return sorted(names)


def read_weights(folder):
    """The state_dict in a Hugging Face checkpoint folder. Raises FileNotFoundError or ValueError naming the file."""
    files = weights_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS_FILE} nor {TORCH_FILE} is there")
    weights = {name: tensor for file in files for name, tensor in unwrapped(load_weights(file), file).items()}
    check_finite(weights, folder)
    return weights


def _transformers_config(folder):
    """config.json as a transformers config object, which adds defaults for the keys that the file lacks."""
    from transformers import AutoConfig

    if "auto_map" in read_json(folder / CONFIG_FILE):
        raise ValueError(f"{folder / CONFIG_FILE}: the model needs Python code of its own (auto_map), which is not run")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # huggingface_hub's validation errors have had several classes
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]
        raise ValueError(f"{folder / CONFIG_FILE}: not a config that transformers reads ({reason})") from error


def read_preprocessing(folder):
    """preprocessor_config.json -> dict with those of mean, std and resample that it states.

    Raises ValueError that names the file for settings that our preprocessing does not have.
    """
    path = folder / PREPROCESSOR_FILE
    stored = read_json(path) if path.is_file() else {}
    if not stored and (folder / "processor_config.json").is_file():  # transformers 5 writes this file for some models
        path = folder / "processor_config.json"
        stored = read_json(path).get("image_processor", {})
    try:
        check(stored, dict, "image_processor")
        stored = PREPROCESSOR_DEFAULTS | stored
        check(stored, PREPROCESSOR_FORM)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    preprocessing = {}
    if not stored["do_rescale"] or abs(stored["rescale_factor"] - 1 / 255) > 1e-6:
        raise ValueError(f"{path}: pixels are to be scaled by {stored['rescale_factor']}, here it is always 1/255")
    if not stored["do_normalize"]:
        stored |= dict(image_mean=0.0, image_std=1.0)
    for ours, key in (("mean", "image_mean"), ("std", "image_std")):
        value = stored[key]
        if value is not None:
            preprocessing[ours] = tuple(value) if isinstance(value, list) else (float(value),) * 3
    resample = stored["resample"]
    if resample is not None:
        if resample not in RESAMPLING:
            raise ValueError(f"{path}: resample {resample} is none of {RESAMPLING}")
        preprocessing["resample"] = RESAMPLING[resample]
    return preprocessing


def _vit_options(vit, source):
    """A transformers ViTConfig or CLIPVisionConfig -> (timm name, options, `vit_pairs` or `clip_pairs`).

    With the options timm builds exactly this architecture. Raises ValueError that names the model type of any other.
    """
    kinds = {
        ("vit", "gelu"): ("vit_base_patch16_224", vit_pairs),
        ("clip_vision_model", "gelu"): ("vit_base_patch16_clip_224", clip_pairs),
        ("clip_vision_model", "quick_gelu"): ("vit_base_patch16_clip_quickgelu_224", clip_pairs),
    }
    kind = (vit.model_type, getattr(vit, "hidden_act", None))
    if kind not in kinds:
        known = ", ".join(f"{model_type} with {act}" for model_type, act in kinds)
        found = printable(f"{kind[0]} with {kind[1]}")[:100]
        raise ValueError(f"{source}: the encoder is {found}; only these can be read: {known}")
    try:
        check({key: getattr(vit, key, None) for key in VIT_FORM}, VIT_FORM, "")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    name, pairs = kinds[kind]
    size = vit.image_size if isinstance(vit.image_size, int) else vit.image_size[0]
    if vit.image_size not in (size, [size, size], (size, size)):
        raise ValueError(f"{source}: image_size {vit.image_size} is not a square")
    options = dict(
        img_size=size,
        patch_size=vit.patch_size,
        embed_dim=vit.hidden_size,
        depth=vit.num_hidden_layers,
        num_heads=vit.num_attention_heads,
        mlp_ratio=(vit.intermediate_size + 0.5) / max(1, vit.hidden_size),  # timm multiplies and cuts off the fraction
        qkv_bias=getattr(vit, "qkv_bias", True),
        norm_eps=vit.layer_norm_eps,
    )
    return name, options, pairs


def read_vision_tower(source):
    """A transformers vision model (ViT, CLIP or its vision half), folder or hub id ->
    (timm name, options of the timm model, preprocessing, read_state_dict).

    `read_state_dict` takes a state_dict of the timm model and returns the one to load. Raises FileNotFoundError, or
    ValueError that names an architecture that is neither ViT nor CLIP.
    """
    folder = find_folder(source, SMALL_FILES)
    config = _transformers_config(folder)
    config = getattr(config, "vision_config", config)  # of a whole CLIP, its vision half
    name, options, pairs = _vit_options(config, source)

    def read_state_dict(reference):
        theirs = read_weights(fetch(source))
        prefixes = [prefix for prefix in ("vision_model.", "vit.") if any(key.startswith(prefix) for key in theirs)]
        for prefix in prefixes:
            theirs = {key.removeprefix(prefix): tensor for key, tensor in theirs.items()}
        theirs = {key: tensor for key, tensor in theirs.items() if not key.startswith(NOT_OF_THE_TOWER)}
        return convert_from_hf(theirs, pairs(options["depth"]), reference, source)

    return name, options, read_preprocessing(folder), read_state_dict


def is_vision_encoder_decoder(config):
    """True for the config.json (a dict) of a VisionEncoderDecoderModel."""
    return config.get("model_type") == MODEL_TYPE


def read_config(source, read_decoder, constants=None):
    """A trained captioner (folder or hub id, ours or a VisionEncoderDecoderModel) -> (folder, model_config as a dict).

    `read_decoder` as in `read_captioner_config`, `constants` as in `load_config`. Raises FileNotFoundError, or
    ValueError for a checkpoint of anything else.
    """
    folder = find_folder(source)
    stored = load_config(folder, constants)
    if is_vision_encoder_decoder(stored):
        folder = fetch(source)
        config, preprocessing = read_captioner_config(folder, read_decoder)
    elif "model_config" in stored:
        config, preprocessing = stored["model_config"], stored["preprocessing"]
    else:
        raise ValueError(f"{folder}: a {stored['model_type']} model, not a captioner")
    return folder, config | {"preprocessing": preprocessing, "start_from": ""}  # its own weights replace start_from's


def read_captioner_config(folder, read_decoder):
    """The folder of a VisionEncoderDecoderModel of ViT and GPT-2 -> (model_config, preprocessing), both dicts.

    `read_decoder(gpt2_config, source)` returns a config for `GPTModel`. Raises ValueError that names an encoder or
    decoder of another kind, or a setting that our model does not have.
    """
    config = _transformers_config(folder)
    if config.encoder.model_type != "vit":
        raise ValueError(f"{folder}: the encoder is {config.encoder.model_type}, only ViT can be read")
    encoder, options, _ = _vit_options(config.encoder, folder)
    decoder = config.decoder
    model_config = vars(read_decoder(decoder, folder))
    eos, start = _special_tokens(folder, config)
    if eos != start or eos is None:
        raise ValueError(
            f"{folder}: captions begin with id {start!r:.40} and end with {eos!r:.40}; here one id does both"
        )
    width = getattr(decoder, "cross_attention_hidden_size", None)
    if width not in (None, decoder.n_embd):
        raise ValueError(f"{folder}: cross_attention_hidden_size {width} is not the decoder's width {decoder.n_embd}")
    model_config |= dict(
        eos_token_id=eos, encoder=encoder, encoder_options=options, coupling="final", normalize_tokens=False
    )
    preprocessing = dict(img_size=options["img_size"], mean=(0.5,) * 3, std=(0.5,) * 3, resample="bilinear")
    return model_config, preprocessing | read_preprocessing(folder)


def _special_tokens(folder, config):
    """-> (EOS id, id that captions start with); versions of transformers differ in which file holds them."""
    configs = [read_json(folder / CONFIG_FILE), config.decoder.to_dict()]
    generation = folder / "generation_config.json"
    if generation.is_file():
        configs.insert(0, read_json(generation))

    def first(*keys):
        return next((config[key] for key in keys for config in configs if config.get(key) is not None), None)

    eos, start = first("eos_token_id"), first("decoder_start_token_id", "bos_token_id")
    if isinstance(eos, list):  # with more than one EOS, the one that also starts captions is GPT-2's own
        eos = start if start in eos else eos[0]
    return eos, start


def read_captioner_weights(folder, reference, gpt2_name):
    """Weights of a VisionEncoderDecoderModel -> our state_dict, shaped like `reference`.

    The pooler, which captioning does not use, and the causal masks in old files are ignored. The head has to equal the
    token embedding. Raises FileNotFoundError, or ValueError that lists the missing, unknown and wrongly shaped keys.
    """
    masks = (".attn.bias", ".attn.masked_bias", ".crossattention.bias", ".crossattention.masked_bias")
    theirs = {
        key: tensor
        for key, tensor in read_weights(folder).items()
        if not key.startswith(("encoder.pooler.", "encoder.embeddings.mask_token")) and not key.endswith(masks)
    }
    head, embedding = theirs.pop("decoder.lm_head.weight", None), "decoder.transformer.wte.weight"
    if head is not None and not torch.equal(theirs.setdefault(embedding, head), head):
        raise ValueError(f"{folder}: decoder.lm_head.weight differs from {embedding}, but the head is tied to it")
    return convert_from_hf(theirs, captioner_pairs(reference, gpt2_name), reference, folder)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_captioner(folder, model, gpt2_name, tokenizer=None):
    """Write a captioner of ours so that transformers loads it: the model as `VisionEncoderDecoderModel`, its tokenizer
    by `AutoTokenizer`, its preprocessing by `AutoImageProcessor`.

    Raises ValueError that says why for a model without an equivalent there: stepped coupling, or an encoder other than
    a plain ViT.
    """
    _check_exportable(model, tokenizer)
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = convert_to_hf(state_dict, captioner_pairs(state_dict, gpt2_name))
    width = model.encoder.width
    # Captioning does not use the pooler. With zeros, it is at least the same for everyone who loads the file.
    weights |= {
        "encoder.pooler.dense.weight": torch.zeros(width, width),
        "encoder.pooler.dense.bias": torch.zeros(width),
    }
    config, generation = _hf_configs(model)
    files = {
        CONFIG_FILE: config,
        "generation_config.json": generation,
        PREPROCESSOR_FILE: _hf_preprocessor(model.preprocessing),
    }
    if tokenizer is not None:
        files[TOKENIZER_FILE] = _beginning_with_bos(tokenizer)
        # Of transformers' processors one of those that make `pixel_values` and `input_ids`, as its pipeline needs them.
        files["processor_config.json"] = dict(processor_class="GitProcessor")
        files["tokenizer_config.json"] = tokenizer_config(tokenizer, model.config.seq_len)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    write_atomically(folder / WEIGHTS_FILE, lambda path: path.write_bytes(save(weights, metadata={"format": "pt"})))


def _beginning_with_bos(tokenizer):
    """The content of tokenizer.json for a `CaptionTokenizer`, with BOS in front of every text: there captions begin,
    also those without a prompt."""
    backend, bos = Tokenizer.from_str(tokenizer.to_json()), tokenizer.bos_token
    special = [(bos, tokenizer.bos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return json.loads(backend.to_str())


def tokenizer_config(tokenizer, max_length):
    """The content of tokenizer_config.json: with it transformers reads the tokenizer.json of a `CaptionTokenizer`."""
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=UNKNOWN if tokenizer.unk_token_id >= 0 else END_OF_TEXT,
    )


def _check_exportable(model, tokenizer):
    """Raise ValueError that says why when no VisionEncoderDecoderModel of ViT and GPT-2 computes what `model` does."""
    config = model.config
    if config.coupling != "final":
        raise ValueError(f'a VisionEncoderDecoderModel has coupling "final", this captioner has "{config.coupling}"')
    if (config.positions, config.activation, config.post_norm) != ("learned", "gelu", False):
        raise ValueError("the decoder is built unlike GPT-2 (positions, activation or post_norm)")
    if tokenizer is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        raise ValueError("GPT-2 has one token for the beginning and the end of a caption, this tokenizer has two")
    vit = getattr(model.encoder, "vit", None)
    if vit is None or type(vit).__name__ != "VisionTransformer":
        raise ValueError(f"{config.encoder} is no ViT: a VisionEncoderDecoderModel of ViT and GPT-2 cannot hold it")
    block = vit.blocks[0]
    if type(block).__name__ != "Block" or not isinstance(vit.norm, torch.nn.LayerNorm):
        raise ValueError(f"{config.encoder} is built of {type(block).__name__}, not of ViT's blocks and norm")
    activation = block.mlp.act
    if not isinstance(activation, torch.nn.GELU) or activation.approximate != "none":
        raise ValueError(f"{config.encoder} has the activation {activation}, transformers' ViT the exact GELU")
    if vit.num_prefix_tokens != 1:
        raise ValueError(f"{config.encoder} has {vit.num_prefix_tokens} tokens before its patches, ViT has one")
    positions = (1, 1 + vit.patch_embed.num_patches, vit.embed_dim)
    if vit.pos_embed is None or vit.pos_embed.shape != positions:
        raise ValueError(f"{config.encoder} has no learned positions {positions} for class token and patches, ViT has")


def _hf_configs(model):
    """-> (config.json, generation_config.json) of the VisionEncoderDecoderModel that equals `model`, both dicts."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig

    config, vit = model.config, model.encoder.vit
    block, eos = vit.blocks[0], config.eos_token_id
    special = dict(bos_token_id=eos, eos_token_id=eos)
    encoder = ViTConfig(
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        hidden_size=model.encoder.width,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_norm_eps=vit.norm.eps,
    )
    decoder = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.seq_len,
        n_embd=config.embed_dim,
        n_head=config.num_heads,
        n_layer=config.depth,
        embd_pdrop=config.emb_dropout,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.residual_dropout,
        add_cross_attention=True,
        is_decoder=True,
        **special,
    )
    joint = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    joint.architectures, joint.tie_word_embeddings = ["VisionEncoderDecoderModel"], False
    generation = dict(special, decoder_start_token_id=eos, pad_token_id=eos)
    return joint.to_dict() | generation, generation | {"max_new_tokens": min(MAX_TOKENS, config.seq_len - 1)}


def _hf_preprocessor(preprocessing):
    """The content of preprocessor_config.json for our `preprocessing`."""
    size = preprocessing["img_size"]
    return dict(
        image_processor_type="ViTImageProcessor",
        do_resize=True,
        size=dict(height=size, width=size),
        resample={name: number for number, name in RESAMPLING.items()}[preprocessing["resample"]],
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )


def check_built_like_gpt2(config, gpt2):
    """Raise ValueError where a decoder is built unlike GPT-2, whose model_config is `gpt2`, in what has no size."""
    for key in ("positions", "activation", "post_norm"):
        if getattr(config, key) != getattr(gpt2, key):
            raise ValueError(f"GPT-2 has no {key} {getattr(config, key)}: set --decoder_weights scratch")


def check_sizes(theirs, ours, repo):
    """Raise ValueError when the GPT-2 of `repo`, with the config `theirs`, has other sizes than our model_config."""
    for key in ("vocab_size", "seq_len", "embed_dim", "num_heads", "depth"):
        size = getattr(theirs, key)
        if size != getattr(ours, key):
            raise ValueError(f"{repo} has {key} {size}, model_config {getattr(ours, key)}: set --{key} {size}")
