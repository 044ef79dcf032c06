"""A dataset of six photos with two captions each, in every format that is read: `write(folder)` writes the captions of
the photos in folder/images."""

import json

import pytest

NAMES = [f"{i}.jpg" for i in range(6)]
TRUTH = [(name, f"caption {n} of {name}") for name in NAMES for n in range(2)]


def flickr30k(folder):
    rows = [f"{name}| {n}| {text}" for n, (name, text) in enumerate(TRUTH)]
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))


def flickr8k(folder):
    (folder / "captions.txt").write_text("\n".join(["image,caption", *(f'{name},"{text}"' for name, text in TRUTH)]))


def flickr8k_tokens(folder):
    (folder / "images").rename(folder / "Flicker8k_Dataset")
    (folder / "Flickr8k.token.txt").write_text("".join(f"{name}#{n}\t{text}\n" for n, (name, text) in enumerate(TRUTH)))


def coco(folder):
    (folder / "images").rename(folder / "train2017")
    (folder / "annotations").mkdir()
    content = dict(
        images=[dict(id=i, file_name=name) for i, name in enumerate(NAMES)],
        annotations=[dict(id=50 + n, image_id=NAMES.index(name), caption=text) for n, (name, text) in enumerate(TRUTH)],
    )
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))


def karpathy(folder):
    splits = ["train", "restval", "train", "val", "val", "test"]
    images = [
        dict(filename=name, split=split, sentences=[dict(raw=text) for image, text in TRUTH if image == name])
        for name, split in zip(NAMES, splits, strict=True)
    ]
    (folder / "dataset_mine.json").write_text(json.dumps(dict(images=images)))


def mapping(folder):
    captions = {name: [text for image, text in TRUTH if image == name] for name in NAMES}
    (folder / "captions.json").write_text(json.dumps(captions))


def json_lines(folder):
    lines = [json.dumps(dict(file_name=name, text=text)) for name, text in TRUTH]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def json_lines_with_lists(folder):
    lines = [json.dumps(dict(image=name, captions=[t for image, t in TRUTH if image == name])) for name in NAMES]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def table(folder):
    (folder / "captions.csv").write_text("\n".join(["id,caption,image", *(f"7,{text},{name}" for name, text in TRUTH)]))


def side_by_side(folder):
    for name in NAMES:
        lines = [text for image, text in TRUTH if image == name]
        (folder / "images" / name).with_suffix(".txt").write_text("\n".join(lines))


def saved_dataset(folder):
    datasets = pytest.importorskip("datasets")
    images = [dict(bytes=(folder / "images" / name).read_bytes(), path=None) for name, _ in TRUTH]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = dict(image=images, caption=[text for _, text in TRUTH])
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    for path in (folder / "saved").iterdir():
        path.rename(folder / path.name)


FORMATS = (flickr30k, flickr8k, flickr8k_tokens, coco, karpathy, mapping, json_lines, json_lines_with_lists, table,
           side_by_side)  # fmt: skip
