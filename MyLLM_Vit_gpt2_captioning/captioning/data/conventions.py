"""Conventions of all annotation formats: names of splits and columns, which files are photos, how a caption is cleaned,
and which captions training can use."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
KARPATHY_FILES = "dataset*.json"
DATASETS_FILES = ("dataset_dict.json", "dataset_info.json")  # `datasets.save_to_disk` writes one of them
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"training": "train", "restval": "train", "valid": "val", "validation": "val", "dev": "val"}
COLUMN_NAMES = {
    "image": ("image_name", "file_name", "filename", "image_path", "filepath", "img", "path"),
    "caption": ("comment", "text", "sentence", "answer", "captions", "answers"),
    "prompt": ("question",),
}
NOT_UTF8 = "\ufffd"  # stands in a text for bytes that are not UTF-8
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


def clean_text(text):
    """A caption or prompt as every reader returns it: valid UTF-8, lowercase, one space between words."""
    return " ".join(as_utf8(text).split()).lower()


def as_utf8(text):
    """The text with NOT_UTF8 in place of lone surrogates, which JSON can escape and UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
