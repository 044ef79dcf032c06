"""Names of the files that a run or a checkpoint consists of, and how every file is written: whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path, PurePath

WEIGHTS_FILE = "captioner.safetensors"
TORCH_FILE = "captioner.pt"
CONFIG_FILE = "config.json"
RECIPE_FILE = "recipe.toml"
TOKENIZER_FILE = "tokenizer.json"
EPOCHS_FOLDER = "epochs"
CURVES = ("loss", "perplexity", "CIDEr", "exact_answers", "reward")  # a picture each, where a run has them
RUN_FILES = (
    RECIPE_FILE,
    EPOCHS_FOLDER,
    WEIGHTS_FILE,
    TORCH_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    "last",
    "metrics.csv",
    "timings.csv",
    "samples.md",
    "demo.png",
    "report.html",
    "tensorboard",
    "wandb",
    *(f"{name.lower()}.png" for name in CURVES),
)
# What macOS and Windows put beside the files of people, besides ._a.jpg for a.jpg.
LITTER = {".ds_store", "__macosx", "thumbs.db", "desktop.ini"}


def is_litter(name):
    """Whether a name, with or without folders, is that of a file which macOS or Windows has left behind."""
    return any(part.startswith("._") or part.lower() in LITTER for part in PurePath(name).parts)


def read_json(path):
    """A JSON file -> the object (dict) in it. Raises ValueError that names the file when there is none that can be
    read: 100,000 brackets are valid JSON, too."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {repr(content)[:40]}, but must hold a JSON object")
    return content


def make_folder(folder, option):
    """Make a folder, and those it lies in. Raises OSError that names it and the `option` that would choose another."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be made ({error.strerror}); choose another with {option} FOLDER") from error


def write_atomically(path, write):
    """`write(draft_path)`, then put the finished file in the place of `path` in one step.

    A reader, or a crash at any moment, sees the old file or the new one, never half of one. Raises OSError that names
    `path` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.part")
    try:
        write(draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(
            f"{path}: could not be written ({reason}); what was there before is still whole. Make room, or allow "
            "writing there, or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # the folder itself may be gone
            draft.unlink(missing_ok=True)
