"""Everything that a run needs to go on as if it had never stopped: `captioner/last/`.

A state is written every few minutes, after every epoch, when the run is asked to stop, and before an exception ends it.
The last two are kept: if the newest is damaged, the one before serves. Batches, augmentation and dropout of a step
depend on nothing but the state, so a resumed run on a CPU is bit for bit the run that was never stopped.
"""

import hashlib
import os
import pickle
import random
import signal
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from captioning.common.files import write_atomically
from captioning.model.checkpoint import portable

FOLDER = "last"
NEWEST, BEFORE = "state.pt", "state_before.pt"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# Train constants that may change when a run goes on, because no weight depends on the order they would change. The
# others decide what is in a batch, how it is trained on or what is kept.
MAY_CHANGE = {
    "epochs", "lr", "scst_epochs", "scst_lr", "max_bad_steps", "num_workers", "device", "precision", "compile",
    "gradient_checkpointing", "data_dir", "image_dir", "captions_file", "dataset", "model_path", "cache_dir",
    "keep_epoch_checkpoints", "save_minutes", "resume", "demo_images", "deterministic", "max_bad_images",
    "tracker", "log_steps", "push_every_epoch",
}  # fmt: skip
ANNOUNCED = ("epochs", "lr", "scst_epochs", "scst_lr", "device", "precision")


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


class RunState:
    """`position` is where the run is: {"epoch", "batches" done of it, "total" and "count" of what it reports}."""

    def __init__(self, trainer, first_epoch, root):
        """`root`: what paths in configs are compared relative to."""
        self.trainer, self.root = trainer, root
        self.folder = trainer.model_path / FOLDER
        self.position = dict(epoch=first_epoch, batches=0, total=0.0, count=0)
        self.resumed = False
        self.rng, self._due = None, None  # of the position; to be restored at its first step
        self.shares = trainer.team.size  # batches of batch_size captions that make one of all processes
        self._saved, self._in_step, self._signal = time.monotonic(), False, None

    # --- while the run goes on ----------------------------------------------------------------------------------------

    def enter(self, epoch):
        """The position in this epoch: its start, unless the run was stopped in the middle of it."""
        if self.position["epoch"] != epoch:
            self.position = dict(epoch=epoch, batches=0, total=0.0, count=0)
        return self.position

    @contextmanager
    def step(self):
        """Around a step: what ends the run waits until it is whole. Saves when it is time. Raises Stopped."""
        if self._due is not None:
            restore_rng(self._due)
            self.trainer.team.own_random_numbers(self.trainer.train_config.seed, self.position)
            self._due = None
        self._in_step = True
        try:
            yield
            self.rng = rng_state()
        finally:
            self._in_step = False
        self._stop_if_asked()
        if time.monotonic() - self._saved > 60 * self.trainer.train_config.save_minutes:
            self.save()

    def finish(self, epoch):
        """The epoch is trained, validated and recorded."""
        self.position, self.rng = dict(epoch=epoch + 1, batches=0, total=0.0, count=0), rng_state()
        self.save()
        self._stop_if_asked()

    @contextmanager
    def signals(self):
        """Inside, SIGTERM, SIGINT and SIGUSR1 end the run with its state saved; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread listen
            return
        before = {number: signal.signal(number, self._asked_to_stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self, number, frame):
        self._signal = signal.Signals(number).name
        if self.trainer.team.size > 1:
            return  # all stop behind the same step; torchrun itself ends those that take too long
        for known in SIGNALS:
            signal.signal(known, signal.SIG_DFL)
        if not self._in_step:
            self._stop_if_asked()

    def _stop_if_asked(self):
        [asked] = self.trainer.team.sum(self._signal is not None)
        if asked:
            name, self._signal = self._signal or "a signal to another process", None
            raise Stopped(f"stopped by {name}")

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self):
        """Write the state; where that fails the run is told, not ended: the states before are as they were."""
        try:
            if self.trainer.team.first:
                write_state(self.folder, self._content())
        except OSError as error:
            print(f"WARNING: {self.folder}: the state of the run cannot be written ({error})")
        self._saved = time.monotonic()

    def _content(self):
        trainer = self.trainer
        return {
            "format": 1,
            "position": self.position,
            "shares": self.shares,
            "stage": trainer.stage,
            "model": trainer.model.state_dict(),
            "optimization": trainer.optimization.state_dict(),
            "rng": self.rng,
            "best": trainer.best,
            "metrics": trainer.log.rows,
            "samples": trainer.log.samples,
            "timings": trainer.log.timings,
            "log": trainer.log.state_dict(),
            "config": self._config(),
            "dataset": [fingerprint(loader.dataset) for loader in (trainer.train_dl, trainer.valid_dl)],
        }

    def _config(self):
        configs = {"model": self.trainer.model.config, "train": self.trainer.train_config}
        return {name: portable(config, self.root) for name, config in configs.items()}

    def resume(self, source):
        """Go on from `source`: "auto", a run's folder, its last/ or a file in it. Without one there the run starts
        afresh, with a warning. Raises ValueError that lists what has changed where the run would be another one."""
        path = self.folder if source == "auto" else Path(source)
        path = path / FOLDER if (path / FOLDER).is_dir() else path
        found, state = read_state(path)
        if self.trainer.team.sum(state is not None)[0] not in (0, self.trainer.team.size):
            raise ValueError(f"{path}: not every host sees the state of the run: give a --model_path that all share")
        if state is None:
            print(f"WARNING: {path}: no state of a run is there to go on from. TRAINING STARTS FROM THE BEGINNING.")
            return
        self._compare(found, state)
        trainer, self.position = self.trainer, state["position"]
        if state["shares"] != self.shares:
            self._keep_batches(state["shares"])
        trainer.best = state["best"]
        trainer.log.rows[:], trainer.log.samples, trainer.log.timings = (
            state["metrics"], state["samples"], state["timings"],
        )  # fmt: skip
        trainer.log.load_state_dict(state.get("log", {}))
        if state["stage"] == "self-critical":
            trainer.start_self_critical()
        trainer.stage = state["stage"]  # what was entered before is not entered again
        if self.position["batches"]:
            trainer.enter_stage(self.position["epoch"])
        trainer.model.load_state_dict(state["model"])
        trainer.optimization.load_state_dict(state["optimization"])
        self.rng = self._due = state["rng"]
        self.resumed = True
        batches = f", batch {self.position['batches'] + 1}" if self.position["batches"] else ""
        print(f"going on from {found}: epoch {self.position['epoch'] + 1}{batches}")

    def _keep_batches(self, shares):
        """The run had another number of processes: a step keeps its captions, and each process gets more or fewer."""
        trainer, team, self.shares = self.trainer, self.trainer.team, shares
        for loader in (trainer.train_dl, trainer.valid_dl, trainer.self_critical and trainer.self_critical.loader):
            if loader:
                loader.batch_sampler.set_rank(team.rank, team.size, shares)
        trainer.rebuild_schedule(trainer.train_config.epochs)
        captions = shares * trainer.train_config.batch_size
        print(f"the run had {shares} processes, now it has {team.size}: a batch of them all stays {captions} captions")

    def _compare(self, path, state):
        now, then = self._config(), state["config"]
        changed = {
            f"{name}.{key}": (then[name].get(key), now[name].get(key))
            for name in now
            for key in sorted(now[name].keys() | then[name].keys())
            if plain(then[name].get(key)) != plain(now[name].get(key))
        }
        refused = [
            f"{key}: it was {old!r}, now it is {new!r}"
            for key, (old, new) in changed.items()
            if key.partition(".")[2] not in MAY_CHANGE or key.startswith("model.")
        ]
        loaders = (self.trainer.train_dl, self.trainer.valid_dl)
        for split, loader, before in zip(("training", "validation"), loaders, state["dataset"], strict=True):
            if fingerprint(loader.dataset) != before:
                refused.append(f"{split} captions: they were {before[0]:,}, and not the same as now")
        if refused:
            raise ValueError(
                f"{path} cannot be gone on from, because the run would be another one:\n  "
                + "\n  ".join(refused)
                + "\nGive the constants it had, or leave out --resume to start afresh"
            )
        for key, (old, new) in changed.items():
            if key.partition(".")[2] in ANNOUNCED:
                print(f"changed since the run stopped: {key.partition('.')[2]} was {old}, now it is {new}")


def plain(value):
    """Tuples and lists alike, as JSON has them."""
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def fingerprint(dataset):
    """A caption dataset -> [number of captions, hash of images' names, captions and prompts in their order]."""
    digest = hashlib.sha256()
    prompts = getattr(dataset, "prompts", [""] * len(dataset))
    for image, caption, prompt in zip(dataset.images, dataset.captions, prompts, strict=True):
        digest.update(f"{Path(image).name}\0{caption}\0{prompt}\0".encode())
    return [len(dataset), digest.hexdigest()]


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
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            print(f"WARNING: {file} is damaged ({str(error).splitlines()[0]})")
    if files:
        raise ValueError(f"{path}: every state of the run is damaged; leave out --resume to start afresh")
    return path, None
