"""What training does to photos: crops, mirrors and light, from a seed alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.images.augmentation import may_mirror, random_crop_box, random_light, with_light


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
        plain = valid_tfms(image=pixels)["image"]
        unmirrored = [train_tfms(image=pixels, captions=["left"], seed=[seed])["image"] for seed in range(10)]
        differences = [image - plain for image in unmirrored]
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


@pytest.mark.parametrize(("contrast", "brightness"), [(0.85, 0.15), (1.15, -0.15), (1.07, 0.031), (1.0, -0.1)])
def test_light_is_albumentations(photo, contrast, brightness):
    A = pytest.importorskip("albumentations", exc_type=ImportError)
    theirs = A.RandomBrightnessContrast().apply(photo, contrast, brightness * 255)
    assert np.array_equal(with_light(photo, contrast, brightness), theirs)


def test_light_is_distributed_as_albumentations():
    """How often light changes, and the quantiles of the changes: of middle grey (brightness) and of the distance
    between a dark and a bright grey (contrast)."""
    A = pytest.importorskip("albumentations", exc_type=ImportError)
    theirs = A.Compose([A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.5)], seed=0)
    generator = np.random.default_rng(0)
    greys = np.repeat(np.array([[[78], [128], [178]]], dtype=np.uint8), 3, axis=2)  # (1, 3, 3)

    def measured(change):
        dark, middle, bright = np.array([change(greys)[0, :, 0] for _ in range(3000)], dtype=int).T  # (3000,) each
        changed = (dark, middle, bright) != greys[0, :, :1]
        changed = changed.any(axis=0)
        shares = np.linspace(0, 1, 11)
        quantiles = [np.quantile(values[changed], shares) for values in (middle - 128, bright - dark - 100)]
        return changed.mean(), np.concatenate(quantiles)

    our_share, our_quantiles = measured(lambda image: random_light(generator, image))
    their_share, their_quantiles = measured(lambda image: theirs(image=image)["image"])
    assert abs(our_share - 0.5) < 0.03 and abs(their_share - 0.5) < 0.03
    assert np.abs(our_quantiles - their_quantiles).max() <= 4  # of a range of 100 and more, and one of 30
    assert our_quantiles.min() < -50 and our_quantiles.max() > 50


def test_mirror_and_light_are_independent(script):
    """A mirrored picture is as often brightened as another one, and captions do not change the light."""
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:, 4:] = 128
    train_tfms = script.build_transforms(8, crop_scale=1.0, normalized=False)[0]
    mirrored, changed = [], []
    for seed in range(400):
        image, plain = (train_tfms(image=picture, captions=[text], seed=seed)["image"] for text in ("", "left"))
        mirrored.append(image[0, 0, 0].item() > image[0, 0, -1].item())
        changed.append(plain[0, 0, -1].item() != 128)
        assert torch.equal(plain, image.flip(-1) if mirrored[-1] else image)
    mirrored, changed = np.array(mirrored), np.array(changed)
    for chosen in (mirrored, ~mirrored):
        assert 150 < chosen.sum() < 250
        assert 0.35 < changed[chosen].mean() < 0.65


def test_augmentation_depends_on_its_seed_only(script, photo):
    first, second = (script.build_transforms(32)[0] for _ in range(2))
    second(image=photo, seed=[9])
    a, b = (tfms(image=photo, seed=[0, 1, 2])["image"] for tfms in (first, second))
    assert torch.equal(a, b)
    assert not torch.equal(a, first(image=photo, seed=[0, 2, 2])["image"])
