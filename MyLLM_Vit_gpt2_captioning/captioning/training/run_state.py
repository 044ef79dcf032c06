"""Everything that a run needs to be resumed as if it had never stopped: `captioner/last/`.

A state is written every few minutes, after every epoch, when the run is asked to stop, and before an exception ends it.
The last two are kept: if the newest is damaged, the one before it serves. Batches, augmentation and dropout of a step
depend on nothing but the state, so on a CPU a resumed run is bit for bit the run that was never stopped.
"""

import hashlib
import os
import pickle
import random
import time
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from captioning.common import stopping
from captioning.common.files import write_atomically
from captioning.common.form import misfit
from captioning.common.printable import printable
from captioning.data.workers import end_workers
from captioning.images import tar_members
from captioning.model.checkpoint import check_finite
from captioning.training import run_folder

NEWEST, BEFORE = "state.pt", "state_before.pt"
FORMAT = 1  # of a state; another one is refused by name
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile)
DAMAGED = "the state of the run is damaged; leave out --resume to start afresh"
FORM = {  # of a state, beside what the parts of the Trainer check themselves
    "position": {"epoch": int, "batches": int, "total": float, "count": float},
    "shares": int,
    "rng": (dict, None),
    "stage": str,
    "model": {str: torch.Tensor},
    "optimization": dict,
    "best": {"best_perplexity": float, "best_epoch": (int, None)},
    "config": {"model": {str: object}, "train": {str: object}},
    "dataset": [list],
}
# Train constants that may differ when a run is resumed. The others decide what is in a batch, how the batch is trained
# on, or which epoch is kept.
MAY_CHANGE = {
    "epochs",
    "lr",
    "scst_epochs",
    "scst_lr",
    "max_bad_steps",
    "max_bad_images",
    "num_workers",
    "device",
    "precision",
    "compile",
    "gradient_checkpointing",
    "deterministic",
    "data_dir",
    "image_dir",
    "captions_file",
    "unescape_captions",  # the captions themselves are compared
    "dataset",
    "model_path",
    "cache_dir",
    "keep_epoch_checkpoints",
    "save_minutes",
    "resume",
    "demo_images",
    "tracker",
    "log_steps",
    "push_every_epoch",
}
ANNOUNCED = ("epochs", "lr", "scst_epochs", "scst_lr", "device", "precision")  # of those that may change


class RunState:
    """Where a run is, and the files that hold its state.

    `position`: {"epoch", "batches" done of it, "total" and "count" of what the epoch reports}; `resumed`: the folder of
    the run that goes on, None for a new run; `batch_world_size`: how many batches of `batch_size` captions all
    processes train on together, which stays what it was when a run is resumed with another number of processes.
    """

    def __init__(self, folder, processes, train_config, first_epoch):
        """`folder`: of the run; `processes`: its `ProcessGroup`."""
        self.run_folder, self.processes, self.config = Path(folder), processes, train_config
        self.folder = self.run_folder / run_folder.STATES
        self.position = dict(epoch=first_epoch, batches=0, total=0.0, count=0)
        self.resumed = None
        self.batch_world_size = processes.world_size
        self.rng = None  # random number generators after the last complete step
        self._rng_to_restore = None
        self._saved_at = time.monotonic()
        self._seed_rank()

    # --- while the run goes on ----------------------------------------------------------------------------------------

    def enter(self, epoch):
        """The position in this epoch: its start, unless the run was stopped in the middle of it."""
        if self.position["epoch"] != epoch:
            self.position = dict(epoch=epoch, batches=0, total=0.0, count=0)
        return self.position

    @contextmanager
    def step(self):
        """Around a training step: behind it `rng` is that of a complete step. Before the first step of a resumed run
        the random number generators are restored."""
        if self._rng_to_restore is not None:
            restore_rng(self._rng_to_restore)
            self._seed_rank()
            self._rng_to_restore = None
        yield
        self.rng = rng_state()

    def _seed_rank(self):
        """Let each rank but 0 draw random numbers of its own, which depend on the position only."""
        self.processes.seed_rank(self.config.seed, self.position["epoch"], self.position["batches"])

    def stop_or_save(self, state_dict):
        """Between two steps: raise Stopped if a signal has come; save if the last state is older than `save_minutes`.

        `state_dict`, here and below, is a function that returns the Trainer's state, as in `save`.
        """
        self.stop_if_asked()
        if time.monotonic() - self._saved_at > 60 * self.config.save_minutes:
            self.save(state_dict)

    def finish_epoch(self, epoch, state_dict):
        """The epoch is trained, validated and recorded: the position is the start of the next one. Saves."""
        self.position, self.rng = dict(epoch=epoch + 1, batches=0, total=0.0, count=0), rng_state()
        self.save(state_dict)
        self.stop_if_asked()

    @contextmanager
    def run(self, state_dict, has_best):
        """Around the run: its folder is its own, and whatever ends it, its state is saved and its workers are ended. A
        signal ends it as `stopping.listening` says. `has_best`: some epoch was the best so far, so a checkpoint goes
        with the state."""
        how_to_go_on = "the same command with --resume auto resumes the run"
        with run_folder.writing(self.run_folder), stopping.listening(how_to_go_on):
            if self.resumed and has_best and self.processes.is_main:
                run_folder.bring_best(self.run_folder, self.resumed)
            try:
                yield
            except BaseException:
                self.save(state_dict)
                raise
            finally:
                end_workers()

    def stop_if_asked(self):
        """Raise Stopped when a signal has come to this or another process."""
        [asked] = self.processes.all_reduce_sum(stopping.asked() is not None)
        if asked:
            stopping.stop(stopping.asked() or "a signal to another process")

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, state_dict):
        """Write position, random number generators and the result of `state_dict()` as the newest state, on rank 0.

        Where that fails the run is warned, not ended: the earlier states are as they were.
        """
        own = {"format": FORMAT, "position": self.position, "shares": self.batch_world_size, "rng": self.rng}
        try:
            if self.processes.is_main:
                write_state(self.folder, own | state_dict())
        except OSError as error:
            print(f"WARNING: {self.folder}: the state of the run cannot be written ({error})")
        self._saved_at = time.monotonic()

    def read(self, source):
        """`source`: "auto" (this run's folder), another run's folder, its last/ or a file in it -> (path, state).

        The state is None, and a warning printed, when there is none: the run starts from the beginning. Raises
        ValueError for damaged files, for a state of an unknown format, and where only some hosts see it.
        """
        path = self.folder if source == "auto" else Path(source)
        path = path / run_folder.STATES if (path / run_folder.STATES).is_dir() else path
        if path.is_file() and path.suffix == ".safetensors":
            raise ValueError(
                f"{path}: the weights of a captioner, not the state of a run: give --resume the folder of the run, or "
                f"--start_from {path.parent} to begin a new run with these weights"
            )
        path, state = read_state(path)
        if self.processes.all_reduce_sum(state is not None)[0] not in (0, self.processes.world_size):
            raise ValueError(f"{path}: not every host sees the state of the run: give a --model_path that all share")
        if state is None:
            print(f"WARNING: {path}: there is no state of a run to resume. TRAINING STARTS FROM THE BEGINNING.")
        else:
            check_state(path, state)
        return path, state

    @contextmanager
    def damage_named(self, path=None):
        """Around what is restored from a state: whatever does not fit is a ValueError that names its file."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path or self.resumed}: {DAMAGED} ({reason})") from error

    def resume(self, source, current, loaders):
        """Take position and random number generators from the state in `source`, as in `read` -> the state, whose other
        parts belong to the Trainer; None where there is none, and the run starts afresh.

        `current`: `Trainer.identity` of the run as it is now, for `check_same_run`, whose ValueError is raised. Where
        the run had another number of processes, a step keeps its captions: each process takes more or fewer of them
        from its `loaders`.
        """
        path, state = self.read(source)
        if state is None:
            return None
        check_same_run(path, state, current)
        self.position, self.rng = state["position"], state["rng"]
        if self.rng is not None:
            with self.damage_named(path):
                restore_rng(self.rng)  # and again in front of the first step; so far a damaged state does no harm
        self._rng_to_restore = self.rng
        self.resumed = path.parent.parent if path.parent.name == run_folder.STATES else path.parent
        if state["shares"] != self.batch_world_size:
            self.batch_world_size, world_size = state["shares"], self.processes.world_size
            for loader in loaders:
                loader.batch_sampler.set_rank(self.processes.rank, world_size, self.batch_world_size)
            captions = self.batch_world_size * self.config.batch_size
            print(
                f"the run had {self.batch_world_size} processes, now it has {world_size}: a batch of them all stays "
                f"{captions} captions"
            )
        batch = f", batch {self.position['batches'] + 1}" if self.position["batches"] else ""
        print(f"resuming {path}: epoch {self.position['epoch'] + 1}{batch}")
        return state


def check_state(path, state):
    """Raise ValueError for what `read_state` has read unless it is the state of a run, of this version's format."""
    if not isinstance(state, dict) or "position" not in state:
        raise ValueError(f"{path}: not the state of a run; --resume takes the folder of a run, or auto")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: the state has format {state.get('format')!r}, this version reads format {FORMAT}: resume the run "
            "with the version that wrote it, or leave out --resume to start afresh"
        )
    place, position = misfit(state, FORM), state["position"]
    if not place and (position["epoch"] < -1 or position["batches"] < 0 or state["shares"] < 1):
        place = "['position']"
    if not place and (len(state["dataset"]) != 2 or any(misfit(d[:1], [int]) for d in state["dataset"])):
        place = "['dataset']"
    if place:
        raise ValueError(f"{path}: {DAMAGED} ({place:.100} is not what belongs there)")
    check_finite(state["model"], path)


def check_same_run(path, saved, current):
    """Compare the state `saved` in `path` with the `current` run; both have "config", {"model": dict, "train": dict},
    and "dataset", `dataset_digest` of training and validation captions. Prints constants that have changed and may.

    Raises ValueError that lists what has changed where the resumed run would be another one.
    """
    then, now = saved["config"], current["config"]
    changed = {
        (name, key): (then[name][key], now[name].get(key))
        for name in now
        for key in sorted(then[name])  # a constant that came later has a default that does what was done before
        if without_tuples(then[name][key]) != without_tuples(now[name].get(key))
    }
    refused = [
        printable(f"{name}.{key}: it was {old!r:.200}, now it is {new!r:.200}")[:500]
        for (name, key), (old, new) in changed.items()
        if name == "model" or key not in MAY_CHANGE
    ]
    for split, before, digest in zip(("training", "validation"), saved["dataset"], current["dataset"], strict=True):
        if digest[2:] != before[2:]:
            print(
                f"WARNING: files of the {split} photos have changed since the run stopped: it goes on with other pixels"
            )
        if digest[:2] != before[:2]:
            refused.append(f"{split} captions: they were {before[0]:,}, and not the same as now")
    if refused:
        raise ValueError(
            f"{path} cannot be resumed, because the run would be another one:\n  "
            + "\n  ".join(refused)
            + "\nGive the constants it had, or leave out --resume to start afresh"
        )
    for (_, key), (old, new) in changed.items():
        if key in ANNOUNCED:
            print(printable(f"changed since the run stopped: {key} was {old!s:.200}, now it is {new}"))


def without_tuples(value):
    """Tuples as lists, as JSON has them."""
    return [without_tuples(part) for part in value] if isinstance(value, (list, tuple)) else value


def dataset_digest(dataset):
    """A caption dataset -> [number of captions, SHA-256 of images' names, captions and prompts in their order, SHA-256
    of the sizes of the images' files in bytes, "" for a stream]."""
    digest = hashlib.sha256()
    prompts = getattr(dataset, "prompts", [""] * len(dataset))
    for image, caption, prompt in zip(dataset.images, dataset.captions, prompts, strict=True):
        digest.update(f"{Path(image).name}\0{caption}\0{prompt}\0".encode())
    return [len(dataset), digest.hexdigest(), _sizes_digest(tuple(dict.fromkeys(dataset.images)))]


@cache
def _sizes_digest(images):
    """Paths of images -> SHA-256 of the sizes of their files, those at the start of the run."""
    digest = hashlib.sha256()
    for image in images:
        try:
            digest.update(f"{tar_members.file_identity(image)[0]}\0".encode())
        except OSError:
            digest.update(b"\0")
    return digest.hexdigest() if images else ""


def rng_state():
    """Of Python, NumPy, torch and all GPUs, as what `torch.load(weights_only=True)` reads."""
    _, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state):
    """Put back what `rng_state` gave. On another number of GPUs their generators go on from their seeds."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_state(folder, state):
    """Write the newest state; the one that was the newest becomes the one before. A crash at any moment leaves one."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = folder / NEWEST

    def replace(draft):
        torch.save(state, draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, folder / BEFORE)

    write_atomically(newest, replace)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the names, too
    finally:
        os.close(descriptor)


def read_state(path):
    """A folder with states, or one file -> (path of the newest whole one, state); (path, None) when there is none.

    A damaged file is named in a warning. Raises ValueError when there are only damaged ones.
    """
    files = [path / NEWEST, path / BEFORE] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()  # compares checksums, which torch.load does not
            if broken:
                raise ValueError(f"{broken} in it has another checksum")
            return file, torch.load(file, map_location="cpu", weights_only=True)
        except (*UNREADABLE, pickle.UnpicklingError) as error:
            # torch's message for a pickle with code advises to run it.
            reason = "a pickle" if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()[0]
            print(f"WARNING: {file} is damaged ({reason})")
    if files:
        raise ValueError(f"{path}: every state of the run is damaged; leave out --resume to start afresh")
    return path, None
