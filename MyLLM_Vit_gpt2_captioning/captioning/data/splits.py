"""Which photo is for training, validation or test: published splits where there are some, else a split by image."""

import json
from pathlib import Path

from captioning.data.conventions import DATASETS_FILES, IMAGE_SUFFIXES, KARPATHY_FILES, SPLIT_NAMES, SPLITS

SPLIT_LISTS = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt"),
    "val": ("val.txt", "Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt"),
}


def split_by_lists(data_dir):
    """Published splits in `data_dir` -> {file name: split}; empty when there are none.

    Reads a Karpathy file (`dataset_*.json`; his `restval` counts as train) or lists of file names (`train.txt`, ...).
    """
    data_dir = Path(data_dir)
    for path in sorted(data_dir.glob(KARPATHY_FILES)):
        if path.name in DATASETS_FILES:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or "images" not in content:
                continue  # another file with such a name
            images = content["images"]
            split_of = {image["filename"]: SPLIT_NAMES.get(image["split"], image["split"]) for image in images}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a Karpathy split file ({error!r})") from error
        strange = set(split_of.values()) - set(SPLITS)
        if strange:
            raise ValueError(f"{path}: unknown split {sorted(strange)[0]!r}; expected {', '.join(SPLITS)} or restval")
        return split_of
    split_of = {}
    for split, names in SPLIT_LISTS.items():
        for path in (data_dir / name for name in names):
            beside_a_photo = any(
                path.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES
            )  # then it is a caption
            if path.is_file() and not beside_a_photo:
                for line in path.read_text(encoding="utf-8-sig").splitlines():
                    name = Path(line.strip()).name
                    if not name:
                        continue
                    if split_of.setdefault(name, split) != split:
                        raise ValueError(f"{path}: {name} is also in the {split_of[name]} list")
    return split_of


def assign_splits(images, data_dir, seed=0, given=None):
    """Image names (one a caption) -> their splits, in the same order.

    `given` are the splits that the annotation file itself has; otherwise published lists are used where they lie in
    `data_dir`, and an image in none of them is test, so that nothing held out by its publisher is ever trained on.
    Otherwise about 5% of the images each become val and test, chosen by `seed`; so does the val part of a file that has
    only train, as COCO's may. Raises ValueError when fewer than three images are to be split, when a published split
    leaves train or val empty, or when it puts one image into two parts.
    """
    split_of = {} if given is not None else split_by_lists(data_dir)
    if split_of or given is not None:
        splits = given if given is not None else images.map(lambda name: split_of.get(Path(name).name, "test"))
        parts = splits.groupby(images.to_numpy()).nunique()
        if (parts > 1).any():
            raise ValueError(f"{data_dir}: the image {parts.index[(parts > 1).argmax()]} is in more than one split")
        for split in ("train", "val") if given is None else ():
            if not (splits == split).any():
                raise ValueError(f"{data_dir}: the published split puts none of the images with captions into {split}")
        if given is None or set(splits) != {"train"}:
            return splits
    import pandas as pd
    from sklearn.model_selection import GroupShuffleSplit

    if images.nunique() < 3:
        raise ValueError(f"{data_dir}: {images.nunique()} image(s) cannot be split into train, val and test")
    names, splits = images.to_numpy(), pd.Series("train", index=range(len(images)))
    for split, share in (("test", 0.05), ("val", 0.05 / 0.95)):
        rest = splits.index[splits == "train"]
        _, chosen = next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(rest, groups=names[rest]))
        splits[rest[chosen]] = split
    return splits.set_axis(images.index)
