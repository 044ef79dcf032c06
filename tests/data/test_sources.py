"""Every annotation format gives the same frame; what is wrong in a file is named with its row."""

import json

import pytest

from captioning.data import sources
from captioning.data.splits import assign_splits, published_splits
from helpers.annotation_files import FORMATS, NAMES, TRUTH, coco, flickr8k, saved_dataset


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_frame(photos, write):
    write(photos)
    df = sources.load(photos)
    assert list(df.columns) == ["image", "caption", "split"]
    assert sorted(zip(df["image"].map(lambda path: path.name), df["caption"], strict=True)) == TRUTH
    assert df["image"].map(lambda path: path.is_file()).all()
    assert df.groupby("image")["split"].nunique().max() == 1
    assert set(df["split"]) == {"train", "val", "test"}
    assert len(sources.drop_unusable(df, photos)) == len(TRUTH)


def test_a_saved_hugging_face_dataset(photos):
    """Its photos lie inside its own files and are written out, as they are, once."""
    saved_dataset(photos)
    df = sources.load(photos)
    assert df["caption"].tolist() == [text for _, text in TRUTH]
    extracted = sorted((photos / "extracted_images").iterdir())
    assert len(extracted) == len(TRUTH)
    assert extracted[0].read_bytes() == (photos / "images" / "0.jpg").read_bytes()
    times = [path.stat().st_mtime_ns for path in extracted]
    sources.load(photos)
    assert times == [path.stat().st_mtime_ns for path in extracted]


def test_the_splits_of_a_saved_dataset(photos):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict(dict(image=["images/0.jpg"], question=["what ?"], answer=["it"]))
    stored = datasets.DatasetDict(train=part, validation=part.map(lambda row: dict(image="images/1.jpg")))
    stored.save_to_disk(str(photos / "vqa"))
    df = sources.load(photos / "vqa", image_dir=photos)
    assert df["split"].tolist() == ["train", "val"]
    assert df["prompt"].tolist() == ["what ?"] * 2


def test_coco_train_and_val(photos):
    """Both files of a COCO folder; the split comes from the file's name, the photos' folder too."""
    coco(photos)
    train = json.loads((photos / "annotations" / "captions_train2017.json").read_text())
    (photos / "val2017").mkdir()
    (photos / "train2017" / "5.jpg").rename(photos / "val2017" / "5.jpg")
    val = dict(images=train["images"][5:], annotations=[a for a in train["annotations"] if a["image_id"] == 5])
    train = dict(images=train["images"][:5], annotations=[a for a in train["annotations"] if a["image_id"] != 5])
    (photos / "annotations" / "captions_train2017.json").write_text(json.dumps(train))
    (photos / "annotations" / "captions_val2017.json").write_text(json.dumps(val))
    (photos / "annotations" / "instances_val2017.json").write_text("{}")  # COCO's other files are not captions
    df = sources.load(photos)
    assert df["split"].value_counts().to_dict() == {"train": 10, "val": 2}
    assert df["image"].map(lambda path: path.is_file()).all()
    one = sources.load(photos, photos / "annotations" / "captions_train2017.json", photos / "train2017")
    assert len(one) == 10
    assert one["image"].map(lambda path: path.is_file()).all()


def test_questions_and_given_splits(photos):
    rows = [dict(image=name, question="What is it ?", answer="a Dog", split="validation") for name in NAMES[:2]]
    rows += [dict(image=name, question="what ?", answer="a cat", split="train") for name in NAMES[2:]]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    df = sources.load(photos)
    assert df["prompt"].tolist()[:3] == ["what is it ?"] * 2 + ["what ?"]
    assert df["caption"].tolist()[0] == "a dog"
    assert df["split"].tolist() == ["val", "val", "train", "train", "train", "train"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.xml", "<a/>", r"captions\.xml: unknown format"),
        ("captions.csv", "", r"captions\.csv: the file is empty"),
        ("captions.csv", "image,caption\n", r"captions\.csv: holds no captions"),
        ("captions.csv", "image,label\na,b\n", r"captions\.csv: no column caption; it has image, label"),
        ("captions.csv", "image,caption\n0.jpg,a\n ,b\n", r"captions\.csv, line 3: no image name"),
        (
            "captions.jsonl",
            '{"image": "0.jpg", "caption": "a"}\n{"image": \n',
            r"captions\.jsonl, line 2: not valid JSON",
        ),
        ("captions.jsonl", '{"image": "0.jpg"}\n', r"captions\.jsonl, line 1: no column caption; it has image"),
        ("captions.jsonl", "[1]\n", r"captions\.jsonl, line 1: expected an object with image and caption"),
        ("captions.json", "[1", r"captions\.json: not valid JSON"),
        ("captions.json", '{"0.jpg": 5}', r"captions\.json: not in a format that is known"),
        ("Flickr8k.token.txt", "0.jpg#0\ta dog\n0.jpg a\n", r"token\.txt, line 2: expected 'photo\.jpg#0', a tab"),
        ("captions.csv", "caption,image\na dog, running,0.jpg\n", r"line 2: more fields than the header has"),
        ("captions.json", '{"0.jpg": [{"raw": "a dog"}]}', r"entry 0: the caption is \{'raw': 'a dog'\}, not a text"),
        ("captions.csv", "image,caption,split\n0.jpg,a,exam\n", r"captions\.csv, line 2: unknown split 'exam'"),
        ("captions.csv", "image,caption,split\n0.jpg,a,train\n0.jpg,b,val\n", r"0\.jpg is in more than one split"),
    ],
)
def test_a_bad_file_is_named_with_its_row(photos, name, text, message):
    (photos / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.load(photos, photos / name)


@pytest.mark.parametrize("name", ["../secret.jpg", "images/../../secret.jpg", "/etc/hostname.jpg"])
def test_names_that_lead_out_of_the_folder_are_refused(photos, name):
    (photos.parent / "secret.jpg").write_bytes((photos / "images" / "0.jpg").read_bytes())
    rows = ["image,caption", *(f"{image},{text}" for image, text in TRUTH), f"{name},a secret"]
    (photos / "captions.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"captions\.csv, line 14: the image '.*' lies outside of .*images"):
        sources.load(photos)


def test_an_absolute_name_inside_the_folder_is_taken(photos):
    rows = ["image,caption", *(f"{photos / 'images' / image},{text}" for image, text in TRUTH)]
    (photos / "captions.csv").write_text("\n".join(rows))
    assert sources.load(photos)["image"].iloc[0] == photos / "images" / "0.jpg"


def test_captions_that_are_not_utf8_are_counted_and_named(photos, capsys):
    flickr8k(photos)
    path = photos / "captions.txt"
    path.write_bytes(
        path.read_bytes().replace(b"caption 1 of 3.jpg", b"caf\xe9 au lait") + "\n2.jpg,\n4.jpg,Käfer\n".encode()
    )
    df = sources.drop_unusable(sources.load(photos), path)
    assert len(df) == 12
    assert df.index.tolist() == list(range(12))
    said = capsys.readouterr().out
    assert "left out 1 of 14 rows; the first, line 14, has no caption: " in said
    assert "left out 1 of 14 rows; the first, line 9, has a caption that is not UTF-8: " in said
    (photos / "captions.txt").write_bytes("\ufeffimage,caption\r\n0.jpg,ein Käfer\r\n".encode() * 1)
    assert sources.read_captions(photos / "captions.txt")["caption"].tolist() == ["ein käfer"]  # BOM, CRLF


def test_rows_are_counted_where_a_caption_spans_lines(photos, capsys):
    """Then no line is named, for it would be a wrong one; in the caption it is one line."""
    rows = [f"{name},a\n" for name in NAMES]
    (photos / "captions.csv").write_text('image,caption\n0.jpg,"two\nlines"\n' + "".join(rows) + "gone.jpg,b\n")
    df = sources.load(photos)
    assert df["caption"].iloc[0] == "two lines"
    sources.drop_unusable(df, "captions.csv")
    assert "the first, row 8, names a photo that is not there" in capsys.readouterr().out
    (photos / "captions.csv").unlink()
    (photos / "captions.jsonl").write_text(
        "".join(json.dumps(dict(image=name, caption="a\u2028b"), ensure_ascii=False) + "\n" for name in NAMES), "utf-8"
    )
    assert sources.load(photos)["caption"].iloc[0] == "a b"


def test_one_photo_under_two_names_is_in_one_split(photos):
    rows = [f"{prefix}{name},a" for name in NAMES for prefix in ("", "images/", "./images/")]
    (photos / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    for seed in range(5):
        df = sources.load(photos)
        df["split"] = assign_splits(df["image"].astype(str), photos / "none", seed)
        assert df.groupby(df["image"].map(lambda path: path.resolve()))["split"].nunique().max() == 1
    assert sources.load(photos).groupby("image")["split"].nunique().max() == 1


def test_other_files_with_the_names_of_splits(photos):
    """A dataset*.json that is no Karpathy file, a train.txt that is the caption of train.jpg, names with spaces."""
    flickr8k(photos)
    (photos / "dataset-metadata.json").write_text('{"title": "a dataset"}')
    assert len(sources.load(photos)) == len(TRUTH)
    (photos / "train.jpg").write_bytes((photos / "images" / "0.jpg").read_bytes())
    (photos / "train.txt").write_text("a train\n")
    assert published_splits(photos) == {}
    (photos / "train.jpg").unlink()
    (photos / "train.txt").write_text("images/my photo.jpg\n0.jpg\n")
    assert published_splits(photos) == {"my photo.jpg": "train", "0.jpg": "train"}


def test_no_usable_row(photos):
    (photos / "captions.csv").write_text("image,caption\n" + "".join(f"{name},\n" for name in NAMES))
    with pytest.raises(ValueError, match="no row has both a caption and a photo"):
        sources.drop_unusable(sources.load(photos), "captions.csv")


def test_coco_annotation_without_its_image(photos):
    content = dict(images=[dict(id=1, file_name="0.jpg")], annotations=[dict(id=9, image_id=2, caption="a")])
    (photos / "captions_val2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"captions_val2017\.json, annotation 9: no image has the id 2"):
        sources.load(photos)
