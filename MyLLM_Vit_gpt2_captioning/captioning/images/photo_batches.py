"""Photos to batches of pixels, decoded by several threads: Pillow lets them run at the same time."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from captioning.images.preprocessing import resize

MAX_THREADS = 8


def photo_batches(batches, img_size, resample, device, grey16="full"):
    """Lists of images, as `load_image` takes them -> yields for each uint8 pixels (B, 3, img_size, img_size), as in
    validation; in pinned memory where they go to a CUDA device. `resample` and `grey16` as in `resize`.

    While an accelerator works on a batch the files of the next one are decoded, never more. On a CPU the cores belong
    to the model then, so that a batch is decoded when it is asked for. What `load_image` raises is raised when the
    batch with that image is due.
    """
    device, waiting = torch.device(device), deque()  # batches whose photos are being decoded
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for images in batches:
                waiting.append(_start(pool, images, device, img_size, resample, grey16))
                if len(waiting) > (device.type != "cpu"):
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _start(pool, images, device, img_size, *how):
    """-> (pixels (B, 3, img_size, img_size) uint8, a function for each image that is done when its pixels are there).

    Only files are left to threads: an image that the caller holds may be there twice, and Pillow opens it lazily.
    """
    pixels = torch.empty(len(images), 3, img_size, img_size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    jobs = []
    for place, image in zip(pixels.numpy(), images, strict=True):
        load = partial(_load, place, image, img_size, *how)
        jobs.append(pool.submit(load).result if isinstance(image, str | Path) else load)
    return pixels, jobs


def _load(place, image, img_size, *how):
    """Write the pixels to `place` (3, img_size, img_size), with NumPy: torch would start threads of its own here."""
    place[:] = np.asarray(resize(image, img_size, *how)).transpose(2, 0, 1)


def _finish(pixels, jobs):
    for job in jobs:
        job()
    return pixels
