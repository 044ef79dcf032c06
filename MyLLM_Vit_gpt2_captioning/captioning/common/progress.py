"""A progress bar that also behaves in a log file."""

import sys

from tqdm import tqdm

from captioning.common.distributed import rank_and_size


def progress_bar(images, title):
    """A bar that counts images, so that tqdm shows images/s. In a log file it speaks only now and then; of several
    processes only the first has one."""
    interval, rank = 0.2 if sys.stderr.isatty() else 30, rank_and_size()[0]
    return tqdm(total=images, desc=title, unit="img", mininterval=interval, disable=rank > 0)
