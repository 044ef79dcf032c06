"""A progress bar that also behaves in a log file."""

import sys

from tqdm import tqdm

from captioning.common.distributed import rank_and_world_size


def progress_bar(images, title):
    """A bar that counts images, so that tqdm shows images/s; in a log file it writes a line every 30 seconds. Of
    several processes only rank 0 shows one."""
    interval, (rank, _) = 0.2 if sys.stderr.isatty() else 30, rank_and_world_size()
    return tqdm(total=images, desc=title, unit="img", mininterval=interval, disable=rank > 0)
