"""Splits by image into training, validation and test: published ones where there are some, else seeded ones."""

import json
from pathlib import Path

from captioning.common.printable import printable
from captioning.data.annotation_files import read_text
from captioning.data.conventions import DATASETS_FILES, IMAGE_SUFFIXES, KARPATHY_FILES, SPLIT_NAMES, SPLITS
from captioning.data.photo_names import plain_name

SPLIT_LISTS = {  # files of image names, one a line
    "train": ("train.txt", "Flickr_8k.trainImages.txt"),
    "val": ("val.txt", "Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt"),
}


def published_splits(data_dir):
    """Published splits in `data_dir` -> {image name: split}; empty when there are none.

    Read from a Karpathy file (`dataset_*.json`; his `restval` counts as train), else from lists of image names
    (`train.txt`, ...). Raises ValueError that names the file when it cannot be understood.
    """
    data_dir = Path(data_dir)
    for path in sorted(data_dir.glob(KARPATHY_FILES)):
        if path.name not in DATASETS_FILES and (split_of := _read_karpathy_splits(path)) is not None:
            return split_of
    return _read_split_lists(data_dir)


def _read_karpathy_splits(path):
    """{image name: split}, or None for another kind of file with such a name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "images" not in content:
            return None
        images = content["images"]
        split_of = {image["filename"]: SPLIT_NAMES.get(image["split"], image["split"]) for image in images}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a Karpathy split file ({error!r})") from error
    unknown = set(split_of.values()) - set(SPLITS)
    if unknown:
        raise ValueError(f"{path}: unknown split {sorted(unknown)[0]!r}; expected {', '.join(SPLITS)} or restval")
    return split_of


def _read_split_lists(data_dir):
    split_of = {}
    for split, names in SPLIT_LISTS.items():
        for path in (data_dir / name for name in names):
            # A train.txt beside train.jpg is that photo's caption.
            is_caption = any(path.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES)
            if is_caption or not path.is_file():
                continue
            for line in read_text(path, may_be_empty=True).splitlines():
                name = Path(line.strip()).name
                if name and split_of.setdefault(name, split) != split:
                    raise ValueError(f"{path}: {printable(name)} is also in the {split_of[name]} list")
    return split_of


def assign_splits(images, data_dir, seed=0, given=None, photos=None, other_dir=None):
    """Image names (a Series, one a caption) -> their splits, in the same order.

    The splits of the annotation file itself, `given`, come first. Next are published splits in `data_dir`, else in
    `other_dir`; an image in none of them is test, so that no image held out by its publisher is ever trained on. They
    may have the name that is in `images` or that of the file, one of `photos` (paths). Without either, and for a file
    that has only train, as COCO's may, about 5% of the images each become val and test, chosen by `seed`; of fewer than
    three all are test. Raises ValueError when a published split puts one image into two splits.
    """
    split_of = {} if given is not None else published_splits(data_dir)
    if given is None and not split_of and other_dir not in (None, data_dir):
        split_of = published_splits(other_dir)
    if split_of or given is not None:
        splits = given if given is not None else _published(split_of, images, images if photos is None else photos)
        splits_of_image = splits.groupby(images.to_numpy()).nunique()
        if (splits_of_image > 1).any():
            image = splits_of_image.index[(splits_of_image > 1).argmax()]
            raise ValueError(f"{data_dir}: the image {printable(image)} is in more than one split")
        if given is None or set(splits) != {"train"}:
            return splits
    import pandas as pd
    from sklearn.model_selection import GroupShuffleSplit

    if images.nunique() < 3:
        return pd.Series("test", index=images.index)
    names, splits = images.to_numpy(), pd.Series("train", index=range(len(images)))
    for split, fraction in (("test", 0.05), ("val", 0.05 / 0.95)):
        rest = splits.index[splits == "train"]
        _, chosen = next(GroupShuffleSplit(1, test_size=fraction, random_state=seed).split(rest, groups=names[rest]))
        splits[rest[chosen]] = split
    return splits.set_axis(images.index)


def _published(split_of, images, photos):
    """The published split of each image, by its name as it is or that of its file; a name in the lists that no image
    has so may be in another case, with other code points for its letters, or without its ending."""
    import pandas as pd

    names_of = {pair: [Path(name).name for name in pair] for pair in zip(images, map(str, photos), strict=True)}
    used = {name for names in names_of.values() for name in names}
    loosely = {}
    for name in split_of.keys() - used:
        loosely.setdefault(plain_name(name), set()).add(split_of[name])
    loosely = {name: splits.pop() for name, splits in loosely.items() if len(splits) == 1}
    splits = {}
    for pair, names in names_of.items():
        known = [split_of[name] for name in names if name in split_of]
        known += [loosely[plain] for plain in map(plain_name, names) if plain in loosely]
        splits[pair] = known[0] if known else "test"
    return pd.Series([splits[pair] for pair in zip(images, map(str, photos), strict=True)], index=images.index)
