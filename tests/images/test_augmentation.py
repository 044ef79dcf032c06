"""What training does to photos: crops, mirrors and light, from a seed alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.images.augmentation import may_mirror, random_crop_box


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on the left", False), ("a RIGHT-handed player", False), ("the rightmost car", False),
        ("a sign that reads stop", False), ("a bright light", True), ("a man in a copyright office", True),
        ("the logo of a team", False), ("", True),
    ],
)  # fmt: skip
def test_what_may_be_mirrored(caption, expected):
    assert may_mirror(["a plain caption", caption]) is expected


def test_training_transform_mirrors_only_when_true(script, photo):
    """Over many seeds: a picture whose red half is on the left stays that way when a caption says left."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:, :16, 0] = 255
    train_tfms = script.build_transforms(32)[0]

    def mirrored(caption):
        images = [train_tfms(image=picture, captions=[caption], seed=[seed])["image"] for seed in range(40)]
        return sum(bool(image[0, :, :8].mean() < image[0, :, -8:].mean()) for image in images)

    assert mirrored("red on the left") == 0
    assert 8 < mirrored("something red") < 32


@pytest.mark.parametrize("shape", [(40, 60), (20, 60), (60, 20), (48, 48)])
def test_crops_keep_what_they_promise(shape):
    height, width = shape
    generator, areas, aspects = np.random.default_rng(0), [], []
    for _ in range(300):
        left, top, right, bottom = random_crop_box(generator, width, height, 0.8)
        assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
        areas.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top) / (width / height))
    Image.new("RGB", (width, height)).resize((8, 8), box=random_crop_box(generator, width, height, 1.0))
    assert min(areas) >= 0.8 - 1e-9
    assert max(areas) > 0.97
    assert 0.75 < min(aspects) < 0.9 and 1.1 < max(aspects) < 1.34


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_a_crop_of_everything_is_the_validation_image(script, photo, resample):
    """Training resamples as validation does: without crop, mirror and light the pixels are the same, but for rounding
    in another kernel. On photos, larger and smaller than the model's, at most one level of 255 nearly everywhere."""
    for pixels in (photo, photo[:20, :20], np.asarray(Image.fromarray(photo).resize((300, 200)))):
        train_tfms, valid_tfms = script.build_transforms(32, crop_scale=1.0, resample=resample)
        train_tfms.mirrored = train_tfms.unmirrored
        plain = valid_tfms(image=pixels)["image"]
        differences = [train_tfms(image=pixels, seed=[seed])["image"] - plain for seed in range(10)]
        levels = min(differences, key=lambda difference: difference.abs().sum()).abs() * 255 / 2  # pixels are -1..1
        assert levels.mean() < 0.1
        assert levels.max() < 3


def test_training_transform_keeps_hue(script):
    """Brightness and contrast may change; a pure red stays the only channel that is on."""
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 200
    for seed in range(30):
        image = script.build_transforms(16)[0](image=red, seed=[seed])["image"] * 0.5 + 0.5
        assert image[0].min() > 0.5
        assert image[1:].max() < 0.2


def test_augmentation_depends_on_its_seed_only(script, photo):
    first, second = (script.build_transforms(32)[0] for _ in range(2))
    second(image=photo, seed=[9])
    a, b = (tfms(image=photo, seed=[0, 1, 2])["image"] for tfms in (first, second))
    assert torch.equal(a, b)
    assert not torch.equal(a, first(image=photo, seed=[0, 2, 2])["image"])
