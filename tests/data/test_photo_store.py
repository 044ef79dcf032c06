"""A photo store reads back as the dataset it was made from, survives a kill, and says which photos it left out."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import prepare_data
from captioning.data import photo_store, sources
from captioning.data.photo_store import shrink, write_store
from captioning.images.preprocessing import load_image
from conftest import REPO_ROOT, make_flickr
from helpers.annotation_files import FORMATS, NAMES, coco, saved_dataset


def snapshot(folder):
    """{name: (time of the last change, content)} of the photos in a store."""
    images = folder / "images"
    return {
        path.relative_to(images).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(images.rglob("*"))
        if path.is_file()
    }


def rows(df):
    """Everything in a frame but the folder of the photos."""
    return df.drop(columns="image").to_dict("list") | {"image": [path.name for path in df["image"]]}


def draw(path, size, **options):
    """Write a smooth, colourful picture to `path` -> path."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1] // 40 + 2, size[0] // 40 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    mode = options.pop("mode", "RGB")
    picture.convert(mode).save(path, **options)
    return path


# --- a store is a dataset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [*FORMATS, saved_dataset])
def test_every_format_reads_back_as_it_was(photos, tmp_path, write):
    write(photos)
    store = tmp_path / "store"
    assert write_store(photos, store) == 0
    before, after = sources.load(photos), sources.load(store)
    assert rows(after) == rows(before)
    assert list(after.columns) == list(before.columns)
    assert all(path.is_relative_to(store) and path.is_file() for path in after["image"])
    assert len(sources.drop_unusable(after, store)) == len(before)


def test_splits_questions_and_odd_captions_come_along(photos, tmp_path):
    texts = ['"a" dog| says, \\n', "ein käfer \u2028 犬", "", "broken \ufffd bytes"]
    lines = [
        dict(image=name, question=f"what is {i} ?", answer=texts[i % 4], split=("train", "val", "test")[i % 3])
        for i, name in enumerate(NAMES)
    ]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_store(photos, tmp_path / "store")
    assert rows(sources.load(tmp_path / "store")) == rows(sources.load(photos))
    assert set(sources.load(tmp_path / "store")["prompt"]) == {f"what is {i} ?" for i in range(6)}


def test_photos_of_one_name_in_two_folders_stay_two(photos, tmp_path):
    coco(photos)
    train = json.loads((photos / "annotations" / "captions_train2017.json").read_text())
    (photos / "val2017").mkdir()
    draw(photos / "val2017" / "0.jpg", (40, 24))
    val = dict(images=train["images"][:1], annotations=[dict(id=9, image_id=0, caption="another")])
    (photos / "annotations" / "captions_val2017.json").write_text(json.dumps(val))
    write_store(photos, tmp_path / "store")
    df = sources.load(tmp_path / "store")
    assert rows(df) == rows(sources.load(photos))
    assert load_image(df["image"].iloc[0]).size == (8, 8)
    assert load_image(df["image"].iloc[-1]).size == (40, 24)


def test_names_are_those_of_jpegs():
    names = photo_store.store_names(["/d/images/1.jpg", "/d/images/1.png", "/d/2.JPEG"])
    assert list(names.values()) == ["images/1.jpg", "images/1.png.jpg", "2.JPEG"]
    names = photo_store.store_names(["/d/1.jpg", "/d/1.bmp"], photo_store.UNCOMPRESSED)
    assert list(names.values()) == ["1.jpg.bmp", "1.bmp"]
    with pytest.raises(ValueError, match=r"/d/1\.jpg and /d/1\.jpg\.bmp would both be 1\.jpg\.bmp in the store"):
        photo_store.store_names(["/d/1.jpg", "/d/1.jpg.bmp"], photo_store.UNCOMPRESSED)


@pytest.mark.parametrize(("arguments", "name"), [([], "data_24"), (["--uncompressed"], "data_24_bmp")])
def test_training_runs_on_a_store(script, flickr, tmp_path, bpe, arguments, name):
    prepare_data.main(["--shrink", str(flickr), "--side", "24", "--num_workers", "2", *arguments])
    store = flickr.with_name(name)
    df = sources.load_usable(store, None, None, "flickr30k")
    assert df["split"].value_counts().to_dict() == {"train": 16, "val": 4, "test": 4}
    assert load_image(df["image"].iloc[0]).size == (30, 24)
    assert script.Dataset(df, script.build_transforms(32)[0], bpe)[0][0].shape == (3, 32, 32)


# --- photos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jpg", {}), ("a.jpg", dict(mode="CMYK")), ("a.jpg", dict(mode="L")), ("a.png", dict(mode="RGBA"))],
)
def test_photos_become_upright_small_rgb_jpegs(tmp_path, name, options, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = draw(tmp_path / name, (640, 400), exif=exif, **options)
    (tmp_path / "small.jpg").write_bytes(shrink(path, 64))
    with Image.open(tmp_path / "small.jpg") as small:
        assert (small.format, small.mode, dict(small.getexif())) == ("JPEG", "RGB", {})
        assert small.size == ((102, 64) if turn == 1 else (64, 102))
        expected = np.asarray(load_image(path).resize(small.size, Image.Resampling.LANCZOS), dtype=float)
        assert np.abs(expected - np.asarray(small)).mean() < 6  # of 255, from compression and reduced decoding


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "small.jpg"])
def test_uncompressed_photos_keep_every_pixel(tmp_path, name):
    """A small JPEG too is decoded once: that is what the store is for."""
    path = draw(tmp_path / name, (60, 40) if name == "small.jpg" else (120, 80))
    (tmp_path / "photo.bmp").write_bytes(shrink(path, 40, photo_store.UNCOMPRESSED))
    with Image.open(tmp_path / "photo.bmp") as photo:
        assert (photo.format, photo.mode, photo.size) == ("BMP", "RGB", (60, 40))
        expected = load_image(path)
        if expected.size != photo.size:
            expected = expected.resize(photo.size, Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(photo), np.asarray(expected))


def test_photos_are_never_enlarged_nor_compressed_twice(tmp_path):
    small = draw(tmp_path / "small.jpg", (300, 64))
    assert shrink(small, 64) == small.read_bytes()
    assert shrink(small, 63) != small.read_bytes()
    progressive = draw(tmp_path / "progressive.jpg", (64, 64), progressive=True)
    with Image.open(progressive) as opened:
        assert opened.info.get("progressive")
    assert shrink(progressive, 64) != progressive.read_bytes()
    png = draw(tmp_path / "tiny.png", (16, 8))
    (tmp_path / "tiny.jpg").write_bytes(shrink(png, 64))
    assert load_image(tmp_path / "tiny.jpg").size == (16, 8)
    panorama = draw(tmp_path / "panorama.jpg", (2000, 80))
    (tmp_path / "narrow.jpg").write_bytes(shrink(panorama, 8))
    assert load_image(tmp_path / "narrow.jpg").size == (200, 8)


def test_unreadable_photos_are_counted_named_and_left_out(flickr, tmp_path, capsys):
    images = flickr / "flickr30k_images"
    (images / "1003.jpg").write_bytes((images / "1003.jpg").read_bytes()[:600])  # a JPEG that ends early
    (images / "1004.jpg").write_text("no photo")
    (images / "1005.jpg").unlink()
    store = tmp_path / "store"
    assert write_store(flickr, store) == 3
    said = capsys.readouterr().out
    assert "9 photos, 9 of them made now; 24 captions" in said
    assert "warning: 3 photos cannot be read" in said
    for name in ("1003.jpg: not a readable image", "1004.jpg: not a readable", "1005.jpg: no such image"):
        assert name in said
    assert rows(sources.load(store)) == rows(sources.load(flickr))
    assert len(sources.drop_unusable(sources.load(store), store)) == 18
    Image.new("RGB", (9, 9)).save(images / "1004.jpg")  # mended
    assert write_store(flickr, store) == 2
    assert "10 photos, 1 of them made now" in capsys.readouterr().out


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_second_run_makes_nothing_but_what_changed(flickr, tmp_path, capsys):
    store, images = tmp_path / "store", flickr / "flickr30k_images"
    write_store(flickr, store)
    first = snapshot(store)
    write_store(flickr, store)
    assert snapshot(store) == first
    assert "12 photos, 0 of them made now" in capsys.readouterr().out
    draw(images / "1000.jpg", (48, 24))
    (store / "images" / "1001.jpg").unlink()
    write_store(flickr, store)
    second = snapshot(store)
    assert {name for name in first if first[name][0] != second[name][0]} == {"1000.jpg", "1001.jpg"}
    assert first["1001.jpg"][1] == second["1001.jpg"][1]
    assert "12 photos, 2 of them made now" in capsys.readouterr().out
    (images / "1000.jpg").write_text("broken since")
    write_store(flickr, store)
    assert "1000.jpg" not in snapshot(store)


def test_a_line_that_is_not_whole_does_not_count(flickr, tmp_path, capsys):
    store = tmp_path / "store"
    write_store(flickr, store)
    index = store / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-5])
    (store / "images" / ".1001.jpg.part").write_text("half of a photo")
    capsys.readouterr()
    write_store(flickr, store)
    assert "12 photos, 1 of them made now" in capsys.readouterr().out
    assert len(index.read_text().splitlines()) == 12
    assert len(snapshot(store)) == 12


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL in the middle: there is no dataset yet, every photo is whole, no process stays, the next run goes on."""
    data, store = make_flickr(tmp_path / "data", photos=6), tmp_path / "store"
    for path in (data / "flickr30k_images").iterdir():
        draw(path, (400, 320))
    slow = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from captioning.data import photo_store\n"
        "shrink = photo_store.shrink\n"
        "photo_store.shrink = lambda *args: time.sleep(0.2) or shrink(*args)\n"
        "photo_store.write_store(sys.argv[2], sys.argv[3], num_workers=1)\n"
    )
    folder = str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning")
    run = subprocess.Popen([sys.executable, "-c", slow, folder, str(data), str(store)], stderr=subprocess.DEVNULL)
    index, start = store / "index.jsonl", time.monotonic()
    while not (index.is_file() and index.read_bytes().count(b"\n") >= 2):
        assert run.poll() is None and time.monotonic() - start < 60
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(0.5)  # for the worker to notice, and perhaps to finish a photo
    assert sources.find_captions(store) is None
    named = [name for name, *_ in map(json.loads, index.read_text().splitlines())]
    assert 2 <= len(named) < 6
    for name in named:
        assert load_image(store / "images" / name).size == (320, 256)
    before = snapshot(store)
    write_store(data, store)
    after = snapshot(store)
    assert len(after) == 6
    assert all(before[name] == after[name] for name in named)


def test_a_store_is_never_mixed(flickr, tmp_path, capsys):
    store = tmp_path / "store"
    write_store(flickr, store, side=32)
    with pytest.raises(ValueError, match=r"manifest\.json: the photos there have side 32 instead of 24: .* --to"):
        write_store(flickr, store, side=24)
    with pytest.raises(ValueError, match="quality 90 instead of uncompressed"):
        write_store(flickr, store, side=32, quality=photo_store.UNCOMPRESSED)
    with pytest.raises(FileExistsError, match="holds something other than a photo store"):
        write_store(flickr, flickr)
    with pytest.raises(FileNotFoundError, match="no captions there"):
        write_store(tmp_path / "nothing", tmp_path / "store2")
    with pytest.raises(SystemExit, match="holds something other than a photo store"):
        prepare_data.main(["--shrink", str(flickr), "--to", str(flickr)])
    with pytest.raises(SystemExit, match="--shrink FOLDER"):
        prepare_data.main(["shapes", "--shrink", str(flickr)])


def test_a_store_of_nothing_is_refused(flickr, tmp_path):
    for path in (flickr / "flickr30k_images").iterdir():
        path.write_text("no photo")
    with pytest.raises(ValueError, match=r"none of its 12 photos can be read; the first: .*1000\.jpg"):
        write_store(flickr, tmp_path / "store")
    assert sources.find_captions(tmp_path / "store") is None
