"""Files and folders as people have them: whatever a person would call fine is read, and what was made of it is said."""

import json

import numpy as np
import pytest
from PIL import Image

from captioning.data import sources
from captioning.data.photo_names import PhotoFinder
from captioning.data.photo_store import write_store
from captioning.data.shards import reading, streaming, writing
from captioning.data.splits import assign_splits
from helpers.annotation_files import NAMES
from helpers.tar_files import make_shards, members, write_tar


def save_photo(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)
    return path


def rows_of(folder, **options):
    """(photo in the folder, caption) of the usable rows."""
    df = sources.drop_unusable(sources.load(folder, **options), "captions")
    return [(path.relative_to(folder).as_posix(), text) for path, text in zip(df["image"], df["caption"], strict=True)]


def captions_in(folder, content, name="captions.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [text for _, text in rows_of(folder)]


REST = "".join(f"{name}| 0| {name}\n" for name in NAMES)
HEADER = "image_name| comment_number| comment\n"

# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "captions", "line"),
    [
        ("results.csv", HEADER + "0.jpg| 0| a man | a dog\n1.jpg| 0| b\n", ["a man | a dog", "b"], 2),
        ("captions.txt", "image,caption\n0.jpg,a dog, running\n1.jpg,b\n", ["a dog, running", "b"], 2),
        ("captions.txt", 'image,caption\n0.jpg,b\n1.jpg,"c, ""d"""\n2.jpg,a , b\n', ["b", 'c, "d"', "a , b"], 4),
        ("captions.csv", 'image,caption\n"0.jpg",a "big" dog, "old"\n', ['a "big" dog, "old"'], 2),
        ("captions.csv", 'image,caption\n0.jpg,"two\nlines"\n1.jpg,a, b\n', ["two lines", "a, b"], 4),
        ("captions.csv", 'x,image,caption\n"a ""b, c"" d",0.jpg,a, b\n', ["a, b"], 2),
        ("captions.tsv", "image\tcaption\n0.jpg\ta\tb\n", ["a b"], 2),
        ("captions.csv", "image;caption\n0.jpg;a; b\n", ["a; b"], 2),
        # A record with more fields is one line, so that a stray quotation mark does not swallow those behind it.
        ("captions.csv", 'image,caption\n0.jpg,"a" big, dog\n1.jpg,b\n', ['"a" big, dog', "b"], 2),
    ],
)
def test_the_caption_in_the_last_column_is_free_text(photos, capsys, name, content, captions, line):
    (photos / name).write_text(content)
    assert [text for _, text in rows_of(photos, captions_file=photos / name)] == captions
    assert f"1 of {len(captions)} rows have more separators" in (said := capsys.readouterr().out)
    assert f"the first, line {line}: " in said


def test_a_separator_too_many_in_front_of_the_last_column_is_named(photos):
    with pytest.raises(ValueError, match=r"captions\.csv, line 3: more fields than the header has; quote captions"):
        captions_in(photos, "caption,image\na,0.jpg\na dog, running,1.jpg\n")
    with pytest.raises(ValueError, match=r"captions\.csv, line 3: a quotation mark that nothing closes"):
        captions_in(photos, 'image,caption\n0.jpg,a dog, running\n1.jpg,"b\n2.jpg,c\n')


@pytest.mark.parametrize("empty", ["|||", "||", " | |", "|"])
def test_rows_of_nothing_are_left_out_and_counted(photos, capsys, empty):
    assert len(captions_in(photos, HEADER + REST + empty + "\n0.jpg| 1| b\n", "results.csv")) == len(NAMES) + 1
    said = capsys.readouterr().out
    assert f"warning: {photos / 'results.csv'}: left out 1 of 8 rows; the first, line 8, has nothing in it" in said
    captions_in(photos, HEADER + REST + "1.jpg| 1", "results.csv")  # cut off in the middle
    assert "left out 1 of 7 rows; the first, line 8, has no caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "separator", "understood"),
    [
        ("image;caption", ";", "separated by ';'"),
        ("Image,Caption", ",", "separated by ',', image is 'Image', caption is 'Caption'"),
        ("IMAGE_NAME,caption", ",", "image is 'IMAGE_NAME'"),
        ("Image Name;Comment", ";", "image is 'Image Name', caption is 'Comment'"),
        ("filename,text", ",", "image is 'filename', caption is 'text'"),
        ('"File";"Description"', ";", "image is 'File', caption is 'Description'"),
        ("Image|Caption", "|", "image is 'Image', caption is 'Caption'"),
    ],
)
def test_headers_of_spreadsheets(photos, capsys, header, separator, understood):
    lines = [header, *(f"{name}{separator}a {name}" for name in NAMES)]
    assert captions_in(photos, "\r\n".join(lines)) == [f"a {name}" for name in NAMES]
    assert understood in capsys.readouterr().out


def test_an_image_id_is_a_name_without_ending(photos, capsys):
    assert rows_of_table(photos, "image_id,caption", ["0", "1"]) == ["images/0.jpg", "images/1.jpg"]
    assert (
        "2 of 2 photos have another name there than on the disk; the first, line 2: '0' is" in capsys.readouterr().out
    )
    assert rows_of_table(photos, "image_id,image,caption", ["7,0.jpg"]) == ["images/0.jpg"]


def rows_of_table(folder, header, names):
    (folder / "captions.csv").write_text("\n".join([header, *(f"{name},x" for name in names)]), encoding="utf-8")
    return [image for image, _ in rows_of(folder)]


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ("0.jpg,a dog, running\n1.jpg,b\n", "a dog, running"),
        ("0.jpg| 0| a dog\n1.jpg| 0| b\n", "a dog"),
        ("0.jpg;a dog\n1.jpg;b\n", "a dog"),
        ("0.jpg#0\ta dog\n1.jpg#0\tb\n", "a dog"),
        ("images/0.jpg\ta | dog\nimages/1.jpg\tb\n", "a | dog"),
    ],
)
def test_a_table_without_column_names(photos, capsys, content, first):
    """It is one where the first field is a photo that exists."""
    assert captions_in(photos, content, "captions.txt") == [first, "b"]
    assert "no line of column names, taken for image, " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"captions\.txt: no column caption and image; it has gone\.jpg, a"):
        captions_in(photos, "gone.jpg,a\n", "captions.txt")
    captions_in(photos, content + "2.jpg\n", "captions.txt")
    assert "line 3, has no caption" in capsys.readouterr().out


# --- names of photos --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("train\\a.jpg", "a.jpg"),
        ("train\\a.jpg", "train/a.jpg"),
        ("C:\\data\\images\\a.jpg", "a.jpg"),
        ("C:\\data\\images\\train\\a.jpg", "train/a.jpg"),
        ("\\\\server\\photos\\a.jpg", "a.jpg"),
        ("/home/me/images/a.jpg", "a.jpg"),
        ("a.JPG", "a.jpg"),
        ("a.jpg", "A.JPG"),
        ("TRAIN/a.jpg", "train/a.jpg"),
        ("a", "a.jpeg"),
        ("my.photo", "my.photo.jpg"),
        ("\u00e4.jpg", "a\u0308.jpg"),
        ("a\u0308.jpg", "\u00e4.jpg"),
        ("train/a.jpg", "a.jpg"),
        ("a.jpg", "train/a.jpg"),
        ("a.jpg", "train/2017/a.jpg"),
        ("522418", "COCO_train2014_000000522418.jpg"),
        ("139", "000000000139.jpg"),
    ],
)
def test_a_name_from_another_system_is_found(photos, capsys, name, on_disk):
    save_photo(photos / "images" / on_disk)
    assert rows_of_table(photos, "image,caption", [name]) == [f"images/{on_disk}"]
    if name != "train/a.jpg":  # which was found before, too
        assert f"1 of 1 photos have another name there than on the disk; the first, line 2: {name!r} is" in (
            capsys.readouterr().out
        )


@pytest.mark.parametrize(
    ("name", "on_disk", "best"),
    [
        ("a", ("a.jpg", "a.png"), None),
        ("a.JPG", ("a.jpg", "A.jpg"), None),
        ("a.jpg", ("x/a.jpg", "y/a.jpg"), None),
        ("C:\\x\\a.jpg", ("x/a.jpg", "y/a.jpg"), "x/a.jpg"),
        ("b/x/A.jpg", ("b/x/a.jpg", "x/a.jpg"), "b/x/a.jpg"),
        ("a\u0308.JPG", ("\u00e4.JPG", "\u00e4.jpg"), "\u00e4.JPG"),
    ],
)
def test_of_two_photos_the_one_that_fits_better_is_taken_and_else_both_are_named(photos, name, on_disk, best):
    for other in on_disk:
        save_photo(photos / "images" / other)
    if best:
        assert rows_of_table(photos, "image,caption", [name]) == [f"images/{best}"]
    else:
        with pytest.raises(
            ValueError, match=r"captions\.csv, line 2: the image '.*' may be .* or .*; name it in full"
        ) as error:
            rows_of_table(photos, "image,caption", [name])
        assert all(str(photos / "images" / other) in str(error.value) for other in on_disk)


@pytest.mark.parametrize("name", ["val/a.jpg", "a.png", "b.jpg", "x\\val\\a.jpg", "a.jpg/b", "0000"])
def test_another_photo_is_not_taken(photos, capsys, name):
    """The folders agree as far as both names have some: val/1.jpg is not train/1.jpg."""
    save_photo(photos / "images" / "train" / "a.jpg")
    assert rows_of_table(photos, "image,caption", [name, "0.jpg"]) == ["images/0.jpg"]
    assert "1 of 2 rows; the first, line 2, names a photo that is not there" in capsys.readouterr().out


def test_no_photo_of_a_data_set_below_is_taken(tmp_path):
    """data/ may hold whole data sets in folders of their own."""
    for name in NAMES:
        save_photo(tmp_path / name)
    other = save_photo(tmp_path / "other" / "photos" / "a.jpg").parent.parent
    (other / "captions.csv").write_text("image,caption\na.jpg,a\n")
    assert rows_of_table(tmp_path, "image,caption", ["a.jpg", "0.jpg"]) == ["0.jpg"]


@pytest.mark.parametrize("name", ["..\\..\\secret.jpg", "x\\..\\..\\secret.jpg", "/etc/secret.jpg"])
def test_a_leading_path_never_leads_out(photos, name):
    save_photo(photos / "secret.jpg")
    with pytest.raises(
        ValueError, match=r"captions\.csv, line 2: the image .* lies outside of .*images; move it there"
    ):
        rows_of_table(photos, "image,caption", [name])


def test_lists_of_splits_name_photos_in_any_way_too(photos):
    for split, name in (("train", "0"), ("val", "1.JPG"), ("test", "x\\2.jpg")):
        (photos / f"{split}.txt").write_text(name + "\n")
    rows_of_table(photos, "image,caption", ["train\\0.jpg", "1.jpg", "2.jpg"])
    assert sources.load(photos)["split"].tolist() == ["train", "val", "test"]
    (photos / "train.txt").write_text("0.png\n3")  # another ending is another photo
    assert sources.load(photos)["split"].tolist() == ["test", "val", "test"]


# --- what operating systems leave behind ------------------------------------------------------------------------------

LITTER = ("._0.jpg", "._0.txt", ".DS_Store", "Thumbs.db", "__MACOSX/0.jpg", "__MACOSX/._0.jpg", "desktop.ini")


def test_litter_is_ignored_beside_photos(photos):
    for name in NAMES:
        (photos / "images" / name).with_suffix(".txt").write_text(name)
    for name in LITTER:
        (photos / "images" / name).parent.mkdir(exist_ok=True)
        (photos / "images" / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert rows_of(photos) == [(f"images/{name}", name) for name in NAMES]
    assert PhotoFinder([photos / "images"]).index.find("._0.jpg") == []


def test_litter_is_ignored_in_tars_and_beside_them(tmp_path):
    pytest.importorskip("webdataset")
    folder = make_shards(tmp_path / "shards", [[1] * 2] * 2)
    content = members(99, 0, 1)
    junk = {
        f"{folder}{name}": b"\0\5\x16\7" for folder in ("", "__MACOSX/") for name in ("._000000.jpg", "._000000.json")
    }
    write_tar(folder / "val-000000.tar", content | junk | {".DS_Store": b"x"})
    (folder / "._train-000000.tar").write_bytes(b"\0\5\x16\7")
    (folder / "._val-000000.tar").write_bytes(b"\0\5\x16\7")
    samples = list(reading.read_samples(folder / "val-000000.tar", lambda *what: pytest.fail(str(what))))
    assert [sample.name for sample in samples] == ["000000.jpg"]
    assert {split: len(paths) for split, paths in reading.shards_by_split(folder).items()} == {"train": 2, "val": 1}


# --- texts ------------------------------------------------------------------------------------------------------------

WRITTEN_FOR_PAGES = {
    "a man &amp; a dog &quot;hi&quot;": 'a man & a dog "hi"',
    "the man&#39;s d&#xF6;g": "the man's dög",
    "&Eacute;T&Eacute;": "été",
    "a <b>big</b> dog<br/>runs <!-- so --> <a href='x'>here</a>": "a big dog runs here",
    "a\u200bb \ufeffc\u00a0d so\u00adft&shy;er": "ab c d softer",
    "&amp;lt;b&amp;gt;": "&lt;b&gt;",  # once
    "<a man and a dog> <b > <img src=x alt='a b'/>": "<a man and a dog>",
    "a < b && c > d & e; AT&T &nosuch; <unk> &copy 2": "a < b && c > d & e; at&t &nosuch; <unk> &copy 2",
    "\U0001f468\u200d\U0001f469 \u200fab": "\U0001f468\u200d\U0001f469 \u200fab",  # what joins emoji stays
}


@pytest.mark.parametrize("text", WRITTEN_FOR_PAGES)
def test_what_was_written_for_a_web_page_is_unescaped_once(photos, capsys, text):
    captions = captions_in(photos, json.dumps({"0.jpg": [text, "a dog"], "1.jpg": [text]}), "captions.json")
    assert captions == [WRITTEN_FOR_PAGES[text], "a dog", WRITTEN_FOR_PAGES[text]]
    said = capsys.readouterr().out
    changed = text.lower() != WRITTEN_FOR_PAGES[text]
    assert said.count("2 of 3 captions were written for a web page") == changed
    assert sources.load(photos, unescape=False)["caption"].iloc[0] == " ".join(text.lower().split())


def test_copies_of_a_data_set_are_unescaped_no_further(photos, tmp_path):
    """A photo store and tar shards are read as any dataset is."""
    texts = {name: [text, "a & b"] for name, text in zip(NAMES, WRITTEN_FOR_PAGES, strict=False)}
    (photos / "captions.json").write_text(json.dumps(texts))
    truth = sorted(sources.load(photos)["caption"])
    write_store(photos, tmp_path / "store")
    assert sorted(sources.load(tmp_path / "store")["caption"]) == truth
    pytest.importorskip("webdataset")
    writing.write_shards(photos, tmp_path / "shards", photos_per_shard=2)
    assert sorted(sources.load(tmp_path / "shards")["caption"]) == truth
    raw = sorted(sources.load(photos, unescape=False)["caption"])
    write_store(photos, tmp_path / "raw_store", unescape=False)
    writing.write_shards(photos, tmp_path / "raw_shards", photos_per_shard=2, unescape=False)
    for copy in ("raw_store", "raw_shards"):
        assert sorted(sources.load(tmp_path / copy, unescape=False)["caption"]) == raw
    val = [text for _, text, _, _ in reading.read_rows(tmp_path / "raw_shards", ["val"], unescape=False)]
    frame = sources.load_usable(tmp_path / "raw_shards", None, None, "flickr8k", unescape=False)
    assert sorted([*streaming.training_texts(frame, unescape=False), *val]) == sorted(
        set_of_split(photos, ("train", "val"))
    )


def set_of_split(folder, splits):
    df = sources.load(folder, unescape=False)
    return df["caption"][df["split"].isin(splits)].tolist()


@pytest.mark.parametrize("unescape", [True, False])
def test_the_constant_decides_what_training_streams(script, photos, tmp_path, words_tokenizer, unescape):
    pytest.importorskip("webdataset")
    folder = make_shards(tmp_path / "shards", [[1], [1]])
    write_tar(
        folder / "train-000000.tar",
        members(0, 0, 1) | {"000000.json": json.dumps({"caption": "cats &amp; dogs"}).encode()},
    )
    config = script.complete(dict(batch_size=1, unescape_captions=unescape), script.train_config)
    dataset = script.Dataset(
        sources.load_usable(folder, None, None, "x")[:0], script.build_transforms(16)[0], words_tokenizer
    )
    loader = streaming.build_stream_loader(folder, dataset, lambda items: items, config)
    texts = [text for batch in loader.batch_sampler for group in batch for text in group.captions]
    assert ("cats & dogs" if unescape else "cats &amp; dogs") in texts


@pytest.fixture
def words_tokenizer(bpe):
    return bpe


def test_windows_1252_is_read_where_all_of_the_file_is_it(photos, capsys):
    text = "image,caption\n0.jpg,caf\u00e9 \u201chi\u201d\n1.jpg,na\u00efve\n"
    assert captions_in(photos, text.encode("cp1252")) == ["café “hi”", "naïve"]
    assert "captions.csv: not UTF-8; read as Windows-1252, which all of it is" in capsys.readouterr().out
    assert captions_in(photos, text.encode("cp1252") + "2.jpg,Käfer\n".encode()) == ["käfer"]  # a character of UTF-8
    assert "left out 2 of 3 rows; the first, line 2, has a caption that is not UTF-8" in capsys.readouterr().out
    assert captions_in(photos, text.encode("cp1252") + b"2.jpg,b\x81d\n3.jpg,a\n") == ["a"]  # no character there


def test_sidecars_in_windows_1252(photos, capsys):
    for name in NAMES:
        (photos / "images" / name).with_suffix(".txt").write_bytes(
            f"café {name}".encode("cp1252" if name < "3" else "utf-8")
        )
    assert [text for _, text in rows_of(photos)] == [f"café {name}" for name in NAMES]
    assert capsys.readouterr().out.count("3 files are not UTF-8; read as Windows-1252; the first: 0.txt") == 1


def test_control_characters_are_not_trained_on(photos):
    text = "a \x1b[1;31mred\x1b[0m\x07 dog\x00 \x1b]0;title\x07 r\x08uns\x7f \x9bfast"
    assert captions_in(photos, json.dumps({"0.jpg": text}), "captions.json") == ["a red dog ]0;title runs fast"]


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_annotation_lists_of_lavis(tmp_path, capsys):
    """coco_karpathy_train.json and so on: a caption, or a list of them; the name of the file tells the split."""
    lists = {}
    for split, folder in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        names = [f"{folder}/{split}{i}.jpg" for i in range(2)]
        lists[split] = [dict(image=name, caption=name if split == "train" else [name, name + " b"]) for name in names]
        for name in names:
            save_photo(tmp_path / "images" / name)
    (tmp_path / "annotations").mkdir()
    for split, content in lists.items():
        (tmp_path / "annotations" / f"coco_karpathy_{split}.json").write_text(json.dumps(content))
    (tmp_path / "annotations" / "coco_karpathy_val_gt.json").write_text('{"annotations": [], "info": 3}')
    df = sources.load(tmp_path)
    assert df["split"].value_counts().to_dict() == {"train": 2, "val": 4, "test": 4}
    assert df["image"].map(lambda path: path.is_file()).all()
    assert "images/val2014/test0.jpg" in {path.relative_to(tmp_path).as_posix() for path in df["image"]}


def test_the_json_of_clip_prefix_caption(tmp_path):
    """COCO's ids, as text, in place of names."""
    for number in (1, 22, 522418):
        save_photo(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg")
    (tmp_path / "annotations").mkdir()
    content = [dict(image_id=str(n), caption=f"caption {n}", id=n) for n in (522418, 1, 22)]
    (tmp_path / "annotations" / "train_caption.json").write_text(json.dumps(content))
    assert rows_of(tmp_path)[0] == ("train2014/COCO_train2014_000000522418.jpg", "caption 522418")
    assert len(rows_of(tmp_path)) == 3


@pytest.mark.parametrize("splits", [("train",), ("train", "validation", "test")])
def test_an_imagefolder_with_metadata_in_each_split(tmp_path, splits):
    for split in splits:
        for i in range(3):
            save_photo(tmp_path / split / f"{i}.jpg")
        lines = [json.dumps(dict(file_name=f"{i}.jpg", text=f"{split} {i}")) for i in range(3)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    df = sources.load(tmp_path)
    assert set(df["split"]) == {"train", "val", "test"}
    assert [f"{path.parent.name} {path.stem}" for path in df["image"]] == df["caption"].tolist()
    assert df["image"].map(lambda path: path.is_file()).all()


def test_flickr30k_of_kaggle_holds_the_same_folder_again(tmp_path):
    folder = tmp_path / "flickr30k_images"
    for name in NAMES:
        save_photo(folder / "flickr30k_images" / name)
    (folder / "results.csv").write_text(HEADER + REST)
    for data_dir in (tmp_path, folder):
        assert [image.rpartition("/")[2] for image, _ in rows_of(data_dir)] == NAMES


def test_flickr8k_text_beside_its_photos(tmp_path):
    for name in NAMES:
        save_photo(tmp_path / "Flicker8k_Dataset" / name)
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    (text / "Flickr8k.token.txt").write_text("".join(f"{name}#0\ta {name}\n" for name in NAMES))
    for i, split in enumerate(("train", "dev", "test")):
        (text / f"Flickr_8k.{split}Images.txt").write_text("\n".join(NAMES[2 * i : 2 * i + 2]))
    df = sources.load(tmp_path)
    assert df["split"].tolist() == ["train", "train", "val", "val", "test", "test"]
    assert df["image"].map(lambda path: path.is_file()).all()


def test_a_table_of_another_name_is_taken_when_its_photos_are_there(photos, capsys):
    (photos / "my captions.csv").write_text("photo;Caption\n" + "".join(f"{name};a {name}\n" for name in NAMES))
    (photos / "metadata.json").write_text('{"title": "a data set of mine", "license": "none"}')
    (photos / "notes.txt").write_text("bought in June,\nall of them")
    assert len(rows_of(photos)) == len(NAMES)
    assert "my captions.csv: a table separated by ';'" in capsys.readouterr().out


def test_splits_in_tables_of_their_own(photos):
    for i, split in enumerate(("train", "val", "test")):
        (photos / f"{split}.csv").write_text("image,caption\n" + "".join(f"{n},a\n" for n in NAMES[2 * i : 2 * i + 2]))
    assert sources.load(photos)["split"].tolist() == ["train", "train", "val", "val", "test", "test"]


def test_without_captions_the_message_says_why_no_file_will_do(photos):
    (photos / "labels.csv").write_text("image,label\n0.jpg,3\n")
    (photos / "other.json").write_text('{"gone.jpg": "a dog"}')
    (photos / "broken.json").write_text("{")
    with pytest.raises(FileNotFoundError) as error:
        sources.load(photos)
    first, *files = str(error.value).splitlines()
    assert first.startswith(f"{photos}: no captions there: looked for results.csv, captions.txt")
    assert files[1:] == [
        "    labels.csv: no column caption; it has image, label",
        "    other.json: captions, but no photo that it names is here",
    ]
    assert files[0].startswith("    broken.json: not valid JSON (")
    for name in ("a.csv", "b.csv"):
        (photos / name).write_text("image,caption\n0.jpg,a\n")
    with pytest.raises(
        FileNotFoundError, match=r"More than one other file holds captions: choose with --captions_file"
    ):
        sources.load(photos)


# --- sets without train or val ----------------------------------------------------------------------------------------


def test_what_does_not_train_needs_no_training_split(photos):
    rows_of_table(photos, "image,caption", NAMES)
    (photos / "test.txt").write_text("\n".join(NAMES))
    assert set(sources.load(photos)["split"]) == {"test"}
    with pytest.raises(ValueError, match=r"none of the images with captions is in the split train$"):
        sources.load_usable(photos, None, None, "flickr8k")
    (photos / "train.txt").write_text("0.jpg\n")
    (photos / "test.txt").write_text("\n".join(NAMES[1:]))
    with pytest.raises(ValueError, match=r"none of the images with captions is in the split val$"):
        sources.load_usable(photos, None, None, "flickr8k")


def test_shards_of_test_photos_alone(tmp_path):
    pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "test-000000.tar", members(0, 0, 1))
    assert sources.load(folder)["split"].tolist() == ["test"]
    with pytest.raises(ValueError, match=r"no shard is of the split val; there are 1 of test"):
        sources.load_usable(folder, None, None, "flickr8k")


def test_one_or_two_photos_are_all_test(photos):
    rows_of_table(photos, "image,caption", NAMES[:2])
    assert set(sources.load(photos)["split"]) == {"test"}
    with pytest.raises(ValueError, match=r"split train; 2 image\(s\) cannot be split into train, val and test"):
        sources.load_usable(photos, None, None, "flickr8k")


def test_seeded_splits_go_by_the_names_in_the_file(photos):
    """So names that are found in another way change nothing for the other photos."""
    import pandas as pd

    names = pd.Series([f"{i}.jpg" for i in range(40)])
    renamed = names.map(lambda name: photos / "elsewhere" / name.upper())
    assert assign_splits(names, photos, photos=renamed).equals(assign_splits(names, photos))
