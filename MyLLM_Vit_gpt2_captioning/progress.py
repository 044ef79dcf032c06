"""A progress bar that also behaves in a log file."""

import sys

from tqdm import tqdm


def progress_bar(images, title):
    """A bar that counts images, so that tqdm shows images/s. In a log file it speaks only now and then."""
    return tqdm(total=images, desc=title, unit="img", mininterval=0.2 if sys.stderr.isatty() else 30)
