"""Photos as they are decoded, and what validation makes of them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from captioning.images.augmentation import opening_of
from captioning.images.photo_batches import photo_batches
from captioning.images.preprocessing import load_image, normalize, preprocess


def test_validation_transform_is_the_plain_preprocessing(script, photo):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    valid_tfms = script.build_transforms(32, mean, std)[1]
    expected = np.array(Image.fromarray(photo).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((expected - mean) / std).permute(2, 0, 1).float()
    tensor = valid_tfms(image=photo)["image"]
    assert torch.equal(tensor, preprocess(photo, 32, mean, std))
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_default_normalisation_is_one_half(script):
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    for tfms in script.build_transforms(8)[1:]:
        torch.testing.assert_close(tfms(image=white)["image"], torch.ones(3, 8, 8))


def test_load_image_turns_photos_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_decoding_keeps_the_picture(tmp_path, mode, turn):
    """A photo of 800 x 600 is decoded at a quarter for at least 150 pixels, and still upright, with its colours."""
    smooth = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(smooth).resize((800, 600), Image.Resampling.BICUBIC).convert(mode)
    picture.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    full, reduced = load_image(tmp_path / "photo.jpg"), load_image(tmp_path / "photo.jpg", least_side=150)
    assert full.mode == reduced.mode == "RGB"
    assert full.size == ((800, 600) if turn in (1, 3) else (600, 800))
    assert reduced.size == (full.width // 4, full.height // 4)
    expected, pixels = (np.asarray(image.resize((50, 50)), dtype=float) for image in (full, reduced))
    assert np.abs(expected - pixels).mean() < 2
    assert load_image(tmp_path / "photo.jpg", least_side=301).size == full.size  # half of it would be too small


def test_least_side_changes_no_other_format(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for source in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png"), photo):
        assert np.array_equal(load_image(source, least_side=4), photo)


def test_load_image_leaves_an_opened_photo_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    opened = Image.open(tmp_path / "turned.jpg")
    assert load_image(opened).size == (20, 40)
    assert opened.size == (40, 20)


def test_only_training_decodes_reduced_photos(script, tmp_path, photo, bpe):
    """A validation photo is pixel for pixel what `preprocess` makes of the file, whatever its size."""
    Image.fromarray(photo).resize((600, 500), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    df = pd.DataFrame({"image": [tmp_path / "large.jpg"], "caption": ["a dog"]})
    train_tfms, valid_tfms = script.build_transforms(32)
    image = script.Dataset(df, valid_tfms, bpe)[0][0]
    assert torch.equal(image, preprocess(tmp_path / "large.jpg", 32, (0.5,) * 3, (0.5,) * 3))
    sizes = []

    def watched(image, captions, seed):
        sizes.append(image.shape[:2])
        return train_tfms(image=image, captions=captions, seed=seed)

    watched.least_side = train_tfms.least_side
    assert script.Dataset(df, watched, bpe)[0][0].shape == (3, 32, 32)
    assert sizes == [(125, 150)]  # a quarter; an eighth would have less than twice the 32 pixels


def test_bad_images_are_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(ValueError, match=r"broken\.jpg: not a readable image"):
        load_image(tmp_path / "broken.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such image"):
        load_image(tmp_path / "gone.jpg")


def test_16_bits_of_grey_by_the_range_of_the_photo(script, tiny_config, tmp_path):
    """An X-ray of 12 bits in a file of 16 is nearly black, unless it is scaled."""
    values = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "x_ray.png")
    dark = np.asarray(load_image(tmp_path / "x_ray.png"))
    scaled = np.asarray(load_image(tmp_path / "x_ray.png", grey16="range"))
    assert dark.max() == 15 and (scaled.min(), scaled.max()) == (0, 255)
    assert np.asarray(load_image(Image.fromarray(np.full((4, 4), 900, np.uint16)), grey16="range")).max() == 0
    config = script.complete(tiny_config, script.model_config)
    config.preprocessing = {"grey16": "range"}
    model = script.VisionGPT2Model(config)
    model.save_pretrained(tmp_path / "captioner")
    stored = json.loads((tmp_path / "captioner" / "config.json").read_text())
    assert stored["preprocessing"]["grey16"] == "range"
    assert script.VisionGPT2Model.from_pretrained(tmp_path / "captioner").preprocessing["grey16"] == "range"
    assert "grey16" not in script.VisionGPT2Model(tiny_config).preprocessing
    config.preprocessing = {"grey16": "most"}
    with pytest.raises(ValueError, match="preprocessing: grey16 'most' is neither full nor range"):
        script.VisionGPT2Model(config)
    photo, path = model.preprocessing, tmp_path / "x_ray.png"
    seen = preprocess(path, **photo)
    assert seen.max() - seen.min() > 10 * (preprocess(path, **(photo | {"grey16": "full"}))).std()
    [batch] = photo_batches([[path]], photo["img_size"], photo["resample"], "cpu", "range")
    assert torch.equal(normalize(batch, photo["mean"], photo["std"])[0], seen)
    for tfms in script.build_transforms(photo["img_size"]):
        assert opening_of(tfms).keys() == {"least_side"}
        tfms.grey16 = "range"
        assert np.array_equal(np.asarray(load_image(path, **opening_of(tfms))), scaled)
