"""Photos that turn out to be unreadable while a run trains: named once, counted, and left out of the loss, so that one
broken file among 100,000 does not end a night's work."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.utils.data

from captioning.images.preprocessing import load_image

GREY = np.full((8, 8, 3), 128, dtype=np.uint8)


class BadImages:
    """Which of some photos cannot be read: `path in bad_images`, known as soon as `load` was asked for the photo.

    A grey picture takes the place of such a photo, so that the order and the number of steps stay what they are.
    """

    def __init__(self, images, most):
        """`images`: paths; `most`: how many of them may be unreadable, `max_bad_images`."""
        self.images, self.most, self.known = list(images), most, 0
        self.places = {image: place for place, image in enumerate(self.images)}
        self.flags = torch.zeros(len(self.images), dtype=torch.bool).share_memory_()  # shared: data workers set them

    def __contains__(self, image):
        return bool(self.flags[self.places[image]])

    def load(self, image, least_side=None):
        """-> upright RGB pixels (H, W, 3) uint8; grey ones for a photo that cannot be read. `least_side` as in
        `load_image`."""
        if image in self:
            return GREY
        try:
            return np.asarray(load_image(image, least_side))
        except (OSError, ValueError) as error:
            self.flags[self.places[image]] = True
            print(f"\nwarning: {error}. Training goes on without it and its captions", file=sys.stderr)
            return GREY

    def check(self):
        """Raise FileNotFoundError when a folder of photos has vanished, ValueError when more photos than `most`, or all
        of them, cannot be read."""
        count = int(self.flags.sum())
        if count == self.known:
            return
        self.known = count
        bad = [image for image, flag in zip(self.images, self.flags.tolist(), strict=True) if flag]
        for folder in {Path(image).parent for image in bad}:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: the folder with the photos has vanished; bring it back and start again. "
                    "What the run has written so far stays"
                )
        if count > self.most or count == len(self.images):
            everything = "" if count < len(self.images) else ", so none is left"
            raise ValueError(
                f"{count:,} of {len(self.images):,} photos of a split cannot be read{everything} (one is {bad[0]}; "
                f"max_bad_images is {self.most}): prepare_data.py --check FOLDER lists them all with their rows. "
                "Replace them, or allow more with --max_bad_images N. What the run has written so far stays"
            )


class CheckedLoader(torch.utils.data.DataLoader):
    """A DataLoader that ends with the error of its dataset's `bad_images.check()`. It is asked in this process: an
    error in a data worker would come with the worker's traceback in front of what it says."""

    def __iter__(self):
        for batch in super().__iter__():
            self.dataset.bad_images.check()
            yield batch
