"""The folder that a run writes to: one run at a time writes there, and no run overwrites another one's files."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from captioning.common.distributed import rank_and_world_size
from captioning.common.files import (
    CONFIG_FILE,
    RUN_FILES,
    TOKENIZER_FILE,
    TORCH_FILE,
    WEIGHTS_FILE,
    make_folder,
    write_atomically,
)
from captioning.common.locks import LOCK_FILE, only_writer

STATES = "last"  # the folder in it from which a run is resumed


@contextmanager
def writing(folder):
    """Around everything that writes to `folder`, which is made. Of several processes the first holds the lock.

    Raises OSError for a folder that cannot be made, BlockingIOError that names the process of another run there.
    """
    folder, new = Path(folder), not Path(folder).exists()
    make_folder(folder, "--model_path")
    if rank_and_world_size()[0] > 0:
        yield
        return
    try:
        with only_writer(folder / LOCK_FILE, "wait for it, or choose another folder with --model_path FOLDER"):
            yield
    finally:
        if new and [path.name for path in folder.glob("*")] == [LOCK_FILE]:  # it ended before it had anything to write
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder, resumed=None):
    """Move an earlier run in `folder` to `folder`/earlier/<its date>, and say so -> that path; None when there is no
    earlier run, or when it is the one in the folder `resumed` that goes on."""
    folder = Path(folder)
    there = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not there or (resumed is not None and Path(resumed).resolve() == folder.resolve()):
        return None
    date = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(max(path.stat().st_mtime for path in there)))
    earlier, number = folder / "earlier" / date, 1
    while earlier.exists():
        number += 1
        earlier = folder / "earlier" / f"{date}_{number}"
    earlier.mkdir(parents=True)
    for path in there:
        path.rename(earlier / path.name)
    print(f"an earlier run was moved to {earlier}")
    return earlier


def bring_best(folder, resumed):
    """Copy the best checkpoint of the run in the folder `resumed`, which goes on in `folder`.

    Raises FileNotFoundError where it is not there: a run in which nothing improves any more would have no weights.
    """
    folder, resumed = Path(folder), Path(resumed)
    if not (resumed / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{resumed / WEIGHTS_FILE}: not found; a run is resumed with its best weights so far, so give --resume the "
            "folder with all its files"
        )
    if resumed.resolve() == folder.resolve():
        return
    for name in (WEIGHTS_FILE, TORCH_FILE, TOKENIZER_FILE, CONFIG_FILE):
        if (resumed / name).is_file():
            write_atomically(folder / name, lambda draft, name=name: shutil.copyfile(resumed / name, draft))
