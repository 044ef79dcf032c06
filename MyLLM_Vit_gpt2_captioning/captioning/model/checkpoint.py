"""Files of a trained captioner, written so that an interrupted write never damages what was there.

A checkpoint folder holds
    captioner.safetensors   the weights; plain `load_file` and strict `load_state_dict` read them
    captioner.pt            the same state_dict for `torch.load`
    config.json             everything needed to rebuild the model and its preprocessing
    tokenizer.json
"""

import json
import math
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from captioning.common.config import as_type
from captioning.common.files import (
    CONFIG_FILE,
    EPOCHS_FOLDER,
    TOKENIZER_FILE,
    TORCH_FILE,
    WEIGHTS_FILE,
    read_json,
    write_atomically,
)
from captioning.common.printable import printable

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")  # under which training loops save that of the model
# In front of all names: put there by DistributedDataParallel, by torch.compile, by the attribute of a LightningModule.
WRAPPERS = ("module.", "_orig_mod.", "model.")
LINES_SHOWN = 1000  # about tensors that do not fit
OTHER_COPY = "take another copy of the checkpoint, or train again"
SIZES = (
    "embed_dim",
    "num_heads",
    "depth",
    "seq_len",
    "vocab_size",
    "img_size",
)  # constants in config.json that are at least 1


def save_checkpoint(folder, state_dict, config, tokenizer=None, torch_file=True):
    """Write a checkpoint. `config` is a dict that JSON can hold; without `torch_file` there is no captioner.pt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    # `save_file` would make it readable for its owner only, unlike the files beside it.
    write_atomically(folder / WEIGHTS_FILE, lambda path: path.write_bytes(save(state_dict)))
    if torch_file:
        write_atomically(folder / TORCH_FILE, lambda path: torch.save(state_dict, path))
    if tokenizer is not None:
        write_atomically(folder / TOKENIZER_FILE, lambda path: path.write_text(tokenizer.to_json(), encoding="utf-8"))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def save_epoch(folder, state_dict, epoch, loss):
    """Keep the weights of one epoch (counted from 1) beside the best ones: epochs/epoch_03_loss_2.345.safetensors."""
    epochs = Path(folder) / EPOCHS_FOLDER
    epochs.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    name = f"epoch_{epoch:02d}_loss_{loss:.3f}.safetensors"
    write_atomically(epochs / name, lambda path: path.write_bytes(save(weights)))


def portable(config, root):
    """The attributes of `config` as a dict for config.json: a path inside `root` becomes relative to it, another path
    only its last part, so that a shared checkpoint names no private folder."""

    def without_folder(value):
        if isinstance(value, Path) or (isinstance(value, str) and value and Path(value).exists()):
            path, inside = Path(value).resolve(), Path(root).resolve()
            return path.relative_to(inside).as_posix() if path.is_relative_to(inside) else path.name
        return value

    return {key: without_folder(value) for key, value in vars(config).items()}


def describe(model, root, train_config=None, best=None):
    """The content of config.json for a `VisionGPT2Model`, as a dict; for that of a run with the constants of training
    and `best`, {"best_perplexity", "best_epoch"}. Paths become relative to `root`."""
    config = {"model_config": portable(model.config, root), "preprocessing": model.preprocessing}
    if train_config is not None:
        perplexity = best["best_perplexity"] if best["best_epoch"] is not None else None
        config |= {"train_config": portable(train_config, root), "best_epoch": best["best_epoch"]}
        config |= {"best_perplexity": perplexity}
    return config


def load_config(folder, constants=None):
    """config.json of a checkpoint, ours or Hugging Face's -> dict.

    Raises FileNotFoundError or ValueError that names the file, also where a constant of our model has another type than
    in `constants`, the script's model_config.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {folder} is no captioner checkpoint")
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {OTHER_COPY}") from error
    if {"model_config", "preprocessing"} <= config.keys():
        photo = dict(img_size=0, mean=[], std=[], resample="")
        for section, known in (("model_config", vars(constants) if constants else {}), ("preprocessing", photo)):
            _check_types(config[section], known, f"{path}: {section}")
        return config
    if isinstance(config.get("model_type"), str):
        return config
    raise ValueError(f"{path}: not the config of a captioner (no model_config and preprocessing in it)")


def _check_types(values, known, place):
    """Raise ValueError where `values` is not a dict, or one of them has another type than in `known`; see `as_type`."""
    if not isinstance(values, dict):
        raise ValueError(f"{place} is {repr(values)[:60]}, but must be an object; {OTHER_COPY}")
    for key in values.keys() & known.keys():
        try:
            value = as_type(key, values[key], type(known[key]))
        except ValueError as error:
            raise ValueError(f"{place}: {error}; {OTHER_COPY}") from None
        if key in SIZES and value < 1:
            raise ValueError(f"{place}: {key} is {value}, but must be a positive int; {OTHER_COPY}")


def weights_file(folder):
    """The file with the weights in a checkpoint folder: captioner.safetensors, where that is missing captioner.pt."""
    paths = [Path(folder) / name for name in (WEIGHTS_FILE, TORCH_FILE)]
    return next((path for path in paths if path.is_file()), paths[0])


def load_weights(path):
    """A `.safetensors` or `.pt` file -> state_dict on the CPU; a pickle that holds anything but tensors is refused.

    Raises FileNotFoundError or ValueError that names the file.
    """
    with _named_errors(path):
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def read_shapes(path):
    """A weights file -> {name: shape} of its tensors, without their values. Raises what `load_weights` raises."""
    with _named_errors(path):
        if Path(path).suffix != ".safetensors":
            weights = unwrapped(torch.load(path, map_location="meta", weights_only=True), path)
            return {name: tuple(tensor.shape) for name, tensor in weights.items()}
        with safe_open(path, "pt") as file:
            return _without_prefix({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118


@contextmanager
def _named_errors(path):
    """Context in which a weights file is read: its errors become those of `load_weights`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: not found")
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message advises to run what is in the file
        raise ValueError(f"{path}: damaged, or a pickle that holds more than tensors, which is not read") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]
        raise ValueError(f"{path}: damaged, or not a weights file ({reason}); {OTHER_COPY}") from error


def check_stored(weights, source):
    """Raise ValueError for a tensor of which not every number is in the file: one number can stand for any many."""
    for name, tensor in weights.items():
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not is_plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{source}: {printable(name):.200} is not stored number by number; {OTHER_COPY}")


def check_finite(weights, source):
    """Raise ValueError that names `source` and the first tensor of a state_dict with NaN or infinity in it: such a
    model writes empty captions."""
    check_stored(weights, source)
    for name, tensor in weights.items():  # the sum is not finite where a number is not
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64)):
            raise ValueError(f"{source}: {printable(name):.200} has numbers that are not finite; {OTHER_COPY}")


def unwrapped(content, path):
    """What a weights file of any training loop holds -> the model's state_dict: the loop may have put it beside other
    things, as PyTorch Lightning does, or saved the model as DistributedDataParallel or torch.compile wraps it.

    Raises ValueError that names the file when there is no state_dict in it.
    """
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no state_dict, neither as it is nor as {' or '.join(STATE_DICT_KEYS)}")
    check_stored(content, path)
    return _without_prefix(content)


def _without_prefix(content):
    """A dict without the WRAPPERS in front of all of its names."""
    while content and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in content)), None)):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def find_folder(source, files=(WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE)):
    """A checkpoint folder, or a hub id "user/repo" of which `files` are then downloaded -> Path of the folder.

    Raises FileNotFoundError that says what was tried.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute():
        raise FileNotFoundError(f"{source}: no such folder; where another recipe makes it, train that one first")
    from huggingface_hub import snapshot_download

    from captioning.common.hub_errors import explain

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(files)))
    except Exception as error:  # of huggingface_hub, its HTTP library or Xet: each has its own
        raise FileNotFoundError(
            f"{source}: not a checkpoint folder, and not available from the Hugging Face hub: {explain(error)}"
        ) from error


def load_strictly(model, path):
    """Load the weights file `path`, or that of the checkpoint folder `path`, into `model`, all of it.

    Raises ValueError that lists every key that is missing, unknown or of another shape; the model is then unchanged.
    """
    path = weights_file(path) if Path(path).is_dir() else path
    stored, own = unwrapped(load_weights(path), path), model.state_dict()
    problems = [f"{key}: missing" for key in own.keys() - stored.keys()]
    problems += [f"{printable(key):.200}: unknown" for key in stored.keys() - own.keys()]
    problems += [
        f"{key}: shape {tuple(stored[key].shape)} where {tuple(own[key].shape)} is needed"
        for key in own.keys() & stored.keys()
        if stored[key].shape != own[key].shape
    ]
    problems += [
        f"{key}: {stored[key].dtype} where {own[key].dtype} is needed"
        for key in own.keys() & stored.keys()
        if stored[key].is_floating_point() != own[key].is_floating_point()
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model:\n  {shortened(problems)}\n{OTHER_COPY}")
    check_finite(stored, path)
    load_weights_into(model, stored)


def shortened(problems):
    """Lines about single tensors -> one text, the first LINES_SHOWN of them sorted."""
    lines = sorted(problems)
    more = [f"and {len(lines) - LINES_SHOWN:,} more"] if len(lines) > LINES_SHOWN else []
    return "\n  ".join(lines[:LINES_SHOWN] + more)


def load_weights_into(model, weights):
    """Load a state_dict that fits into `model`. The weights are copied into its tensors; where the model was built on
    the meta device they take the place of its tensors, and stay in the memory-mapped file until they are used."""
    own = model.state_dict()
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in weights.items()}, assign=on_meta)
