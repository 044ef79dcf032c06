"""Training augmentation that keeps captions true.

A caption is a label for the whole picture, and most augmentations make some captions false. Here the crop keeps at
least `crop_scale` of the area, colours change only in brightness and contrast (never in hue), and a picture is
mirrored only when none of its captions speaks of left, right or writing.
"""

import math
import re
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from captioning.images.preprocessing import normalize, resize, to_tensor

# Words that mirroring the picture would make false: directions, and writing, which would become unreadable.
NOT_MIRRORABLE = re.compile(
    r"\b(left|right|clockwise|anticlockwise|counterclockwise|read|letter|word|text|writing|written|number|say|spell|"
    r"print|label|logo|sign)",
    re.IGNORECASE,
)


class CaptionsOfPicture(list):
    """All captions of a picture. A picture may have thousands, so whether it may be mirrored is looked up once."""

    @cached_property
    def may_mirror(self):
        return not any(NOT_MIRRORABLE.search(caption) for caption in self)


def may_mirror(captions):
    """True when no caption of the picture would become false in a mirror."""
    return (captions if isinstance(captions, CaptionsOfPicture) else CaptionsOfPicture(captions)).may_mirror


def random_crop_box(generator, width, height, crop_scale):
    """A box (left, top, right, bottom) that keeps at least `crop_scale` of the area.

    Its aspect varies by up to 4/3 around that of the photo, as far as the photo allows: like the whole photo in
    validation, the box is then squeezed into a square.
    """
    area = generator.uniform(crop_scale, 1)
    limit = math.log(min(4 / 3, 1 / area))
    ratio = math.exp(generator.uniform(-limit, limit))
    # The limit keeps both shares below 1 but for rounding, and Pillow refuses a box that is a hair too large.
    w, h = width * min(1, math.sqrt(area * ratio)), height * min(1, math.sqrt(area / ratio))
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    return left, top, left + w, top + h


def random_light(generator, pixels, limit=0.15, probability=0.5):
    """pixels (H, W, 3) uint8 -> with `probability` in another light: contrast * pixels + brightness * 255.

    `contrast` is drawn from 1 - limit .. 1 + limit, `brightness` from -limit .. limit: the method and the distribution
    of albumentations 2.0.8's `RandomBrightnessContrast`.
    """
    if generator.random() >= probability:
        return pixels
    contrast, brightness = 1 + generator.uniform(-limit, limit), generator.uniform(-limit, limit)
    return with_light(pixels, contrast, brightness)


def with_light(pixels, contrast, brightness):
    """pixels (H, W, 3) uint8 -> contrast * pixels + brightness * 255, cut to 0..255, uint8, rounded towards 0."""
    table = np.arange(256, dtype=np.float32) * contrast + brightness * 255  # (256,), what becomes of each value
    return table.clip(0, 255).astype(np.uint8)[pixels]


def resize_fast(pixels, side, resample):
    """pixels (H, W, 3) uint8 -> (side, side, 3) uint8, antialiased; `resample` is "bicubic" or "bilinear".

    Pillow's method in torch's 8-bit kernel, four times as fast: few values differ from `preprocessing.resize`, and
    those by rounding. Published scores were measured on Pillow's pixels, so validation keeps to them.
    """
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last
    image = F.interpolate(image, (side, side), mode=resample, antialias=True)
    return image[0].permute(1, 2, 0).contiguous().numpy()


def opening_of(transforms):
    """How the photos for these transforms are opened, as arguments of `load_image`; they may be another library's."""
    opening = dict(least_side=getattr(transforms, "least_side", None))
    grey16 = getattr(transforms, "grey16", "full")
    return opening if grey16 == "full" else opening | dict(grey16=grey16)


class TrainingTransforms:
    """`transforms(image=array, captions=[...], seed=...)["image"]` -> float tensor (3, img_size, img_size), or uint8
    when it is normalised later, on the device."""

    def __init__(self, img_size, mean, std, crop_scale=0.8, resample="bicubic", normalized=True, grey16="full"):
        self.img_size, self.mean, self.std, self.crop_scale = img_size, mean, std, crop_scale
        self.resample, self.normalized = resample, normalized
        # For `load_image`: twice the pixels that the model sees, so that the crop is still reduced.
        self.least_side, self.grey16 = 2 * img_size, grey16

    def __call__(self, image, captions=(), seed=None):
        """image (H, W, 3) uint8; `captions` are all captions of the picture; the same `seed` gives the same result."""
        generator = np.random.default_rng(seed)
        image = np.asarray(image)
        height, width, _ = image.shape
        left, top, right, bottom = random_crop_box(generator, width, height, self.crop_scale)
        crop = image[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
        image = resize_fast(crop, self.img_size, self.resample)
        if generator.random() < 0.5 and may_mirror(captions):  # drawn first: captions do not change the light
            image = image[:, ::-1]
        pixels = to_tensor(random_light(generator, image))
        return {"image": normalize(pixels, self.mean, self.std) if self.normalized else pixels}


class ValidationTransforms:
    """The plain preprocessing, called like a training transform; pixel for pixel `preprocessing.preprocess`."""

    def __init__(self, img_size, mean, std, resample="bicubic", normalized=True, grey16="full"):
        self.img_size, self.mean, self.std, self.resample, self.normalized = img_size, mean, std, resample, normalized
        self.grey16 = grey16  # for `load_image`

    def __call__(self, image, captions=(), seed=None):
        """image (H, W, 3) uint8 -> {"image": tensor (3, img_size, img_size)}; the rest is not used."""
        pixels = to_tensor(resize(np.asarray(image), self.img_size, self.resample))
        return {"image": normalize(pixels, self.mean, self.std) if self.normalized else pixels}
