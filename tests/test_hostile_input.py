"""Input that fights back: every case ends with a clear error or a counted skip, and nothing written before is lost.

The table of all cases with what happened is HOSTILE_INPUT.md beside this file. A case whose words differ from it fails;
    UPDATE_TABLE=1 python -m pytest tests/test_hostile_input.py
writes it anew.
"""

import contextlib
import csv
import inspect
import io
import json
import os
import re
import resource
import shutil
import stat
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

from captioning.common.files import CONFIG_FILE, TOKENIZER_FILE, TORCH_FILE, WEIGHTS_FILE, write_atomically
from captioning.data import dataset_check, downloads, photo_store, sources
from captioning.data.conventions import is_photo_file
from captioning.data.resumable_work import Jobs
from captioning.data.shards import reading, streaming, writing
from captioning.data.token_cache import TokenCache
from captioning.data.workers import Loader
from captioning.images import tar_members
from captioning.images.preprocessing import load_image
from captioning.model import checkpoint, hugging_face
from captioning.pages import html_pages
from captioning.scoring import metrics
from captioning.training import run_folder
from captioning.training.run_log import RunLog
from captioning.training.self_critical import SelfCritical
from conftest import CAPTIONS
from helpers.folders import for_everybody, read_only
from helpers.image_files import png
from helpers.runs import TINY
from helpers.server import data_url, post, serving
from helpers.tar_files import make_shards, members, write_tar

TABLE = Path(__file__).with_name("HOSTILE_INPUT.md")
UPDATE = "UPDATE_TABLE" in os.environ
CASES, OUTCOMES = {}, {}  # (section, input): the function that tries it; what happened


def case(section, name):
    """A case: a function of fixtures, which returns what happened in words, or raises what the user is told."""

    def add(function):
        assert (section, name) not in CASES
        CASES[section, name] = function
        return function

    return add


def row(key, outcome):
    """A row of the table. What libraries and systems say differs between versions, so it is left out."""
    words = re.sub(r"-view0-[0-9a-f]{12}", "-view0-...", outcome)
    words = re.sub(r"not a readable image \(.*?\);", "not a readable image (why);", words)
    words = re.sub(r"(damaged, or not an? [a-z ]+) \(.*?\)(;|$)", r"\1 (why)\2", words)
    words = re.sub(r"(not a readable image|not a whole tar file) \(.*?\)(?=[.]|$)", r"\1 (why)", words)
    words = re.sub(r"(could not be written|cannot be made|not valid JSON|not a usable zip archive) \(.*?\)(;|$)",
                   r"\1 (why)\2", words)  # fmt: skip
    words = re.sub(r"([|<&])", r"\\\1", " ".join(words.split()))
    return f"| {key[1]} | {words} |"


# --- images -----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (24, 32, 3), dtype=np.uint8)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def save(path, pixels=PIXELS, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@case("Images", "truncated JPEG")
def _(tmp_path):
    path = save(tmp_path / "photo.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    assert "truncated" in dataset_check.read_photo(path).fault
    load_image(path)


@case("Images", "file of zero bytes")
def _(tmp_path):
    (tmp_path / "photo.jpg").touch()
    assert dataset_check.read_photo(tmp_path / "photo.jpg").fault == "empty"
    load_image(tmp_path / "photo.jpg")


@case("Images", "web page named photo.jpg")
def _(tmp_path):
    (tmp_path / "photo.jpg").write_text("<html>not found</html>")
    load_image(tmp_path / "photo.jpg")


@case("Images", "PNG named photo.jpg")
def _(tmp_path):
    path = save(tmp_path / "photo.jpg", format="PNG")
    assert np.array_equal(np.asarray(load_image(path, least_side=8)), PIXELS)
    return "read, every pixel: the content decides, not the name"


@case("Images", "CMYK JPEG")
def _(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK").save(tmp_path / "photo.jpg", quality=95)
    red, green, blue = np.asarray(load_image(tmp_path / "photo.jpg")).mean((0, 1))
    assert abs(red - 200) < 5 and abs(green - 40) < 5 and abs(blue - 40) < 5
    return "read as RGB, with its colours"


@case("Images", "16-bit grey PNG and TIFF")
def _(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name, values in (("photo.png", ramp), ("photo.tif", ramp), ("wide.tif", ramp.astype(np.int32))):
        pixels = np.asarray(load_image(save(tmp_path / name, values)))
        assert np.array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))
        assert (pixels == pixels[..., :1]).all()
    return "read, 65,536 levels as 256 (Pillow alone would show nearly all of it white)"


@case("Images", "16-bit colour PNG")
def _(tmp_path):
    lines = b"".join(b"\0" + struct.pack(">12H", *[0x8000, 0xFFFF, 0] * 4) for _ in range(4))
    (tmp_path / "photo.png").write_bytes(png(4, 4, 16, 2, lines))
    assert (np.asarray(load_image(tmp_path / "photo.png")) == (128, 255, 0)).all()
    return "read, 65,536 levels as 256"


@case("Images", "TIFF of floating-point numbers")
def _(tmp_path):
    load_image(save(tmp_path / "photo.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)))


@case("Images", "transparency: of a palette, a channel, one colour")
def _(tmp_path, recwarn):
    def read_as(image, **options):
        image.save(tmp_path / "photo.png", **options)
        return np.asarray(load_image(tmp_path / "photo.png"))

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (read_as(palette, transparency=bytes([0, 128])) == (127, 255, 127)).all()
    assert (read_as(palette) == (0, 255, 0)).all()
    assert (read_as(Image.new("RGBA", (8, 8), (9, 9, 9, 0))) == 255).all()
    assert (read_as(Image.new("LA", (8, 8), (0, 255))) == 0).all()
    assert (read_as(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)) == 255).all()
    assert (read_as(Image.new("L", (8, 8), 7), transparency=7) == 255).all()
    opaque = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    assert np.array_equal(read_as(Image.fromarray(opaque)), PIXELS)
    assert not any(issubclass(warning.category, UserWarning) for warning in recwarn)
    return "read, what is transparent on white"


@case("Images", "AVIF")
def _(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    path = save(tmp_path / "photo.avif", np.full((16, 16, 3), (200, 40, 40), np.uint8), quality=95)
    assert abs(np.asarray(load_image(path)).mean((0, 1)) - (200, 40, 40)).max() < 6
    assert is_photo_file(path)
    return "read, by Pillow"


@case("Images", "HEIC, without the library pillow-heif")
def _(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    assert "pip install pillow-heif" in dataset_check.read_photo(tmp_path / "photo.heic").fault
    with pytest.raises(ValueError, match=r"photo\.heic: not a readable image \(HEIC, .*: pip install pillow-heif\)"):
        load_image(tmp_path / "photo.heic")
    return "refused as any unreadable image, with the command that installs the library"


@case("Images", "HEIC, with it")
def _(tmp_path, monkeypatch):
    """The library stands in for itself: it makes Pillow open the file."""

    def register():
        monkeypatch.setattr(Image, "open", lambda source: Image.fromarray(PIXELS))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    path = tmp_path / "photo.heic"
    path.write_bytes(HEIC)
    with open(path, "rb") as file:
        assert np.array_equal(np.asarray(load_image(file)), PIXELS)
    assert np.array_equal(np.asarray(load_image(path)), PIXELS) and is_photo_file(path)
    return "read"


@case("Images", "animated GIF")
def _(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "photo.gif", save_all=True, append_images=frames[1:])
    assert (np.asarray(load_image(tmp_path / "photo.gif")) == (255, 0, 0)).all()
    return "its first frame is read"


@case("Images", "turned by EXIF, all eight ways")
def _(tmp_path):
    turned = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
              6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}  # fmt: skip
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / "photo.png", np.ascontiguousarray(stored(PIXELS)), exif=exif)
        assert np.array_equal(np.asarray(load_image(path)), PIXELS), orientation
    return "turned upright"


@case("Images", "damaged EXIF, or any other damaged bytes")
def _(tmp_path):
    """600 damaged files: each is an image, or is refused by its name."""
    exif, path, generator = Image.Exif(), tmp_path / "photo", np.random.default_rng(0)
    exif[0x0112], exif[0x010E] = 6, "a photo"
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = np.frombuffer(save(path, format=kind, exif=exif).read_bytes(), np.uint8)
        for _ in range(150):
            damaged = whole.copy()
            places = generator.integers(0, generator.choice([60, 300, len(whole)]), generator.integers(1, 8))
            damaged[places % len(whole)] = generator.integers(0, 256, len(places))
            path.write_bytes(damaged.tobytes())
            try:
                assert load_image(path).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith(f"{path}: not a readable image")
    return "read, or refused as any unreadable image: 600 files with random damage"


@case("Images", "1 x 1 pixel")
def _(tmp_path, script):
    path = save(tmp_path / "photo.png", PIXELS[:1, :1])
    for transforms in script.build_transforms(32):
        assert transforms(image=np.asarray(load_image(path)), seed=[0])["image"].shape == (3, 32, 32)
    return "read; the check names photos with a side below 32 pixels"


@case("Images", "decompression bomb: 400 million pixels in 100 bytes")
def _(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(20_000, 20_000, 8, 2, b"\0"))  # decoding it would say that it is truncated
    assert len(path.read_bytes()) < 100
    with pytest.raises(ValueError, match=r"bomb\.png: not a readable image \(Image size \(400000000 pixels\) exceeds"):
        load_image(path)
    return "refused as any unreadable image, by the number of pixels that its header names, before decoding"


@case("Images", "PostScript named photo.jpg")
def _(tmp_path, monkeypatch):
    """For EPS Pillow starts Ghostscript."""
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: pytest.fail("Ghostscript is started")
    )
    path = tmp_path / "photo.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert dataset_check.read_photo(path).fault == "not an image of a known format"
    load_image(path)


@case("Images", "pipe named photo.jpg, which would never end")
def _(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    assert dataset_check.read_photo(tmp_path / "photo.jpg").fault == "it is a pipe or a device"
    load_image(tmp_path / "photo.jpg")


@case("Images", "directory named 1000.jpg")
def _(flickr, capsys):
    photo = flickr / "flickr30k_images" / "1000.jpg"
    photo.unlink()
    photo.mkdir()
    with pytest.raises(ValueError, match=r"1000\.jpg: not a readable image"):
        load_image(photo)
    return left_out(flickr, capsys)


def left_out(folder, capsys):
    """What `load_usable` says about the rows it leaves out; the other rows stay."""
    sources.load_usable(folder, None, None, "flickr30k")
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))


# --- photos that break while a run trains -----------------------------------------------------------------------------


def batches_of(loader):
    return [(ids, labels) for _, ids, labels in loader]


def breaks(flickr, *names):
    for name in names:
        (flickr / "flickr30k_images" / name).write_bytes(b"damaged")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_photo_changes_neither_order_nor_steps(
    script, tiny_config, tiny_train_config, flickr, bpe, capfd, workers
):
    """The other photos come as they would; the broken one is grey, and its labels count nothing."""
    tiny_train_config.num_workers = workers
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")

    def epochs():
        loader, _ = script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
        for epoch in range(2):
            loader.dataset.set_epoch(epoch)
            loader.batch_sampler.set_epoch(epoch)
            yield from loader
        yield loader.dataset.unreadable_photos

    *whole, known = epochs()
    assert not known.flags.any()
    breaks(flickr, "1003.jpg")
    *broken, known = epochs()
    assert known.flags.sum() == 1  # however often it was asked for, in whichever worker
    assert capfd.readouterr().err.count("1003.jpg: not a readable image") == 1
    assert len(broken) == len(whole) == 8
    hidden = 0
    for (images, ids, labels), (others, other_ids, other_labels) in zip(whole, broken, strict=True):
        assert torch.equal(ids, other_ids)
        for image, other, row, other_row in zip(
            images.repeat_interleave(2, 0), others.repeat_interleave(2, 0), labels, other_labels, strict=True
        ):
            if (other_row == -100).all():
                hidden += 1
                assert other.float().std() == 0
            else:
                assert torch.equal(image, other) and torch.equal(row, other_row)
    assert hidden == 4  # two captions, two epochs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_any_readable_photo_is_left_out(script, tiny_config, tiny_train_config, flickr, bpe, accumulate):
    tiny_train_config.batch_size, tiny_train_config.accumulate, tiny_train_config.max_bad_steps = 2, accumulate, 1
    breaks(flickr, "1001.jpg", "1008.jpg")  # in training, in validation
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    dls = script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    steps = []
    step = trainer.train_step
    trainer.train_step = lambda batches: steps.append(step(batches)) or steps[-1]
    result = trainer.run_training()
    skipped = [count for _, count in steps if count == 0]
    assert len(skipped) == (1 if accumulate == 1 else 0) and len(steps) == 8 // accumulate
    assert trainer.bad_steps == 0
    assert np.isfinite(result["best_perplexity"]) and np.isfinite(trainer.metrics[0]["train_loss"])


def test_an_unreadable_photo_teaches_no_reward(script, tiny_config, tiny_train_config, flickr, bpe):
    tiny_train_config.scst_epochs = 1
    breaks(flickr, *(f"{1000 + i}.jpg" for i in range(7)))  # of 8
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    training, _ = script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
    model = script.VisionGPT2Model(tiny_config)
    scst = SelfCritical(model, training.dataset, script.complete(tiny_train_config, script.train_config))
    rewards = iter(range(1000))
    scst.rewards = lambda ids, places: torch.tensor([float(next(rewards)) for _ in ids])
    for images, places in scst.loader:
        readable = [place for place in places.tolist() if scst.photos[place] not in scst.unreadable_photos]
        loss, _ = scst.loss((images, places))
        (gradient,) = torch.autograd.grad(loss, model.gpt.tok_emb.weight)
        assert gradient.any() == bool(readable)


@case("A run", "photos that break: 1 of 8 in training, 1 of 2 in validation")
def _(script, flickr, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "no_data")
    breaks(flickr, "1003.jpg", "1008.jpg")
    script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path / "captioner"), *TINY, "--epochs", "1"])
    said = capfd.readouterr().err
    assert {"captioner.safetensors", "demo.png"} <= {path.name for path in (tmp_path / "captioner").iterdir()}
    return next(line for line in said.splitlines() if "1003.jpg: not a readable" in line)


@case("A run", "more broken photos than `max_bad_images`")
def _(script, tiny_config, tiny_train_config, flickr, bpe):
    tiny_train_config.num_workers, tiny_train_config.max_bad_images = 2, 1
    breaks(flickr, "1002.jpg", "1003.jpg")
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    for _ in script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)[0]:
        pass


@case("A run", "no readable photo in validation")
def _(script, tiny_config, tiny_train_config, flickr, bpe):
    breaks(flickr, "1008.jpg", "1009.jpg")
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    for _ in script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)[1]:
        pass


@case("A run", "`data/` vanishes while it trains")
def _(script, tiny_config, tiny_train_config, flickr, dls):
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    trainer.run_training()
    shutil.rmtree(flickr)
    try:
        trainer.train_one_epoch(1)
    finally:
        trainer.load_best_model()  # what was written is there


# --- captions ---------------------------------------------------------------------------------------------------------


def read(folder, content, name="captions.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return sources.read_captions(folder / name)["caption"].tolist()


def usable(flickr, capsys, caption):
    """Flickr30k with one more caption, as JSON Lines -> what is said about it; the others stay."""
    rows = [dict(image=f"{1000 + i}.jpg", caption=text) for i in range(12) for text in CAPTIONS]
    text = "\n".join(map(json.dumps, [*rows, dict(image="1000.jpg", caption=caption)]))
    (flickr / "results.csv").unlink()
    (flickr / "captions.jsonl").write_text(text)
    said = left_out(flickr, capsys)
    assert len(sources.drop_unusable(sources.load(flickr), "captions.jsonl")) == len(rows)
    return said


@case("Captions", "60,000 captions of one photo")
def _(script, tmp_path, bpe):
    """What is looked up in all captions of a photo is looked up once, and scores are not compared pair by pair."""
    save(tmp_path / "1.jpg")
    captions = [f"{CAPTIONS[1]} {number}" for number in range(60_000)]
    df = pd.DataFrame({"image": tmp_path / "1.jpg", "caption": captions})
    dataset = script.Dataset(df, script.build_transforms(16)[0], bpe)
    searched = 0

    class Counting:
        def search(self, text):
            nonlocal searched
            searched += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioning.images.augmentation.NOT_MIRRORABLE", Counting())
        assert len(dataset.__getitems__(range(5))) == 5
    assert searched == len(captions)
    assert metrics.bleu([captions[7]], [captions])[3] == pytest.approx(1)
    return "trained on and scored, in time that grows with their number"


@case("Captions", "byte order mark, line ends of Windows and of old Macs")
def _(tmp_path):
    for lines in ("\r\n", "\r"):
        assert read(tmp_path, f"\ufeffimage,caption{lines}1.jpg,ein Käfer{lines}".encode()) == ["ein käfer"]
    return "read, without them"


@case("Captions", "UTF-16, which Windows calls Unicode")
def _(tmp_path):
    assert read(tmp_path, "image,caption\r\n1.jpg,ein Käfer\r\n".encode("utf-16")) == ["ein käfer"]
    return "read"


@case("Captions", "separators and quotation marks in a quoted CSV field, in JSON, behind Flickr8k's tab")
def _(tmp_path):
    text = "say \"hi\", | she\tsaid; 'so'"
    table = io.StringIO()
    csv.writer(table).writerows([("image", "caption"), ("1.jpg", text)])
    truth = ["say \"hi\", | she said; 'so'"]
    assert read(tmp_path, table.getvalue()) == truth
    assert read(tmp_path, json.dumps({"1.jpg": [text]}), "captions.json") == truth
    assert read(tmp_path, f"1.jpg#0\t{text}", "Flickr8k.token.txt") == truth
    return "read as they are"


def said_of(folder, capsys, text="have|left out|unescaped|read as|is a|taken for|separated by"):
    """What `load_usable` says about the files it reads, in the line in which one of the words is."""
    sources.load_usable(folder, None, None, "flickr30k")
    return next(line for line in capsys.readouterr().out.splitlines() if re.search(text, line))


def rewritten(flickr, content, name="captions.csv"):
    """The folder with other captions in place of its own."""
    (flickr / "results.csv").unlink(missing_ok=True)
    (flickr / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return flickr


PHOTOS = [f"{1000 + i}.jpg" for i in range(12)]


@case("Captions", "a separator in a caption that is not quoted, in the last column")
def _(flickr, capsys):
    with open(flickr / "results.csv", "a") as file:
        file.write("1000.jpg| 2| a man | a dog\n")
    said = said_of(flickr, capsys)
    assert sources.load(flickr)["caption"].iloc[-1] == "a man | a dog"
    return said


@case("Captions", "a separator in a caption that is not quoted, in another column")
def _(tmp_path):
    read(tmp_path, "caption,image\na dog,1.jpg\na dog, running,1.jpg\n")


@case("Captions", "a row of nothing but separators")
def _(flickr, capsys):
    with open(flickr / "results.csv", "a") as file:
        file.write("|||\n")
    return said_of(flickr, capsys, "left out")


@case("Captions", "a row that breaks off")
def _(flickr, capsys):
    with open(flickr / "results.csv", "a") as file:
        file.write("1000.jpg| 2")
    return said_of(flickr, capsys, "left out")


@case("Captions", "separators and column names of spreadsheets")
def _(flickr, capsys):
    lines = ["Image Name;Comment", *(f"{name};a {name}" for name in PHOTOS)]
    return said_of(rewritten(flickr, "\r\n".join(lines)), capsys)


@case("Captions", "a table without column names")
def _(flickr, capsys):
    said = said_of(
        rewritten(flickr, "".join(f"{name},a dog, {name}\n" for name in PHOTOS)), capsys, "no line of column"
    )
    assert sources.load(flickr)["caption"].iloc[0] == "a dog, 1000.jpg"
    return said


@case("Captions", "text that was written for a web page: `&amp;`, `<b>`, soft hyphens")
def _(flickr, capsys):
    text = json.dumps({name: ["a man &amp; a <b>dog</b>&#39;s toy"] for name in PHOTOS})
    said = said_of(rewritten(flickr, text, "captions.json"), capsys)
    assert set(sources.load(flickr)["caption"]) == {"a man & a dog's toy"}
    return said


@case("Captions", "a quotation mark that nothing closes, in CSV")
def _(tmp_path):
    read(tmp_path, 'image,caption\n1.jpg,"a dog\n2.jpg,a cat\n')


@case("Captions", "NUL, and what colours a terminal, rings its bell, moves its cursor")
def _(tmp_path):
    assert read(tmp_path, "image,caption\n1.jpg,a\0 \x1b[31mred\x1b[0m\a dog\b\n2.jpg,b\n") == ["a red dog", "b"]
    return "read without them"


@case("Captions", "100,000 characters")
def _(flickr, capsys):
    return usable(flickr, capsys, "a.b," * 25_000)


@case("Captions", "10,000 characters")
def _(tmp_path, script, bpe):
    assert read(tmp_path, json.dumps({"1.jpg": "dog " * 2500}), "captions.json") == [("dog " * 2500).strip()]
    ids = script.encode_caption(bpe, "dog " * 2500, 24)
    assert len(ids) == 24 and ids[-1] == bpe.eos_token_id
    return "read; training cuts it to `seq_len` tokens, the end of the caption included"


@case("Captions", "right to left, emoji, combining marks")
def _(tmp_path, bpe):
    text = "\u05db\u05dc\u05d1 \u0631\u0643\u0636 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301"
    assert read(tmp_path, f"image,caption\n1.jpg,{text}\n") == [text]
    assert bpe.decode(bpe.encode(text)) == text
    return "read; its tokens give the same text again"


@case("Captions", "empty")
def _(flickr, capsys):
    return usable(flickr, capsys, "  ")


@case("Captions", "half of a surrogate pair, as JSON can escape it")
def _(flickr, capsys):
    return usable(flickr, capsys, "a dog \ud83d runs")


@case("Captions", "Latin-1 or Windows-1252, all of the file")
def _(flickr, capsys):
    with open(flickr / "results.csv", "ab") as file:
        file.write("1000.jpg| 2| ein “Käfer”\n".encode("cp1252"))
    said = said_of(flickr, capsys)
    assert sources.load(flickr)["caption"].iloc[-1] == "ein “käfer”"
    return said


@case("Captions", "Latin-1 in a file of UTF-8")
def _(flickr, capsys):
    with open(flickr / "results.csv", "ab") as file:
        file.write("1000.jpg| 2| ein Käfer\n".encode() + "1000.jpg| 3| ein Käfer\n".encode("latin-1"))
    return left_out(flickr, capsys)


@case("Captions", "JSON of 100,000 brackets")
def _(tmp_path):
    read(tmp_path, "[" * 100_000, "captions.json")


@case("Captions", "a line that is no JSON")
def _(tmp_path):
    read(tmp_path, '{"image": "1.jpg", "caption": "a"}\n{"image": \n', "captions.jsonl")


@case("Captions", "a photo's name with NUL, or of 300 characters")
def _(flickr, capsys):
    for name in ("a\0b.jpg", "x" * 300 + ".jpg"):
        with open(flickr / "results.csv", "a") as file:
            file.write(f"{name}| 0| a dog\n")
    said = left_out(flickr, capsys)
    assert "left out 2 of 26 rows" in said
    return said


@case("Captions", "names of photos from Windows, in another case, without ending, with letters taken apart")
def _(flickr, capsys):
    (flickr / "flickr30k_images" / "1003.jpg").rename(flickr / "flickr30k_images" / "a\u0308.jpg")
    names = ["C:\\data\\train\\1000.jpg", "1001.JPG", "1002", "\u00e4.jpg", *PHOTOS[4:]]
    said = said_of(
        rewritten(flickr, json.dumps({name: ["a dog"] for name in names}), "captions.json"), capsys, "another"
    )
    assert sources.load(flickr)["image"].map(Path.is_file).all()
    return said


@case("Captions", "a photo's name that fits two")
def _(flickr):
    shutil.copy(flickr / "flickr30k_images" / "1000.jpg", flickr / "flickr30k_images" / "1000.jpeg")
    sources.load(rewritten(flickr, json.dumps({"1000": ["a dog"]}), "captions.json"))


@case("Captions", "a folder of which no file holds captions")
def _(flickr):
    sources.load(rewritten(flickr, "image,label\n1000.jpg,3\n", "labels.csv"))


@case("Captions", "folders as other projects have them: LAVIS, ClipCap, imagefolder, Kaggle's Flickr30k, Flickr8k_text")
def _(flickr):
    inner = flickr / "flickr30k_images"
    shutil.move(inner, flickr / "again")
    inner.mkdir()
    shutil.move(flickr / "again", inner / "flickr30k_images")
    shutil.move(flickr / "results.csv", inner)
    assert sources.load(flickr)["image"].map(Path.is_file).all()
    return "read; test_other_peoples_files.py has each of them"


@case("Captions", "control characters, HTML and Markdown in a caption or a name that is shown")
def _(tmp_path):
    text = "a \x1b[31mdog <script> ![x](y) | z"
    html_pages.write_samples(tmp_path / "samples.md", ["1.jpg"], [["a"]], {1: [text]})
    shown = r"| 1 | a \\x1b\[31mdog \<script\> !\[x\](y) \| z |"
    assert shown in (tmp_path / "samples.md").read_text()
    assert "<script>" not in html_pages.photo_grid([(PIXELS, text, [], "")])
    return "written out as `\\x1b`, escaped: on the terminal, in Markdown, HTML and pictures"


@case("Captions", "photos of one split alone, when a run is to train on them")
def _(flickr):
    (flickr / "dataset_flickr30k.json").unlink()
    (flickr / "test.txt").write_text("\n".join(PHOTOS))
    assert len(sources.load(flickr)) == 24  # what does not train needs no other
    sources.load_usable(flickr, None, None, "flickr30k")


@case("Captions", "files that macOS and Windows leave behind: ._a.jpg, __MACOSX, Thumbs.db")
def _(flickr):
    folder = flickr / "flickr30k_images"
    for name in PHOTOS:
        (folder / name).with_suffix(".txt").write_text(name)
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
        (folder / f"._{name}").with_suffix(".txt").write_bytes(b"\0\5\x16\7Mac OS X")
    (flickr / "results.csv").unlink()
    assert sources.load(flickr)["caption"].tolist() == PHOTOS
    return "ignored, in folders and in tars"


@case("Captions", "a photo's name that leads out of the folder")
def _(flickr):
    with open(flickr / "results.csv", "a") as file:
        file.write("../../secret.jpg| 0| a secret\n")
    sources.load(flickr)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioner(tiny_model, bpe, tmp_path):
    """A checkpoint folder."""
    config = dict(model_config=checkpoint.portable(tiny_model.config, tmp_path), preprocessing=tiny_model.preprocessing)
    checkpoint.save_checkpoint(tmp_path / "captioner", tiny_model.state_dict(), config, bpe)
    return tmp_path / "captioner"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_checkpoint_that_is_damaged_below_is_whole(script, captioner, tiny_model):
    model, _ = script.load_captioner(captioner)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model.parameters(), strict=True))


def half_written(name):
    @case("Files", f"half-written {name}")
    def _(script, captioner):
        content = (captioner / name).read_bytes()
        (captioner / name).write_bytes(content[: len(content) // 2])
        if name.endswith(".pt"):
            checkpoint.load_weights(captioner / name)
        script.load_captioner(captioner)


for file in (WEIGHTS_FILE, TORCH_FILE, CONFIG_FILE, TOKENIZER_FILE):
    half_written(file)


@case("Files", "weights that are a pickle with code in it")
def _(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weights": Evil()}, tmp_path / "captioner.pt")
    try:
        checkpoint.load_weights(tmp_path / "captioner.pt")
    finally:
        assert not (tmp_path / "ran").exists()


def wrong_type(section, key, value):
    @case("Files", f"`config.json` with `{key}` {json.dumps(value)}")
    def _(script, captioner):
        config = json.loads((captioner / "config.json").read_text())
        (config[section] if section else config)[key] = value
        (captioner / "config.json").write_text(json.dumps(config))
        script.load_captioner(captioner)


for place in (
    (None, "model_config", [1, 2]),
    (None, "preprocessing", 224),
    ("model_config", "embed_dim", "768"),
    ("model_config", "depth", -1),
    ("model_config", "num_heads", True),
    ("model_config", "encoder_options", "none"),
    ("preprocessing", "mean", 0.5),
    ("preprocessing", "img_size", None),
):
    wrong_type(*place)


def lying_size(section, key, value):
    @case("Files", f"`config.json` with {f'`{section}`, ' if section else ''}`{key}` {json.dumps(value)}")
    def _(script, captioner):
        config = json.loads((captioner / "config.json").read_text())
        (config["model_config"][section] if section else config["model_config"])[key] = value
        (captioner / "config.json").write_text(json.dumps(config))
        built = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script.VisionGPT2Model, "__init__", lambda *args, **options: built.append(args))
            try:
                script.load_captioner(captioner)
            finally:
                assert not built  # the header of the weights is compared first


for lie in ((None, "depth", 10**6), (None, "vocab_size", 10**12), ("encoder_options", "depth", 10**5)):
    lying_size(*lie)


@case(
    "Files",
    "weights as `torch.compile`, DistributedDataParallel and PyTorch Lightning save them, in `captioner.pt` only",
)
def _(script, captioner, tiny_model):
    (captioner / WEIGHTS_FILE).unlink()
    wrapped = {f"model.module._orig_mod.{name}": tensor for name, tensor in tiny_model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, captioner / TORCH_FILE)
    model, _ = script.load_captioner(captioner)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model.parameters(), strict=True))
    return "loaded, as strictly as any"


@case("Files", "`config.json` whose `encoder_options` name a file for timm to load (`checkpoint_path`)")
def _(script, captioner, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    config = json.loads((captioner / CONFIG_FILE).read_text())
    config["model_config"]["encoder_options"] |= {"checkpoint_path": str(tmp_path / "evil.pth")}
    (captioner / CONFIG_FILE).write_text(json.dumps(config))
    try:
        script.load_captioner(captioner)
    finally:
        assert not (tmp_path / "ran").exists()


@case("Files", '`config.json` with `encoder` "user/repo": captioning asks no Hub')
def _(script, captioner, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("the Hub is asked"))
    config = json.loads((captioner / CONFIG_FILE).read_text())
    config["model_config"]["encoder"] = "user/repo"
    (captioner / CONFIG_FILE).write_text(json.dumps(config))
    script.load_captioner(captioner)


@case("Files", "an encoder's `config.json` with code of its own (`auto_map`)")
def _(tmp_path, monkeypatch):
    """On a terminal transformers would ask whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run the code"))
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / CONFIG_FILE).write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (tmp_path / "tower" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    try:
        hugging_face.read_vision_tower(tmp_path / "tower")
    finally:
        assert not (tmp_path / "ran").exists()


@case("Files", "index of sharded weights that names a file outside of its folder")
def _(tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"secret": "../secret.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    hugging_face.read_weights(tmp_path / "hf")


def changed_config(what, section, **changes):
    @case("Files", f"`config.json` with {what}")
    def _(script, captioner):
        config = json.loads((captioner / CONFIG_FILE).read_text())
        values = config[section]
        if section == "model_config" and "refiner" not in changes:
            values = values["encoder_options"]
        values |= changes
        (captioner / CONFIG_FILE).write_text(json.dumps(config))
        script.load_captioner(captioner)


changed_config("a mean that is no number", "preprocessing", mean=[float("nan")] * 3)
changed_config("an infinite std", "preprocessing", std=[float("inf")] * 3)
changed_config("`encoder_options` with 0 heads", "model_config", num_heads=0)
changed_config("`encoder_options` with a list as depth", "model_config", depth=[1])
changed_config("`encoder_options` with patches of 0 pixels", "model_config", patch_size=0)
changed_config("`encoder_options` with images that are no squares", "model_config", img_size=[384, 256])
changed_config("`encoder_options` with a class token that is missing", "model_config", class_token=False)
changed_config("photos of 100,000 pixels a side", "model_config", img_size=100_000)
changed_config("`encoder_options` of a network far larger than its weights", "model_config", mlp_ratio=50_000)
changed_config("a `refiner` of width 'x'", "model_config", refiner={"width": "x"}, encoder="resnet10t")


@case("Files", "`config.json` of 100,000 brackets")
def _(script, captioner):
    (captioner / CONFIG_FILE).write_text("[" * 100_000)
    script.load_captioner(captioner)


@case("Files", "`config.json` that is a list")
def _(script, captioner):
    (captioner / CONFIG_FILE).write_text("[1, 2]")
    script.load_captioner(captioner)


def changed_weights(what, change):
    @case("Files", f"weights that are {what}")
    def _(script, captioner, tiny_model):
        weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
        weights["gpt.tok_emb.weight"] = change(weights["gpt.tok_emb.weight"])
        save_file(weights, captioner / WEIGHTS_FILE)
        script.load_captioner(captioner)


changed_weights("no numbers (NaN)", lambda tensor: tensor * torch.nan)
changed_weights("infinite in one place", lambda tensor: tensor.index_fill(0, torch.tensor([3]), torch.inf))
changed_weights("integers", lambda tensor: tensor.int())


@case("Files", "token cache with a byte that has changed")
def _(tiny_model, flickr, tmp_path):
    """Also where a data worker reads it."""
    photos = sorted(map(str, (flickr / "flickr30k_images").iterdir()))
    cache = TokenCache(tmp_path / "token_cache", tiny_model).fill(tiny_model, photos)
    with open(cache.folder / "level_1.float16", "r+b") as file:
        file.seek(1000)
        file.write(b"\x77")
    cache = TokenCache(tmp_path / "token_cache", tiny_model)
    with pytest.raises(ValueError, match="are damaged") as in_worker:
        list(Loader(Jobs(cache.__getitem__, photos), batch_size=None, num_workers=1))
    assert len(str(in_worker.value).splitlines()) == 1
    for photo in photos:
        cache[photo]


@case("Files", "token cache with a damaged manifest or index")
def _(tiny_model, flickr, tmp_path):
    photos = sorted(map(str, (flickr / "flickr30k_images").iterdir()))
    whole = TokenCache(tmp_path / "token_cache", tiny_model).fill(tiny_model, photos).batch(photos)
    folder = TokenCache(tmp_path / "token_cache", tiny_model).folder
    shapes = json.loads((folder / "manifest.json").read_text())
    for name, content in (
        ("manifest.json", "[" * 100_000),
        ("manifest.json", "[]"),
        ("manifest.json", json.dumps(shapes | {"shapes": [[1, 2], "x"]})),
        ("manifest.json", json.dumps(shapes | {"shapes": [[5, 24]] * 7})),
        ("manifest.json", json.dumps(shapes | {"shapes": [[0, 0]]})),
        ("index.jsonl", "[" * 100_000 + "\n"),
        ("index.jsonl", "{}\n7\n"),
        ("index.jsonl", '["a", 1]\n'),
    ):
        (folder / name).write_text(content)
        cache = TokenCache(tmp_path / "token_cache", tiny_model).fill(tiny_model, photos)
        assert all(map(torch.equal, cache.batch(photos), whole)), content[:20]
    return "the tokens are computed again"


def damaged_record(what, write):
    @case("Files", what)
    def _(flickr, tmp_path):
        pytest.importorskip("webdataset")
        write(flickr, tmp_path)


def damaged_store(flickr, tmp_path):
    photo_store.write_store(flickr, tmp_path / "store")
    (tmp_path / "store" / "index.jsonl").write_text("7\n{}\n[]\n")
    photo_store.write_store(flickr, tmp_path / "store")  # the photos are made again
    (tmp_path / "store" / "manifest.json").write_text("[" * 100_000)
    photo_store.write_store(flickr, tmp_path / "store")


def damaged_shards(flickr, tmp_path):
    writing.write_shards(flickr, tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").write_text('{"shards": [1]}')
    writing.write_shards(flickr, tmp_path / "shards")


damaged_record("photo store with a damaged index, then a damaged manifest", damaged_store)
damaged_record("shards with a damaged manifest", damaged_shards)


@case("Files", "a tensor of the wrong shape, one missing, one unknown")
def _(script, captioner, tiny_model):
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    weights["encoder.vit.pos_embed"] = torch.zeros(1, 3, 24)
    weights["stranger"] = weights.pop("gpt.final_norm.scale")
    save_file(weights, captioner / WEIGHTS_FILE)
    script.load_captioner(captioner)


def bad_archive(what, *members):
    @case("Files", f"archive with {what}")
    def _(tmp_path):
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for name, content in (("a/1.jpg", "1"), *members):
                archive.writestr(name, content)
        (tmp_path / "inside").mkdir()
        try:
            downloads.extract(tmp_path / "photos.zip", tmp_path / "inside", {"a/": "images/"})
        finally:
            assert not list((tmp_path / "inside").iterdir()) and not (tmp_path / "evil.txt").exists()


LINK = zipfile.ZipInfo("a/link")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
bad_archive("`..` in a name", ("a/../../evil.txt", "evil"))
bad_archive("an absolute name", ("/etc/evil.txt", "evil"))
bad_archive("a link", (LINK, "/etc"))


@case("Files", "archive that is encrypted")
def _(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a/1.jpg", "1")
    content = bytearray((tmp_path / "photos.zip").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # of the member, in the directory
        content[content.index(header) + flags] |= 1
    (tmp_path / "photos.zip").write_bytes(content)
    downloads.extract(tmp_path / "photos.zip", tmp_path, {"a/": "images/"})


def stranger_s_tokenizer(what, change):
    @case("Files", f"`tokenizer.json` with {what}")
    def _(script, captioner):
        content = json.loads((captioner / TOKENIZER_FILE).read_text())
        change(content)
        (captioner / TOKENIZER_FILE).write_text(json.dumps(content))
        script.load_captioner(captioner)


stranger_s_tokenizer(
    "a regular expression that takes for ever",
    lambda content: content.update(
        pre_tokenizer=dict(type="Split", pattern={"Regex": "(a+)+$"}, behavior="Removed", invert=False)
    ),
)
stranger_s_tokenizer(
    "a token of the id 2,000,000,000", lambda content: content["model"]["vocab"].update({"a": 2 * 10**9})
)


@case("Files", "state of a run whose moments AdamW would read behind their end")
def _(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", epochs=1)
    trainer.run_training()
    state = torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True)
    state["optimization"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(state, tmp_path / "run" / "last" / "state.pt")
    make_trainer(tmp_path / "other", resume=str(tmp_path / "run"))


@case("Files", "half an archive")
def _(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"1" * 1000)
    (tmp_path / "photos.zip").write_bytes((tmp_path / "photos.zip").read_bytes()[:500])
    downloads.extract(tmp_path / "photos.zip", tmp_path, {"a/": "images/"})


@contextlib.contextmanager
def disk_full_behind(size):
    """Writing fails as on a full disk, behind `size` bytes of a file (the reason that is told is another)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@case("Files", "disk full half-way through `captioner.safetensors`")
def _(captioner, tiny_model, bpe):
    before = contents(captioner)
    try:
        with disk_full_behind(20_000):
            checkpoint.save_checkpoint(captioner, tiny_model.state_dict(), {}, bpe)
    finally:
        assert contents(captioner) == before


@case("Files", "disk full half-way through `captioner.pt`")
def _(captioner, tiny_model):
    before = contents(captioner)
    try:
        with disk_full_behind(20_000):
            write_atomically(captioner / "captioner.pt", lambda path: torch.save(tiny_model.state_dict(), path))
    finally:
        assert contents(captioner) == before


@case("Files", "disk full half-way through `metrics.csv`")
def _(script, tiny_train_config, tmp_path):
    config = script.complete(tiny_train_config, script.train_config)
    log = RunLog(tmp_path / "captioner", config, script.ProcessGroup("cpu"))
    log.record(0, "everything", 1e-3, 3.0, 20.0, {})
    before = contents(tmp_path / "captioner")
    try:
        with disk_full_behind(150):
            log.record(1, "everything", 1e-3, 2.0, 10.0, {})
    finally:
        assert list(before) == ["metrics.csv"] and contents(tmp_path / "captioner") == before


@case("Files", "disk full half-way through the token cache")
def _(tiny_model, flickr, tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.data.token_cache.SYNC_EVERY", 2)
    photos = sorted((flickr / "flickr30k_images").iterdir())
    whole = TokenCache(tmp_path / "whole", tiny_model).fill(tiny_model, photos)
    size = (whole.folder / "level_0.float16").stat().st_size
    try:
        with disk_full_behind(size // 2):
            TokenCache(tmp_path / "token_cache", tiny_model).fill(tiny_model, photos, batch_size=2)
    finally:
        kept = TokenCache(tmp_path / "token_cache", tiny_model)
        assert 0 < kept.rows < len(photos)
        first = photos[: kept.rows]
        assert all(map(torch.equal, kept.batch(first), whole.batch(first)))
        kept.fill(tiny_model, photos)  # with room again, the rest
        assert all(map(torch.equal, kept.batch(photos), whole.batch(photos)))


@case("Files", "output folder that may not be written")
def _(tiny_model, bpe):
    with for_everybody() as folder:
        (folder / "captioner").mkdir()
        weights = tiny_model.state_dict()
        with read_only(folder / "captioner"), pytest.raises(OSError) as error:
            checkpoint.save_checkpoint(folder / "captioner", weights, {}, bpe)
        return f"error: {error.value}".replace(f"{folder}/", "")


@case("Files", "output folder that may not be made: found before training")
def _():
    with for_everybody() as folder:
        with read_only(folder), pytest.raises(OSError) as error, run_folder.writing(folder / "captioner"):
            pass
        return f"error: {error.value}".replace(f"{folder}/", "")


# --- tar shards -------------------------------------------------------------------------------------------------------


def stream(script, folder, words, **changes):
    """One epoch over the training shards in `folder`."""
    config = script.complete(SimpleNamespace(batch_size=2, **changes), script.train_config)
    rows = sources.load_usable(folder, None, None, "flickr30k")
    dataset = script.Dataset(rows[:0], script.build_transforms(16)[0], words)
    collate = partial(script.collate_fn, tokenizer=words)
    return list(streaming.build_stream_loader(folder, dataset, collate, config))


def two_shards(folder, **damage):
    """Shards 0 and 1 of 3 photos; `damage`: {name of a member of shard 0: its content, None for none}."""
    pytest.importorskip("webdataset")
    make_shards(folder, [[1] * 3] * 2)
    reading.training_shards(folder)
    (folder / "counts.json").rename(folder / "manifest.json")  # it is known how they were
    content = members(0, 0, 1) | members(0, 1, 1) | members(0, 2, 1) | damage
    write_tar(folder / "train-000000.tar", {name: value for name, value in content.items() if value is not None})
    return folder


def said(capsys):
    return capsys.readouterr().err.partition("warning: ")[2].partition("\n")[0]


@case("Tar shards", "a shard that breaks off")
def _(script, bpe, tmp_path, capsys):
    folder = two_shards(tmp_path / "shards")
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    batches = stream(script, folder, bpe)
    assert len(batches) == 3
    return f"warning: {said(capsys)}"


@case("Tar shards", "a broken photo, and a json of 100,000 brackets")
def _(script, bpe, tmp_path, capsys):
    damage = {"000001.jpg": b"no photo", "000002.json": b"[" * 100_000}
    assert len(stream(script, two_shards(tmp_path / "shards", **damage), bpe)) == 3
    warnings = [line for line in capsys.readouterr().err.splitlines() if "Training goes on without it" in line]
    assert len(warnings) == 2
    return min(warnings, key=len)


@case("Tar shards", "more that is broken than `max_bad_images`")
def _(script, bpe, tmp_path):
    folder = two_shards(tmp_path / "shards", **{"000000.jpg": b"", "000001.jpg": b""})
    stream(script, folder, bpe, max_bad_images=1)


@case("Tar shards", "names that lead out of the tar; links, devices")
def _(script, bpe, tmp_path):
    link, device = tarfile.TarInfo(), tarfile.TarInfo()
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    damage = {"../000003.jpg": b"", "/etc/000004.jpg": b"", "000005.jpg": link, "000006.jpg": device}
    folder = two_shards(tmp_path / "shards", **damage)
    before = sorted(tmp_path.rglob("*"))
    stream(script, folder, bpe, max_bad_images=0)
    assert sorted(tmp_path.rglob("*")) == before
    return "not read; nothing is ever unpacked"


@case("Tar shards", "a member of a terabyte, by its header")
def _(script, bpe, tmp_path, capsys):
    huge = tarfile.TarInfo()
    huge.size = 2**40
    stream(script, two_shards(tmp_path / "shards", **{"000002.jpg": huge}), bpe)
    return f"warning: {said(capsys)}"


@case("Tar shards", "a header of 3 GB for a long name")
def _(tmp_path):
    header = tarfile.TarInfo("./PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 3 * 2**30
    with open(tmp_path / "photos.tar", "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(3 * 2**30 + 2048)  # no blocks on the disk
    with open(tmp_path / "photos.tar", "rb") as file:
        list(tar_members.members(file))


@case("Tar shards", "shards that are still being written")
def _(tmp_path):
    folder = two_shards(tmp_path / "shards")
    (folder / "progress.jsonl").touch()
    sources.load(folder)


# --- the table --------------------------------------------------------------------------------------------------------


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    from MyLLM_Vit_gpt2_captioning import REPO_ROOT, load_captioner

    with serving(*load_captioner(REPO_ROOT / "examples" / "shapes"), max_bytes=1_000_000) as running:
        yield running


def answered(server, content, **request):
    """The status and the message of the answer to a request whose messages have this content."""
    body = dict(model="mine", messages=[{"role": "user", "content": content}]) | request
    status, answer = post(server.url, json.dumps(body).encode())
    return f"{status}: {answer['error']['message']}"


def request_with(name, url, **request):
    @case("Requests to the server", name)
    def _(server):
        content = [{"type": "image_url", "image_url": {"url": url() if callable(url) else url}}]
        return answered(server, content, **request)


request_with("a text file as image", data_url(b"hello"))
request_with("decompression bomb: 400 million pixels in 100 bytes", data_url(png(20_000, 20_000, 8, 2, b"\0")))
request_with("an image of 56 million pixels", data_url(png(8000, 7000, 8, 2, b"\0")))
request_with("what is not base64", "data:image/png;base64,@@@")
request_with("more bytes than allowed", lambda: data_url(bytes(1_000_000)))
request_with("a file of the server's machine", "file:///etc/passwd")
request_with("a URL, where nothing is fetched", "http://example.org/photo.jpg")
request_with("another model, its name with control characters", "", model="\x1b[31mgpt")
request_with("10,000 choices", "", n=10_000)
request_with("NaN as temperature", "", temperature=float("nan"))


@case("Requests to the server", "a URL of the machine or its network, with `--allow_urls`")
def _(server, monkeypatch):
    monkeypatch.setattr(server.served, "allow_urls", True)
    monkeypatch.setenv("NO_PROXY", "*")
    for url in (
        "http://127.0.0.1/x.png",
        "http://[::1]/x.png",
        "http://169.254.169.254/latest",
        "http://10.0.0.1/x.png",
    ):
        outcome = answered(server, [{"type": "image_url", "image_url": {"url": url}}])
        assert "which is no public address" in outcome
    return outcome


@case("Requests to the server", "JSON of 100,000 brackets")
def _(server):
    status, answer = post(server.url, b"[" * 100_000)
    return f"{status}: {re.match('the body: invalid JSON', answer['error']['message'])[0]}"


@case("Requests to the server", "a form, as a page elsewhere can have a browser send it")
def _(server):
    status, answer = post(server.url, b"{}", "text/plain")
    return f"{status}: {answer['error']['message']}"


@case("Requests to the server", "a page elsewhere whose name leads to this machine")
def _(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/models", headers={"Host": "evil.example"}))
    return f"{refused.value.code}: {refused.value.read().decode()}"


@pytest.mark.filterwarnings("ignore:.*(Tag data|Truncated|Corrupt EXIF)")  # Pillow about the damage
@pytest.mark.parametrize("key", CASES, ids=lambda key: key[1])
def test_case(key, request, tmp_path):
    function = CASES[key]
    arguments = {name: request.getfixturevalue(name) for name in inspect.signature(function).parameters}
    try:
        outcome = function(**arguments)
        assert outcome, "the case neither failed nor said what happened"
    except (OSError, ValueError) as error:  # what the script prints as "error: ..."
        outcome = f"error: {error}"
    OUTCOMES[key] = row(key, outcome.replace(f"{tmp_path}/", ""))
    assert str(tmp_path) not in OUTCOMES[key]
    if not UPDATE:
        assert OUTCOMES[key] in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_shows_all_cases_and_no_others():
    if UPDATE:
        lines = [
            "# Input that fights back",
            "",
            'What happens to it; written by `test_hostile_input.py`. "error:" ends the program with that line.',
        ]
        for section in dict.fromkeys(section for section, _ in CASES):
            lines += ["", f"## {section}", "", "| input | what happens |", "| --- | --- |"]
            lines += [OUTCOMES[key] for key in CASES if key[0] == section]
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = re.findall(r"^\| (.*?) \| ", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in shown if name not in ("input", "---")] == [name for _, name in CASES]
