"""From the constants of a model that a user gives to its complete configuration and its weights.

Nothing behind this file changes a configuration: each function returns a new one.
"""

import dataclasses
import math
import re
from contextlib import contextmanager

from captioning.common.config import attributes, complete
from captioning.common.files import CONFIG_FILE
from captioning.common.printable import printable
from captioning.model import checkpoint, encoders, hugging_face
from captioning.model.tokenizer import CaptionTokenizer, check_eos, check_fingerprint


def stored_config(source, defaults, read_decoder):
    """A trained captioner (folder or hub id, ours or Hugging Face's) -> (its folder, its complete model_config).

    `defaults`: the script's model_config; `read_decoder` as in `hugging_face.read_config`. Raises FileNotFoundError, or
    ValueError that names the file, for what is no captioner or has constants that do not exist here.
    """
    folder, values = hugging_face.read_config(source, read_decoder, defaults)
    with _named(folder):
        config = complete(values, defaults)
    check_stored_sizes(config, folder)
    with _named(folder):
        encoders.check_options(config.encoder_options)
        if re.search(r"[/\\:]", config.encoder):  # a stranger's file asks no Hub
            raise ValueError(f"encoder is {config.encoder[:60]!r}, but must be the name of a timm model")
    return folder, config


@contextmanager
def _named(folder):
    """Around checks of a stored configuration: their errors name its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG_FILE}: {printable(error)[:500]}. The captioner is damaged or comes from another version"
        ) from error


# A size in the configuration: where the weights have it, in our names and in those of Hugging Face. A number is a
# dimension of that tensor, None counts the blocks whose tensors have such names.
STORED_SIZES = {
    "depth": ((r"gpt\.trf_blocks\.(\d+)\.", None), (r"decoder\.transformer\.h\.(\d+)\.", None)),
    "vocab_size": (("gpt.tok_emb.weight", 0), ("decoder.transformer.wte.weight", 0)),
    "embed_dim": (("gpt.tok_emb.weight", 1), ("decoder.transformer.wte.weight", 1)),
    "seq_len": (("gpt.pos_emb.weight", 0), ("decoder.transformer.wpe.weight", 0)),
}
STORED_ENCODER_SIZES = {  # likewise, in encoder_options of a ViT
    "depth": ((r"encoder\.vit\.blocks\.(\d+)\.", None), (r"encoder\.encoder\.layer\.(\d+)\.", None)),
    "embed_dim": (("encoder.vit.patch_embed.proj.weight", 0), ("encoder.embeddings.cls_token", 2)),
}


def check_stored_sizes(config, folder):
    """Raise ValueError where a trained captioner's configuration has other sizes than its weights, by the header of
    their file; without such a file there is nothing to compare.

    Without this a model with a million blocks is built for minutes before it turns out not to fit. Of other numbers
    only those are refused that no model with these weights can have: more layers than there are tensors, or a size
    above the number of all weights.
    """
    shapes = {}
    for path in hugging_face.weights_files(folder) or [checkpoint.weights_file(folder)]:
        shapes |= checkpoint.read_shapes(path) if path.is_file() else {}
    if not shapes:
        return
    weights = sum(math.prod(shape) for shape in shapes.values())
    sections = {
        "": (vars(config), STORED_SIZES),
        "encoder_options: ": (config.encoder_options, STORED_ENCODER_SIZES),
        "refiner: ": (config.refiner, {}),
        "preprocessing: ": (config.preprocessing, {}),
    }
    for section, (values, names) in sections.items():
        for key, value in values.items():
            if key in ("eos_token_id", "unk_token_id") and value >= config.vocab_size:
                raise ValueError(
                    f"{folder / CONFIG_FILE}: {key} is {value}, but there are {config.vocab_size:,} tokens; "
                    f"{checkpoint.OTHER_COPY}"
                )
            if not isinstance(value, int) or key in ("eos_token_id", "unk_token_id"):
                continue
            stored = next((size for name in names.get(key, ()) if (size := _stored_size(shapes, *name))), None)
            limit = len(shapes) if re.search("depth|layers|blocks", key) else weights
            if value != stored if stored else value > limit:
                has = f"have {stored}" if stored else f"are {weights:,} numbers in {len(shapes):,} tensors"
                raise ValueError(
                    f"{folder / CONFIG_FILE}: {section}{key} is {value}, but the weights beside it {has}; "
                    f"{checkpoint.OTHER_COPY}"
                )


def _stored_size(shapes, name, dimension):
    """A size by one of the entries of the tables above, or None where the weights have no such tensor."""
    if dimension is not None:
        return shapes[name][dimension] if len(shapes.get(name, ())) > dimension else None
    return len({match[1] for key in shapes if (match := re.match(name, key))}) or None


def complete_model_config(given, defaults, read_decoder):
    """An object with some or all of the constants of a model -> the complete model_config.

    Constants that are not given are those of the captioner to start from (`start_from`), where there is one, else
    `defaults`. A whole `ModelConfig` gives all of them: to start from a captioner, give an object with `start_from` and
    the constants that are to differ. Raises ValueError that names an unknown constant, or one that the captioner
    decides and that is to differ, and what `stored_config` raises.
    """
    values = attributes(given)
    if values.get("start_from") and not vars(defaults).keys() <= values.keys():
        _, defaults = stored_config(values["start_from"], defaults, read_decoder)
        check_decided_by_captioner(values, defaults)
        values["preprocessing"] = defaults.preprocessing | values.get("preprocessing", {})
    return complete(values, defaults)


# Constants that a captioner to start from decides, because its weights or its tokenizer do.
DECIDED_BY_CAPTIONER = (
    "embed_dim",
    "num_heads",
    "depth",
    "vocab_size",
    "positions",
    "activation",
    "post_norm",
    "tokenizer",
    "eos_token_id",
    "unk_token_id",
    "encoder",
)
WHOSE_WEIGHTS_ARE_LOADED = ("decoder_weights", "encoder_weights")


def check_decided_by_captioner(given, stored):
    """Raise ValueError for the first of the constants `given` (a dict) that has no effect, because the captioner to
    start from, with the configuration `stored`, decides it, and has another one."""
    for name, value in given.items():
        own, start_from = getattr(stored, name, None), given["start_from"]
        if name in DECIDED_BY_CAPTIONER and value != own:
            raise ValueError(
                f"{name} is {value!r}, but the captioner in start_from, {start_from}, has {own!r}, which cannot be "
                f"changed: leave {name} out, or train a new captioner without start_from"
            )
        if name in WHOSE_WEIGHTS_ARE_LOADED and value not in ("pretrained", "scratch", own):
            raise ValueError(
                f"{name} is {value!r}, but all weights are those of the captioner in start_from, {start_from}: leave "
                f"{name} out, or train a new captioner without start_from"
            )


def with_timm_encoder(config, gpt2_repo):
    """A model_config in which a transformers model as encoder is replaced by the timm model that equals it.

    Raises what `encoders.resolve_encoder` raises, where files are missing with `offline_help`.
    """
    try:
        return dataclasses.replace(config, **encoders.resolve_encoder(config))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\n\n{offline_help(config, gpt2_repo)}") from error


def stored_tokenizer(folder):
    """The tokenizer of the captioner in `folder`, ours or Hugging Face's. Raises FileNotFoundError or ValueError where
    it is not there or not that of the captioner."""
    tokenizer = CaptionTokenizer(folder)
    check_fingerprint(tokenizer, checkpoint.load_config(folder))
    return tokenizer


def with_tokenizer(config, tokenizer):
    """A model_config with what decoding has to know of the tokenizer: the ids of [EOS] and of unknown words.

    Raises ValueError when the model has too few rows for its tokens, or comes from a captioner with another tokenizer.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, vocab_size is {config.vocab_size}")
    if config.start_from:
        check_eos(tokenizer, config)
    unknown = getattr(tokenizer, "unk_token_id", -1)  # tokenizers of transformers may lack it
    return dataclasses.replace(config, eos_token_id=tokenizer.eos_token_id, unk_token_id=unknown)


def load_captioner_weights(model, folder, gpt2_name):
    """Load all weights of the captioner in `folder`, ours or Hugging Face's, strictly into `model`.

    `gpt2_name` as in `hugging_face.read_captioner_weights`. On ValueError the model is unchanged.
    """
    if hugging_face.is_vision_encoder_decoder(checkpoint.load_config(folder)):
        checkpoint.load_weights_into(model, hugging_face.read_captioner_weights(folder, model.state_dict(), gpt2_name))
    else:
        checkpoint.load_strictly(model, folder)


def offline_help(model_config, gpt2_repo):
    """For a run whose files cannot be downloaded: which ones it needs, and how to give local copies -> text."""
    if model_config.start_from:
        return f"The captioner to start from, {model_config.start_from}, could not be read: give --start_from FOLDER"
    needs = []
    if model_config.tokenizer == "gpt2" or model_config.decoder_weights == "pretrained":
        needs.append(
            f"    GPT-2's tokenizer and weights ({gpt2_repo}): set the environment variable HF_GPT2_REPO=FOLDER,\n"
            "        a folder with vocab.json, merges.txt and, unless --decoder_weights scratch, config.json and\n"
            "        model.safetensors"
        )
    if "/" in model_config.encoder:
        needs.append(
            f"    the vision model {model_config.encoder}: --encoder FOLDER, its folder as transformers saves it"
        )
    elif model_config.encoder_weights == "pretrained":
        needs.append(
            f"    the weights of {model_config.encoder}: --encoder_weights FILE, a .safetensors or .pth file with\n"
            "        timm's key names"
        )
    needs.append("or train from random weights, which takes far longer to get good:")
    needs.append("    --tokenizer bpe --decoder_weights scratch --encoder_weights scratch")
    return "\n".join(["This run needs, from the network or from local copies:", *needs])
