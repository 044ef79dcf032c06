"""What annotation files and folders of photos have in common, whatever their format: names of splits and columns, what
counts as a photo, what counts as a caption."""

KARPATHY_FILES = "dataset*.json"
DATASETS_FILES = ("dataset_dict.json", "dataset_info.json")  # what `datasets` writes
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"training": "train", "restval": "train", "valid": "val", "validation": "val", "dev": "val"}
COLUMN_NAMES = {
    "image": ("image_name", "file_name", "filename", "image_path", "filepath", "img", "path"),
    "caption": ("comment", "text", "sentence", "answer", "captions", "answers"),
    "prompt": ("question",),
}
NOT_UTF8 = "\ufffd"  # what stands in a caption for bytes that are no UTF-8
LONGEST_CAPTION = 10_000  # characters; what is longer is no caption, and scoring it may take minutes
