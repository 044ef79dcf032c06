"""Conventions of all annotation formats: names of splits and columns, which files are photos, and which captions
training can use."""

import re

from captioning.common.files import is_litter
from captioning.common.text import NOT_UTF8

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
RESULTS_FILE = "results.csv"
CAPTIONS_FILE = "captions.txt"
FLICKR_TOKENS = ("Flickr8k.token.txt", "results_20130124.token")
KNOWN_FILES = (  # looked for in this order
    RESULTS_FILE,
    CAPTIONS_FILE,
    *FLICKR_TOKENS,
    "captions.json",
    "captions.jsonl",
    "captions.csv",
    "metadata.jsonl",
    "metadata.csv",
)
RECORD_COLUMNS = ("model", "made_with")  # the last ones of a captions.csv that caption_image.py wrote
KARPATHY_FILES = "dataset*.json"
DATASETS_FILES = ("dataset_dict.json", "dataset_info.json")  # `datasets.save_to_disk` writes one of them
SPLITS = ("train", "val", "test")
ALL = "all"  # in the place of a split, for tools that do not train
SPLIT_NAMES = {"training": "train", "restval": "train", "valid": "val", "validation": "val", "dev": "val"}
COLUMN_NAMES = {
    "image": ("image_name", "file_name", "filename", "image_path", "filepath", "img", "path"),
    "caption": ("comment", "text", "sentence", "answer", "captions", "answers"),
    "prompt": ("question",),
}
# What else people call these columns, in any case and with spaces; looked for where none of the names above is there.
OTHER_COLUMN_NAMES = {
    "image": ("file", "image_file", "image_filename", "photo", "picture", "image_id"),
    "caption": ("description",),
    "prompt": (),
}
LONGEST_CAPTION = 10_000  # characters; a longer text is not a caption, and scoring it may take minutes
# Why training cannot use a caption -> the test for it.
CAPTION_FAULTS = {
    "has no caption": lambda caption: not caption,
    "has a caption that is not UTF-8": lambda caption: NOT_UTF8 in caption,
    f"has a caption of more than {LONGEST_CAPTION:,} characters": lambda caption: len(caption) > LONGEST_CAPTION,
}


def is_usable(caption):
    """Whether training can use a caption that `clean_text` has cleaned."""
    return not any(has_fault(caption) for has_fault in CAPTION_FAULTS.values())


def split_in_name(name):
    """The last split among the words of a file's name, coco_karpathy_val -> val; None where there is none."""
    words = [SPLIT_NAMES.get(word, word) for word in re.split(r"[-_. ]", name.lower())]
    return next((word for word in reversed(words) if word in SPLITS), None)


def is_photo_file(path):
    """Whether a path ends like a photo's and is not what an operating system has left behind."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_litter(path.name)


def match_columns(columns):
    """{column as a file calls it: image, caption or prompt}: by the names in COLUMN_NAMES as they are, else in any case
    and with spaces, else by OTHER_COLUMN_NAMES."""
    ours, plain = {}, {}
    for column in columns:
        plain.setdefault(re.sub(r"[\s-]+", "_", str(column).strip()).lower(), column)
    for our_name, other_names in COLUMN_NAMES.items():
        names = (our_name, *other_names)
        exact = [name for name in names if name in columns]
        found = [*exact, *(plain[name] for name in (*names, *OTHER_COLUMN_NAMES[our_name]) if name in plain)]
        found = [column for column in found if column not in ours]
        if found:
            ours[found[0]] = our_name
    return ours
