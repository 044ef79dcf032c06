"""Training augmentation that keeps captions true.

A caption is a label for the whole picture, and most augmentations make some captions false. Here the crop keeps at
least `crop_scale` of the area, colours change only in brightness and contrast (never in hue), and a picture is
mirrored only when none of its captions speaks of left, right or written text.
"""

import os
import random
import re

import numpy as np

from preprocessing import preprocess, to_normalized_tensor

# albumentations 2.0.8 asks a server for newer versions when it is imported; a training run needs no network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2

# Words that a mirrored picture would make false: directions, and writing, which would become unreadable.
NOT_MIRRORABLE = re.compile(
    r"\b(left|right|clockwise|anticlockwise|counterclockwise|reads|letter|word|text|writing|written|number|says|saying)",
    re.IGNORECASE,
)


def may_mirror(captions):
    """True when no caption of the picture would become false in a mirror."""
    return not any(NOT_MIRRORABLE.search(caption) for caption in captions)


class TrainingTransforms:
    """`transforms(image=array, captions=[...], seed=...)["image"]` -> float tensor (3, img_size, img_size)."""

    def __init__(self, img_size, mean, std, crop_scale=0.8):
        self.mean, self.std = mean, std
        crop = A.RandomResizedCrop((img_size, img_size), scale=(crop_scale, 1.0), interpolation=cv2.INTER_AREA)
        light = A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.5)
        self.mirrored = A.Compose([crop, A.HorizontalFlip(p=0.5), light])
        self.unmirrored = A.Compose([crop, light])

    def __call__(self, image, captions=(), seed=None):
        """image (H, W, 3) uint8; `captions` are all captions of the picture; the same `seed` gives the same result."""
        transforms = self.mirrored if may_mirror(captions) else self.unmirrored
        if seed is not None:
            # One stream for all steps: `set_random_seed` would start each step at the same number, so that every
            # mirrored picture would also be a brightened one.
            generator = np.random.default_rng(seed)
            transforms.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        pixels = transforms(image=np.asarray(image))["image"]  # (img_size, img_size, 3) uint8
        return {"image": to_normalized_tensor(pixels, self.mean, self.std)}


class ValidationTransforms:
    """The plain preprocessing, called like a training transform; pixel for pixel `preprocessing.preprocess`."""

    def __init__(self, img_size, mean, std):
        self.img_size, self.mean, self.std = img_size, mean, std

    def __call__(self, image, captions=(), seed=None):
        """image (H, W, 3) uint8 -> {"image": float tensor (3, img_size, img_size)}; the rest is not used."""
        return {"image": preprocess(np.asarray(image), self.img_size, self.mean, self.std)}
