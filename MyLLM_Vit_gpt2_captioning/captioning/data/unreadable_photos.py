"""Photos that cannot be read: while a run trains each is named once, counted, and left out of the loss, so that one
broken file among 100,000 does not end a night's work."""

import sys
from pathlib import Path

import numpy as np
import torch

from captioning.data.workers import Loader
from captioning.images.preprocessing import load_image

GREY = np.full((8, 8, 3), 128, dtype=np.uint8)  # takes the place of an unreadable photo
FAULTS_SHOWN = 10


class UnreadableFlags:
    """A flag for each photo of a split, shared with data workers, which set it; `check` raises when too many are set.

    A grey picture takes the place of an unreadable photo, so that the order and the number of steps stay the same.
    """

    consequence = "Training goes on without it"

    def __init__(self, photos, max_bad_images):
        """`photos`: how many there are; `max_bad_images`: how many of them may be unreadable."""
        self.flags = torch.zeros(photos, dtype=torch.bool).share_memory_()
        self.max_bad_images, self.checked_count = max_bad_images, 0

    def load_or_grey(self, index, load):
        """-> upright RGB pixels (H, W, 3) uint8 of the photo with this index; grey ones where `load()` -> image raises
        OSError or ValueError. The error is printed and the photo flagged, once."""
        if self.flags[index]:
            return GREY
        try:
            return np.asarray(load())
        except (OSError, ValueError) as error:
            self.flags[index] = True
            print(f"\nwarning: {error}. {self.consequence}", file=sys.stderr)
            return GREY

    def count(self):
        """How many unreadable photos are known so far."""
        return int(self.flags.sum())

    def check(self):
        """Raise FileNotFoundError when the photos have vanished, ValueError when more than `max_bad_images`, or all of
        them, cannot be read."""
        count = self.count()
        if count != self.checked_count:
            self.checked_count = count
            self._check(count)


class UnreadablePhotos(UnreadableFlags):
    """The photo files of a split that cannot be read: `path in unreadable_photos`, known once the path was loaded."""

    consequence = "Training goes on without it and its captions"

    def __init__(self, images, max_bad_images):
        """`images`: paths; `max_bad_images`: how many of them may be unreadable."""
        self.images = list(images)
        self.index_of = {image: index for index, image in enumerate(self.images)}
        super().__init__(len(self.images), max_bad_images)

    def __contains__(self, image):
        return bool(self.flags[self.index_of[image]])

    def load(self, image, **opening):
        """-> upright RGB pixels (H, W, 3) uint8; grey ones for an unreadable photo. `opening` as in `load_image`."""
        return self.load_or_grey(self.index_of[image], lambda: load_image(image, **opening))

    def _check(self, count):
        unreadable = [image for image, flag in zip(self.images, self.flags.tolist(), strict=True) if flag]
        for folder in {Path(image).parent for image in unreadable}:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: the folder with the photos has vanished; bring it back and start again. "
                    "Everything written so far is kept"
                )
        if count > self.max_bad_images or count == len(self.images):
            everything = "" if count < len(self.images) else ", so none is left"
            raise ValueError(
                f"{count:,} of {len(self.images):,} photos of a split cannot be read{everything} (one is "
                f"{unreadable[0]}; max_bad_images is {self.max_bad_images}): prepare_data.py --check FOLDER lists them "
                "all with their rows. Replace them, or allow more with --max_bad_images N. Everything written so far "
                "is kept"
            )


class CheckedLoader(Loader):
    """A `Loader` that raises the error of its dataset's `unreadable_photos.check()`. The check runs in this process:
    an error in a data worker would come with the worker's traceback in front of its message."""

    def __iter__(self):
        for batch in super().__iter__():
            self.dataset.unreadable_photos.check()
            yield batch


def print_left_out(faults):
    """Print which photos a copy of a dataset leaves out: `faults` has a line for each; the first ten are shown."""
    if faults:
        print(f"warning: {len(faults):,} photos cannot be read and are left out:")
        more = [f"and {len(faults) - FAULTS_SHOWN:,} more"] if len(faults) > FAULTS_SHOWN else []
        print("\n".join(f"    {fault}" for fault in faults[:FAULTS_SHOWN] + more))
